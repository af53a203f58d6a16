"""Builds that find their own batches write what they would with that number. A function stands for the memory of a GPU."""

import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from ray_distill.teacher_cache.build import build_cache as building
from ray_distill.teacher_cache.build import shard_writer
from ray_distill.teacher_cache.build.build_cache import BuildReport, build_cache
from ray_distill.teacher_cache.build.pass_memory import PassMemory, find_fitting_passes
from ray_distill.teacher_cache.build.shard_workers import ShardWriterActor, Workers
from ray_distill.teacher_cache.build.shard_writer import ShardWriter
from ray_distill.teacher_cache.maintenance.repair import repair_cache
from ray_distill.teacher_cache.maintenance.verify import verify_cache
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.storage.build_statistics import BUILDS
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.teachers import Teacher, load_teacher

TEACHER = "random:2x32"
SECOND, WEIGHTS, LIMIT = 1_000_000, 2_000_000, 8_300_000
"""Bytes of a second of padded audio and of the rest, and those that passes may need."""
Build = Callable[..., BuildReport]
Make = Callable[..., CacheSpec]


class Gpu:
    """A GPU whose memory is a function of the batch, in the place of a CPU.

    Attributes:
        measured: Numbers of utterances in the batches that were measured.
        batches: Seconds of padded audio in the batches of the teacher's passes.
        capacity: Seconds of padded audio beyond which a pass of the build runs out of memory, whatever was measured.
        limit: Bytes that passes may need.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.measured: list[int] = []
        self.batches: list[float] = []
        self.capacity, self.limit = 1e6, LIMIT
        self.is_measuring = False
        compute = Teacher.hidden_states

        def states(teacher: Teacher, waveforms: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            seconds = waveforms.numel() / 16_000
            if not self.is_measuring:
                self.batches.append(seconds)
                if seconds > self.capacity:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
            return compute(teacher, waveforms, *arguments, **options)

        def peak(memory: PassMemory, lengths: Sequence[int]) -> int:
            self.measured.append(len(lengths))
            self.is_measuring = True
            assert memory._run_passes(lengths) > 0
            self.is_measuring = False
            return WEIGHTS + SECOND * max(lengths) * len(lengths) // 16_000

        patch.setattr(Teacher, "hidden_states", states)
        patch.setattr(PassMemory, "_peak", peak)
        patch.setattr(PassMemory, "_usable_bytes", lambda memory, share: self.limit)
        for module in (shard_writer, building):
            patch.setattr(module, "load_teacher", lambda spec, device="cpu": load_teacher(spec))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


@pytest.fixture
def build(cache_spec: Make, source_utterances: list[Utterance]) -> Build:
    """Build a cache on such a GPU. ``changes`` are fields of its specification."""

    def run(location: Path, device: str = "cuda", notes: list[str] | None = None, **changes: object) -> BuildReport:
        spec = cache_spec(TEACHER, **{"batch_seconds": "auto", "shard_seconds": 15} | changes)
        plan = plan_shards(source_utterances, spec.shard_seconds)
        say = [].append if notes is None else notes.append
        options: dict[str, Any] = {"teacher_name": TEACHER, "workers": None, "device": device, "on_note": say}
        return build_cache(location, spec, plan, TEACHER, **options)

    return run


def tables(root: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of all shard files, which have the same bytes as long as their codes have."""
    return {str(path.relative_to(root)): pq.read_table(path).to_pylist() for path in root.rglob("part-*.parquet")}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"codec": "pca", "layers": (2,)},
    {"codec": "int8", "targets": "composite_only"},
    {"codec": "fp16", "targets": "clean_only"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_build_that_chose_equals_one_that_was_told(
    options: dict[str, Any], tmp_path: Path, build: Build, gpu: Gpu
) -> None:
    notes: list[str] = []
    report = build(tmp_path / "auto", notes=notes, **options)
    assert len(gpu.measured) >= 3 and max(gpu.measured) > 1
    (found,) = report.batch_seconds
    assert 4.5 < found <= (LIMIT - WEIGHTS) / SECOND
    passes, gpu.batches = gpu.batches, []
    told = build(tmp_path / "told", **options, batch_seconds=found)
    assert passes == gpu.batches and max(passes) <= found, "the measurement changes no batch"
    assert tables(tmp_path / "auto") == tables(tmp_path / "told")
    assert told.batch_seconds == ()
    # It is said once for each worker, and recorded with the build.
    (note,) = notes
    assert note.startswith(f"batches of {found:g} s of audio (auto) on ")
    for name, sizes in (("auto", [found]), ("told", None)):
        (record,) = (tmp_path / name / BUILDS).iterdir()
        assert json.loads(record.read_text()).get("batch_seconds") == sizes


@pytest.mark.parametrize(("targets", "held"), [("clean_and_masked", 1), ("composite_only", 1), ("clean_only", 0)])
def test_a_pass_has_the_memory_of_the_masked_pass_before_it(
    targets: str, held: int, tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most: list[int] = []
    compute = Teacher.hidden_states

    def states(teacher: Teacher, *arguments: Any, **options: Any) -> Tensor:
        most.append(sum(of_pass() is not None for of_pass in alive))
        found = compute(teacher, *arguments, **options)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Teacher, "hidden_states", states)
    masks = MaskDraws(policy=MaskPolicy(mask_prob=0.5, mask_length=4), draws=3)
    build(tmp_path / "cache", "cpu", batch_seconds=4, targets=targets, masks=masks, codec="fp16")
    assert max(most) == held, "only the clean pass is there while the masked ones run"


def test_masks_are_drawn_while_the_teacher_is_at_another_batch(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python draws them, in milliseconds, in which a GPU would have nothing to do."""
    held: dict[str, set[bool]] = {"_masks": set(), "_encode": set()}

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(ShardWriter, name)

        def call(writer: ShardWriter, *arguments: Any) -> Any:
            held[name].add(writer._teacher_lock.locked())
            return original(writer, *arguments)

        return call

    for name in held:
        monkeypatch.setattr(ShardWriter, name, watched(name))
    monkeypatch.setattr(shard_writer, "teacher_mask", watched_mask := Mock(wraps=shard_writer.teacher_mask))
    build(tmp_path / "cache", "cpu", batch_seconds=4, codec="fp16")
    assert held == {"_masks": {False}, "_encode": {True}} and watched_mask.call_count > 1


def test_what_is_found_is_no_part_of_the_identity(tmp_path: Path, build: Build, gpu: Gpu) -> None:
    small = build(tmp_path / "small")
    gpu.limit = 2 * LIMIT
    large = build(tmp_path / "large")
    assert small.batch_seconds < large.batch_seconds
    one, other = (Cache.open(tmp_path / name) for name in ("small", "large"))
    assert one.fingerprint == other.fingerprint and one.spec.batch_seconds == "auto"
    assert one.files(one.shards[0]) == other.files(other.shards[0])
    for file in one.files(one.shards[0]):
        ours, theirs = (pq.read_table(cache.store.local / file.name) for cache in (one, other))
        for name in [name for name in ours.column_names if name.startswith("layer")]:
            for a, b in zip(ours[name].to_pylist(), theirs[name].to_pylist(), strict=True):
                assert np.allclose(np.frombuffer(a, "<f4"), np.frombuffer(b, "<f4"), atol=1e-4), "up to rounding"


def test_a_build_goes_on_with_what_fits_then(tmp_path: Path, build: Build, gpu: Gpu) -> None:
    build(tmp_path / "cache")
    cache = Cache.open(tmp_path / "cache")
    commits = sorted((tmp_path / "cache" / "commits").rglob("*.json"))
    before = tables(tmp_path / "cache")
    commits[0].unlink()
    gpu.limit = 2 * LIMIT
    report = build(tmp_path / "cache")
    assert report.written == 1 and report.reused == len(cache.shards) - 1
    assert report.batch_seconds[0] > (LIMIT - WEIGHTS) / SECOND
    assert tables(tmp_path / "cache").keys() == before.keys() and verify_cache(tmp_path / "cache") == []


@pytest.mark.parametrize("codec", ["fp32", "pca"])
def test_where_memory_runs_out_later_the_shard_begins_again_with_half(
    codec: str, tmp_path: Path, build: Build, gpu: Gpu
) -> None:
    gpu.limit, gpu.capacity = 2 * LIMIT, 4.0
    notes: list[str] = []
    report = build(tmp_path / "cache", notes=notes, codec=codec)
    found, *later = notes
    assert found.startswith("batches of 1") and 1 <= len(later) <= 2
    sizes = [float(note.rpartition("goes on with ")[2].removesuffix(" s")) for note in later]
    assert "memory ran out on" in later[0] and sizes == sorted(sizes, reverse=True)
    assert report.batch_seconds == (sizes[-1],), "no file has batches of two sizes, and no size is tried again"
    assert verify_cache(tmp_path / "cache") == []
    gpu.capacity = 1e6
    build(tmp_path / "told", codec=codec, batch_seconds=sizes[-1])
    assert tables(tmp_path / "cache") == tables(tmp_path / "told")


def test_one_utterance_that_does_not_fit_is_an_error_of_one_sentence(
    tmp_path: Path, build: Build, gpu: Gpu, source_utterances: list[Utterance]
) -> None:
    longest = max(utterance.num_samples for utterance in source_utterances) / 16_000
    gpu.capacity = 0.1
    with pytest.raises(CacheError, match=r"ran out of memory on cpu with one utterance of [12]\.\d s; stop other"):
        build(tmp_path / "later")
    assert not list((tmp_path / "later" / "clean").iterdir())
    gpu.capacity, gpu.limit = 1e6, WEIGHTS
    message = (
        rf"^cache.batch_seconds auto: the longest utterance \({longest:.1f} s\) alone .* \(0\.0 GB\); .* corpus.max_"
    )
    with pytest.raises(CacheError, match=message):
        build(tmp_path / "before")
    # An actor returns the sentence, because Ray would restart it after an exception.
    actor = ShardWriterActor(str(tmp_path / "before"), TEACHER, "cuda", 3)
    assert "alone needs more memory in the teacher's passes than the GPU has left" in actor._refused


def test_two_threads_halve_once(tmp_path: Path, build: Build, gpu: Gpu) -> None:
    build(tmp_path / "cache")
    writer = ShardWriter(str(tmp_path / "cache"), TEACHER, "cuda")
    size, device = writer._size, torch.device("cpu")
    found = size.seconds
    for _ in range(2):
        size.halve(found, device)
    assert found / 2.2 < size.seconds <= found / 2 and len(size.take_notes()) == 2 and size.take_notes() == []


def test_a_cpu_has_no_memory_to_measure(tmp_path: Path, build: Build, gpu: Gpu) -> None:
    message = (
        "are auto, which measures the memory of a GPU, but the teacher runs on the CPU; set cache.gpus_per_actor, or"
    )
    with pytest.raises(CacheError, match=message):
        build(tmp_path / "cache", "cpu")
    assert not (tmp_path / "cache" / "cache.json").exists()
    build(tmp_path / "cache")
    assert build(tmp_path / "cache", "cpu").written == 0, "nothing is left to do"
    victim = next((tmp_path / "cache" / "clean").rglob("*.parquet"))
    victim.with_name(victim.name).unlink()
    next((tmp_path / "cache" / "commits" / "clean").rglob(f"{victim.stem}.json")).unlink()
    with pytest.raises(CacheError, match=message):
        build(tmp_path / "cache", "cpu")
    # A repair takes the default there, as it may run on any machine.
    gpu.measured, gpu.batches = [], []
    repair_cache(str(tmp_path / "cache"), TEACHER, "cpu")
    assert not gpu.measured and max(gpu.batches) > 4.3
    assert verify_cache(tmp_path / "cache") == []


def test_a_number_does_not_serve_a_need_of_another_size(tmp_path: Path, build: Build, gpu: Gpu) -> None:
    build(tmp_path / "cache")
    with pytest.raises(CacheError, match=r"made for something else \(batch_seconds: 'auto' -> 6.0\)"):
        build(tmp_path / "cache", batch_seconds=6)


class Allocator:
    """The memory of a GPU by PyTorch's functions."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = 1000
        self.share = 1.0
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 80_000))
        patch.setattr(torch.cuda, "memory_reserved", lambda device: 1500)
        patch.setattr(torch.cuda, "memory_allocated", lambda device: self.now)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(self, "peak", self.now))
        patch.setattr(
            torch.cuda, "set_per_process_memory_fraction", lambda share, device: setattr(self, "share", share)
        )

    def take(self, share: float, device: int | None) -> None:
        """Limit the process to a share. PyTorch takes no device without an index here, such as that of a teacher."""
        assert device is None or isinstance(device, int)
        self.share = share


