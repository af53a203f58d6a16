"""Measure what the service answers in time at 0.5 to 10 times its capacity, and beside a flood of audio that is costly to decode.

The loads are Poisson arrivals of noise in three mixes of lengths, sent as FLAC from another core than the service's, which has its
default deadline of 30 s. Goodput is the audio of the answers in a run, without its first fifth, relative to the same backend on the
same core in offline batches of the same audio, at the priority that inference has in the service. The flood sends FLAC files of 60 s
at the highest rate and number of channels that the service accepts, all at once, and then times one short clip.

The backend ``sleep`` is a model that waits for a known time instead of computing. It needs no core, so it also gives figures of
admission and deadlines on a machine that other work shares; its offline speed is computed.

``--quick`` covers the same cases in about 10 minutes: a student that is four times as fast, a deadline of 5 s, 8 s for each load, the
offline speed once for each case, and no flood. A point then has few deadlines, so its figures are rough.
"""

import asyncio
import io
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import soundfile
import torch
import typer

from benchmarks.result_file import REPOSITORY, RESULTS, write_result
from benchmarks.serve.load import GENERATOR_CORE, PATH, SERVICE_CORE, Clip, offer, offline, running
from benchmarks.serve.sleeping_server import seconds as waiting
from benchmarks.small_speech import small_student
from ray_distill.pipeline.config import load_config
from ray_distill.serve.inference.engine import NICENESS
from ray_distill.serve.settings import Limits
from ray_distill.student import Student, save_student
from ray_distill.student.exporters.onnx import export_onnx

MIXES = {"1-4 s": (1.0, 4.0), "40-60 s": (40.0, 60.0), "1-60 s": (1.0, 60.0)}
"""Shortest and longest clip of each mix; the logarithm of the length is uniform between them."""


def clips(shortest: float, longest: float, count: int = 40) -> list[Clip]:
    """Return noise of the lengths of a mix as FLAC files."""
    lengths = np.exp(np.linspace(np.log(shortest), np.log(longest), count))
    return [Clip(flac(seconds, 16_000, 1), float(seconds)) for seconds in lengths]


def flac(seconds: float, rate: int, channels: int) -> bytes:
    """Return noise as a FLAC file; at the rate of the flood, silence, which is small."""
    count = int(seconds * rate)
    loudness = 0.1 if rate == 16_000 else 0.0
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, channels, format="FLAC") as file:
        for start in range(0, count, rate):
            shape = min(rate, count - start), channels
            file.write(np.random.default_rng(start).normal(0, loudness, shape).astype(np.float32))
    return buffer.getvalue()


async def flood(address: str, files: int = 40) -> dict[str, Any]:
    """Send costly files at once and then a short clip; return the statuses and the latency of the clip."""
    limits = Limits()
    costly, short = flac(60, limits.max_sample_rate, limits.max_channels), flac(0.05, 16_000, 1)
    async with httpx.AsyncClient(base_url=address, timeout=120, trust_env=False) as client:
        tasks = [asyncio.create_task(client.post(PATH, content=costly)) for _ in range(files)]
        await asyncio.sleep(1)
        began = time.perf_counter()
        clip = await client.post(PATH, content=short)
        latency = time.perf_counter() - began
        statuses = Counter(str(response.status_code) for response in await asyncio.gather(*tasks))
    return {
        "files": files,
        "bytes": len(costly),
        "statuses": dict(statuses),
        "clip_status": clip.status_code,
        "clip_seconds": latency,
    }


