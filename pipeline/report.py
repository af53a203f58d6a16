"""A run as one HTML page that opens anywhere: no network, no script, one file."""

import html
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.charts import COLORS, Line, heatmap, layer_color, line_chart
from student import Student
from teacher_cache.batch import TargetReader
from teacher_cache.frames import SAMPLE_RATE

_CHANNELS = 96
"""Shown of each layer: those that vary most."""
_REACH = 2.5
"""Standard deviations at which the colours of a heatmap end."""
_SAMPLE_SECONDS = 6.0

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --faint: #5c6670; --line: #d9dee3; --page: #fff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ec; --faint: #9aa4ae; --line: #3a424b; --page: #14181d; --card: #1c2127; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1040px; padding: 28px 20px 60px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
a { color: inherit; } h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 34px 0 10px; } p { margin: 6px 0 12px; }
.faint, figcaption span { color: var(--faint); }
.warning { background: #fff3cd; color: #5c4400; border-left: 4px solid #d39e00; padding: 10px 14px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 20px; } .tile span { color: var(--faint); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 18px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: 6px; } .none { color: var(--faint); }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 11px; fill: var(--faint); }
svg .grid { stroke: var(--line); } svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; color: var(--faint); margin-top: 6px; }
.legend i { display: inline-block; width: 14px; height: 3px; margin-right: 5px; vertical-align: middle; }
.maps { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 6px 10px; margin-bottom: 14px; }
.maps img { width: 100%; height: 130px; display: block; image-rendering: pixelated; border: 1px solid var(--line); }
.maps div { font-size: 12px; color: var(--faint); } .maps .layer { grid-column: 1 / -1; font-weight: 600; color: var(--text); }
.time { display: flex; justify-content: space-between; }
table { border-collapse: collapse; width: 100%; }
td { padding: 4px 10px 4px 0; vertical-align: top; border-top: 1px solid var(--line); }
td:first-child { color: var(--faint); white-space: nowrap; width: 1%; } td { overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; font-size: 12px; }
@media (max-width: 560px) {
  svg text { font-size: 15px; } .maps { grid-template-columns: 1fr; } td:first-child { white-space: normal; width: 34%; }
}
@media print { body { max-width: none; } figure { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class FeatureMaps:
    """One utterance through teacher and student.

    Attributes:
        utterance: its id.
        seconds: of audio.
        layers: 1-based teacher layers, and for each (T, C) teacher and student features of the C channels that vary most,
            in the teacher's standard deviations from its mean.
    """

    utterance: str
    seconds: float
    layers: list[tuple[int, np.ndarray, np.ndarray]]


@torch.inference_mode()
def feature_maps(student: Student, reader: TargetReader) -> FeatureMaps:
    """The first, middle and last layer of a clean utterance of about 6 s."""
    index = int(np.abs(reader.num_samples - _SAMPLE_SECONDS * SAMPLE_RATE).argmin())
    batch = reader.read([index], None).to("cpu")
    projections = student.eval()(batch.waveforms, batch.lengths).projections[0]
    chosen = sorted({0, len(reader.layers) // 2, len(reader.layers) - 1})
    layers = []
    for position in chosen:
        teacher = batch.targets[0, position]
        deviation, mean = torch.std_mean(teacher, 0)
        loudest = deviation.topk(min(_CHANNELS, len(deviation))).indices.sort().values
        shown = [
            ((x - mean) / deviation.clamp(min=1e-12))[:, loudest].numpy() for x in (teacher, projections[position])
        ]
        layers.append((reader.layers[position], shown[0], shown[1]))
    return FeatureMaps(batch.ids[0], float(reader.num_samples[index]) / SAMPLE_RATE, layers)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """A run's rows; a last line that was cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_report(
    path: Path,
    *,
    summary: Mapping[str, Any],
    facts: Mapping[str, str],
    metrics: Sequence[Mapping[str, Any]],
    maps: FeatureMaps,
    config: str,
) -> None:
    """Writes the page.

    Args:
        path: of the HTML file, in the run's folder.
        summary: as in ``summary.json``.
        facts: lines of the table at the top, by name.
        metrics: rows of ``metrics.jsonl``.
        maps: features of a sample utterance.
        config: the resolved configuration, as YAML.
    """
    escape = html.escape
    warning = ""
    if summary["teacher_is_random"]:
        warning = (
            '<p class="warning">The teacher has seeded random weights: this run shows the machinery, its features mean '
            "nothing.</p>"
        )
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in _tiles(summary, metrics)
    )
    table = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts.items())
    versions = f"Python {platform.python_version()}, " + ", ".join(
        f"{n} {version(n)}" for n in ("torch", "ray", "pyarrow")
    )
    files = " · ".join(
        f'<a href="{name}">{name}</a>'
        for name in ("summary.json", "metrics.jsonl", "config.yaml", "export/config.json")
        if (path.parent / name).exists()
    )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(summary["name"])}: distillation report</title><style>{_STYLE}</style></head><body>
<h1>{escape(summary["name"])}</h1>
<p class="faint">Distillation of {escape(summary["teacher"])} · {time.strftime("%Y-%m-%d %H:%M")} · {escape(versions)}</p>
{warning}<div class="tiles">{tiles}</div>
<table>{table}</table>
<h2>Training</h2><div class="charts">{"".join(_training_charts(metrics))}</div>
<h2>Layers</h2><div class="charts">{"".join(_layer_charts(metrics))}</div>
<h2>Speed</h2><div class="charts">{"".join(_speed_charts(metrics))}</div>
<h2>Teacher and student</h2>{_maps(maps)}
<h2>Configuration</h2><details><summary>All settings of this run</summary><pre>{escape(config)}</pre></details>
<p class="faint">Files: {files}</p>
</body></html>
"""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page)
    temporary.replace(path)


def _tiles(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    trained = summary["training"]
    ratio = summary["teacher_parameters"] / summary["student_parameters"]
    first, best = trained["first_validation_loss"], trained["best_validation_loss"]
    tiles = [
        (f"best validation loss, from {first:.4g} at the start", f"{best:.4g}"),
        (f"optimiser steps, {trained['skipped_steps']} of them skipped", f"{trained['steps']:,}"),
        (f"student parameters, 1/{ratio:.3g} of the teacher's", f"{summary['student_parameters'] / 1e6:.3g} M"),
        ("of training", _duration(trained["seconds"])),
    ]
    waits = [row["data_wait"] for row in metrics if row["kind"] == "train"]
    if waits:
        tiles.append(("of that time waiting for data", f"{np.mean(waits):.1%}"))
    if summary["cache_bytes_per_second"] is not None:
        tiles.append(("of cache per second of audio", f"{summary['cache_bytes_per_second'] / 1e3:.3g} kB"))
    return tiles


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{rest} s"


def _line(rows: Sequence[Mapping[str, Any]], key: str, label: str, color: str, factor: float = 1.0) -> Line:
    return Line(label, [row["step"] for row in rows], [factor * row.get(key, math.nan) for row in rows], color)


def _training_charts(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    train = [row for row in metrics if row["kind"] == "train"]
    validation = [row for row in metrics if row["kind"] == "validation"]
    lines = [_line(train, "loss", "training", COLORS[0]), _line(validation, "loss", "validation", COLORS[1])]
    skipped = [row["step"] for row in metrics if row["kind"] == "skipped"]
    charts = [line_chart("Loss", lines, "weighted loss")]
    charts.append(
        line_chart("Learning rate", [_line(train, "learning_rate", "learning rate", COLORS[2])], "learning rate")
    )
    charts.append(
        line_chart("Gradient norm", [_line(train, "gradient_norm", "gradient norm", COLORS[4])], "norm before clipping")
    )
    if skipped:
        counts = list(range(1, len(skipped) + 1))
        charts.append(line_chart("Skipped steps", [Line("skipped", skipped, counts, COLORS[1])], "steps so far"))
    return charts


def _layer_charts(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    train = [row for row in metrics if row["kind"] == "train"]
    validation = [row for row in metrics if row["kind"] == "validation"]
    charts = []
    for title, rows, prefix, label in (
        ("Validation loss of each layer", validation, "layer_", "loss per frame"),
        ("Cosine similarity, validation (no masks)", validation, "cosine_unmasked_layer_", "cosine"),
        ("Cosine similarity at masked frames, training", train, "cosine_masked_layer_", "cosine"),
        ("Cosine similarity at unmasked frames, training", train, "cosine_unmasked_layer_", "cosine"),
    ):
        keys = sorted({key for row in rows for key in row if key.startswith(prefix)})
        if keys:
            lines = [
                _line(rows, key, "layer " + key.removeprefix(prefix).lstrip("0"), layer_color(n, len(keys)))
                for n, key in enumerate(keys)
            ]
            charts.append(line_chart(title, lines, label))
    return charts or [line_chart("Validation loss of each layer", [], "loss")]


def _speed_charts(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    train = [row for row in metrics if row["kind"] == "train"]
    shares = [
        _line(train, "data_wait", "waiting for data", COLORS[1], 100),
        _line(train, "padding_waste", "padding", COLORS[3], 100),
    ]
    charts = [
        line_chart(
            "Throughput", [_line(train, "audio_hours_per_minute", "throughput", COLORS[0])], "hours of audio per minute"
        ),
        line_chart("Waste", shares, "per cent"),
    ]
    if any("bytes_per_second" in row for row in train):
        charts.append(
            line_chart("Read from the cache", [_line(train, "bytes_per_second", "read", COLORS[2], 1e-6)], "MB/s")
        )
    return charts


def _maps(maps: FeatureMaps) -> str:
    parts = [
        f"<p>{html.escape(maps.utterance)}, {maps.seconds:.1f} s, unmasked. The channels that vary most in the teacher, each in the "
        f"teacher's standard deviations from its mean: blue {-_REACH:g} and below, white 0, red {_REACH:g} and above.</p><figure>"
    ]
    for layer, teacher, student in maps.layers:
        similarity = np.mean(
            (teacher * student).sum(1)
            / np.maximum(np.linalg.norm(teacher, axis=1) * np.linalg.norm(student, axis=1), 1e-12)
        )
        parts.append(
            f'<div class="maps"><div class="layer">Layer {layer} <span class="faint">(cosine {similarity:.2f})</span></div>'
        )
        for name, values in (("teacher", teacher), ("student", student), ("student - teacher", student - teacher)):
            image = heatmap(values, _REACH).replace('alt=""', f'alt="layer {layer}, {name}"')
            axis = f'<div class="time"><span>0 s</span><span>{name}</span><span>{maps.seconds:.1f} s</span></div>'
            parts.append(f"<div>{image}{axis}</div>")
        parts.append("</div>")
    return "".join(parts) + "</figure>"
