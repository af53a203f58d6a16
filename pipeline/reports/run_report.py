"""The report of a run: one HTML file with the charts of the training, features of an utterance, and the configuration."""

import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import groupby
from typing import Any

import numpy as np

from ray_distill.pipeline.composition.suggestions import enumerated
from ray_distill.pipeline.files import write_text
from ray_distill.pipeline.probing.probe_record import distinct_titles, read_probes
from ray_distill.pipeline.probing.task import NO_LABEL, SILENCE
from ray_distill.pipeline.reports.explained_variance import explained_variance
from ray_distill.pipeline.reports.feature_maps import FeatureMaps
from ray_distill.pipeline.reports.heatmap import heatmap
from ray_distill.pipeline.reports.html_page import render_page
from ray_distill.pipeline.reports.probe_page import probe_section
from ray_distill.pipeline.reports.training_charts import (
    Rows,
    curve_notes,
    last_layer_values,
    rows_of_kind,
    similarity_charts,
    speed_charts,
    training_charts,
)
from ray_distill.pipeline.run_folder import RunFolder

_HEATMAP_LIMIT = 2.5
"""Standard deviations at which the colours of a heatmap end."""
_HEATMAP_FRAMES = 400
"""Maximum number of frames shown. Noisy images compress badly, and a page should stay below 2 MB."""

_LABELLED_FRAMES = 110
"""Maximum number of frames shown with the names of their phones, which need room."""


def write_run_report(
    folder: RunFolder, *, summary: Mapping[str, Any], facts: Mapping[str, str], maps: FeatureMaps | str
) -> None:
    """Write the report of a run from its metrics, probes and configuration. The same run gives the same bytes.

    Args:
        folder: Folder of the run.
        summary: Content of ``summary.json``; its ``training`` is None if the training is not finished.
        facts: Rows of the table at the top, by name.
        maps: Features of an utterance, or a sentence that says why there are none.
    """
    metrics = folder.metrics()
    headings, layers = last_layer_values(metrics)
    if (explained := explained_variance(metrics)) is not None:
        headings.append("variance explained")
        for layer, values in layers.items():
            values.append(explained.share.get(layer))
    probes = read_probes(folder.path)
    page = render_page(
        "run.html",
        name=summary["name"],
        origin=_origin(summary["teacher"], folder),
        warnings=_warnings(summary, metrics),
        tiles=_tiles(summary, metrics),
        facts=facts,
        notes=curve_notes(metrics),
        training=training_charts(metrics),
        similarity=similarity_charts(metrics),
        layer_headings=headings,
        layers=layers,
        speed=speed_charts(metrics),
        probes=[
            probe_section(title, probe.outcomes) for probe, title in zip(probes, distinct_titles(probes), strict=True)
        ],
        maps=maps if isinstance(maps, str) else _images(maps),
        config=folder.config_file.read_text(),
        files=_files(folder),
    )
    write_text(folder.report, page)


def _origin(teacher: str, folder: RunFolder) -> str:
    """Return a line with the teacher, the time of the last metrics and the versions of the main packages."""
    parts = [f"Distillation of {teacher}"]
    if folder.metrics_file.is_file():
        # The time of the report would make every page of the same run different.
        parts.append(time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(folder.metrics_file.stat().st_mtime)))
    versions = (f"{name} {version(name)}" for name in ("torch", "ray", "pyarrow"))
    return " · ".join([*parts, f"Python {platform.python_version()}, {', '.join(versions)}"])


def _files(folder: RunFolder) -> list[str]:
    """Return the existing files of a run that a page links to, relative to the run's folder."""
    paths = (
        *(folder.summary_file, folder.metrics_file, folder.config_file, folder.corpus / "skipped.csv"),
        *(folder.tensorboard, folder.checkpoints, folder.export / "model.safetensors", folder.export / "config.json"),
        folder.ray_log,
    )
    return [f"{path.relative_to(folder.path)}{'/' if path.is_dir() else ''}" for path in paths if path.exists()]


def _warnings(summary: Mapping[str, Any], metrics: Rows) -> list[str]:
    """Return what a reader must know before reading the numbers."""
    found = []
    if summary["teacher_is_random"]:
        found.append(
            "The teacher has seeded random weights, so the features mean nothing; this run only shows that the pipeline works."
        )
    elif some := summary.get("random_teachers"):
        found.append(
            f"{enumerated(some)} {'has' if len({*some}) == 1 else 'have'} seeded random weights, so what the student learns from "
            f"{'it' if len({*some}) == 1 else 'them'} means nothing."
        )
    train, result = rows_of_kind(metrics, "train"), summary["training"]
    last = train[-1]["step"] if train else 0
    if result is None:
        planned = f" of {train[-1]['steps']:,}" if train else ""
        found.append(f"The training is not finished. The last recorded step is {last:,}{planned}.")
    elif last < result["steps"]:
        found.append(
            f"metrics.jsonl ends at step {last:,}, but the training continued to step {result['steps']:,}, "
            "so the charts are incomplete."
        )
    if not rows_of_kind(metrics, "validation"):
        found.append("No validation was recorded.")
    return found


