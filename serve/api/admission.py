"""Admission of requests: API keys, open requests, requests per key, and the memory that open requests hold."""

import base64
import binascii
import hmac
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from time import monotonic

from starlette.requests import HTTPConnection

from ray_distill.serve.api.errors import ServiceError
from ray_distill.serve.settings import Limits

_LOG = logging.getLogger(__name__)
KEY_PREFIX = "key."
"""Prefix of the subprotocol of a WebSocket that holds an API key."""


class HeldBytes:
    """The memory that one open request holds, counted against the limit for all requests."""

    def __init__(self, admission: "Admission") -> None:
        self._admission = admission
        self.count = 0

    def acquire(self, count: int) -> None:
        """Hold ``count`` bytes more.

        Raises:
            ServiceError: ``too_large`` if the request alone would exceed the limit, ``overloaded`` if all requests together would.
        """
        limit = self._admission.limits.open_bytes
        if self.count + count > limit:
            message = f"The request and its response would need more than the limit of {limit} bytes of memory; split the request."
            raise ServiceError("too_large", message)
        if self._admission.held_bytes + count > limit:
            message = (
                f"The service is overloaded: open requests hold {self._admission.held_bytes} bytes; try again later."
            )
            raise ServiceError("overloaded", message, {"retry-after": "1"})
        self._change(count)

    def release(self, count: int) -> None:
        """Hold ``count`` bytes less."""
        self._change(-count)

    def _change(self, count: int) -> None:
        self.count += count
        self._admission.held_bytes += count


class Admission:
    """Admits requests; used on the event loop only.

    Args:
        limits: Limits of requests.
        api_keys: Clients must send one of them as a bearer token. Default: no key is needed.

    Raises:
        ValueError: there are limits for each key, but no keys.
    """

    def __init__(self, limits: Limits, api_keys: Sequence[str] = ()) -> None:
        if not api_keys and (limits.key_requests or limits.key_rate):
            raise ValueError("key_requests and key_rate limit each API key, but there are no API keys: set api_keys.")
        self.limits = limits
        self.held_bytes = 0
        self._keys = [key.encode() for key in api_keys]
        self._open: Counter[bytes] = Counter()
        # The theoretical arrival time of each key's next request (generic cell rate algorithm).
        self._next_arrival: dict[bytes, float] = {}

    def reload_keys(self, read: Callable[[], Sequence[str]]) -> None:
        """Replace the API keys by what ``read`` returns; keep them, and log the error, if that fails."""
        try:
            self._keys = [key.encode() for key in read()]
        except (ValueError, OSError) as error:
            _LOG.error("The API keys stay as they were: %s", error)

    def check_key(self, request: HTTPConnection) -> bytes:
        """Return the API key of a request or WebSocket, b"" if the service needs none.

        Pages of browsers can't set headers of a WebSocket, so it may also have the key in its subprotocols, in URL-safe base64
        after ``key.``.

        Raises:
            ServiceError: ``unauthorized`` if the request has no valid key.
        """
        if not self._keys:
            return b""
        scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
        token = credentials.strip().encode() if scheme.lower() == "bearer" else _subprotocol_key(request)
        # All keys are compared, each in constant time, so that the duration reveals nothing about them.
        if not sum([hmac.compare_digest(token, key) for key in self._keys]):
            headers = {"www-authenticate": "Bearer"}
            raise ServiceError("unauthorized", "Send a valid API key as 'Authorization: Bearer KEY'.", headers)
        return token

    async def admit(self, request: HTTPConnection) -> AsyncIterator[HeldBytes]:
        """Admit a request until its response is sent, or a WebSocket until it is closed; a dependency of routes.

        Raises:
            ServiceError: ``unauthorized``, ``overloaded`` or ``rate_limited``.
        """
        key = self.check_key(request)
        limit = self.limits.key_requests
        if limit is not None and self._open[key] >= limit:
            message = f"This API key has reached its limit of {limit} open requests; try again later."
            raise ServiceError("rate_limited", message, {"retry-after": "1"})
        if (count := self._open.total()) >= self.limits.max_requests:
            message = f"The service is overloaded: {count} requests are open; try again later."
            raise ServiceError("overloaded", message, {"retry-after": "1"})
        self._check_rate(key)
        held = HeldBytes(self)
        self._open[key] += 1
        try:
            yield held
        finally:
            held.release(held.count)
            self._open[key] -= 1

    def _check_rate(self, key: bytes) -> None:
        rate = self.limits.key_rate
        if rate is None:
            return
        now = monotonic()
        next_arrival = max(self._next_arrival.get(key, now), now)
        wait = next_arrival - now - max(1 - 1 / rate, 0)
        if wait > 0:
            message = f"This API key is limited to {rate:g} requests per second; try again later."
            raise ServiceError("rate_limited", message, {"retry-after": str(math.ceil(wait))})
        self._next_arrival[key] = next_arrival + 1 / rate


def _subprotocol_key(connection: HTTPConnection) -> bytes:
    """Return the API key in the subprotocols of a WebSocket; b"" if there is none."""
    for name in connection.scope.get("subprotocols", ()):
        if name.startswith(KEY_PREFIX):
            text = name.removeprefix(KEY_PREFIX)
            try:
                return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            except binascii.Error:
                return b""
    return b""
