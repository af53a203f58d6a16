"""Well-known teachers on the Hugging Face Hub, with their facts as published, in ``known_teachers.json`` beside this file."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

_FILE = Path(__file__).parent / "known_teachers.json"


@dataclass(frozen=True)
class KnownTeacher:
    """Facts of a teacher, as its card and configuration on the hub state them. They are not read from the hub again.

    Attributes:
        name: Name on the hub, ``OWNER/NAME``.
        kind: ``model_type`` of its configuration.
        layers: Number of Transformer layers.
        width: Width D of the layers.
        sampling_rate: Samples per second of its input.
        frame_rate: Frames per second; None for patches of a spectrogram.
        mask_embedding: Whether it has a mask embedding, which masked targets need.
        license: Identifier of the license, or ``see the card``.
    """

    name: str
    kind: str
    layers: int
    width: int
    sampling_rate: int
    frame_rate: int | None
    mask_embedding: bool
    license: str


def known_teachers() -> list[KnownTeacher]:
    """Return the well-known teachers, sorted by kind and size."""
    return [KnownTeacher(**row) for row in json.loads(_FILE.read_text())]


def suggestion(name: str) -> str:
    """Return words that suggest the well-known teacher with the nearest name, or an empty text if none is near.

    Args:
        name: A name that does not exist, with or without its owner.
    """
    by_name = {teacher.name.lower(): teacher.name for teacher in known_teachers()}
    by_name |= {full.partition("/")[2]: teacher for full, teacher in by_name.items()}
    near = difflib.get_close_matches(name.lower(), by_name, n=1, cutoff=0.75)
    return f" (did you mean {by_name[near[0]]}?)" if near else ""
