"""Count the requests that checks of a cache send to a simulated bucket, with its manifest of commit records and without.

``python -m benchmarks.cache.checks`` makes the metadata of a synthetic cache as `benchmarks.cache.opening` does, with sparse shard
files. The check of sizes is `cache verify --fast`, and that of a start with ``cache.verify=false``.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.cache.opening import make
from benchmarks.cache.slow_store import SlowStore
from benchmarks.result_file import RESULTS, write_result
from ray_distill.teacher_cache.maintenance.verify import verify_cache
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.failed_utterances import failed_utterances
from ray_distill.teacher_cache.storage.store import Store

CHECKS: dict[str, Callable[[Store], object]] = {
    "sizes": lambda store: verify_cache(store, checksums=False),
    "failed utterances": lambda store: failed_utterances(Cache.open(store)),
    "missing files": lambda store: Cache.open(store).missing(),
}

app = typer.Typer(add_completion=False)


@app.command()
def measure(
    utterances: Annotated[int, typer.Option(help="Number of utterances.")] = 50_000,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "cache/checks.json",
) -> None:
    """Count the requests of each check, and write the result file."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, utterances, files=True)
        files = sum(1 for _ in folder.glob("commits/**/*.json"))
        for manifest in (True, False):
            if not manifest:
                (folder / "manifest.parquet").unlink()
            for check, run in CHECKS.items():
                store = SlowStore(folder)
                assert not run(store)
                rows.append({"check": check, "manifest": manifest, "requests": store.handler.requests})
                print(f"{check:20s} manifest: {manifest!s:5s} {store.handler.requests:8,} requests", flush=True)
    write_result(output, utterances=utterances, files=files, rows=rows)


if __name__ == "__main__":
    app()
