"""A run as one HTML page that opens anywhere: no network, no script, one file."""

import html
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_distill.pipeline.files import write_text
from ray_distill.pipeline.reports.charts import COLORS, Line, heatmap, line_chart
from ray_distill.student import Student
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.targets.target_batch import TargetReader

_CHANNELS = 96
"""Shown of each layer: those that vary most."""
_REACH = 2.5
"""Standard deviations at which the colours of a heatmap end."""
_SAMPLE_SECONDS = 6.0
_SHOWN_SECONDS = 10.0
"""Of the sample utterance: noisy pictures compress badly, and the page is to stay below 2 MB."""
_POINTS = 400
"""Of a line: more than the chart has pixels; a published recipe writes 24,000 rows."""

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --faint: #5c6670; --line: #d9dee3; --page: #fff; --card: #f6f8fa; }
@media screen and (prefers-color-scheme: dark) {
  :root { --text: #e6e9ec; --faint: #9aa4ae; --line: #3a424b; --page: #14181d; --card: #1c2127; }
  .layers svg { --faint: #5c6670; --line: #bfbfbf; }
  .layers svg, .layers i { filter: invert(1) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1040px; padding: 28px 20px 60px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
a { color: inherit; } h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 34px 0 10px; } p { margin: 6px 0 12px; }
.faint, figcaption span { color: var(--faint); }
.warning { background: #fff3cd; color: #5c4400; border-left: 4px solid #d39e00; padding: 10px 14px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 20px; } .tile span { color: var(--faint); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 18px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; min-width: 0; }
.charts > .layers > figure { height: 100%; }
figcaption { font-weight: 600; margin-bottom: 6px; } .none { color: var(--faint); }
svg { width: 100%; height: auto; display: block; overflow: visible; } svg text { font-size: 11px; fill: var(--faint); }
svg text[transform] { translate: -9px; }
svg .grid { stroke: var(--line); } svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; color: var(--faint); margin-top: 6px; }
.legend i { display: inline-block; width: 14px; height: 3px; margin-right: 5px; vertical-align: middle; }
.maps { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 6px 14px; margin-bottom: 18px; }
.maps img { width: 100%; height: 130px; display: block; image-rendering: pixelated; outline: 1px solid var(--line); }
.maps > div { font-size: 12px; color: var(--faint); min-width: 0; }
.maps .layer { grid-column: 1 / -1; font-size: 15px; font-weight: 600; color: var(--text); }
.time { position: relative; height: 24px; }
.time span { position: absolute; top: 0; padding-top: 5px; line-height: 16px; transform: translateX(-50%); white-space: nowrap; }
.time span::before { content: ""; position: absolute; left: 50%; top: 0; height: 5px; border-left: 1px solid var(--faint); }
.scale { max-width: 300px; margin: 0 16px 14px; font-size: 12px; color: var(--faint); }
.scale img { width: 100%; height: 12px; display: block; }
table { border-collapse: collapse; width: 100%; }
td, th { padding: 4px 10px 4px 0; vertical-align: top; text-align: left; font-weight: normal; border-top: 1px solid var(--line); }
.facts th { color: var(--faint); white-space: nowrap; width: 1%; }
.numbers { font-size: 12px; font-variant-numeric: tabular-nums; }
.numbers td, .numbers th { padding: 1px 0 1px 6px; text-align: right; }
.numbers thead th { color: var(--faint); border: 0; vertical-align: bottom; line-height: 1.25; overflow-wrap: normal; }
pre { white-space: pre-wrap; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px;
  font-size: 12px; }
@media (max-width: 560px) {
  svg text { font-size: 14px; } .maps { grid-template-columns: 1fr; } .facts th { white-space: normal; width: 26%; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 12px; } .legend i { print-color-adjust: exact; }
  .charts { grid-template-columns: 1fr 1fr; } figure, .maps, .tile { break-inside: avoid; } .maps-of { break-inside: auto; }
  h2 { break-after: avoid; } details::details-content { content-visibility: visible; block-size: auto; }
}
"""


@dataclass(frozen=True)
class LayerMap:
    """A layer of one utterance, teacher and student.

    Attributes:
        layer: 1-based teacher layer.
        teacher, student: (T, C) features of the C channels that vary most, in the teacher's standard deviations from its mean.
        cosine: similarity of the whole, unscaled features, mean over frames.
    """

    layer: int
    teacher: np.ndarray
    student: np.ndarray
    cosine: float


@dataclass(frozen=True)
class FeatureMaps:
    """One utterance through teacher and student.

    Attributes:
        utterance: its id.
        seconds: of audio.
        layers: some of the layers learnt from.
    """

    utterance: str
    seconds: float
    layers: Sequence[LayerMap]


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
        cosine = torch.nn.functional.cosine_similarity(teacher, projections[position], dim=-1).mean()
        layers.append(LayerMap(reader.layers[position], shown[0], shown[1], float(cosine)))
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
    maps: FeatureMaps | str,
    config: str,
    probes: str = "",
) -> None:
    """Writes the page.

    Args:
        path: of the HTML file, in the run's folder.
        summary: as in ``summary.json``; its ``training`` is None where the training is not finished.
        facts: lines of the table at the top, by name.
        metrics: rows of ``metrics.jsonl``.
        maps: features of a sample utterance, or a sentence that says why there are none.
        config: the resolved configuration, as YAML.
        probes: sections of `ray_distill.pipeline.probing.probe.probe_section`, if any.
    """
    escape = html.escape
    warnings = "".join(f'<p class="warning">{escape(text)}</p>' for text in _warnings(summary, metrics))
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in _tiles(summary, metrics)
    )
    table = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in facts.items()
    )
    versions = f"Python {platform.python_version()}, " + ", ".join(
        f"{n} {version(n)}" for n in ("torch", "ray", "pyarrow")
    )
    files = " · ".join(f'<a href="{name}">{name}</a>' for name in _FILES if (path.parent / name).exists())
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(summary["name"])}: distillation report</title><style>{STYLE}</style></head><body><main>
<h1>{escape(summary["name"])}</h1>
<p class="faint">Distillation of {escape(summary["teacher"])} · {time.strftime("%Y-%m-%d %H:%M %Z")} · {escape(versions)}</p>
{warnings}<div class="tiles">{tiles}</div>
<table class="facts">{table}</table>
<h2>Training</h2>{_notes(metrics)}<div class="charts">{"".join(_training_charts(metrics))}</div>
<h2>Teacher and student, layer by layer</h2>
<div class="charts">{"".join(_layer_charts(metrics, _LAYER_CHARTS[1:]))}{_layer_table(metrics)}</div>
<h2>Speed</h2><div class="charts">{"".join(_speed_charts(metrics))}</div>
{f"<h2>Probes</h2>{probes}" if probes else ""}
<h2>Features of an utterance</h2>{_maps(maps)}
<h2>Configuration</h2><details><summary>All settings of this run</summary><pre>{escape(config)}</pre></details>
<p class="faint">Files: {files}</p>
</main></body></html>
"""
    write_text(path, page)


_FILES = (
    *("summary.json", "metrics.jsonl", "config.yaml", "corpus/skipped.csv", "tensorboard/", "checkpoints/"),
    *("export/model.safetensors", "export/config.json", "ray.log"),
)

Rows = Sequence[Mapping[str, Any]]


def _of(metrics: Rows, kind: str) -> Rows:
    return [row for row in metrics if row["kind"] == kind]


def _warnings(summary: Mapping[str, Any], metrics: Rows) -> list[str]:
    """What a reader must know before the numbers."""
    found = []
    if summary["teacher_is_random"]:
        found.append("The teacher has seeded random weights: this run shows the machinery, its features mean nothing.")
    train, trained = _of(metrics, "train"), summary["training"]
    last = train[-1]["step"] if train else 0
    if trained is None:
        planned = f" of {train[-1]['steps']:,}" if train else ""
        found.append(f"The training is not finished: step {last:,}{planned} is the last that is recorded.")
    elif last < trained["steps"]:
        found.append(
            f"metrics.jsonl ends at step {last:,}, but the training went on to step {trained['steps']:,}: "
            "the charts do not show all of it."
        )
    if not _of(metrics, "validation"):
        found.append("No validation is recorded.")
    return found


def _tiles(summary: Mapping[str, Any], metrics: Rows) -> list[tuple[str, str]]:
    train, validation, trained = _of(metrics, "train"), _of(metrics, "validation"), summary["training"]
    tiles = []
    if trained is not None:
        first, best = trained["first_validation_loss"], trained["best_validation_loss"]
        tiles.append((f"best validation loss, from {first:.4g} at the start", f"{best:.4g}"))
        tiles.append((f"optimiser steps, {trained['skipped_steps']} of them skipped", f"{trained['steps']:,}"))
    elif validation:
        first, best = validation[0]["loss"], min(row["loss"] for row in validation)
        tiles.append((f"best validation loss so far, from {first:.4g} at the start", f"{best:.4g}"))
    ratio = summary["teacher_parameters"] / summary["student_parameters"]
    tiles.append(
        (f"student parameters, 1/{ratio:.3g} of the teacher's", f"{summary['student_parameters'] / 1e6:.3g} M")
    )
    if trained is not None:
        tiles.append(("of training", _duration(trained["seconds"])))
    if train:
        tiles.append(("of training time spent waiting for data", f"{np.mean([row['data_wait'] for row in train]):.1%}"))
    if summary["cache_bytes_per_second"] is not None:
        tiles.append(("of cache per second of audio", f"{summary['cache_bytes_per_second'] / 1e3:.3g} kB"))
    return tiles


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{rest} s"


def _notes(metrics: Rows) -> str:
    """How rows became points, and which steps were skipped."""
    notes = []
    rows = -(-len(_of(metrics, "train")) // _POINTS)
    if rows > 1:
        notes.append(
            f"Each point is the mean of up to {rows} rows of metrics.jsonl; of the gradient norm, the largest."
        )
    skipped = _of(metrics, "skipped")
    if skipped:
        causes = Counter(row["cause"] for row in skipped)
        why = ", ".join(f"{count} for the {cause}" for cause, count in causes.most_common())
        steps = sorted({row["step"] for row in skipped})
        which = ", ".join(f"{step:,}" for step in steps[:8]) + (f", ... {steps[-1]:,}" if len(steps) > 8 else "")
        notes.append(f"Steps skipped because a value was not finite: {len(skipped):,} ({why}), at {which}.")
    return f'<p class="faint">{html.escape(" ".join(notes))}</p>' if notes else ""


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _line(
    rows: Rows,
    key: str,
    label: str,
    color: str,
    factor: float = 1.0,
    merge: Callable[[list[float]], float] = _mean,
) -> Line:
    """A line of at most _POINTS points, each of some rows in a row; where none of them has the value, a gap."""
    x, y = [], []
    for part in np.array_split(np.arange(len(rows)), min(len(rows), _POINTS) or 1):
        values = [factor * rows[n][key] for n in part if key in rows[n]]
        if len(part):
            x.append(rows[part[-1]]["step"])
            y.append(merge(values) if values else math.nan)
    return Line(label, x, y, color)


def _marks(metrics: Rows, line: Line) -> list[Line]:
    """Dots on ``line`` where steps were skipped: points with a gap after each."""
    steps = np.array(sorted({row["step"] for row in _of(metrics, "skipped")}))
    if not len(steps) or not line.x:
        return []
    steps = steps[np.linspace(0, len(steps) - 1, min(len(steps), _POINTS)).round().astype(int)]
    heights = np.interp(steps, line.x, line.y)
    x = [float(step) for step in steps for _ in range(2)]
    y = [value for height in heights for value in (float(height), math.nan)]
    return [Line("skipped step", x, y, "currentColor")]


def _training_charts(metrics: Rows) -> list[str]:
    train = _of(metrics, "train")
    loss = _line(train, "loss", "training", COLORS[0])
    lines = [loss, _line(_of(metrics, "validation"), "loss", "validation", COLORS[1]), *_marks(metrics, loss)]
    rate = _line(train, "learning_rate", "learning rate", COLORS[0])
    norm = _line(train, "gradient_norm", "gradient norm", COLORS[0], merge=max)
    charts = [
        line_chart("Training and validation loss", [line for line in lines if line.x], "weighted loss"),
        *_layer_charts(metrics, _LAYER_CHARTS[:1]),
        line_chart("Gradient norm", [norm], "norm before clipping"),
        line_chart("Learning rate", [rate], "learning rate"),
    ]
    if any("loss_scale" in row for row in train):
        scale = _line(train, "loss_scale", "loss scale", COLORS[0], merge=min)
        charts.append(line_chart("Loss scale (fp16)", [scale], "loss scale"))
    return charts


_LAYER_CHARTS = (
    ("Validation loss of each layer", "validation", "layer_", "loss per frame"),
    ("Cosine similarity, validation (no masks)", "validation", "cosine_unmasked_layer_", "cosine"),
    ("Cosine similarity at masked frames, training", "train", "cosine_masked_layer_", "cosine"),
    ("Cosine similarity at unmasked frames, training", "train", "cosine_unmasked_layer_", "cosine"),
)
_COLUMNS = ("validation loss", "cosine, validation", "cosine, masked, training", "cosine, unmasked, training")
"""What the table calls them."""


def layer_color(number: int, count: int) -> str:
    """The number-th (from 0) of ordered colours, ever lighter (violet, blue, green): order is seen without seeing hue.

    All have a contrast of 3 on the light page, and on the dark page, where the style inverts them.
    """
    stops = np.array([[52, 0, 92], [60, 80, 139], [30, 130, 140], [70, 155, 70]])
    at = number / max(1, count - 1) * (len(stops) - 1)
    red, green, blue = (int(np.interp(at, np.arange(len(stops)), channel)) for channel in stops.T)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _layer_keys(metrics: Rows, kind: str, prefix: str) -> tuple[Rows, dict[int, str]]:
    """The rows that have a value for each layer, and its key by layer."""
    rows = _of(metrics, kind)
    keys = sorted({key for row in rows for key in row if key.startswith(prefix)})
    layers = {int(key.removeprefix(prefix)): key for key in keys}
    return [row for row in rows if any(key in row for key in keys)], layers


def _layer_charts(metrics: Rows, charts: Sequence[tuple[str, str, str, str]]) -> list[str]:
    found = []
    for title, kind, prefix, label in charts:
        rows, keys = _layer_keys(metrics, kind, prefix)
        lines = [
            _line(rows, key, f"layer {layer}", layer_color(n, len(keys))) for n, (layer, key) in enumerate(keys.items())
        ]
        if lines:
            found.append(f'<div class="layers">{line_chart(title, lines, label)}</div>')
    return found


def _layer_table(metrics: Rows) -> str:
    """The last value of each line, for those who do not see lines."""
    columns = {}
    for name, (_, kind, prefix, _) in zip(_COLUMNS, _LAYER_CHARTS, strict=True):
        rows, keys = _layer_keys(metrics, kind, prefix)
        if rows:
            columns[name] = {layer: rows[-1][key] for layer, key in keys.items()}
    if not columns:
        return ""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{layer}</th>'
        + "".join(f"<td>{values[layer]:.3f}</td>" if layer in values else "<td></td>" for values in columns.values())
        + "</tr>"
        for layer in sorted({layer for values in columns.values() for layer in values})
    )
    return (
        "<figure><figcaption>Last values of each layer</figcaption>"
        f'<table class="numbers"><thead><tr><th scope="col">layer</th>{head}</tr></thead><tbody>{body}</tbody></table></figure>'
    )


def _speed_charts(metrics: Rows) -> list[str]:
    train = _of(metrics, "train")
    charts = [
        line_chart(title, [_line(train, key, title.lower(), COLORS[0], factor)], label)
        for title, key, factor, label in (
            ("Throughput", "audio_hours_per_minute", 1, "hours of audio per minute"),
            ("Time spent waiting for data", "data_wait", 100, "per cent of the time"),
            ("Padding", "padding_waste", 100, "per cent of the samples"),
        )
    ]
    if any("bytes_per_second" in row for row in train):
        charts.append(
            line_chart("Read from the cache", [_line(train, "bytes_per_second", "read", COLORS[0], 1e-6)], "MB/s")
        )
    return charts


def _maps(maps: FeatureMaps | str) -> str:
    if isinstance(maps, str):
        return f'<p class="none">{html.escape(maps)}</p>'
    per_second = len(maps.layers[0].teacher) / maps.seconds  # 50 frames, or AST's 120 patches.
    frames = round(_SHOWN_SECONDS * per_second)
    cut = f", of which the first {_SHOWN_SECONDS:g} s are shown" if len(maps.layers[0].teacher) > frames else ""
    scale = heatmap(np.linspace(-_REACH, _REACH, 255)[:, None], _REACH).replace(
        'alt=""', f'alt="colours from blue at -{_REACH:g} over white at 0 to red at {_REACH:g}"'
    )
    parts = [
        f"<p>{html.escape(maps.utterance)}, {maps.seconds:.1f} s{cut}, unmasked. Each row of a picture is a channel (those that vary "
        "most in the teacher), in the teacher's standard deviations from its mean; the colours are the same in all pictures.</p>"
        f'<figure class="maps-of"><div class="scale">{scale}{_axis([-_REACH, 0, _REACH], -_REACH, _REACH)}</div>'
    ]
    for layer in maps.layers:
        teacher, student = layer.teacher[:frames], layer.student[:frames]
        parts.append(
            f'<div class="maps"><div class="layer">Layer {layer.layer} '
            f'<span class="faint">cosine similarity {layer.cosine:.2f}</span></div>'
        )
        for name, values in (("teacher", teacher), ("student", student), ("student - teacher", student - teacher)):
            image = heatmap(values, _REACH).replace('alt=""', f'alt="layer {layer.layer}, {name}: channels over time"')
            parts.append(f"<div>{name}{image}{_time_axis(len(values) / per_second)}</div>")
        parts.append("</div>")
    return "".join(parts) + "</figure>"


def _time_axis(seconds: float) -> str:
    step = next(step for step in (0.1, 0.2, 0.5, 1, 2, 5) if seconds / step <= 6)
    return _axis([n * step for n in range(int(seconds / step + 1e-9) + 1)], 0, seconds, " s")


def _axis(ticks: Sequence[float], low: float, high: float, unit: str = "") -> str:
    """Ticks under a picture that goes from low to high; the last one has the unit."""
    marks = []
    for n, tick in enumerate(ticks):
        text = f"{tick:g}{unit if n == len(ticks) - 1 else ''}"
        marks.append(f'<span style="left:{(tick - low) / (high - low):.2%}">{text}</span>')
    return f'<div class="time">{"".join(marks)}</div>'
