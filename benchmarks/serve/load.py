"""Measure the service under open-loop load: throughput and latency below, at and beyond saturation, and memory over many requests.

``load`` sends requests at random times (Poisson arrivals), independent of earlier answers, from a process on another core than the
service's. The service takes turns, load by load, with a plain FastAPI endpoint that processes one request at a time and, if
``--litserve`` names the folder where it is installed, with LitServe. Before each load the same backend runs the same audio in
batches, offline, on the service's core. ``soak`` sends many short requests and records memory.

Audio is real speech if `small_speech` finds any, else noise with lengths like LibriSpeech's.
"""

import asyncio
import base64
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import httpx
import numpy as np
import psutil
import soundfile
import torch
import typer

from benchmarks.result_file import REPOSITORY, RESULTS, write_result
from benchmarks.small_speech import HELD_OUT, TRAIN, shared_data
from ray_distill.pipeline.config import load_config
from ray_distill.serve.decoding import decode
from ray_distill.serve.inference.backends import LayerRequest
from ray_distill.serve.inference.batch_selection import choose_batch
from ray_distill.serve.inference.models import open_backend
from ray_distill.serve.settings import BackendOptions, BatchLimits
from ray_distill.student import Student, save_student
from tests.tiny import tiny_student

SERVICE_CORE, GENERATOR_CORE = 0, 1
PATH = "/v1/features?format=npy"


@dataclass(frozen=True)
class Clip:
    """An audio file and its length in seconds."""

    data: bytes
    seconds: float


def clips(longest: float = 60.0) -> tuple[str, list[Clip]]:
    """Return a description of the clips, and the clips."""
    try:
        folder = shared_data() / "speech" / "LibriSpeech"
        files = [path for split in (TRAIN, HELD_OUT) for path in sorted((folder / split).rglob("*.flac"))]
        found = [Clip(path.read_bytes(), soundfile.info(path).duration) for path in files]
        return "Mini LibriSpeech", [clip for clip in found if clip.seconds <= longest]
    except SystemExit:
        rng = np.random.default_rng(0)
        made = []
        for seconds in rng.triangular(1.5, 15.5, 17.0, 200):  # As in LibriSpeech: most are near the longest.
            buffer = io.BytesIO()
            soundfile.write(buffer, rng.normal(0, 0.1, int(16_000 * seconds)), 16_000, format="FLAC")
            made.append(Clip(buffer.getvalue(), float(seconds)))
        return "noise with lengths like LibriSpeech's", made


@contextmanager
def running(command: list[str], python_path: Path | None = None) -> Iterator[tuple[int, str]]:
    """Run a server on the service's core. Yield its process id and address once it is ready; stop it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(python_path)} if python_path else {})
    process = subprocess.Popen(
        ["taskset", "-c", str(SERVICE_CORE), sys.executable, *command, "--port", str(port)],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                if httpx.get(f"{address}/readyz", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None, f"{command} ended"
            time.sleep(0.2)
        yield process.pid, address
    finally:
        if process.poll() is None:
            # LitServe's children outlive their parent.
            for child in psutil.Process(process.pid).children(recursive=True):
                child.terminate()
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process and its children, in MiB."""
    process = psutil.Process(pid)
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True))) / 2**20