def _tiles(summary: Mapping[str, Any], metrics: Rows) -> list[tuple[str, str]]:
    """Return the headline figures, each as a value and its label."""
    train, validation, result = rows_of_kind(metrics, "train"), rows_of_kind(metrics, "validation"), summary["training"]
    tiles = []
    explained = explained_variance(metrics)
    if result is not None:
        first, best = result["first_validation_loss"], result["best_validation_loss"]
        tiles.append((f"{best:.4g}", f"best validation loss ({first:.4g} at the start)"))
        tiles.append((f"{result['steps']:,}", f"optimiser steps ({result['skipped_steps']} skipped)"))
    elif validation:
        first, best = validation[0]["loss"], min(row["loss"] for row in validation)
        tiles.append((f"{best:.4g}", f"best validation loss so far ({first:.4g} at the start)"))
    if explained is not None and explained.share:
        layer, share = list(explained.share.items())[-1]
        more = f"; the error is {1 - share:,.3g} times that of a constant" if share < 0 else ""
        what = f"of the variance of layer {layer} explained at the last validation{more}"
        tiles.append((f"{share:.1%}" if share >= 0 else "none", what))
    owners = "all teachers'" if summary.get("teachers") else "the teacher's"
    ratio = summary["teacher_parameters"] / summary["student_parameters"]
    tiles.append(
        (
            f"{summary['student_parameters'] / 1e6:.3g} M",
            f"student parameters (1/{ratio:.3g} of {owners})",
        )
    )
    if result is not None:
        tiles.append((_duration(result["seconds"]), "training time"))
    if train:
        tiles.append(
            (f"{np.mean([row['data_wait'] for row in train]):.1%}", "of training time is spent waiting for data")
        )
    if summary["cache_bytes_per_second"] is not None:
        tiles.append((f"{summary['cache_bytes_per_second'] / 1e3:.3g} kB", "cache size per second of audio"))
    return tiles


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{rest} s"


def _images(maps: FeatureMaps) -> dict[str, Any]:
    """Return what the template needs to show feature maps."""
    frames = len(maps.layers[0].teacher)
    per_second = frames / maps.seconds  # 50, or 120 patches of AST.
    shown = min(frames, _LABELLED_FRAMES if maps.phones else _HEATMAP_FRAMES)
    layers = []
    for layer in maps.layers:
        teacher, student = layer.teacher[:shown], layer.student[:shown]
        images = [
            (name, heatmap(values, _HEATMAP_LIMIT), f"Heatmap of layer {layer.layer}, {name}: channels over time")
            for name, values in (("teacher", teacher), ("student", student), ("student - teacher", student - teacher))
        ]
        layers.append({"number": layer.layer, "cosine": layer.cosine, "images": images})
    limit = _HEATMAP_LIMIT
    return {
        "utterance": maps.utterance,
        "seconds": maps.seconds,
        "shown_seconds": shown / per_second if shown < frames else None,
        "limit": limit,
        "scale": heatmap(np.linspace(-limit, limit, 255)[:, None], limit),
        "scale_ticks": _ticks([-limit, 0, limit], -limit, limit),
        "time_ticks": _time_ticks(shown / per_second),
        "phone_ticks": _phone_ticks(maps.phones[:shown]),
        "layers": layers,
    }


def _phone_ticks(phones: Sequence[str]) -> list[tuple[float, str]]:
    """Return the centre in per cent and the name of each phone, without silence and frames that have no label."""
    ticks, first = [], 0
    for phone, members in groupby(phones):
        last = first + len(list(members))
        if phone not in (SILENCE, NO_LABEL):
            ticks.append((50 * (first + last) / len(phones), phone))
        first = last
    return ticks


def _time_ticks(seconds: float) -> list[tuple[float, str]]:
    step = next(step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10) if seconds / step <= 6)
    return _ticks([n * step for n in range(int(seconds / step + 1e-9) + 1)], 0, seconds, " s")


def _ticks(values: Sequence[float], low: float, high: float, unit: str = "") -> list[tuple[float, str]]:
    """Return the position in per cent and the label of each tick below an image; the last label has the unit."""
    labels = [f"{value:g}" for value in values]
    labels[-1] += unit
    return [(100 * (value - low) / (high - low), label) for value, label in zip(values, labels, strict=True)]
