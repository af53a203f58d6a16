"""Time and memory of finding the audio of a manifest with millions of rows, before any is decoded.

``python -m benchmarks.cluster.corpus_manifest`` writes manifests of made-up rows, of which no file exists, and finds their audio as
the index stage does first. Each is read in a process of its own.
"""

import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from benchmarks.memory import forget_peak, peak_resident_bytes, resident_bytes
from benchmarks.result_file import RESULTS, write_result
from ray_distill.pipeline.corpus.search import find_audio

COLUMNS = {"few": ("path", "id"), "all": ("path", "id", "split", "start", "end", "channel", "speaker", "text")}

app = typer.Typer(add_completion=False)


def row(n: int) -> dict[str, str]:
    """Return the values of a row: a piece of 12 s of a recording of ten minutes."""
    return {
        "path": f"/data/corpora/speech/train/{n // 50:06d}/{n:09d}.flac",
        "id": f"{n:09d}",
        "split": "dev" if n % 100 == 0 else "train",
        "start": f"{n % 50 * 12}",
        "end": f"{n % 50 * 12 + 11.5}",
        "channel": "0",
        "speaker": f"s{n // 5000}",
        "text": f'so she said, "{n} times", and went on',
    }


def write_manifest(file: Path, names: tuple[str, ...], rows: int) -> None:
    """Write a manifest with some of the columns. Its suffix is its format."""
    if file.suffix == ".parquet":
        schema = pa.schema([(name, pa.string()) for name in names])
        with pq.ParquetWriter(file, schema) as writer:
            for begin in range(0, rows, 100_000):
                found = [row(n) for n in range(begin, min(begin + 100_000, rows))]
                writer.write_table(pa.table({name: [values[name] for values in found] for name in names}, schema))
        return
    with file.open("w") as output:
        if file.suffix == ".csv":
            output.write(",".join(names) + "\n")
        for n in range(rows):
            values = row(n)
            if file.suffix == ".csv":
                quoted = (
                    '"' + values[name].replace('"', '""') + '"' if name == "text" else values[name] for name in names
                )
                output.write(",".join(quoted) + "\n")
            else:
                output.write(json.dumps({name: values[name] for name in names}) + "\n")


def measure_manifest(rows: int, kind: str, columns: str) -> dict[str, Any]:
    """Return the seconds and the peak resident memory of finding the audio of a manifest."""
    with tempfile.TemporaryDirectory() as place:
        tiny, manifest = Path(place) / f"tiny.{kind}", Path(place) / f"corpus.{kind}"
        write_manifest(tiny, COLUMNS[columns], 10)
        find_audio(tiny, None, None)  # It imports what it needs.
        write_manifest(manifest, COLUMNS[columns], rows)
        at_start = resident_bytes()
        forget_peak()
        began, cpu = time.perf_counter(), time.process_time()
        entries = find_audio(manifest, None, None).entries
        seconds, cpu, peak = time.perf_counter() - began, time.process_time() - cpu, peak_resident_bytes()
        assert len(entries) == rows
    print(f"{rows:>10,} {kind:8s} {columns:4s} {cpu:8.2f} s of CPU  {(peak - at_start) / 1e9:6.2f} GB", flush=True)
    return {
        "rows": rows,
        "kind": kind,
        "columns": list(COLUMNS[columns]),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "grown_bytes": peak - at_start,
    }


@app.command()
def measure(
    count: Annotated[str, typer.Option(help="Numbers of rows, separated by commas.")] = "300000",
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "cluster/corpus_manifest.json",
) -> None:
    """Measure all sizes, and write the result file."""
    measured = []
    for rows in (int(number) for number in count.split(",")):
        for kind, columns in (("csv", "few"), ("csv", "all"), ("jsonl", "all"), ("parquet", "all")):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                measured.append(pool.apply(measure_manifest, (rows, kind, columns)))
    write_result(output, measured=measured)


if __name__ == "__main__":
    app()
