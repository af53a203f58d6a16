"""Frames of teachers with another rate become frames of 20 ms, with the masks that the teacher had."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.build.shard_writer import open_writer
from ray_distill.teacher_cache.frames import num_frames
from ray_distill.teacher_cache.maintenance.derive import derive_cache
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.reading.commit_manifest import update_manifest
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.create import create_cache
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.targets.crop import crop_batch, crop_starts
from ray_distill.teacher_cache.targets.frame_rate import check_counts, check_rule, spread_mask, teacher_positions
from ray_distill.teacher_cache.targets.online_targets import OnlineReader
from ray_distill.teacher_cache.targets.several_caches import SeveralCaches
from ray_distill.teacher_cache.targets.student_frames import StudentFrames, open_reader
from ray_distill.teacher_cache.targets.target_batch import SeveralTargets
from ray_distill.teacher_cache.teachers.architecture import Architecture, build_model
from ray_distill.teacher_cache.teachers.wav2vec2 import Wav2Vec2Teacher

MASKS = MaskDraws(policy=MaskPolicy(mask_prob=0.5, mask_length=4), draws=1, seed=3)
NONE = MASKS.model_copy(update={"draws": 0})


@cache
def teacher_of(rate: int) -> Wav2Vec2Teacher:
    """A random teacher with 25, 50, 75 or 100 frames per second; one with 75 reads audio at 24 kHz, as MERT does."""
    last = {25: 4, 50: 2, 75: 2, 100: 1}[rate]
    with torch.random.fork_rng():
        torch.manual_seed(rate)
        model = build_model(
            Architecture(
                conv_layers=[(8, 10, 5), *[(8, 3, 2)] * 4, (8, 2, 2), (8, 2, last)],
                conv_bias=False,
                conv_layer_norm=False,
                dim=16,
                ffn_dim=32,
                heads=2,
                layers=2,
                layer_norm_first=False,
                pos_kernel=4,
                pos_groups=2,
            ),
            f"{rate} per second",
        )
        embedding = torch.randn(16)
    return Wav2Vec2Teacher(model, embedding, name=f"{rate} per second", input_rate=24_000 if rate == 75 else 16_000)


@pytest.fixture
def write(tmp_path: Path, source_utterances: list[Utterance]) -> Callable[..., str]:
    """Writes a cache of `teacher_of` a rate and returns its place."""

    def make(rate: int, **changes: object) -> str:
        teacher, place = teacher_of(rate), str(tmp_path / f"cache-{rate}")
        spec = spec_of(rate, **changes)
        plan = plan_shards(source_utterances, spec.shard_seconds, teacher.num_frames)
        made = create_cache(Store(place), spec, plan, teacher_name=teacher.name, teacher_spec="", state={})
        with open_writer(made, teacher) as writer:
            for shard in made.shards:
                assert not writer.write(shard)["failures"]
        update_manifest(made, None)
        return place

    return make


def spec_of(rate: int, **changes: object) -> CacheSpec:
    teacher = teacher_of(rate)
    values = {
        "teacher": teacher.fingerprint,
        "num_layers": 2,
        "dim": 16,
        "layers": (1, 2),
        "masks": MASKS,
        "codec": "fp32",
        "corpus": "test",
        "shard_seconds": 5,
        "batch_seconds": 6,
        "frame_rate": teacher.stated_rate,
    }
    return CacheSpec.model_validate(values | changes)


@pytest.mark.parametrize(
    ("rate", "rule", "expected"),
    [
        ("50", "average", [[0], [1], [2], [3]]),
        ("50", "nearest", [[0], [1], [2], [3]]),
        ("100", "average", [[0, 1], [2, 3], [4, 5], [6, 6]]),
        ("25", "average", [[0], [0], [1], [1]]),
        ("25", "nearest", [[0], [0], [1], [1]]),
        ("75", "average", [[0, 0, 1], [1, 2, 2], [3, 3, 4], [4, 5, 5]]),
        ("75", "nearest", [[0], [2], [3], [5]]),
        ("100/3", "average", [[0, 0], [0, 1], [1, 1], [2, 2]]),
        ("11025/128", "nearest", [[0], [2], [4], [6]]),
    ],
)
def test_the_rule_by_hand(rate: str, rule: str, expected: list[list[int]]) -> None:
    available = 7 if rate == "100" else 20
    assert teacher_positions(Fraction(rate), rule, 4, available).tolist() == expected  # type: ignore[arg-type]


def by_hand(states_LUD: Tensor, rate: int, frames: int) -> Tensor:
    """The (L, T, D) means over frames of 20 ms, of states on a grid of 1 / 300 s, the common parts of all rates here."""
    fine = states_LUD.repeat_interleave(300 // rate, dim=1)
    short = max(0, frames * 6 - fine.shape[1])
    fine = torch.cat([fine, fine[:, -1:].expand(-1, short, -1)], 1)[:, : frames * 6]
    return fine.unflatten(1, (frames, 6)).mean(2)


@pytest.mark.parametrize(("rate", "masks"), [(100, MASKS), (25, NONE), (75, NONE)])
def test_cached_and_online_targets_are_the_teachers_means(
    write: Callable[..., str], source_utterances: list[Utterance], rate: int, masks: MaskDraws
) -> None:
    teacher, draw = teacher_of(rate), 0 if masks.draws else None
    reader = open_reader(write(rate, masks=masks), "train")
    assert isinstance(reader, StudentFrames) and reader.rule == "average"
    assert reader.num_frames.tolist() == [num_frames(int(n)) for n in reader.num_samples]
    rows = [5, 0, 3]
    batch = reader.read(rows, draw)
    assert batch.targets.shape[2] == int(batch.num_frames.max())
    for row, name in enumerate(batch.ids):
        length, count = int(batch.lengths[row]), int(batch.num_frames[row])
        wave = batch.waveforms[row : row + 1, :length]
        states = teacher(wave)[0]
        if draw is not None:
            mask = MASKS.frame_mask(draw, [name], [count])
            assert batch.frame_mask is not None and torch.equal(batch.frame_mask[row, :count], mask[0])
            spread = mask.repeat_interleave(2, dim=1)
            spread = torch.cat([spread, spread[:, -1:]], 1)[:, : states.shape[1]]
            states = torch.where(spread[0][:, None], states, teacher(wave, frame_mask=spread)[0])
        torch.testing.assert_close(batch.targets[row, :, :count], by_hand(states, rate, count), atol=1e-5, rtol=1e-5)
    members = {u.id: u for u in source_utterances}
    online = OnlineReader([members[name] for name in batch.ids], teacher, masks)
    live = online.read([0, 1, 2], draw)
    assert online.num_frames.tolist() == batch.num_frames.tolist()
    for row, count in enumerate(batch.num_frames.tolist()):
        torch.testing.assert_close(live.targets[row, :, :count], batch.targets[row, :, :count], atol=1e-5, rtol=1e-5)
    # A crop cuts student's frames.
    cropped, starts = crop_batch(batch, 6_400, 0, 1), crop_starts(batch.ids, batch.lengths.tolist(), 6_400, 0, 1)
    for row, start in enumerate(starts):
        assert torch.equal(cropped.targets[row], batch.targets[row, :, start : start + 19])


def test_a_short_and_a_long_utterance_at_24_khz_do_not_change_each_other() -> None:
    teacher = teacher_of(75)
    waves = torch.randn(2, 9_000, generator=torch.Generator().manual_seed(0))
    both = teacher(waves, torch.tensor([9_000, 4_001]))
    count = teacher.num_frames(4_001)
    torch.testing.assert_close(both[1, :, :count], teacher(waves[1:, :4_001])[0], atol=1e-5, rtol=1e-5)
    assert teacher.min_samples == 400 and teacher.num_frames(400) >= 1


def test_a_spread_mask_ends_with_its_utterance() -> None:
    masks = torch.tensor([[True, False, True], [True, False, False]])
    spread = spread_mask(masks, Fraction(100), [3, 1], [7, 3]).int().tolist()
    assert spread == [[1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]


def test_symbols_are_those_of_the_nearest_frame(write: Callable[..., str], tmp_path: Path) -> None:
    derive_cache(write(100), tmp_path / "units", "units:4", [2])
    raw, reader = CacheReader(tmp_path / "units", "train"), open_reader(str(tmp_path / "units"), "train")
    assert raw.cache.spec.frame_rate == "100" and isinstance(reader, StudentFrames) and reader.rule == "nearest"
    count = int(reader.num_frames[0])
    last = int(raw.num_frames[0]) - 1
    expected = raw.read([0], None).symbols[0, :, [min(2 * j + 1, last) for j in range(count)]]
    assert torch.equal(reader.read([0], None).symbols[0], expected)
    with pytest.raises(
        CacheError, match="can't be read: frames average: the targets are symbols of 100 frames per second"
    ):
        StudentFrames(raw, "average")


def test_teachers_of_two_rates_teach_one_student(
    write: Callable[..., str], make_cache: Callable[..., CacheSpec], tmp_path: Path
) -> None:
    make_cache(tmp_path / "usual", masks=MASKS)
    places = {"a": str(tmp_path / "usual"), "b": write(100)}
    both = SeveralCaches({name: open_reader(place, "train") for name, place in places.items()})
    assert isinstance(open_reader(places["a"], "train"), CacheReader)
    batch = both.read([1, 4], 0)
    assert isinstance(batch.coded, SeveralTargets) and [part.parts for part in batch.coded.parts] == [1, 2]
    alone = open_reader(places["b"], "train").read([1, 4], 0)
    assert alone.ids == batch.ids and torch.equal(batch.of_teacher(1).targets, alone.targets)
    assert alone.frame_mask is not None and batch.frame_mask is not None and alone.frame_mask.equal(batch.frame_mask)


def test_masked_targets_that_cant_be_exact_are_refused(
    write: Callable[..., str], source_utterances: list[Utterance], tmp_path: Path
) -> None:
    with pytest.raises(
        CacheError, match=r"x has 75 frames per second, no multiple of 50, so some of them lie in masked"
    ):
        build_cache(
            tmp_path / "no", spec_of(75), plan_shards(source_utterances, 5), "x", teacher_name="x", workers=None
        )
    place = write(75, targets="clean_only")
    batch = open_reader(place, "train").read([0], 0)
    assert batch.frame_mask is not None and batch.frame_mask.shape[1] == int(batch.num_frames[0])
    assert torch.equal(batch.frame_mask, MASKS.frame_mask(0, batch.ids, batch.num_frames.tolist()))
    other = copy(teacher_of(50))
    vars(other)["fingerprint"] = spec_of(75).teacher
    with (
        pytest.raises(CacheError, match="states 75 frames per second, but 50 per second has 50; give a new cache.path"),
        open_writer(Cache.open(place), other),
    ):
        pass


def test_stored_masks_of_another_policy_are_refused(write: Callable[..., str]) -> None:
    reader = StudentFrames(CacheReader(write(100), "train"))
    spec = reader.cache.spec
    other = spec.model_copy(update={"masks": spec.masks.model_copy(update={"seed": 4})})
    reader.cache = replace(reader.cache, spec=other)
    with pytest.raises(CacheError, match="has masks that are not those of its policy and seed; build it again"):
        reader.read([0], 0)


def test_numbers_of_frames_are_compared_with_the_rate() -> None:
    samples = np.array([400, 16_000, 160_000])
    for rate in (25, 75, 100):
        check_counts(
            Fraction(rate), samples, np.array([teacher_of(rate).num_frames(max(n, 800)) for n in samples.tolist()])
        )
    with pytest.raises(
        ValueError, match="an utterance of 1.00 s has 49 frames, but at 100 frames per second .* about 98"
    ):
        check_counts(Fraction(100), samples[1:2], np.array([49]))
    assert check_rule(Fraction(50), "average", discrete=True) == "average", "frames of 20 ms need no mean"
