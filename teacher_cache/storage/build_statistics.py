"""Cost of building a cache: one small record per build, stored beside the shards in ``builds/``.

The records are measurements and not part of a cache's identity. Only reports read them, and a cache works without them.
"""

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ray_distill.teacher_cache.storage.json_record import MAX_RECORD_BYTES, decode_record, encode_record
from ray_distill.teacher_cache.storage.store import Store

BUILDS = "builds"


@dataclass
class PassTime:
    """Time of the clean or of the masked passes of teachers.

    Attributes:
        teacher_seconds: Compute time, summed over teachers.
        audio_seconds: Duration of the audio that was processed. Audio counts once per mask draw.
    """

    teacher_seconds: float = 0.0
    audio_seconds: float = 0.0

    def add(self, teacher_seconds: float, audio_seconds: float) -> None:
        """Add further passes."""
        self.teacher_seconds += teacher_seconds
        self.audio_seconds += audio_seconds

    @property
    def rate(self) -> float | None:
        """Teacher seconds per second of audio, or None without audio."""
        return self.teacher_seconds / self.audio_seconds if self.audio_seconds else None


@dataclass
class TeacherTime:
    """Time of teachers in one or more builds of a cache.

    Attributes:
        clean: Passes over the plain input.
        masked: Passes with the mask embedding at masked frames.
    """

    clean: PassTime = field(default_factory=PassTime)
    masked: PassTime = field(default_factory=PassTime)

    @property
    def seconds(self) -> float:
        """Teacher seconds of all passes."""
        return self.clean.teacher_seconds + self.masked.teacher_seconds

    def add(self, other: "TeacherTime") -> None:
        """Add the passes of another build."""
        for mine, theirs in ((self.clean, other.clean), (self.masked, other.masked)):
            mine.add(theirs.teacher_seconds, theirs.audio_seconds)

    def to_columns(self) -> dict[str, float]:
        """Return the four numbers as columns of a record."""
        return {f"{kind}_{name}": value for kind, passes in asdict(self).items() for name, value in passes.items()}

    @classmethod
    def from_columns(cls, record: Mapping[str, Any]) -> "TeacherTime":
        """Read the columns of `to_columns` from a record, ignoring its other keys."""
        clean, masked = (
            PassTime(record[f"{kind}_teacher_seconds"], record[f"{kind}_audio_seconds"]) for kind in ("clean", "masked")
        )
        return cls(clean, masked)


def write_build_statistics(
    store: Store,
    teacher_time: TeacherTime,
    *,
    device: str,
    actors: int,
    elapsed: float,
    batch_seconds: Sequence[float] = (),
) -> None:
    """Record a build.

    Args:
        store: Store of the cache.
        teacher_time: Time of its teachers.
        device: Device of the teachers.
        actors: Number of teachers that ran in parallel.
        elapsed: Wall time in seconds.
        batch_seconds: Sizes of batches that the workers found themselves, ascending. Default: none.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record: dict[str, Any] = {"finished": now, "device": device, "actors": actors, "elapsed": elapsed}
    record |= teacher_time.to_columns()
    if batch_seconds:
        record["batch_seconds"] = list(batch_seconds)
    store.write(f"{BUILDS}/{now.replace(':', '')}-{uuid.uuid4().hex[:8]}.json", encode_record(record))


def total_teacher_time(store: Store) -> TeacherTime:
    """Return the teacher time of all recorded builds of a cache. Killed builds and damaged records do not count."""
    total = TeacherTime()
    for name in store.names(BUILDS):
        try:
            found = TeacherTime.from_columns(decode_record(store.read(name, MAX_RECORD_BYTES)))
            if all(0 <= number < math.inf for number in found.to_columns().values()):
                total.add(found)
        except (ValueError, KeyError, TypeError):
            continue  # A damaged record changes nothing but this sum.
    return total
