"""Long audio in windows: every frame once, features close to those of the whole file, and limits."""

import asyncio
import io
import itertools

import numpy as np
import pytest
import soundfile
import torch
from fastapi.testclient import TestClient

from ray_distill.serve import create_app
from ray_distill.serve.inference.backends import TorchBackend
from ray_distill.serve.inference.engine import FeatureEngine
from ray_distill.serve.inference.windows import features_in_windows, split_windows
from ray_distill.serve.settings import BatchLimits, Limits
from ray_distill.student import Student
from ray_distill.teacher_cache.frames import num_frames


def speechlike(seconds: float) -> np.ndarray:
    """Return bursts of filtered noise of changing loudness, (S,) float32."""
    rng = np.random.default_rng(0)
    count = int(16_000 * seconds)
    loudness = np.repeat(rng.uniform(0.02, 0.3, count // 3200 + 1), 3200)[:count]
    noise = np.convolve(rng.standard_normal(count), np.hanning(9) / 4, "same")
    return (noise * loudness).clip(-1, 1).astype(np.float32)


@pytest.mark.parametrize("overlap", [0, 1, 4, 15])
def test_windows_give_every_frame_once(overlap: float) -> None:
    rng = np.random.default_rng(0)
    for num_samples in [400, 719, 720, 30 * 16_000, 30 * 16_000 + 320, *rng.integers(400, 600 * 16_000, 200).tolist()]:
        windows = split_windows(num_samples, 30, overlap)
        assert windows[0].frames.start == 0 and windows[-1].frames.stop == num_frames(num_samples)
        for window, following in itertools.pairwise(windows):
            assert window.frames.stop == following.frames.start
        for window in windows:
            start, size = window.samples.start // 320, window.samples.stop - window.samples.start
            assert window.samples.start % 320 == 0 and window.samples.stop <= num_samples
            assert 0 <= window.frames.start - start < window.frames.stop - start <= num_frames(size)
        if len(windows) > 1:
            assert len({w.samples.stop - w.samples.start for w in windows}) == 1
            inner = [w.frames.start - w.samples.start // 320 for w in windows[1:]]
            assert min(inner) >= overlap * 50 // 2


@pytest.mark.slow
def test_features_are_those_of_each_window(student: Student) -> None:
    # The queue holds less than a window, so most windows must wait.
    engine = FeatureEngine(TorchBackend(student), BatchLimits(queue_seconds=5))
    waveform = speechlike(31)
    limits = Limits(long_audio="windows", max_seconds=30, long_seconds=60, window_seconds=8, overlap_seconds=2)
    windows = split_windows(len(waveform), 8, 2)

    async def both() -> tuple[np.ndarray, np.ndarray]:
        stitched = await features_in_windows(engine, waveform, limits)
        last = await features_in_windows(engine, waveform, limits, 3)
        assert stitched.windows == len(windows) == 5
        return stitched.array, last.array

    stitched, last = asyncio.run(both())
    engine.close()
    assert stitched.shape == (3, num_frames(len(waveform)), 16)
    np.testing.assert_allclose(last, stitched[2], atol=1e-5)
    for window in windows:
        part = torch.from_numpy(waveform[window.samples])[None]
        with torch.inference_mode():
            alone, _ = student.encode(part, torch.tensor([part.shape[1]]))
        start = window.samples.start // 320
        kept = alone[0, :, window.frames.start - start : window.frames.stop - start].numpy()
        np.testing.assert_allclose(stitched[:, window.frames], kept, atol=1e-5)


@pytest.mark.slow
def test_the_service_splits_long_audio_and_refuses_longer_audio(student: Student) -> None:
    def body(seconds: float) -> bytes:
        buffer = io.BytesIO()
        soundfile.write(buffer, speechlike(seconds), 16_000, format="FLAC")
        return buffer.getvalue()

    limits = {"max_seconds": 10, "long_audio": {"max_seconds": 40, "window_seconds": 8, "overlap_seconds": 2}}
    with TestClient(create_app(student, limits=limits)) as client, TestClient(create_app(student)) as other:
        for seconds, windows in ((10, "1"), (12, "2"), (39, "7")):
            audio = body(seconds)
            answer = client.post("/v1/features?format=npy", content=audio)
            assert answer.headers["x-windows"] == windows
            found = np.load(io.BytesIO(answer.content))
            whole = np.load(io.BytesIO(other.post("/v1/features?format=npy", content=audio).content))
            assert found.shape == whole.shape
            error = np.linalg.norm(found - whole) / np.linalg.norm(whole)
            # The weights are random; docs/in-depth/serving.md has measurements with a trained student on speech.
            assert error < (1e-4 if windows == "1" else 0.2)
        refused = client.post("/v1/features", content=body(41))
        assert (refused.status_code, refused.json()["error_type"]) == (413, "too_long")
        assert "40 seconds" in refused.json()["error"]


@pytest.mark.parametrize("settings", [(600, 30, 16), (600, 30, -1), (20, 30, 4), (600, 0.5, 0)])
def test_impossible_windows_are_refused(settings: tuple[float, float, float]) -> None:
    names = ("max_seconds", "window_seconds", "overlap_seconds")
    with pytest.raises(ValueError, match="window_seconds|overlap_seconds"):
        create_app("unread", limits={"long_audio": dict(zip(names, settings, strict=True))})


def test_windows_longer_than_max_seconds_are_refused() -> None:
    with pytest.raises(ValueError, match="max_seconds"):
        Limits(max_seconds=20, long_audio="windows")
