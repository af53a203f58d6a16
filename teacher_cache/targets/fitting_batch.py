"""The search for the largest batch for which a memory is enough, given a function that measures what a batch needs.

The training measures its steps with it, and the build of a cache the passes of its teacher.
"""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import numpy as np
import pydantic
import torch

from ray_distill.memory import ran_out_of_memory
from ray_distill.teacher_cache.frames import SAMPLE_RATE

Measure = Callable[[float], int]
"""Return the peak bytes of the work on the largest batch of so many seconds. An error about memory means too many."""


def _check_positive(seconds: float | Literal["auto"]) -> float | Literal["auto"]:
    if seconds != "auto" and not 0 < seconds < math.inf:
        raise ValueError(
            f"{seconds:g} can't be the size of a batch; give a positive number of seconds of audio, or auto"
        )
    return seconds


_Number = Annotated[float, pydantic.WithJsonSchema({"type": "number", "exclusiveMinimum": 0})]
BatchSeconds = Annotated[_Number | Literal["auto"], pydantic.AfterValidator(_check_positive)]
"""Seconds of audio per batch, or ``auto``: as many as are measured to fit."""

MARGIN = 0.1
"""Share of the free memory that is left for fragmentation and for what PyTorch does not allocate itself."""
AIM = 0.98
"""Share of the limit at which the line is read, so that the size that it gives is likely to fit."""
CLOSE = 1.05
"""Ratio of two sizes below which the larger one is not worth another measurement."""
GROWTH = 8
"""Largest ratio of a size and the one before it, beyond which a line through small sizes says little."""
TRIES = 16
"""Largest number of sizes that are measured."""


@dataclass(frozen=True)
class FittingBatch:
    """A size of batches that was measured to fit.

    Attributes:
        seconds: Seconds of audio per batch, padding included.
        peak_bytes: Largest memory of the work at that size, with all else that the process holds on the device.
        limit_bytes: Memory that the work may need.
    """

    seconds: float
    peak_bytes: int
    limit_bytes: int

    def row_fields(self) -> dict[str, float]:
        """Return the fields of a row of metrics."""
        fields = asdict(self)
        return {"batch_seconds": fields.pop("seconds")} | fields


def find_fitting(measure: Measure, limit: int, shortest: float, most: float) -> FittingBatch | None:
    """Return a size that fits and is seldom more than a tenth below the largest, or None if the shortest does not fit.

    The shortest size and its double are measured, then the size at which the line through the last two measurements meets the limit,
    until the line gives nothing larger. What the line promises is always measured before it is returned.

    Args:
        measure: The measurement. More seconds must not need less memory, apart from noise.
        limit: Bytes that the work may need.
        shortest, most: Smallest and largest size to return, in seconds.
    """
    measured: list[tuple[float, int]] = []
    fitting: list[tuple[float, int]] = []
    too_much, failures = math.inf, 0
    size = shortest
    for _ in range(TRIES):
        peak = _measured(measure, size, has_fitted=bool(fitting))
        if peak is not None:
            measured.append((size, peak))
        if peak is None or peak > limit:
            if not fitting:
                return None
            too_much, failures = size, failures + 1
        else:
            fitting.append((size, peak))
            failures = 0
        last = fitting[-1][0]
        size = min(_on_the_line(sorted(measured)[-2:], AIM * limit), GROWTH * last, most)
        if size >= too_much:  # Where the line was wrong, it was wrong by little at first.
            middle = (last + too_much) / 2
            size = max(0.9 * too_much, middle) if failures == 1 else middle
        if size < CLOSE * last:
            break
    return FittingBatch(*fitting[-1], limit)


def _on_the_line(points: Sequence[tuple[float, int]], height: float) -> float:
    """Return where the line through two points reaches a height; infinity if it does not rise, and twice the place of a single one."""
    if len(points) == 1:
        return 2 * points[0][0]
    (left, low), (right, high) = points
    slope = (high - low) / (right - left)
    return right + (height - high) / slope if slope > 0 else math.inf


def _measured(measure: Measure, size: float, *, has_fitted: bool) -> int | None:
    try:
        return measure(size)
    except Exception as error:
        # cuDNN may say this in place of its lack of memory. Where a smaller batch has fitted, nothing else is meant.
        no_engine = has_fitted and "unable to find an engine to execute this computation" in str(error)
        if not (no_engine or ran_out_of_memory(error)):
            raise
        return None


def plain(seconds: float) -> float:
    """Round down to a twentieth of the power of ten below, as from 1,234 to 1,200, from 123.4 to 120 and from 12.34 to 12."""
    unit = 10.0 ** math.floor(math.log10(seconds)) / 20
    return round(math.floor(seconds / unit + 1e-6) * unit, 6)


def largest_batches(num_samples: np.ndarray, seconds: float, switches: Sequence[int] = ()) -> list[list[int]]:
    """Return the batches that may need most memory of all that a plan can make of so many seconds, each once.

    They are those with the longest utterances, whose attention needs most memory, with as much padded audio as possible, and with the
    longest utterances below each switch.

    Args:
        num_samples: (N,) integers, lengths of all utterances.
        seconds: Seconds of audio per batch, padding included. A single utterance may be longer.
        switches: Lengths above which a model saves memory that it uses up to there. Default: none.
    """
    order = np.argsort(-num_samples, kind="stable")
    longest = num_samples[order]
    rows = np.maximum(1, (seconds * SAMPLE_RATE + 0.5) // longest).astype(np.int64)
    rows = np.minimum(rows, len(order) - np.arange(len(order)))
    below = [int(np.argmax(longest <= switch)) for switch in switches]  # 0 if there are none.
    starts = dict.fromkeys((0, int(np.argmax(rows * longest)), *below))
    return [order[start : start + rows[start]].tolist() for start in starts]


def usable_bytes(device: torch.device, share: float = 1.0) -> int:
    """Return the bytes that work on a GPU may need: what is allocated now, and nine tenths of the free memory.

    Args:
        device: A CUDA device.
        share: Share of the device that this process has. With less than 1, nine tenths of that share are the most. Default 1.
    """
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - allocated
    usable = allocated + int((1 - MARGIN) * (free + unused))
    return min(usable, int((1 - MARGIN) * share * total)) if share < 1 else usable
