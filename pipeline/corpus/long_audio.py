"""Cutting of long recordings into windows, at pauses where there are any."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np

from ray_distill.teacher_cache.audio import read_blocks
from ray_distill.teacher_cache.sources.address import AudioAddress

_HOPS_PER_SECOND = 100
_PAUSE_HOPS = 10
"""Half the length of audio, in hops of 10 ms, whose energy decides whether there is a pause."""
_SCALE = 32768


def cut_recording(
    address: AudioAddress, rate: int, max_seconds: float, min_seconds: float
) -> list[tuple[AudioAddress, float, float]]:
    """Cut a recording, or a long piece of one, into windows that cover it exactly. It is read in bounded memory.

    Args:
        address: The recording.
        rate: Its samples per second.
        max_seconds: Maximum length of a window.
        min_seconds: Minimum length of a window, if it is at most half the maximum.

    Returns:
        The address of each window, and its beginning and end in seconds.

    Raises:
        AudioError: The recording can't be decoded.
    """
    first = address.start or 0
    bounds = cut_points(read_blocks(address), rate, max_seconds, min_seconds)
    return [
        (replace(address, start=first + begin, end=first + end), (first + begin) / rate, (first + end) / rate)
        for begin, end in pairwise(bounds)
    ]


def cut_points(blocks: Iterable[np.ndarray], rate: int, max_seconds: float, min_seconds: float) -> list[int]:
    """Return the samples at which audio is cut, with its first one and its end.

    A window ends at the quietest 200 ms in the second half of the time that it may last. The last two windows share what is left.
    Energies are sums of squares of 16-bit integers, so the cuts are the same on every machine for audio that is decoded exactly.

    Args:
        blocks: (N,) float32 samples; N varies.
        rate: Samples per second.
        max_seconds: Maximum length of a window.
        min_seconds: Minimum length of a window, if it is at most half the maximum.
    """
    hop = rate // _HOPS_PER_SECOND
    energies: list[np.ndarray] = []
    samples = 0
    for energy, count in _hop_energies(blocks, hop):
        energies.append(energy)
        samples += count
    energy = np.concatenate([np.zeros(_PAUSE_HOPS, np.int64), *energies, np.zeros(_PAUSE_HOPS, np.int64)])
    hops, most = -(-samples // hop), int(max_seconds * rate) // hop
    latest = (samples - math.ceil(min_seconds * rate)) // hop
    points = [0]
    while samples - points[-1] > int(max_seconds * rate):
        begin = points[-1] // hop
        high = max(min(begin + most, latest), begin + 1)
        low = min(max(begin + max(most // 2, 1), hops - most if hops - begin <= 2 * most else 0), high)
        # The hops around a point; `energy` begins with 10 empty ones.
        around = np.convolve(energy[low : high + 2 * _PAUSE_HOPS], np.ones(2 * _PAUSE_HOPS, np.int64), "valid")
        points.append(min(high - int(np.argmin(around[::-1])), hops) * hop)
    return [*points, samples]


def _hop_energies(blocks: Iterable[np.ndarray], hop: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the (H,) int64 energies of hops, and how many samples they are of. The last hop may be shorter."""
    rest = np.zeros(0, np.float32)
    for block in blocks:
        joined = np.concatenate([rest, block])
        count = len(joined) // hop * hop
        yield _energies(joined[:count], hop), count
        rest = joined[count:]
    if len(rest):
        yield _energies(np.pad(rest, (0, hop - len(rest))), hop), len(rest)


def _energies(samples: np.ndarray, hop: int) -> np.ndarray:
    values = np.rint(np.clip(np.nan_to_num(samples), -1, 1) * _SCALE).astype(np.int64)
    energies: np.ndarray = np.square(values).reshape(-1, hop).sum(1)
    return energies
