"""Names of models on the Hugging Face Hub: ``OWNER/NAME``, ``OWNER/NAME@REVISION`` and the same after ``hf://``."""

import re
from dataclasses import dataclass
from pathlib import Path

from ray_distill.teacher_cache.teachers.teacher import TeacherError

PREFIX = "hf://"

_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(rf"(?P<repository>{_WORD}/{_WORD})(@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
"""Suffixes of checkpoints. A name that ends in one is a path, even if there is no such file."""


@dataclass(frozen=True)
class HubName:
    """A model on the hub.

    Attributes:
        repository: ``OWNER/NAME``.
        revision: Branch, tag or commit; None for the default branch.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return PREFIX + self.repository + (f"@{self.revision}" if self.revision else "")

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a whole commit, which can't move."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


def parse_hub_name(spec: str) -> HubName | None:
    """Return the model on the hub that a specification without options names, or None if it names something else.

    An existing file or folder of that name wins over the hub.

    Raises:
        TeacherError: If the specification starts with ``hf://`` and is not followed by a name.
    """
    explicit = spec.startswith(PREFIX)
    if not explicit and (spec.endswith(_FILES) or Path(spec).exists()):
        return None
    match = _NAME.fullmatch(spec.removeprefix(PREFIX))
    # The hub's rule about dashes and dots keeps the names of folders in its cache unique.
    if match is not None and not any(part in match["repository"] for part in ("--", "..")):
        return HubName(match["repository"], match["revision"])
    if explicit:
        raise TeacherError(
            f"{spec!r} is not the name of a model on the hub; write hf://OWNER/NAME or hf://OWNER/NAME@REVISION"
        )
    return None
