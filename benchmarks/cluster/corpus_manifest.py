"""Time and memory of finding the audio of a manifest with millions of rows, before any is decoded.

``python -m benchmarks.cluster.corpus_manifest`` writes manifests of made-up rows, of which no file exists, and finds their audio as
the index stage does first. It also indexes manifests of which nearly all rows are in a split that is not used: all others are pieces
of one file, so that little is decoded. Each is read in a process of its own.
"""

import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import typer

from benchmarks.memory import forget_peak, peak_resident_bytes, resident_bytes
from benchmarks.result_file import RESULTS, write_result
from ray_distill.pipeline.corpus.index import index_corpus
from ray_distill.pipeline.corpus.search import find_audio

COLUMNS = {"few": ("path", "id"), "all": ("path", "id", "split", "start", "end", "channel", "speaker", "text")}
USED = 200
"""Number of rows that are used beside those of an unused split."""

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


def write_unused(folder: Path, rows: int, order: str) -> Path:
    """Write a manifest with rows of a split that is not used, and with pieces of one file for training and validation."""
    soundfile.write(folder / "a.wav", np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    names = ("path", "id", "split", "start", "end")
    schema, manifest = pa.schema([(name, pa.string()) for name in names]), folder / f"{rows}-{order}.parquet"
    with pq.ParquetWriter(manifest, schema) as writer:
        for begin in range(0, rows, 100_000):
            numbers = range(begin, min(begin + 100_000, rows))
            found = [row(rows - n if order == "reversed" else n) | {"split": "test"} for n in numbers]
            writer.write_table(pa.table({name: [values[name] for values in found] for name in names}, schema))
        splits = ["dev" if n % 10 == 0 else "train" for n in range(USED)]
        starts = [f"{n / USED / 2:.4f}" for n in range(USED)]
        pieces = {"path": [str(folder / "a.wav")] * USED, "id": [f"used-{n}" for n in range(USED)]}
        pieces |= {"split": splits, "start": starts, "end": [f"{float(start) + 0.4:.4f}" for start in starts]}
        writer.write_table(pa.table(pieces, schema))
    return manifest


def measure_unused(rows: int, order: str) -> dict[str, Any]:
    """Return the seconds and the growth of the memory of an index of a manifest with unused rows, and of its reuse.

    Args:
        rows: Number of rows.
        order: Whether the paths are ``sorted`` or ``reversed``.
    """
    steps = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        index_corpus(write_unused(folder, 10, order), output=folder / "tiny")  # It imports what it needs.
        manifest = write_unused(folder, rows, order)
        for step in ("index", "unchanged"):
            pa.default_memory_pool().release_unused()
            at_start = resident_bytes()
            forget_peak()
            began, times = time.perf_counter(), os.times()
            index = index_corpus(manifest, output=folder / "index")
            seconds, now = time.perf_counter() - began, os.times()
            assert len(index.skipped) == index.num_unused == rows and index.reused == (step == "unchanged")
            del index
            cpu, grown = now.user + now.system - times.user - times.system, peak_resident_bytes() - at_start
            steps[step] = {"seconds": seconds, "cpu_seconds": cpu, "grown_bytes": grown}
            print(
                f"{rows:>10,} unused rows, {order:8s} {step:10s} {cpu:8.2f} s of CPU  {grown / 1e9:6.2f} GB", flush=True
            )
    return {"rows": rows, "order": order, "steps": steps}


@app.command()
def measure(
    count: Annotated[str, typer.Option(help="Numbers of rows, separated by commas.")] = "300000",
    unused: Annotated[str, typer.Option(help="Numbers of rows of an unused split.")] = "1000000,3000000",
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "cluster/corpus_manifest.json",
) -> None:
    """Measure all sizes, and write the result file."""
    measured = []
    for rows in (int(number) for number in count.split(",") if number):
        for kind, columns in (("csv", "few"), ("csv", "all"), ("jsonl", "all"), ("parquet", "all")):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                measured.append(pool.apply(measure_manifest, (rows, kind, columns)))
    skipped = []
    for rows in (int(number) for number in unused.split(",") if number):
        for order in ("sorted", "reversed"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                skipped.append(pool.apply(measure_unused, (rows, order)))
    write_result(output, measured=measured, unused=skipped)


if __name__ == "__main__":
    app()
