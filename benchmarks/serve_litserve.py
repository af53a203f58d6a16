"""The same student behind LitServe, as its documentation builds a service that batches. `serve_load` compares the service with it.

LitServe is not among this project's packages: ``pip install --target FOLDER litserve``, and FOLDER on PYTHONPATH.
"""

import base64
import io
import sys
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import litserve
import numpy as np
import torch
import typer
from fastapi import Request, Response

from ray_distill.student import load_student
from ray_distill.teacher_cache.audio import load_audio


class Features(litserve.LitAPI):  # type: ignore[misc]
    """Audio as base64 in JSON, the last layer as .npy; audio is decoded in the worker, one file after another."""

    def __init__(self, model: Path, batch: int) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=0.002, api_path="/v1/features")
        self.model = model

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.student = load_student(self.model)

    def decode_request(self, request: Request) -> Any:
        return load_audio(io.BytesIO(base64.b64decode(request["input"])))  # type: ignore[index]

    def batch(self, inputs: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        waveforms = np.zeros((len(inputs), max(map(len, inputs))), np.float32)
        for row, waveform in zip(waveforms, inputs, strict=True):
            row[: len(waveform)] = waveform
        return torch.from_numpy(waveforms), torch.tensor([len(waveform) for waveform in inputs])

    @torch.inference_mode()
    def predict(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> list[Any]:
        hidden, num_frames = self.student.encode(*inputs)
        return [hidden[row, -1, :count].numpy() for row, count in enumerate(num_frames.tolist())]

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any) -> Response:
        buffer = io.BytesIO()
        np.save(buffer, output)
        return Response(buffer.getvalue(), media_type="application/x-npy")


def main(
    model: Annotated[Path, typer.Option()],
    port: Annotated[int, typer.Option()],
    batch: Annotated[int, typer.Option(help="Requests of a batch, at most.")] = 4,
) -> None:
    """One worker, and no deadline: like the plain endpoint, it answers everybody."""
    server = litserve.LitServer(Features(model, batch), accelerator="cpu", healthcheck_path="/readyz", timeout=False)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    typer.run(main)
