"""The parts of a stream give what the whole audio gives, in chunks of any size and in bounded memory."""

import asyncio
import io

import numpy as np
import pytest
import soundfile

from ray_distill.serve.api.errors import ServiceError
from ray_distill.serve.inference.windows import split_windows
from ray_distill.serve.streams.inbox import Inbox
from ray_distill.serve.streams.samples import SampleReader
from ray_distill.serve.streams.window_buffer import WindowBuffer
from ray_distill.teacher_cache.audio import load_audio


def chunks_of(data: bytes, rng: np.random.Generator) -> list[bytes]:
    """Cut bytes at random places; some chunks are empty."""
    ends = np.sort(rng.integers(0, len(data), 60))
    return [part.tobytes() for part in np.split(np.frombuffer(data, np.uint8), ends)]


@pytest.mark.parametrize(
    ("encoding", "rate", "channels"),
    [
        ("s16le", 16_000, 1),
        ("f32le", 16_000, 2),
        ("s16le", 44_100, 2),
        ("f32le", 48_000, 1),
        ("s16le", 8_000, 3),
        ("f32le", 192_000, 1),
        ("s16le", 44_101, 1),
        ("s16le", 2_000, 1),
    ],
)
def test_chunks_give_the_waveform_of_the_file(encoding: str, rate: int, channels: int) -> None:
    rng = np.random.default_rng(rate + channels)
    samples = rng.normal(0, 0.4, (rate * 3 // 2 + 7, channels)).clip(-3, 3)
    subtype, raw = (
        ("PCM_16", (samples.clip(-1, 1) * 32767).astype("<i2"))
        if encoding == "s16le"
        else ("FLOAT", samples.astype("<f4"))
    )
    file = io.BytesIO()
    soundfile.write(file, raw, rate, format="WAV", subtype=subtype)
    whole = load_audio(io.BytesIO(file.getvalue()))
    for _ in range(3):
        reader = SampleReader(encoding, rate, channels)  # type: ignore[arg-type]
        parts = [reader.read(chunk) for chunk in chunks_of(raw.tobytes(), rng)]
        found = np.concatenate([*parts, reader.finish()])
        assert found.shape == whole.shape and found.dtype == np.float32
        np.testing.assert_allclose(found, whole, atol=0 if rate == 16_000 else 2e-6)


def test_a_reader_holds_little() -> None:
    reader = SampleReader("f32le", 48_000)
    second = np.zeros(48_000, "<f4").tobytes()
    for _ in range(20):
        reader.read(second)
    assert reader._resampler is not None
    assert sum(part.nbytes for part in reader._resampler._waiting) < len(second)


@pytest.mark.parametrize("value", [np.nan, np.inf, 9.0])
def test_impossible_samples_are_refused(value: float) -> None:
    with pytest.raises(ServiceError, match="8 times full scale"):
        SampleReader("f32le", 16_000).read(np.array([0, value], "<f4").tobytes())


def test_a_part_of_a_sample_at_the_end_is_refused() -> None:
    reader = SampleReader("s16le", 16_000, 2)
    assert len(reader.read(b"abcdefg")) == 1
    with pytest.raises(ServiceError, match="3 bytes into a sample"):
        reader.finish()


@pytest.mark.parametrize(("window", "overlap"), [(1.0, 0.0), (1.0, 0.3), (1.0, 0.5), (2.7, 1.3)])
def test_windows_of_a_stream_are_those_of_the_whole(window: float, overlap: float) -> None:
    rng = np.random.default_rng(0)
    size = round(window * 50)
    exact = [(size + extra) * 320 + 400 - 320 for extra in (-1, 0, 1, size)]
    for length in [400, 719, 720, *exact, *rng.integers(400, 200_000, 40).tolist()]:
        waveform = np.arange(length, dtype=np.float32)  # So that each sample tells its place.
        buffer = WindowBuffer(window, overlap)
        found = []
        for part in np.split(waveform, np.sort(rng.integers(0, length, rng.integers(0, 30)))):
            for item in buffer.push(part):
                found.append((item.waveform.copy(), item.first, item.kept))
        last = buffer.finish()
        assert last is not None and buffer.num_samples == length
        found.append((last.waveform.copy(), last.first, last.kept))
        expected = split_windows(length, window, overlap)
        assert len(found) == len(expected)
        for (samples, first, kept), whole in zip(found, expected, strict=True):
            np.testing.assert_array_equal(samples, waveform[whole.samples])
            start = whole.samples.start // 320
            assert (first, kept) == (whole.frames.start, slice(whole.frames.start - start, whole.frames.stop - start))


def test_a_window_is_complete_as_soon_as_one_frame_follows() -> None:
    buffer = WindowBuffer(1.0, 0.5)
    assert len(list(buffer.push(np.zeros(16_000 + 399, np.float32)))) == 0
    assert len(list(buffer.push(np.zeros(1, np.float32)))) == 1


def test_a_long_stream_holds_two_windows() -> None:
    buffer = WindowBuffer(4.0, 1.0)
    before, count = buffer.nbytes, 0
    for length in np.random.default_rng(0).integers(1, 100_000, 400).tolist():  # About 20 minutes.
        count += len(list(buffer.push(np.zeros(length, np.float32))))
        assert buffer._held <= len(buffer._buffer)
    assert count > 300 and buffer.nbytes == before <= 2 * 4 * 4 * 16_000
    assert WindowBuffer(1.0, 0.0).finish() is None


def test_a_full_inbox_waits() -> None:
    async def main() -> None:
        inbox = Inbox(1000)
        await asyncio.wait_for(inbox.put(b"x" * 500), 30)
        waiting = asyncio.create_task(inbox.put(b"y" * 600))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        assert await inbox.get() == b"x" * 500
        await asyncio.wait_for(waiting, 30)
        assert await inbox.get() == b"y" * 600
        flood = asyncio.create_task(asyncio.wait_for(_fill(inbox), 0.05))
        with pytest.raises(TimeoutError):
            await flood

    async def _fill(inbox: Inbox) -> None:
        for _ in range(100):
            await inbox.put(b"")

    asyncio.run(main())
