"""Metrics that a training logs, and their charts: losses, similarity by layer, speed."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ray_distill.pipeline.reports.charts import COLORS, Chart, Scale, Series, line_chart, ordered_color

Rows = Sequence[Mapping[str, Any]]

_POINTS = 300
"""Maximum number of points per curve, about the width of a chart in pixels. Published recipes log 24,000 rows."""
_LAYER_CHARTS = (
    ("Validation loss by layer", "validation", "layer_", "loss per frame"),
    ("Cosine similarity, validation (no masks)", "validation", "cosine_unmasked_layer_", "cosine similarity"),
    ("Cosine similarity at masked frames, training", "train", "cosine_masked_layer_", "cosine similarity"),
    ("Cosine similarity at unmasked frames, training", "train", "cosine_unmasked_layer_", "cosine similarity"),
    ("Symbols predicted right at masked frames, validation", "validation", "accuracy_masked_layer_", "share"),
    ("Symbols predicted right at unmasked frames, validation", "validation", "accuracy_unmasked_layer_", "share"),
)
"""Title, kind of row, prefix of the keys and title of the y axis of each chart with a curve per layer."""
_TEACHER_LOSS = "teacher_loss_"
"""Prefix of the keys of several teachers' losses in rows of validations."""
_TEACHER_WEIGHT = "teacher_weight_"
"""Prefix of the keys of the factors of these losses in rows of trainings."""
_LAYER_COLUMNS = (
    *("validation loss", "cosine, validation", "cosine, masked, training", "cosine, unmasked, training"),
    *("symbols right, masked, validation", "symbols right, unmasked, validation"),
)
"""Headings of the same values in the table of layers."""


def rows_of_kind(metrics: Rows, kind: str) -> Rows:
    """Return the rows of one kind: ``train``, ``validation`` or ``skipped``."""
    return [row for row in metrics if row["kind"] == kind]


def training_charts(metrics: Rows) -> list[Chart]:
    """Return the charts of loss, gradient norm, learning rate and, with fp16, loss scale."""
    train = rows_of_kind(metrics, "train")
    loss = _series(train, "loss", "training", COLORS[0])
    series = [loss, _series(rows_of_kind(metrics, "validation"), "loss", "validation", COLORS[1])]
    series += _skipped_steps(metrics, loss)
    norm = _series(train, "gradient_norm", "gradient norm", COLORS[0], merge=max)
    rate = _series(train, "learning_rate", "learning rate", COLORS[0])
    charts = [
        line_chart("Training and validation loss", [one for one in series if len(one.x)], "weighted loss"),
        *_teacher_charts(metrics),
        *_layer_charts(metrics, _LAYER_CHARTS[:1]),
        line_chart("Gradient norm", [norm], "norm before clipping"),
        line_chart("Learning rate", [rate], "learning rate", y_scale="linear"),
    ]
    if any("loss_scale" in row for row in train):
        scale = _series(train, "loss_scale", "loss scale", COLORS[0], merge=min)
        charts.append(line_chart("Loss scale (fp16)", [scale], "loss scale"))
    return charts


def _teacher_charts(metrics: Rows) -> list[Chart]:
    """Return a chart of the loss of each of several teachers, and one of the factors of their losses."""
    train, validation = rows_of_kind(metrics, "train"), rows_of_kind(metrics, "validation")
    keys = sorted({key for key in set().union(*validation) if key.startswith(_TEACHER_LOSS)})
    names = [key.removeprefix(_TEACHER_LOSS) for key in keys]
    charts = []
    for key, name in zip(keys, names, strict=True):
        series = [_series(train, key, "training", COLORS[0]), _series(validation, key, "validation", COLORS[1])]
        shown = [one for one in series if any(not math.isnan(value) for value in one.y)]
        title = f"Loss of teacher {name.replace('.', ', domain ')}"
        charts.append(line_chart(title, shown, "loss per frame, before it is balanced"))
    if names and train:
        # With weights by domain, the teacher as a whole has no factor.
        weighted = sorted({key for key in set().union(*train) if key.startswith(_TEACHER_WEIGHT)})
        factors = [
            _series(train, key, key.removeprefix(_TEACHER_WEIGHT), ordered_color(n, len(weighted)))
            for n, key in enumerate(weighted)
        ]
        charts.append(line_chart("Factors of the teachers' losses", factors, "factor", y_scale="linear"))
    return charts


def similarity_charts(metrics: Rows) -> list[Chart]:
    """Return the charts of the cosine similarity or the right symbols of teacher and student, with a curve per layer."""
    return _layer_charts(metrics, _LAYER_CHARTS[1:])


