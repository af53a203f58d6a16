"""What an index costs that was killed, and one of a corpus that grew.

``python -m benchmarks.cluster.index_resume`` writes a manifest of short noises, indexes it, indexes it again with a kill in the middle
(``SIGKILL``), and then with 1 % more files. Each index is made by a process of its own, whose start is not
timed.
"""

import csv
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile
import typer

from benchmarks.result_file import RESULTS, write_result
from ray_distill.pipeline.corpus.index import index_corpus

app = typer.Typer(add_completion=False)


def write_corpus(folder: Path, files: int, seconds: float) -> None:
    """Write noises of a length, and manifests of all of them (``all.csv``) and of all but 1 % (``corpus.csv``)."""
    rng = np.random.default_rng(0)
    names = [f"{n // 1000:03d}/{n:06d}.flac" for n in range(files)]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        soundfile.write(folder / name, rng.normal(0, 0.1, round(16_000 * seconds)), 16_000)
    for manifest, listed in (("all.csv", names), ("corpus.csv", names[: round(0.99 * files)])):
        with (folder / manifest).open("w", newline="") as file:
            csv.writer(file).writerows([["path"], *([name] for name in listed)])


def index(manifest: Path, output: Path, kill_at: float, told: "multiprocessing.Queue[dict[str, float]]") -> None:
    """Index a manifest, and put seconds and the number of decoded files in a queue. Kill this process after a fraction of them."""
    begun: list[int] = []

    def progress(done: int, total: int) -> None:
        begun.append(done)
        if done >= kill_at * total:
            os.kill(os.getpid(), signal.SIGKILL)

    began = time.perf_counter()
    index_corpus(manifest, output=output, progress=progress)
    told.put({"seconds": time.perf_counter() - began, "decoded": len(begun) - (begun[0] > 1)})


def timed(manifest: Path, output: Path, kill_at: float = 2.0) -> dict[str, float]:
    """Index a manifest in a new process, and return its seconds and how many files it decoded. Empty if it was killed."""
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    process = context.Process(target=index, args=(manifest, output, kill_at, told))
    process.start()
    process.join()
    return {} if process.exitcode else told.get()


@app.command()
def measure(
    files: Annotated[int, typer.Option(help="Number of files.")] = 10_000,
    seconds: Annotated[float, typer.Option(help="Length of each file in seconds.")] = 0.25,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "cluster/index_resume.json",
) -> None:
    """Measure all cases, and write the result file."""
    rows = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_corpus(folder, files, seconds)
        corpus = folder / "corpus.csv"
        rows["whole"] = timed(corpus, folder / "whole")
        timed(corpus, folder / "killed", 0.5)
        rows["resumed after a kill at half"] = timed(corpus, folder / "killed")
        same = all(
            (folder / "whole" / name).read_bytes() == (folder / "killed" / name).read_bytes()
            for name in ("index.parquet", "skipped.csv", "state.json")
        )
        rows["unchanged"] = timed(corpus, folder / "killed")
        shutil.copy(folder / "all.csv", corpus)
        rows["1 % more files"] = timed(corpus, folder / "killed")
    for name, row in rows.items():
        print(f"{name:30s} {row['seconds']:8.1f} s, {row['decoded']:,} files decoded")
    write_result(output, files=files, file_seconds=seconds, same_bytes=same, rows=rows)


if __name__ == "__main__":
    app()
