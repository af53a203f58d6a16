"""Line charts as inline SVG and heatmaps as inline PNG, for a page that needs no network and no script."""

import base64
import html
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 38

# Okabe and Ito's colours, which colour-blind readers tell apart; dark enough for white, light enough for black.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")


@dataclass(frozen=True)
class Line:
    """A line of a chart: points in order of x; values that are not finite break it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str


def line_chart(title: str, lines: Sequence[Line], y_label: str, *, x_label: str = "optimiser step") -> str:
    """A figure with axes, lines and a legend; a logarithmic y axis where values span more than a factor of 10.

    Returns:
        HTML; a sentence instead of a chart where there is nothing to draw.
    """
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    caption = f"<figcaption>{html.escape(title)}</figcaption>"
    if not points:
        return f'<figure>{caption}<p class="none">Nothing was recorded.</p></figure>'
    xs, ys = [x for x, _ in points], [y for _, y in points]
    logarithmic = min(ys) > 0 and max(ys) / min(ys) > 10
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    y_ticks = _log_ticks(min(ys), max(ys)) if logarithmic else _ticks(min(ys), max(ys))
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def px(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)

    def py(y: float) -> float:
        scale = math.log if logarithmic else float
        share = (scale(y) - scale(y_low)) / (scale(y_high) - scale(y_low))
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{py(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in _ticks(x_low, x_high, 5):
        if x_low <= tick <= x_high:
            parts.append(
                f'<text x="{px(tick):.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_number(tick)}</text>'
            )
    parts.append(f'<text x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{html.escape(x_label)}</text>')
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(
        f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'
    )
    for line in lines:
        for piece in _pieces(line):
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in piece)
            name = f"<title>{html.escape(line.label)}: {_number(piece[0][1])} to {_number(piece[-1][1])}</title>"
            if len(piece) == 1:
                x, y = path.split(",")
                parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{line.color}">{name}</circle>')
            else:
                parts.append(f'<polyline points="{path}" stroke="{line.color}">{name}</polyline>')
    parts.append("</svg>")
    keys = "".join(f'<span><i style="background:{line.color}"></i>{html.escape(line.label)}</span>' for line in lines)
    legend = f'<div class="legend">{keys}</div>' if len(lines) > 1 else ""
    return f"<figure>{caption}{''.join(parts)}{legend}</figure>"


def _pieces(line: Line) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if math.isfinite(y):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``."""
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... (or powers of ten only, over many of them) around the values."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [m * 10.0**power for power in range(first, last + 1) for m in steps]
    inside = [tick for tick in ticks if low <= tick <= high]
    below, above = [tick for tick in ticks if tick < low], [tick for tick in ticks if tick > high]
    return [*below[-1:], *inside, *above[:1]]


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 10_000 else f"{value:,.0f}"


def dot_chart(title: str, groups: Sequence[tuple[str, Sequence[float]]], x_label: str, colors: Sequence[str]) -> str:
    """A figure with a row for each group: its values as dots, their mean as a bar; the first group's mean as a dashed line.

    Args:
        title: of the figure.
        groups: labels and finite values; a group without values has a row without dots.
        x_label: what the values are.
        colors: one for each group.

    Returns:
        HTML; a sentence instead of a chart where there is nothing to draw.
    """
    values = [value for _, group in groups for value in group]
    caption = f"<figcaption>{html.escape(title)}</figcaption>"
    if not values:
        return f'<figure>{caption}<p class="none">Nothing was recorded.</p></figure>'
    row, left = 26, min(220, 16 + max(round(6.2 * len(label)) for label, _ in groups))
    height = _TOP + row * len(groups) + _BOTTOM
    bottom = height - _BOTTOM
    ticks = _ticks(min(values), max(values), 5)
    low, high = ticks[0], ticks[-1]
    digits = next(d for d in range(20) if all(abs(round(tick, d) - tick) < 1e-6 * (high - low) for tick in ticks))

    def px(x: float) -> float:
        return left + (x - low) / (high - low) * (WIDTH - left - _RIGHT)

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}">']
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{px(tick):.1f}" x2="{px(tick):.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{px(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.{digits}f}</text>')
    parts.append(f'<text x="{(WIDTH + left) / 2}" y="{height - 5}" text-anchor="middle">{html.escape(x_label)}</text>')
    if first := groups[0][1]:
        x = px(sum(first) / len(first))
        parts.append(
            f'<polyline points="{x:.1f},{_TOP} {x:.1f},{bottom}" stroke="{colors[0]}" stroke-dasharray="3 4"/>'
        )
    for n, ((label, group), color) in enumerate(zip(groups, colors, strict=True)):
        y = _TOP + row * (n + 0.5)
        shown = label if len(label) <= 34 else f"{label[:33]}…"
        name = f"<title>{html.escape(label)}: {', '.join(map(_number, group))}</title>"
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{html.escape(shown)}</text>')
        parts += [
            f'<circle cx="{px(v):.1f}" cy="{y:.1f}" r="4" fill="{color}" fill-opacity=".55">{name}</circle>'
            for v in group
        ]
        if group:
            x = px(sum(group) / len(group))
            parts.append(
                f'<polyline points="{x:.1f},{y - 9:.1f} {x:.1f},{y + 9:.1f}" stroke="{color}">{name}</polyline>'
            )
    return f"<figure>{caption}{''.join(parts)}</svg></figure>"


def heatmap(values: np.ndarray, reach: float) -> str:
    """(T, C) to an ``<img>``: time from left to right, channels upwards, blue at -reach, white at 0, red at +reach."""
    share = np.clip(values.T[::-1] / reach, -1, 1)
    palette = np.empty((255, 3), np.uint8)
    low, middle, high = np.array([30, 80, 160]), np.array([247, 247, 247]), np.array([178, 40, 30])
    for n in range(255):
        at = n / 127 - 1
        palette[n] = middle + abs(at) * ((high if at > 0 else low) - middle)
    pixels = np.rint(share * 127 + 127).astype(np.uint8)
    data = base64.b64encode(_png(pixels, palette)).decode()
    return f'<img alt="" src="data:image/png;base64,{data}">'


def _png(pixels: np.ndarray, palette: np.ndarray) -> bytes:
    """(height, width) uint8 indices into a (N, 3) uint8 palette, as a PNG file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels], 1).tobytes()
    chunks = (chunk(b"IHDR", header), chunk(b"PLTE", palette.tobytes()), chunk(b"IDAT", zlib.compress(rows, 9)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")