def offline(model: Path, runtime: str, sounds: list[Clip], batch_seconds: float, niceness: int = 0) -> float:
    """Return the seconds of audio per second that a batch job gets: the backend in batches of similar length, decoding included."""
    code = f"import benchmarks.serve.load as b; b.print_offline({str(model)!r}, {runtime!r}, {batch_seconds})"
    data = json.dumps([clip.data.hex() for clip in sounds])
    done = subprocess.run(
        ["nice", "-n", str(niceness), "taskset", "-c", str(SERVICE_CORE), sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        input=data,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def print_offline(model: str, runtime: Any, batch_seconds: float) -> None:
    """Measure and print the offline throughput; `offline` runs this in a subprocess."""
    files = [bytes.fromhex(item) for item in json.load(sys.stdin)]
    backend = open_backend(Path(model), BackendOptions(runtime=runtime))
    backend.run([LayerRequest(np.zeros(16_000, np.float32), None, "student")])
    began = time.perf_counter()
    waveforms = sorted((decode(file, 60.0) for file in files), key=len)
    total = sum(len(waveform) for waveform in waveforms) / 16_000
    while waveforms:
        chosen = set(choose_batch([len(waveform) for waveform in waveforms], int(batch_seconds * 16_000)))
        backend.run([LayerRequest(waveforms[index], backend.num_layers, "student") for index in sorted(chosen)])
        waveforms = [waveform for index, waveform in enumerate(waveforms) if index not in chosen]
    print(total / (time.perf_counter() - began))


async def offer(
    address: str, pid: int, sounds: list[Clip], rate: float, seconds: float, seed: int, as_json: bool
) -> dict[str, Any]:
    """Send requests at an average of ``rate`` per second for ``seconds``, and wait for all answers.

    Latency counts from the time at which a request was due, so a slow generator can't improve the service's figures. Throughput is
    the audio of the answers within the time, without the first fifth, during which queues fill.
    """
    rng = np.random.default_rng(seed)
    moments = np.cumsum(rng.exponential(1 / rate, int(rate * seconds * 2) + 10))
    moments = moments[moments < seconds]
    chosen = [sounds[index] for index in rng.integers(0, len(sounds), len(moments))]
    outcomes: list[tuple[str, float, float, float]] = []  # status, due, came, seconds of audio
    memory: list[float] = []
    late: list[float] = []
    # httpx searches all open connections for each request, so it can't keep up with hundreds of requests per second.
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(120)
    async with aiohttp.ClientSession(address, connector=connector, timeout=timeout) as client:
        began = time.perf_counter()

        async def ask(due: float, clip: Clip) -> None:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            late.append(time.perf_counter() - began - due)
            try:
                body: dict[str, Any] = {"data": clip.data}
                if as_json:
                    body = {"json": {"input": base64.b64encode(clip.data).decode()}}
                async with client.post(PATH, **body) as response:
                    await response.read()
                    status = str(response.status)
            except (aiohttp.ClientError, TimeoutError) as error:
                status = type(error).__name__
            outcomes.append((status, due, time.perf_counter() - began, clip.seconds))

        async def watch() -> None:
            while True:
                memory.append(resident_mib(pid))
                await asyncio.sleep(1)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(ask(due, clip) for due, clip in zip(moments.tolist(), chosen, strict=True)))
        watching.cancel()
    quiet = seconds / 5
    good = [(came - due) for status, due, came, _ in outcomes if status == "200"]
    answered = sum(audio for status, _, came, audio in outcomes if status == "200" and quiet <= came < seconds)
    refused = [came - due for status, due, came, _ in outcomes if status == "429"]
    sent = sum(audio for _, due, _, audio in outcomes if quiet <= due)
    return {
        "requests": len(outcomes),
        "statuses": dict(Counter(status for status, *_ in outcomes)),
        "offered_audio_seconds_per_second": sent / (seconds - quiet),
        "throughput_audio_seconds_per_second": answered / (seconds - quiet),
        "latency_seconds": quantiles(good),
        "refused_after_seconds": quantiles(refused),
        "sent_late_seconds": quantiles(late),
        "memory_mib": [round(value, 1) for value in memory],
    }


def quantiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {f"p{q}": float(np.quantile(values, q / 100)) for q in (50, 95, 99)} | {"max": max(values)}


def load(
    model: Annotated[
        Path | None, typer.Option(help="Exported student. Default: the recipe's student with random weights.")
    ] = None,
    config: Annotated[Path, typer.Option(help="Recipe.")] = REPOSITORY / "configs/armhubert-s-960.yaml",
    backend: Annotated[str, typer.Option(help="torch or onnx.")] = "torch",
    points: Annotated[
        str, typer.Option(help="Offered loads as fractions of the offline throughput, separated by commas.")
    ] = "0.3,0.6,0.8,1,1.5,3",
    seconds: Annotated[float, typer.Option(help="Seconds per load.")] = 60,
    queue_seconds: Annotated[float, typer.Option(help="The service's --queue-seconds.")] = BatchLimits().queue_seconds,
    batch_seconds: Annotated[
        float | None, typer.Option(help="The service's --batch-seconds. Default: the service's default.")
    ] = None,
    offline_seconds: Annotated[float, typer.Option(help="Seconds of audio per offline batch.")] = 30,
    litserve: Annotated[
        Path | None, typer.Option(help="Folder with LitServe: `pip install --target FOLDER litserve`.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "serve/load.json",
) -> None:
    """Measure throughput and latency of the service and its peers at several offered loads."""
    os.sched_setaffinity(0, {GENERATOR_CORE})
    what, sounds = clips()
    mean = statistics.mean(clip.seconds for clip in sounds)
    some = [sounds[index] for index in np.random.default_rng(0).permutation(len(sounds))[:40]]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            torch.manual_seed(0)
            model = Path(folder) / "model"
            save_student(Student(load_config(config).resolve_student(12, 768)).eval(), model)
        chosen = ["--model", str(model.resolve())]
        service = ["-m", "serve", *chosen, "--backend", backend, "--queue-seconds", str(queue_seconds)]
        service += [
            "--deadline-seconds",
            "60",
            *([] if batch_seconds is None else ["--batch-seconds", str(batch_seconds)]),
        ]
        speed = offline(model, backend, some, offline_seconds)
        with ExitStack() as stack:
            servers = {"service": stack.enter_context(running(service))}
            for peer in ("plain", *(["litserve"] if litserve else [])):
                servers[peer] = stack.enter_context(
                    running(["-m", f"benchmarks.serve.{peer}_server", *chosen], litserve)
                )
            for number, point in enumerate(float(part) for part in points.split(",")):
                measured = offline(model, backend, some, offline_seconds)
                for name, (pid, address) in servers.items():
                    rate, as_json = point * speed / mean, name == "litserve"
                    row = asyncio.run(offer(address, pid, sounds, rate, seconds, number, as_json))
                    row = {"server": name, "point": point, "offline_audio_seconds_per_second": measured} | row
                    rows.append(row)
                    latency = row["latency_seconds"] or {}
                    print(
                        f"{point:4.2f} {name:8} {row['requests']:5} requests {row['statuses']}  "
                        f"{row['throughput_audio_seconds_per_second']:6.1f} s/s (offline {measured:.1f})  "
                        + "  ".join(f"{key} {value:.2f} s" for key, value in latency.items())
                        + f"  429 {row['refused_after_seconds']}",
                        flush=True,
                    )
    # The median over the whole run, since other work on this machine varies from minute to minute.
    reference = statistics.median(row["offline_audio_seconds_per_second"] for row in rows)
    for row in rows:
        row["of_offline"] = row["throughput_audio_seconds_per_second"] / reference
    write_result(
        output,
        audio=what,
        mean_seconds=mean,
        student=config.stem if model.parent == Path(folder) else "given",
        backend=backend,
        cores={"service": SERVICE_CORE, "generator": GENERATOR_CORE},
        point_seconds=seconds,
        queue_seconds=queue_seconds,
        batch_seconds=batch_seconds,
        offline_seconds=offline_seconds,
        offline_audio_seconds_per_second=reference,
        saturated_of_offline=max(row["of_offline"] for row in rows if row["server"] == "service"),
        rows=rows,
    )


def soak(
    requests: Annotated[int, typer.Option(help="Number of requests.")] = 20_000,
    clients: Annotated[int, typer.Option(help="Number of concurrent clients.")] = 8,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "serve/soak.json",
) -> None:
    """Send many short requests of all forms to a tiny student, to check that memory doesn't grow."""
    os.sched_setaffinity(0, {GENERATOR_CORE})
    rng = np.random.default_rng(0)
    sounds = []
    for index in range(40):
        buffer = io.BytesIO()
        form, subtype = [("WAV", None), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)][index % 5]
        soundfile.write(
            buffer, rng.normal(0, 0.1, int(rng.integers(3_000, 24_000))), 16_000, format=form, subtype=subtype
        )
        sounds.append(buffer.getvalue())
    sounds += [b"not audio", sounds[0][:30]]
    paths = [f"/v1/features?format={form}&layer=all" for form in ("json", "npy", "npz", "safetensors", "arrow")]
    paths += ["/v1/embeddings", "/v1/features?timeout=0.001"]
    statuses: Counter[str] = Counter()
    memory: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        save_student(Student(tiny_student()).eval(), Path(folder) / "tiny")
        with running(["-m", "serve", "--model", str(Path(folder) / "tiny")]) as (pid, address):

            async def client_loop(numbers: Iterator[int]) -> None:
                async with httpx.AsyncClient(base_url=address, timeout=60, trust_env=False) as client:
                    for number in numbers:
                        body = sounds[number % len(sounds)]
                        response = await client.post(paths[number % len(paths)], content=body)
                        statuses[str(response.status_code)] += 1
                        if number % (requests // 20) == 0:
                            memory.append((number, resident_mib(pid)))
                            print(f"{number:6} requests  {memory[-1][1]:7.1f} MiB  {dict(statuses)}", flush=True)

            async def main() -> None:
                numbers = iter(range(1, requests + 1))
                await asyncio.gather(*(client_loop(numbers) for _ in range(clients)))

            began = time.perf_counter()
            asyncio.run(main())
            elapsed = time.perf_counter() - began
    write_result(
        output,
        requests=requests,
        clients=clients,
        seconds=elapsed,
        statuses=dict(statuses),
        memory_mib=memory,
        growth_mib_second_half=memory[-1][1] - memory[len(memory) // 2][1],
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    for command in (load, soak):
        app.command()(command)
    app()
