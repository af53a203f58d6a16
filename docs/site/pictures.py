"""The diagrams of docs/concepts: boxes and arrows as SVG, in the reader's light or dark colours."""

from dataclasses import dataclass
from xml.sax.saxutils import escape

UNIT_X, UNIT_Y, HEIGHT = 90, 62, 40
STYLE = (
    "text{font:13px sans-serif;text-anchor:middle;fill:#37474f}.s{font-size:11px;fill:#607d8b}"
    "rect{fill:#eceff1;stroke:#546e7a;rx:4}.a{fill:#bbdefb}.m{fill:#ffe0b2}.n{fill:none;stroke-dasharray:4}"
    "path{stroke:#546e7a;fill:none}"
    "@media(prefers-color-scheme:dark){text{fill:#cfd8dc}.s{fill:#90a4ae}rect{fill:#263238;stroke:#90a4ae}"
    ".a{fill:#0d47a1}.m{fill:#5d4037}path{stroke:#90a4ae}}"
)


@dataclass(frozen=True)
class Box:
    """A box at (x, y), ``width`` wide, all in grid units. ``kind`` is ``a`` or ``m`` for a colour, ``n`` for a dashed outline."""

    x: float
    y: float
    text: str
    width: float = 1.6
    kind: str = ""
    note: str = ""
    height: float = 0.0


def picture(title: str, boxes: list[Box], arrows: list[tuple[int, int, str]]) -> str:
    """Return the picture as SVG. Arrows are (from, to, label), where boxes are given by their index in ``boxes``."""
    width = max((box.x + box.width) * UNIT_X for box in boxes) + 14
    height = max(box.y * UNIT_Y + (box.height * UNIT_Y or HEIGHT) for box in boxes) + 14
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        '<defs><marker id="h" orient="auto" markerWidth="8" markerHeight="8" refX="7" refY="3">'
        '<path d="M0 0L7 3L0 6" /></marker></defs>',
    ]
    for box in boxes:
        x, y, w = box.x * UNIT_X + 7, box.y * UNIT_Y + 7, box.width * UNIT_X
        h = box.height * UNIT_Y or HEIGHT
        lines.append(f'<rect class="{box.kind}" x="{x:.0f}" y="{y:.0f}" width="{w:.0f}" height="{h:.0f}" />')
        top = y + (16 if box.height or box.note else 25)
        lines.append(f'<text x="{x + w / 2:.0f}" y="{top:.0f}">{escape(box.text)}</text>')
        if box.note:
            lines.append(f'<text class="s" x="{x + w / 2:.0f}" y="{top + 16:.0f}">{escape(box.note)}</text>')
    for start, end, label in arrows:
        a, b = boxes[start], boxes[end]
        ax, ay = (a.x + a.width / 2) * UNIT_X + 7, a.y * UNIT_Y + 7 + HEIGHT / 2
        bx, by = (b.x + b.width / 2) * UNIT_X + 7, b.y * UNIT_Y + 7 + HEIGHT / 2
        if abs(bx - ax) > (a.width + b.width) * UNIT_X / 2:  # Side by side: between the facing sides.
            side = 1 if bx > ax else -1
            ax, bx = ax + side * a.width * UNIT_X / 2, bx - side * b.width * UNIT_X / 2
        else:
            side = 1 if by > ay else -1
            ay, by = ay + side * HEIGHT / 2, by - side * HEIGHT / 2
        lines.append(f'<path d="M{ax:.0f} {ay:.0f}L{bx:.0f} {by:.0f}" marker-end="url(#h)" />')
        if label:
            slope = (by - ay) * (bx - ax)
            right, down = (0, -4) if slope == 0 else (24, -8) if slope > 0 else (24, 16)  # Beside a sloping arrow.
            x, y = (ax + bx) / 2 + right, (ay + by) / 2 + down
            lines.append(f'<text class="s" x="{x:.0f}" y="{y:.0f}">{escape(label)}</text>')
    return "".join([*lines, "</svg>"])