def main(
    config: Annotated[Path, typer.Option(help="Recipe.")] = REPOSITORY / "configs/armhubert-s-960.yaml",
    cases: Annotated[
        str, typer.Option(help="Pairs BACKEND:MIX, separated by commas; torch, onnx, int8 or sleep.")
    ] = ",".join(f"{backend}:{mix}" for backend in ("torch", "onnx", "int8") for mix in MIXES),
    loads: Annotated[
        str, typer.Option(help="Offered loads relative to offline, separated by commas.")
    ] = "0.5,1,2,5,10",
    seconds: Annotated[
        float | None, typer.Option(help="Seconds per load, many times the deadline. Default: 180, quick 8.")
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(help="The service's --deadline-seconds. Default: its default, quick 5.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Measure a faster student for a shorter time.")] = False,
    shared: Annotated[bool, typer.Option("--shared", help="Record that other work ran on the machine.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Result file (JSON). Default: overload.json, quick overload_quick.json.")
    ] = None,
) -> None:
    """Measure each backend with each mix at each load, and the flood."""
    seconds = seconds or (8 if quick else 180)
    deadline = deadline or (5 if quick else Limits().deadline_seconds)
    output = output or RESULTS / f"serve/overload{'_quick' if quick else ''}.json"
    os.sched_setaffinity(0, {GENERATOR_CORE})
    rows: list[dict[str, Any]] = []
    flooded: dict[str, Any] | None = None

    def write() -> None:
        write_result(
            output,
            student="12 layers of width 256" if quick else config.stem,
            cores={"service": SERVICE_CORE, "generator": GENERATOR_CORE},
            shared_machine=shared,
            point_seconds=seconds,
            deadline_seconds=deadline,
            flood=flooded,
            rows=rows,
        )

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        published = load_config(config).resolve_student(12, 768)
        student = Student(small_student(12, 768, 256) if quick else published).eval()
        models = {name: Path(folder) / f"{name}.onnx" for name in ("onnx", "int8")} | {"torch": Path(folder) / "torch"}
        save_student(student, models["torch"])
        for case in cases.split(","):
            backend, mix = case.split(":")
            sounds = clips(*MIXES[mix])
            mean = float(np.mean([clip.seconds for clip in sounds]))
            some = sounds[:: 8 if mean > 20 else 4]
            runtime = "torch" if backend == "torch" else "onnx"
            if backend in ("onnx", "int8") and not models[backend].exists():
                export_onnx(student, models[backend], {}, int8=backend == "int8")

            def speed_offline(backend: str = backend, runtime: str = runtime, sounds: list[Clip] = sounds) -> float:
                if backend == "sleep":
                    return sum(clip.seconds for clip in sounds) / sum(waiting(1, clip.seconds) for clip in sounds)
                return offline(models[backend], runtime, some, 8.0, NICENESS)  # noqa: B023 (called at once)

            command = ["-m", "serve", "--model", str(models.get(backend)), "--backend", runtime]
            if backend == "sleep":
                command = ["-m", "benchmarks.serve.sleeping_server"]
            with running([*command, "--deadline-seconds", str(deadline)]) as (pid, address):
                after = speed_offline() if quick else 0.0
                for number, load in enumerate(float(part) for part in loads.split(",")):
                    before = after if quick else speed_offline()
                    row = asyncio.run(offer(address, pid, sounds, load * before / mean, seconds, number, False))
                    del row["memory_mib"]
                    after = before if quick else speed_offline()
                    speed = (before + after) / 2
                    row = {
                        "backend": backend,
                        "mix": mix,
                        "load": load,
                        "offline_audio_seconds_per_second": speed,
                    } | row
                    row["goodput_of_offline"] = row["throughput_audio_seconds_per_second"] / speed
                    rows.append(row)
                    write()
                    latency = row["latency_seconds"] or {}
                    print(
                        f"{backend:5} {mix:7} {load:4.1f}x  {row['statuses']}  goodput {row['goodput_of_offline']:.2f} of "
                        f"{speed:.1f} s/s  " + "  ".join(f"{key} {value:.2f} s" for key, value in latency.items()),
                        flush=True,
                    )
                if flooded is None and not quick:
                    flooded = asyncio.run(flood(address))
                    write()
                    print(flooded, flush=True)
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        "| backend | lengths | load | requests | answered | 429 | 504 | goodput, relative to offline | p50, p99 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        answered, refused, late = (row["statuses"].get(status, 0) for status in ("200", "429", "504"))
        latency = row["latency_seconds"]
        times = f"{latency['p50']:.1f}, {latency['p99']:.1f} s" if latency else ""
        cells = [row["backend"], row["mix"], f"{row['load']:g}", row["requests"], answered, refused, late]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['goodput_of_offline']:.2f}", times])) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
