"""Draw the picture of the README: an utterance as a spectrum, and its features in a run's teacher and student.

``python -m benchmarks.teacher.picture runs/demo`` needs a finished run of the demo, and writes docs/pictures/features.png.
"""

from itertools import groupby
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import typer

from benchmarks.result_file import REPOSITORY
from ray_distill.pipeline.config import load_config
from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.task import NO_LABEL, PHONES_FILE, SILENCE, Example, read_task
from ray_distill.student import load_student
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, SAMPLE_RATE
from ray_distill.teacher_cache.teachers import load_teacher

matplotlib.use("agg")
import matplotlib.pyplot as plt

_SECONDS = 2.0
_FRAME_SECONDS = FRAME_SAMPLES / SAMPLE_RATE
_CHANNELS = 64


def similar_channels(features: np.ndarray) -> np.ndarray:
    """Return the channels with the largest variance of (T, D) features, ordered so that similar ones are neighbours."""
    chosen = features.std(0).argsort()[-_CHANNELS:]
    centred = features[:, chosen] - features[:, chosen].mean(0)
    _, _, components = np.linalg.svd(centred / centred.std(0), full_matrices=False)
    order: np.ndarray = chosen[np.arctan2(components[1], components[0]).argsort()]
    return order


def draw(example: Example, run: Path, output: Path) -> None:
    """Draw log-mel bands, the teacher's last layer, the student's prediction of it, and the difference."""
    config = load_config(run / "config.yaml", [])
    waveform = load_audio(example.path)
    wave, frames = torch.from_numpy(waveform)[None], int(_SECONDS / _FRAME_SECONDS)
    teacher = load_teacher(config.teacher.checkpoint)
    layer = max(config.teacher.layers or [teacher.num_layers])
    taught = teacher.hidden_states(wave, layers=[layer])[0, 0].numpy()
    with torch.inference_mode():
        learnt = load_student(run).eval()(wave).projections[0, -1].numpy()
    channels = similar_channels(taught)
    mean, deviation = taught[:, channels].mean(0), taught[:, channels].std(0)
    taught, learnt = ((x[:, channels] - mean) / deviation for x in (taught, learnt))
    spectrum = FeatureSource.log_mel().features(waveform)[0].numpy()
    rows = (
        ("log-mel spectrum", spectrum, "magma", np.percentile(spectrum, 5), np.percentile(spectrum, 99.5)),
        (f"teacher, layer {layer}", taught, "RdBu_r", -2.5, 2.5),
        ("student's prediction", learnt, "RdBu_r", -2.5, 2.5),
        ("difference", learnt - taught, "RdBu_r", -2.5, 2.5),
    )
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 6.2), sharex=True, layout="constrained")
    for axis, (name, values, colours, low, high) in zip(axes, rows, strict=True):
        extent = (0.0, frames * _FRAME_SECONDS, 0.0, 1.0)
        axis.imshow(values[:frames].T, aspect="auto", origin="lower", cmap=colours, vmin=low, vmax=high, extent=extent)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_yticks([])
    first, centres, names = 0, [], []
    for phone, members in groupby(example.target[:frames]):
        last = first + len(list(members))
        if phone not in (SILENCE, NO_LABEL):
            centres.append((first + last) / 2 * _FRAME_SECONDS)
            names.append(phone)
        for axis in axes:
            axis.axvline(first * _FRAME_SECONDS, color="black", linewidth=0.3, alpha=0.5)
        first = last
    axes[-1].set_xticks(centres, names, fontsize=8)
    axes[-1].tick_params(length=0)
    axes[-1].set_xlabel(f"phones of {_SECONDS:g} s of speech", fontsize=10)
    figure.savefig(output, dpi=80)


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of the demo.")],
    output: Annotated[Path, typer.Option(help="PNG file.")] = REPOSITORY / "docs/pictures/features.png",
) -> None:
    """Draw an utterance of the test voices in a run's teacher and student."""
    corpus = load_config(run / "config.yaml", []).corpus.path
    examples = read_task(corpus / PHONES_FILE).examples
    draw(next(e for e in examples if e.test and len(e.target) * _FRAME_SECONDS > _SECONDS), run, output)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
