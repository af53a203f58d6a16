"""Batching: correct features, bounded batches of similar lengths, and no inference for cancelled requests."""

import asyncio
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from ray_distill.serve.api.errors import ServiceError
from ray_distill.serve.inference.backends import TorchBackend
from ray_distill.serve.inference.batch_selection import MIN_FILL, choose_batch
from ray_distill.serve.inference.engine import BatchRecord, EngineClosedError, FeatureEngine
from ray_distill.serve.settings import BatchLimits
from ray_distill.student import Student


def waveforms(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, int(rng.integers(400, 32_000))).astype(np.float32) for _ in range(count)]


class Gate:
    """Blocks a student's inference until ``open`` is set, and records the sizes of batches."""

    def __init__(self, student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self.batches: list[int] = []
        real = student.layer_outputs

        def held(waveforms: torch.Tensor, lengths: torch.Tensor, **options: Any) -> Any:
            self.entered.set()
            assert self.open.wait(20)
            self.batches.append(len(lengths))
            return real(waveforms, lengths, **options)

        monkeypatch.setattr(student, "layer_outputs", held)


def test_the_oldest_runs_with_those_of_similar_length() -> None:
    assert choose_batch([100], 50) == [0]
    assert choose_batch([100, 10, 101, 99, 500], 1000) == [0, 2, 3]
    assert choose_batch([100, 100, 100], 200) == [0, 1]


def test_batches_stay_within_the_budget_and_waste_is_bounded() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        lengths = rng.integers(1, 1000, rng.integers(1, 40)).tolist()
        chosen = choose_batch(lengths, 3000)
        rows = [lengths[index] for index in chosen]
        assert chosen[0] == 0 and len(set(chosen)) == len(chosen)
        assert len(rows) == 1 or len(rows) * max(rows) <= 3000
        assert min(rows) >= MIN_FILL * max(rows)


@pytest.mark.parametrize("space", ["student", "teacher"])
def test_features_do_not_depend_on_the_batch(student: Student, space: Any) -> None:
    records: list[BatchRecord] = []
    engine = FeatureEngine(TorchBackend(student), limits=BatchLimits(wait_seconds=0.05), on_batch=records.append)
    inputs = waveforms(30)

    async def together() -> list[Any]:
        return await asyncio.gather(*(engine.features(waveform, None, space) for waveform in inputs))

    answers = asyncio.run(together())
    engine.close()
    assert len(records) < len(inputs)
    assert sum(record.size for record in records) == len(inputs)
    for waveform, answer in zip(inputs, answers, strict=True):
        with torch.inference_mode():
            out = student(torch.from_numpy(waveform)[None], torch.tensor([len(waveform)]))
        alone = (out.hidden_states if space == "student" else out.projections)[0].numpy()
        np.testing.assert_allclose(answer.array, alone, atol=1e-5 * np.abs(alone).max(), rtol=0)


def test_a_full_queue_refuses_with_retry_after(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FeatureEngine(TorchBackend(student), limits=BatchLimits(queue_seconds=2))
    gate = Gate(student, monkeypatch)
    second = np.zeros(16_000, np.float32)

    async def main() -> None:
        running = asyncio.create_task(engine.features(second))
        await asyncio.to_thread(gate.entered.wait, 20)
        waiting = [asyncio.create_task(engine.features(second)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ServiceError) as refused:
            await engine.features(second)
        assert refused.value.error_type == "overloaded" and int(refused.value.headers["retry-after"]) >= 1
        with pytest.raises(ServiceError):
            engine.check_room()
        gate.open.set()
        await asyncio.gather(running, *waiting)
        assert engine.queued_seconds == 0

    asyncio.run(main())
    engine.close()


def test_cancelled_utterances_do_not_run_and_free_their_room(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FeatureEngine(TorchBackend(student))
    gate = Gate(student, monkeypatch)
    second = np.zeros(16_000, np.float32)

    async def main() -> None:
        running = asyncio.create_task(engine.features(second))
        await asyncio.to_thread(gate.entered.wait, 20)
        left = asyncio.create_task(engine.features(second))
        stays = asyncio.create_task(engine.features(second))
        await asyncio.sleep(0)
        assert engine.queued_seconds == 2
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        assert engine.queued_seconds == 1
        gate.open.set()
        await asyncio.gather(running, stays)

    asyncio.run(main())
    engine.close()
    assert gate.batches == [1, 1]


def test_closing_finishes_what_is_queued(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FeatureEngine(TorchBackend(student))
    gate = Gate(student, monkeypatch)

    async def main() -> None:
        tasks = [asyncio.create_task(engine.features(waveform)) for waveform in waveforms(5)]
        await asyncio.to_thread(gate.entered.wait, 20)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        gate.open.set()
        assert len(await asyncio.gather(*tasks)) == 5
        await closing
        with pytest.raises(EngineClosedError):
            await engine.features(waveforms(1)[0])

    asyncio.run(main())
    assert not engine.alive


def test_a_failed_batch_does_not_stop_the_engine(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FeatureEngine(TorchBackend(student))
    with monkeypatch.context() as patch:
        patch.setattr(student, "layer_outputs", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            asyncio.run(engine.features(waveforms(1)[0]))
        patch.setattr(student, "layer_outputs", lambda *_, **__: torch.empty(2**58))
        with pytest.raises(
            ServiceError, match=r"too little memory for 1.\d s of audio at once; send shorter audio"
        ) as caught:
            asyncio.run(engine.features(waveforms(1)[0]))
        assert caught.value.error_type == "too_long"
    assert asyncio.run(engine.features(waveforms(1)[0])).array.ndim == 3
    engine.close()


def test_a_failing_utterance_does_not_fail_its_batch(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FeatureEngine(TorchBackend(student), limits=BatchLimits(wait_seconds=0.2))
    real = student.layer_outputs
    sizes: list[int] = []

    def picky(waveforms: torch.Tensor, lengths: torch.Tensor, **options: Any) -> Any:
        sizes.append(len(lengths))
        assert not (waveforms[:, 0] == 0.5).any(), "this one"
        return real(waveforms, lengths, **options)

    monkeypatch.setattr(student, "layer_outputs", picky)
    clips = [np.full(8_000, value, np.float32) for value in (0.1, 0.5, 0.2)]

    async def main() -> list[Any]:
        return await asyncio.gather(*map(engine.features, clips), return_exceptions=True)

    first, second, third = asyncio.run(main())
    engine.close()
    assert sizes == [3, 1, 1, 1]
    assert isinstance(second, AssertionError)
    assert first.array.shape == third.array.shape == (3, 24, 16)


def test_utterances_one_by_one_have_the_memory_of_their_batch(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FeatureEngine(TorchBackend(student), limits=BatchLimits(wait_seconds=0.2))
    real = student.layer_outputs
    held: list[weakref.ref[torch.Tensor]] = []

    def small(waveforms: torch.Tensor, lengths: torch.Tensor, **options: Any) -> Any:
        if len(lengths) > 1:
            activations = torch.zeros(10)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert held[0]() is None, "the failed batch still has its memory"
        return real(waveforms, lengths, **options)

    monkeypatch.setattr(student, "layer_outputs", small)

    async def main() -> list[Any]:
        clips = [np.full(8_000, value, np.float32) for value in (0.1, 0.2)]
        return await asyncio.gather(*map(engine.features, clips))

    assert [features.array.shape for features in asyncio.run(main())] == [(3, 24, 16)] * 2
    engine.close()
    assert len(held) == 1


def test_an_engine_that_keeps_failing_is_not_alive(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FeatureEngine(TorchBackend(student))
    with monkeypatch.context() as patch:
        patch.setattr(student, "layer_outputs", lambda *_, **__: 1 / 0)
        for alive in (True, True, False):
            with pytest.raises(ZeroDivisionError):
                asyncio.run(engine.features(waveforms(1)[0]))
            assert engine.alive == alive
    asyncio.run(engine.features(waveforms(1)[0]))
    assert engine.alive  # It works again.
    engine.close()


@pytest.mark.parametrize(
    "wrong", [{"queue_seconds": 0}, {"batch_seconds": float("inf")}, {"batch_seconds": -1}, {"wait_seconds": -0.1}]
)
def test_limits_that_stop_everything_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BatchLimits(**wrong)
