"""Decoding by cost: what is expensive waits, is bounded, and never keeps cheap files waiting."""

import asyncio
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import soundfile

from ray_distill.serve.api.errors import ServiceError
from ray_distill.serve.decoders import NUM_DECODERS, Decoders
from ray_distill.serve.decoding import header_of
from ray_distill.serve.settings import Limits
from ray_distill.teacher_cache.audio import AudioHeader

CHEAP = AudioHeader(16_000, 1, 16_000, 16_000, "WAV", "PCM_16")
# About 4 seconds of work before it is measured.
COSTLY = AudioHeader(192_000, 8, 60 * 192_000, 60 * 192_000, "FLAC", "PCM_16")


class Gate:
    """A decoder that records what it gets, and waits until ``open`` is set for files named ``slow``."""

    def __init__(self) -> None:
        self.open, self.order = threading.Event(), list[bytes]()

    def __call__(self, audio: bytes, max_seconds: float, on_block: Callable[[int], None]) -> Any:
        self.order.append(audio)
        if audio.startswith(b"slow"):
            assert self.open.wait(20)
        on_block(1000 if audio != b"liar" else 10**8)
        return np.zeros(400, np.float32)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr("ray_distill.serve.decoders.decode", gate)
    return gate


@pytest.fixture
def decoders(gate: Gate) -> Iterator[Decoders]:
    decoders = Decoders(Limits(decode_seconds=5))
    yield decoders
    gate.open.set()
    decoders.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def test_cheap_files_pass_costly_ones_and_what_is_too_much_is_refused(decoders: Decoders, gate: Gate) -> None:
    async def main() -> None:
        costly = [asyncio.create_task(decoders.decode(b"slow%d" % n, COSTLY)) for n in range(NUM_DECODERS)]
        await until(lambda: len(gate.order) == NUM_DECODERS - 1)
        with pytest.raises(ServiceError) as refused:  # One waits already.
            decoders.admit([COSTLY])
        assert refused.value.error_type == "overloaded" and int(refused.value.headers["retry-after"]) >= 1
        assert decoders.admit([CHEAP]) < 0.1
        await asyncio.wait_for(decoders.decode(b"cheap", CHEAP), 20)
        assert gate.order[-1] == b"cheap" and not any(task.done() for task in costly)
        costly[-1].cancel()
        await asyncio.wait(costly[-1:])  # It leaves the queue before a decoder is free.
        gate.open.set()
        await asyncio.gather(*costly, return_exceptions=True)
        assert len(gate.order) == NUM_DECODERS  # The cancelled one never ran.

    asyncio.run(main())


def test_idle_decoders_accept_any_file(decoders: Decoders) -> None:
    assert decoders.admit([COSTLY] * 10) > 5


def test_a_file_with_more_than_it_promises_is_stopped_when_others_wait(decoders: Decoders, gate: Gate) -> None:
    async def main() -> None:
        slow = [asyncio.create_task(decoders.decode(b"slow", CHEAP)) for _ in range(NUM_DECODERS - 1)]
        await until(lambda: gate.order.count(b"slow") == NUM_DECODERS - 1)
        liar = asyncio.create_task(decoders.decode(b"slow liar", CHEAP))
        waiting = asyncio.create_task(decoders.decode(b"slow", COSTLY))
        await until(lambda: b"slow liar" in gate.order)
        (task,) = [task for task in decoders._running if task.audio == b"slow liar"]
        with pytest.raises(ServiceError, match="wait to be decoded"):
            decoders._charge(task, 10**8)
        gate.open.set()
        await asyncio.gather(*slow, liar, waiting, return_exceptions=True)
        assert len(await decoders.decode(b"liar", CHEAP)) == 400  # Alone it is decoded.

    asyncio.run(main())


def test_rates_and_channels_have_limits() -> None:
    def flac(rate: int, channels: int, seconds: float = 0.1) -> bytes:
        buffer = io.BytesIO()
        soundfile.write(buffer, np.zeros((int(rate * seconds), channels)), rate, format="FLAC")
        return buffer.getvalue()

    assert header_of(flac(192_000, 8), Limits()).channels == 8
    for rate, channels in ((655_350, 1), (16_000, 8)):
        with pytest.raises(
            ServiceError, match=f"has {channels} channels at {rate} Hz; the limits are 2 channels and"
        ) as refused:
            header_of(flac(rate, channels), Limits(max_channels=2))
        assert refused.value.error_type == "unsupported_media_type"
    with pytest.raises(ServiceError, match="longer than the limit of 1 seconds"):
        header_of(flac(16_000, 1, 1.1), Limits(max_seconds=1))
