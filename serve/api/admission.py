"""Who may ask, and how much is taken in at once: API keys, open requests, requests per key, bytes held."""

import hmac
import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from time import monotonic

from starlette.requests import Request

from ray_distill.serve.api.errors import ServiceError
from ray_distill.serve.inference.windows import LongAudio


@dataclass(frozen=True)
class Limits:
    """What one request, one API key, and all together may take.

    Attributes:
        max_seconds: longest audio run as a whole, in seconds. Default 60.
        max_bytes: largest request body accepted, in bytes. Default 32 MiB.
        deadline_seconds: longest time for an answer; a request may ask for less. Default 30.
        max_requests: requests open at once; more are refused. Default 256.
        open_bytes: bytes that all open requests may hold together: bodies as they arrive, then decoded audio and answers.
            Default 1 GiB.
        request_seconds: audio in all files of a request together, in seconds. Default 300.
        long_audio: how longer audio than ``max_seconds`` is run. Default None: it is refused.
        key_requests: requests of one API key open at once. Default None: as many as there may be.
        key_rate: requests a second of one API key, on average; a second's worth may come at once. Default None: no limit.
    """

    max_seconds: float = 60.0
    max_bytes: int = 32 * 2**20
    deadline_seconds: float = 30.0
    max_requests: int = 256
    open_bytes: int = 2**30
    request_seconds: float = 300.0
    long_audio: LongAudio | None = None
    key_requests: int | None = None
    key_rate: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_seconds", "deadline_seconds", "request_seconds", "key_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number greater than 0, not {value}.")
        for name in ("max_bytes", "max_requests", "open_bytes", "key_requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        if self.open_bytes < self.max_bytes:
            raise ValueError(f"open_bytes ({self.open_bytes}) must be at least max_bytes ({self.max_bytes}).")
        if self.long_audio and not self.long_audio.window_seconds <= self.max_seconds < self.longest_seconds:
            raise ValueError(
                f"Windows ({self.long_audio.window_seconds:g} s) are for audio longer than max_seconds ({self.max_seconds:g} s), and "
                f"must not be longer themselves; the longest audio accepted is {self.longest_seconds:g} s."
            )

    @property
    def longest_seconds(self) -> float:
        """Longest audio accepted, whole or in windows."""
        return self.long_audio.max_seconds if self.long_audio else self.max_seconds


class Held:
    """The bytes that one open request holds of what all may hold together."""

    def __init__(self, admission: "Admission") -> None:
        self._admission = admission
        self.count = 0

    def take(self, count: int) -> None:
        """Holds this many bytes more.

        Raises:
            ServiceError: ``too_large`` where the request alone would hold too much, ``overloaded`` where all would.
        """
        limit = self._admission.limits.open_bytes
        if self.count + count > limit:
            message = (
                f"The request and its answer would hold more than the {limit} bytes there are: ask for less at once."
            )
            raise ServiceError("too_large", message)
        if self._admission.held_bytes + count > limit:
            message = f"The service is overloaded: {self._admission.held_bytes} bytes are held; ask again later."
            raise ServiceError("overloaded", message, {"retry-after": "1"})
        self._change(count)

    def give_back(self, count: int) -> None:
        """Holds this many bytes less."""
        self._change(-count)

    def _change(self, count: int) -> None:
        self.count += count
        self._admission.held_bytes += count


class Admission:
    """Admits requests; used on the event loop only.

    Args:
        limits: see `Limits`.
        api_keys: clients must send one as a bearer token; none: everyone may ask.

    Raises:
        ValueError: limits for each key, and no keys.
    """

    def __init__(self, limits: Limits, api_keys: Sequence[str] = ()) -> None:
        if not api_keys and (limits.key_requests or limits.key_rate):
            raise ValueError("key_requests and key_rate limit each API key, and there are no API keys.")
        self.limits = limits
        self.held_bytes = 0
        self._keys = [key.encode() for key in api_keys]
        self._open: Counter[bytes] = Counter()
        # For each key the moment from which a request costs no wait (the generic cell rate algorithm).
        self._free_from: dict[bytes, float] = {}

    def check_key(self, request: Request) -> bytes:
        """The API key sent, b"" where none are asked for; ServiceError ``unauthorized`` without one of the keys."""
        if not self._keys:
            return b""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        token = given.strip().encode() if scheme.lower() == "bearer" else b""
        # Every key is compared, in constant time, so that timing tells nothing about any.
        if not sum([hmac.compare_digest(token, key) for key in self._keys]):
            headers = {"www-authenticate": "Bearer"}
            raise ServiceError("unauthorized", "Send a valid API key as 'Authorization: Bearer KEY'.", headers)
        return token

    async def admit(self, request: Request) -> AsyncIterator[Held]:
        """A dependency of routes: the request is open until its answer is sent.

        Raises:
            ServiceError: ``unauthorized``, ``overloaded`` or ``rate_limited``.
        """
        key = self.check_key(request)
        limit = self.limits.key_requests
        if limit is not None and self._open[key] >= limit:
            message = f"This API key has {limit} requests open, and may have no more; ask again later."
            raise ServiceError("rate_limited", message, {"retry-after": "1"})
        if (count := self._open.total()) >= self.limits.max_requests:
            message = f"The service is overloaded: {count} requests are open; ask again later."
            raise ServiceError("overloaded", message, {"retry-after": "1"})
        self._check_rate(key)
        held = Held(self)
        self._open[key] += 1
        try:
            yield held
        finally:
            held.give_back(held.count)
            self._open[key] -= 1

    def _check_rate(self, key: bytes) -> None:
        rate = self.limits.key_rate
        if rate is None:
            return
        now = monotonic()
        free_from = max(self._free_from.get(key, now), now)
        wait = free_from - now - max(1 - 1 / rate, 0)
        if wait > 0:
            message = f"This API key may ask {rate:g} times a second; ask again later."
            raise ServiceError("rate_limited", message, {"retry-after": str(math.ceil(wait))})
        self._free_from[key] = free_from + 1 / rate