def speed_charts(metrics: Rows) -> list[Chart]:
    """Return the charts of throughput, waiting time, padding and, with a cache, bytes read."""
    train = rows_of_kind(metrics, "train")
    charts = [
        line_chart(title, [_series(train, key, title.lower(), COLORS[0], factor)], y_title)
        for title, key, factor, y_title in (
            ("Throughput", "audio_hours_per_minute", 1, "hours of audio per minute"),
            ("Time spent waiting for data", "data_wait", 100, "per cent of the time"),
            ("Padding", "padding_waste", 100, "per cent of the samples"),
        )
    ]
    if any("bytes_per_second" in row for row in train):
        read = _series(train, "bytes_per_second", "read", COLORS[0], 1e-6)
        charts.append(line_chart("Read from the cache", [read], "MB/s"))
    return charts


def last_layer_values(metrics: Rows) -> tuple[list[str], dict[str, list[float | None]]]:
    """Return the headings and, by layer, the last values of the curves with a line per layer."""
    columns = {}
    for heading, (_, kind, prefix, _) in zip(_LAYER_COLUMNS, _LAYER_CHARTS, strict=True):
        rows, keys = _layer_keys(metrics, kind, prefix)
        if rows:
            columns[heading] = {layer: rows[-1][key] for layer, key in keys.items()}
    layers = list(dict.fromkeys(layer for values in columns.values() for layer in values))
    return list(columns), {layer: [values.get(layer) for values in columns.values()] for layer in layers}


def curve_notes(metrics: Rows) -> str:
    """Return sentences about how rows were merged into points and which steps were skipped; empty if neither applies."""
    notes = []
    rows = -(-len(rows_of_kind(metrics, "train")) // _POINTS)
    if rows > 1:
        notes.append(
            f"Each point is the mean of up to {rows} rows of metrics.jsonl; for the gradient norm, the maximum, and for the loss "
            "scale, the minimum."
        )
    skipped = rows_of_kind(metrics, "skipped")
    if skipped:
        causes = Counter(row["cause"] for row in skipped)
        counts = ", ".join(f"{cause}: {count:,}" for cause, count in causes.most_common())
        steps = sorted({row["step"] for row in skipped})
        listed = ", ".join(f"{step:,}" for step in steps[:8]) + (f", ... {steps[-1]:,}" if len(steps) > 8 else "")
        notes.append(
            f"{len(skipped):,} {'step was' if len(skipped) == 1 else 'steps were'} skipped because a value was not finite "
            f"({counts}), at {'step' if len(steps) == 1 else 'steps'} {listed}."
        )
    return " ".join(notes)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _series(
    rows: Rows,
    key: str,
    label: str,
    color: str,
    factor: float = 1.0,
    merge: Callable[[list[float]], float] = _mean,
) -> Series:
    """Return a curve of at most _POINTS points, each merged from consecutive rows; a gap where none of them has the value."""
    x, y = [], []
    bounds = np.linspace(0, len(rows), min(len(rows), _POINTS) + 1).round().astype(int).tolist()
    for begin, end in itertools.pairwise(bounds):
        values = [factor * row[key] for row in rows[begin:end] if key in row]
        x.append(rows[end - 1]["step"])
        y.append(merge(values) if values else math.nan)
    return Series(label, x, y, color)


def _skipped_steps(metrics: Rows, curve: Series) -> list[Series]:
    """Return points on a curve where steps were skipped."""
    steps = np.array(sorted({row["step"] for row in rows_of_kind(metrics, "skipped")}))
    if not len(steps) or not curve.x:
        return []
    steps = steps[np.linspace(0, len(steps) - 1, min(len(steps), _POINTS)).round().astype(int)]
    heights = np.interp(steps, curve.x, curve.y)
    return [Series("skipped step", steps.tolist(), heights.tolist(), "var(--text)", mark="points")]


def layer_label(key: str, prefix: str) -> str:
    """Return the name of the layer that a key is about: its number, or ``NAME NUMBER`` with several teachers."""
    teacher, _, number = key.removeprefix(prefix).rpartition("_")
    return f"{teacher} {int(number)}".lstrip()


def _layer_keys(metrics: Rows, kind: str, prefix: str) -> tuple[Rows, dict[str, str]]:
    """Return the rows with values for layers, and the key of each layer by its name."""
    rows = rows_of_kind(metrics, kind)
    keys = {key for key in set().union(*rows) if key.startswith(prefix)}
    layers = {layer_label(key, prefix): key for key in sorted(keys)}
    return [row for row in rows if not keys.isdisjoint(row)], layers


def _layer_charts(metrics: Rows, charts: Sequence[tuple[str, str, str, str]]) -> list[Chart]:
    found = []
    for title, kind, prefix, y_title in charts:
        rows, keys = _layer_keys(metrics, kind, prefix)
        series = [
            _series(rows, key, f"layer {layer}" if layer.isdigit() else layer, ordered_color(n, len(keys)))
            for n, (layer, key) in enumerate(keys.items())
        ]
        if series:
            scale: Scale = "linear" if prefix.startswith(("cosine", "accuracy")) else "auto"
            found.append(line_chart(title, series, y_title, y_scale=scale))
    return found
