"""The student behind LitServe with batching, built as LitServe's documentation describes, for comparison in `benchmarks.serve.load`.

LitServe is not a dependency of this project: run ``pip install --target FOLDER litserve`` and add FOLDER to PYTHONPATH.
"""

import base64
import io
from pathlib import Path
from typing import Annotated, Any

import litserve
import numpy as np
import torch
import typer
from fastapi import Request, Response

from ray_distill.student import load_student
from ray_distill.teacher_cache.audio import load_audio


class Features(litserve.LitAPI):  # type: ignore[misc]
    """The last layer as .npy for audio as base64 in JSON. The worker decodes one file after another."""

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
    batch: Annotated[int, typer.Option(help="Maximum number of requests per batch.")] = 4,
) -> None:
    """Serve with one worker and no deadline. Like the plain endpoint, it answers every request."""
    server = litserve.LitServer(Features(model, batch), accelerator="cpu", healthcheck_path="/readyz", timeout=False)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    typer.run(main)
