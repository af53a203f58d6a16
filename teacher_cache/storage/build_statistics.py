"""What building a cache cost: one small record for each build, beside the shards, in ``builds/``.

They are measurements, so no two are alike; nothing else reads them, and a cache without them is as good.
"""

import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ray_distill.teacher_cache.storage.sealed_json import sealed, unsealed
from ray_distill.teacher_cache.storage.store import Store

BUILDS = "builds"


@dataclass
class Passes:
    """Teacher passes of one kind.

    Attributes:
        teacher_seconds: that teachers worked on them, summed over teachers.
        audio_seconds: that went through them; audio that several draws mask counts once for each.
    """

    teacher_seconds: float = 0.0
    audio_seconds: float = 0.0

    def add(self, teacher_seconds: float, audio_seconds: float) -> None:
        """Counts some more."""
        self.teacher_seconds += teacher_seconds
        self.audio_seconds += audio_seconds

    @property
    def rate(self) -> float | None:
        """Teacher seconds per second of audio; None where there was none."""
        return self.teacher_seconds / self.audio_seconds if self.audio_seconds else None


@dataclass
class TeacherWork:
    """The passes of a build, or of all builds of a cache.

    Attributes:
        clean, masked: with the plain input, and with the mask embedding at masked frames.
    """

    clean: Passes = field(default_factory=Passes)
    masked: Passes = field(default_factory=Passes)

    @property
    def seconds(self) -> float:
        """That teachers worked."""
        return self.clean.teacher_seconds + self.masked.teacher_seconds

    def add(self, other: "TeacherWork") -> None:
        """Counts another's passes too."""
        for mine, theirs in ((self.clean, other.clean), (self.masked, other.masked)):
            mine.add(theirs.teacher_seconds, theirs.audio_seconds)

    def flat(self) -> dict[str, float]:
        """As columns of a record."""
        return {f"{kind}_{name}": value for kind, passes in asdict(self).items() for name, value in passes.items()}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "TeacherWork":
        """The reverse of `flat`; other keys of the record are left alone."""
        clean, masked = (
            Passes(record[f"{kind}_teacher_seconds"], record[f"{kind}_audio_seconds"]) for kind in ("clean", "masked")
        )
        return cls(clean, masked)


def write_build(store: Store, work: TeacherWork, *, device: str, actors: int, elapsed: float) -> None:
    """Records a build: what its teachers did, on which device, how many side by side, and its wall seconds."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record = {"finished": now, "device": device, "actors": actors, "elapsed": elapsed} | work.flat()
    store.write(f"{BUILDS}/{now.replace(':', '')}-{uuid.uuid4().hex[:8]}.json", sealed(record))


def teacher_work(store: Store) -> TeacherWork:
    """What all recorded builds of a cache did together; a record that is damaged is left out, as is a killed build."""
    total = TeacherWork()
    for name in store.names(BUILDS):
        try:
            total.add(TeacherWork.of(unsealed(store.read(name))))
        except (ValueError, KeyError):
            continue  # Nothing but this sum depends on it.
    return total
