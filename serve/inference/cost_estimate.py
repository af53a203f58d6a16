"""How long work takes, learned from measurements."""

import math
import time
from collections.abc import Callable

_WEIGHT = 0.3  # Weight of a new measurement in the moving averages.
_LARGEST_CHANGE = (
    4.0  # Factor by which a single measurement can differ from the average, since other work may have interrupted it.
)
_HALF_LIFE = 300.0
_LEAST = 0.25


class CostEstimate:
    """Seconds of work for a size, from moving averages of the seconds per unit.

    Work has a kind (such as the number of layers), and time is not proportional to size, because attention grows faster. So each kind
    has an average for every half power of two of the size. What was not measured yet costs what the nearest measured size of the same
    kind costs, or, without one, of the nearest larger kind. A factor for all of them follows the speed of the machine.

    Args:
        initial: Seconds per unit before the first measurement.
        clock: Function that returns the time in seconds. Default `time.monotonic`.
    """

    def __init__(self, initial: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._initial = initial
        self._clock = clock
        self._slowness = 1.0
        # Seconds per unit at slowness 1, and the time of the last measurement, by kind and place of the size.
        self._rates: dict[tuple[int, int], tuple[float, float]] = {}
        self._nearest: dict[tuple[int, int], tuple[float, float]] = {}  # What was looked up since the last measurement.

    def seconds(self, size: float, kind: int = 0, *, hopeful: bool = False) -> float:
        """Return the expected seconds of work for ``size`` units.

        Args:
            size: Number of units, above 0.
            kind: Kind of the work.
            hopeful: Whether an average that was not measured lately counts less, down to a quarter. What is refused because of an
                average is never measured again, so refusals that depend on nothing else must use this. Default False.
        """
        rate, measured = self._rate(size, kind)
        if hopeful:
            rate *= max(_LEAST, 0.5 ** ((self._clock() - measured) / _HALF_LIFE))
        return rate * self._slowness * size

    def record(self, size: float, seconds: float, kind: int = 0) -> None:
        """Record that ``size`` units took so many seconds."""
        key = kind, _place(size)
        rate = max(seconds, 1e-9) / size / self._slowness
        if key in self._rates:
            before, _ = self._rates[key]
            change = min(max(rate / before, 1 / _LARGEST_CHANGE), _LARGEST_CHANGE) ** _WEIGHT
            # One half of the change is in the speed of the machine, the other in this size.
            self._slowness *= change**0.5
            rate = before * change**0.5
        self._rates[key] = rate, self._clock()
        self._nearest.clear()

    def _rate(self, size: float, kind: int) -> tuple[float, float]:
        if not self._rates:
            return self._initial, self._clock()
        wanted = kind, _place(size)
        if wanted not in self._nearest:

            def distance(key: tuple[int, int]) -> tuple[bool, int, int]:
                return key[0] < kind, abs(key[0] - kind), abs(key[1] - wanted[1])

            self._nearest[wanted] = self._rates[min(self._rates, key=distance)]
        return self._nearest[wanted]


def _place(size: float) -> int:
    return round(2 * math.log2(size))