PICTURES: dict[str, str] = {
    "idea": picture(
        "The teacher builds the cache, and every student reads it",
        [
            Box(0, 0.5, "audio", 1.2),
            Box(2, 0.5, "teacher", 1.4, "a"),
            Box(4.2, 0.5, "cache", 1.4, "m", "Parquet shards"),
            Box(6.6, 0, "student 1", 1.4),
            Box(6.6, 1, "student 2", 1.4, "", "an ablation"),
            Box(8.8, 0.5, "service", 1.4),
        ],
        [(0, 1, ""), (1, 2, ""), (2, 3, ""), (2, 4, ""), (3, 5, "")],
    ),
    "cache": picture(
        "A shard is the unit of work, retry and resume",
        [
            Box(0, 0.5, "plan", 1.4, "", "utterances to shards"),
            Box(2.4, 0, "shard 0", 1.4, "m"),
            Box(2.4, 1, "shard 1", 1.4, "m"),
            Box(4.8, 0, "temporary file", 1.7),
            Box(7.3, 0, "renamed", 1.3),
            Box(9.4, 0, "committed", 1.5, "a", "rows, bytes, SHA-256"),
            Box(4.8, 1, "killed: no commit", 1.7, "n", "built again"),
        ],
        [(0, 1, ""), (0, 2, ""), (1, 3, ""), (3, 4, ""), (4, 5, ""), (2, 6, "")],
    ),
    "masks": picture(
        "The composite target of eight frames",
        [
            Box(0, 0, "clean pass", 1.6),
            *(Box(2 + 0.8 * n, 0, f"c{n}", 0.7, "a") for n in range(8)),
            Box(0, 1, "masked pass", 1.6),
            *(
                Box(2 + 0.8 * n, 1, "" if n in (2, 3, 4) else f"m{n}", 0.7, "n" if n in (2, 3, 4) else "m")
                for n in range(8)
            ),
            Box(0, 2.2, "target", 1.6),
            *(
                Box(2 + 0.8 * n, 2.2, f"c{n}" if n in (2, 3, 4) else f"m{n}", 0.7, "a" if n in (2, 3, 4) else "m")
                for n in range(8)
            ),
        ],
        [],
    ),
    "student": picture(
        "Every second layer applies the attention map of the layer before it",
        [
            Box(0, 0.5, "convolutions", 1.5),
            Box(2.2, 0.5, "layer 1", 1.4, "a", "Q, K, V"),
            Box(4.3, 0.5, "layer 2", 1.4, "", "V only"),
            Box(6.4, 0.5, "layer 3", 1.4, "a", "Q, K, V"),
            Box(8.5, 0.5, "layer 4", 1.4, "", "V only"),
            *(Box(2.2 + 2.1 * n, 1.7, f"head {n + 1}", 1.4, "m", f"teacher's layer {n + 1}") for n in range(4)),
        ],
        [(0, 1, ""), (1, 2, "map"), (2, 3, ""), (3, 4, "map"), *((n + 1, n + 5, "") for n in range(4))],
    ),
    "invariance": picture(
        "The features of an utterance do not depend on its batch",
        [
            Box(0, 0, "utterance alone", 2),
            Box(2.7, 0, "model", 1.2, "a"),
            Box(4.6, 0, "features", 1.4, "m"),
            Box(0, 1, "same, padded", 2, "", "in a longer batch"),
            Box(2.7, 1, "model", 1.2, "a"),
            Box(4.6, 1, "same features", 1.8, "m", "padding ignored"),
        ],
        [(0, 1, ""), (1, 2, ""), (3, 4, ""), (4, 5, "")],
    ),
    "cluster": picture(
        "What runs where on a cluster",
        [
            Box(0, 0.6, "job", 1.3, "", "run.py, on the head"),
            Box(2.4, 0, "decode tasks", 1.7, "", "CPU nodes"),
            Box(5, 0, "teacher actors", 1.7, "a", "one GPU each"),
            Box(7.7, 0.6, "cache", 1.6, "m", "shards, commits"),
            Box(5, 1.3, "trainers", 1.7, "a", "one GPU each"),
            Box(2.4, 1.3, "run folder", 1.7, "m", "shared file system"),
        ],
        [(0, 1, ""), (1, 2, "audio"), (2, 3, "shards"), (3, 4, "batches"), (4, 5, "checkpoints"), (0, 5, "")],
    ),
}
