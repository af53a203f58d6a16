"""A minimal FastAPI endpoint that processes one request at a time, for comparison in `benchmarks.serve.load`."""

import asyncio
import io
import threading
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
import uvicorn
from fastapi import FastAPI, Request, Response

from ray_distill.student import load_student
from ray_distill.teacher_cache.audio import load_audio


def main(model: Annotated[Path, typer.Option()], port: Annotated[int, typer.Option()]) -> None:
    """Serve the last layer as .npy for audio in the request's body."""
    app, student, lock = FastAPI(), load_student(model), threading.Lock()

    def run(body: bytes) -> bytes:
        with lock, torch.inference_mode():
            waveform = torch.from_numpy(load_audio(io.BytesIO(body)))[None]
            hidden, _ = student.encode(waveform, torch.tensor([waveform.shape[1]]))
            buffer = io.BytesIO()
            np.save(buffer, hidden[0, -1].numpy())
            return buffer.getvalue()

    @app.post("/v1/features")
    async def features(request: Request) -> Response:
        body = await request.body()
        return Response(await asyncio.to_thread(run, body), media_type="application/x-npy")

    @app.get("/readyz")
    async def readyz() -> str:
        return "ready"

    uvicorn.run(app, port=port, log_level="warning")


if __name__ == "__main__":
    typer.run(main)
