"""Compare a trained student's features of long audio in overlapping windows with those of the same audio in one pass.

``python -m benchmarks.serve.windows MODEL`` joins held-out utterances of each speaker into recordings of a few minutes, and compares
several windows and overlaps. The error of a frame is the norm of the difference divided by the root mean square norm of the layer's
frames.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.result_file import RESULTS, write_result
from benchmarks.small_speech import HELD_OUT, utterances
from ray_distill.pipeline.student_export import open_student
from ray_distill.serve.inference.backends import LayerRequest, TorchBackend
from ray_distill.serve.inference.windows import split_windows
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, SAMPLE_RATE


def recordings(seconds: float) -> list[np.ndarray]:
    """Return a recording (S,) float32 per held-out speaker, at most ``seconds`` long."""
    of_speaker: dict[str, list[np.ndarray]] = {}
    for utterance in utterances(HELD_OUT):
        of_speaker.setdefault(utterance.id.split("-")[0], []).append(load_audio(utterance.path))
    return [np.concatenate(parts)[: int(seconds * SAMPLE_RATE)] for parts in of_speaker.values()]


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a run or of an exported student.")],
    seconds: Annotated[float, typer.Option(help="Length of the longest recording in seconds.")] = 150,
    windows: Annotated[
        str, typer.Option(help="Pairs window:overlap in seconds, separated by commas.")
    ] = "1:0,1:0.5,2:0,2:0.5,2:1,5:0,5:1,5:2.5,15:4,30:0,30:1,30:4,30:10,60:4",
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "serve/windows.json",
) -> None:
    """Compare windows with a single pass."""
    torch.set_num_threads(1)
    student, origin = open_student(model)
    backend = TorchBackend(student)
    found: dict[str, list[np.ndarray]] = {setting: [] for setting in windows.split(",")}
    lengths = []
    for waveform in recordings(seconds):
        lengths.append(len(waveform) / SAMPLE_RATE)
        (whole,) = backend.run([LayerRequest(waveform, None, "student")])
        scale = np.sqrt((whole**2).sum(-1).mean(-1))[:, None]
        for setting, errors in found.items():
            window_seconds, overlap_seconds = map(float, setting.split(":"))
            stitched = np.empty_like(whole)
            for window in split_windows(len(waveform), window_seconds, overlap_seconds):
                (part,) = backend.run([LayerRequest(waveform[window.samples], None, "student")])
                start = window.samples.start // FRAME_SAMPLES
                stitched[:, window.frames] = part[:, window.frames.start - start : window.frames.stop - start]
            errors.append(np.linalg.norm(stitched - whole, axis=-1) / scale)
    rows: list[dict[str, Any]] = []
    for setting, errors in found.items():
        joined = np.concatenate(errors, axis=1)  # (L, T)
        window_seconds, overlap_seconds = map(float, setting.split(":"))
        row = {"window_seconds": window_seconds, "overlap_seconds": overlap_seconds}
        for name, layer in (("first_layer", joined[0]), ("last_layer", joined[-1])):
            row[name] = {"mean": float(layer.mean()), "p99": float(np.quantile(layer, 0.99)), "max": float(layer.max())}
        rows.append(row)
        print(
            f"{window_seconds:g} s, overlap {overlap_seconds:g} s: "
            + "; ".join(
                f"{name} " + ", ".join(f"{key} {100 * value:.1f} %" for key, value in row[name].items())
                for name in ("first_layer", "last_layer")
            ),
            flush=True,
        )
    metrics = origin.get("metrics")
    write_result(
        output, recordings_seconds=lengths, frames=joined.shape[1], layers=len(joined), metrics=metrics, rows=rows
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