def test_codes_on_their_way_are_counted_and_a_share_is_kept(
    tmp_path: Path, make_cache: Callable[..., CacheSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(tmp_path / "cache", shard_seconds=15)
    gpu, device, cache = Allocator(monkeypatch), torch.device("cuda"), Cache.open(tmp_path / "cache")
    seen: list[list[int]] = []

    def passes(lengths: Sequence[int]) -> int:
        seen.append(list(lengths))
        gpu.peak = gpu.now + max(lengths) * len(lengths) // 16
        return 70

    memory = PassMemory(passes, np.array([16_000, 32_000, 32_000]), device)
    assert memory.limit == 1000 + 0.9 * (10_000 + 500)
    assert memory(4.0) == 1000 + 4000 + 70 and seen == [[32_000, 32_000]]
    found = find_fitting_passes(cache, passes, device)
    assert found.peak_bytes <= found.limit_bytes == memory.limit and gpu.share == 1
    part = find_fitting_passes(cache, passes, device, 0.05)
    assert gpu.share == 0.05 and part.limit_bytes == 3600 and part.seconds < found.seconds
    with pytest.raises(CacheError, match=r"stop other work on that GPU, raise cache.gpus_per_actor, or lower corpus"):
        find_fitting_passes(cache, passes, device, 0.01)


def test_a_worker_has_its_share_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        "ray_distill.teacher_cache.build.shard_workers.ShardWriter", lambda *args, **options: given.append(options)
    )
    ShardWriterActor("here", TEACHER, Workers(gpus_per_actor=0.5).device, 3, 0.5)
    assert given == [{"max_failed": 3, "gpu_share": 0.5}]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, whose memory is measured")
def test_what_is_found_fits_on_a_gpu(tmp_path: Path, build: Build) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    notes: list[str] = []
    report = build(tmp_path / "cache", notes=notes, precision="fp16")
    assert torch.cuda.max_memory_allocated() < 0.95 * total
    assert len(report.batch_seconds) == 1 and notes[0].startswith(f"batches of {report.batch_seconds[0]:g} s")
    assert verify_cache(tmp_path / "cache") == []
