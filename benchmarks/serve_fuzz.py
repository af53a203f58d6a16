"""Damaged audio of every accepted format over HTTP: no failure of the service, no crash, no growth.

``python benchmarks/serve_fuzz.py`` posts seeded mutations (`tests/serve/test_damaged_audio.py` makes them) to the application in this
process: raw, as forms, and as base64 in JSON; and watches its memory.
"""

import base64
import io
import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import soundfile
import torch
import typer
from fastapi.testclient import TestClient
from memory import resident_bytes
from result_file import RESULTS, write_result

from ray_distill.serve import create_app
from ray_distill.serve.decoding import silence_decoders
from ray_distill.serve.settings import Limits
from ray_distill.student import Student
from tests.serve.conftest import TINY
from tests.serve.test_damaged_audio import FORMATS, mutate


def sources() -> list[bytes]:
    """One file of each format, 0.3 s of noise."""
    rng = np.random.default_rng(0)
    found = []
    for name, subtype in FORMATS:
        buffer = io.BytesIO()
        soundfile.write(buffer, rng.normal(0, 0.1, 4800), 16_000, format=name, subtype=subtype)
        found.append(buffer.getvalue())
    return found


def request_of(audio: bytes, form: int) -> dict[str, Any]:
    """Raw, multipart, or base64 in JSON."""
    if form == 0:
        return {"content": audio}
    if form == 1:
        return {"files": {"file": audio}}
    body = json.dumps({"input": base64.b64encode(audio).decode()})
    return {"content": body, "headers": {"content-type": "application/json"}}


def main(
    cases: Annotated[int, typer.Option(help="How many.")] = 20_000,
    seed: Annotated[int, typer.Option()] = 0,
    output: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "serve_fuzz.json",
) -> None:
    """Posts mutations and counts answers."""
    torch.set_num_threads(1)
    silence_decoders()
    torch.manual_seed(0)
    rng = np.random.default_rng(seed)
    files = sources()
    statuses: dict[str, Counter[str]] = {f"{name} {subtype or ''}".strip(): Counter() for name, subtype in FORMATS}
    memory: list[tuple[int, float]] = []
    began = time.perf_counter()
    app = create_app(Student(TINY).eval(), limits=Limits(max_seconds=5))
    with TestClient(app, raise_server_exceptions=False) as client, ThreadPoolExecutor(4) as pool:
        for start in range(0, cases, 500):
            bodies = [mutate(files[number % len(files)], rng) for number in range(start, min(start + 500, cases))]
            posts = [request_of(body, number // len(files) % 3) for number, body in enumerate(bodies)]
            answers = pool.map(lambda post: client.post("/v1/features?format=npy", **post), posts)
            for number, (answer, body) in enumerate(zip(answers, bodies, strict=True)):
                name = list(statuses)[number % len(files)]
                statuses[name][str(answer.status_code)] += 1
                if answer.status_code not in (200, 400, 413, 422):
                    raise SystemExit(f"{name}: {answer.status_code} {answer.text[:200]} for {body.hex()}")
            memory.append((start + len(bodies), resident_bytes() / 2**20))
            if start % 2000 == 0:
                print(f"{memory[-1][0]:6} cases  {memory[-1][1]:.1f} MiB", flush=True)
        held = app.state.admission.held_bytes
    print({name: dict(counts) for name, counts in statuses.items()})
    write_result(
        output,
        cases=cases,
        seed=seed,
        seconds=time.perf_counter() - began,
        statuses=statuses,
        memory_mib=memory,
        bytes_held_at_the_end=held,
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
