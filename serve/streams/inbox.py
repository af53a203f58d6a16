"""The messages of a stream that have arrived and are not processed yet."""

import asyncio
from collections import deque

_MESSAGE_BYTES = 64  # Memory of a message beside its content, so that empty ones count too.


class Inbox:
    """A queue that is bounded by memory, not by the number of messages.

    While it is full, no further message is read, so the connection's flow control makes the client wait.

    Args:
        max_bytes: Bytes above which `put` waits; the last message may exceed them.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._messages: deque[bytes | None] = deque()
        self._num_bytes = 0
        self._changed = asyncio.Condition()

    async def put(self, message: bytes | None) -> None:
        """Add a message, or None for the end, and wait until there is room for another one."""
        async with self._changed:
            self._messages.append(message)
            self._num_bytes += _size(message)
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._num_bytes <= self._max_bytes)

    async def get(self) -> bytes | None:
        """Wait for the next message and remove it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._messages)
            message = self._messages.popleft()
            self._num_bytes -= _size(message)
            self._changed.notify_all()
            return message


def _size(message: bytes | None) -> int:
    return _MESSAGE_BYTES + len(message or b"")
