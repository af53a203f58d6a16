"""Masks are determined by their arguments, never cover all frames, and have fairseq's distribution."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest

from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy, draw_mask

REPOSITORY = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location(
    "make_mask_statistics", REPOSITORY / "tests" / "golden" / "make_mask_statistics.py"
)
assert _spec is not None and _spec.loader is not None
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

NUM_DRAWS = 4000
POLICIES = [
    MaskPolicy(selection=selection, mask_prob=prob, mask_length=length, mask_other=2, no_overlap=apart, min_space=space)
    for selection in ("static", "uniform", "normal", "poisson")
    for prob, length in ((0.8, 10), (1.0, 3), (0.05, 1), (0.5, 200))
    for apart, space in ((False, 1), (True, 0), (True, 3))
]

FROZEN = (
    "......xxxxxxxxxxxxxxxxxxx..........xxxxxxxxxxxxx............",
    "..........................xxxxxxxxxxxxxxx.......xxxxxx......",
    ".............xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx.......",
    ".xxxxxxxxxxx........xxx..xxxxx...xxxxxxxx....xxxxxxxxxxx....",
)


def positions(mask: np.ndarray) -> str:
    return "".join("x" if masked else "." for masked in mask)


def test_equal_arguments_give_equal_masks_and_others_do_not() -> None:
    policy = MaskPolicy()
    first = draw_mask(policy, 1, 2, "84-121123-0001", 300)
    assert first.shape == (300,) and first.dtype == bool
    np.testing.assert_array_equal(first, draw_mask(policy, 1, 2, "84-121123-0001", 300))
    for other in (
        draw_mask(policy, 2, 2, "84-121123-0001", 300),
        draw_mask(policy, 1, 3, "84-121123-0001", 300),
        draw_mask(policy, 1, 2, "84-121123-0002", 300),
        draw_mask(policy, 12, 0, "84-121123-0001", 300),
    ):
        assert (first != other).any()


def test_the_mask_of_a_batch_has_each_utterances_own_mask() -> None:
    masks = MaskDraws(policy=MaskPolicy(mask_prob=0.5), policies=(MaskPolicy(mask_length=3),), draws=2, seed=7)
    for draw, policy in ((0, masks.policies[0]), (1, masks.policy)):
        batch = masks.frame_mask(draw, ["a", "b"], [60, 90])
        assert batch.shape == (2, 90) and not batch[0, 60:].any()
        np.testing.assert_array_equal(batch[0, :60].numpy(), draw_mask(policy, 7, draw, "a", 60))
        np.testing.assert_array_equal(batch[1].numpy(), draw_mask(policy, 7, draw, "b", 90))


def test_order_and_global_random_state_do_not_matter() -> None:
    policy = MaskPolicy(selection="uniform", mask_prob=0.4, no_overlap=True)
    names = [f"utterance-{n}" for n in range(20)]
    forwards = {name: draw_mask(policy, 0, 0, name, 200) for name in names}
    np.random.seed(5)
    for name in reversed(names):
        np.random.rand()
        np.testing.assert_array_equal(forwards[name], draw_mask(policy, 0, 0, name, 200))


def test_masks_are_frozen() -> None:
    """Masks must never change, because caches depend on them. This includes ids that are not ASCII."""
    apart = MaskPolicy(selection="uniform", mask_prob=0.4, no_overlap=True)
    assert positions(draw_mask(MaskPolicy(), 0, 0, "84-121123-0001", 60)) == FROZEN[0]
    assert positions(draw_mask(apart, 7, 1, "日本語/été", 60)) == FROZEN[1]
    assert positions(draw_mask(MaskPolicy(selection="normal", mask_other=3), 0, 3, "a", 60)) == FROZEN[2]
    assert positions(draw_mask(MaskPolicy(selection="poisson", mask_length=4), 0, 3, "a", 60)) == FROZEN[3]


def test_another_process_draws_the_same() -> None:
    code = (
        "from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy, draw_mask;"
        "print(''.join('x' if m else '.' for m in draw_mask(MaskPolicy(), 3, 1, 'id', 200)))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert out.stdout.strip() == positions(draw_mask(MaskPolicy(), 3, 1, "id", 200))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_some_frames_stay_unmasked(policy: MaskPolicy) -> None:
    for num_frames in (0, 1, 2, 3, 5, 9, 10, 11, 12, 20, 21, 50, 199, 200, 201):
        for draw in range(30):
            mask = draw_mask(policy, 0, draw, "short", num_frames)
            assert mask.shape == (num_frames,)
            assert num_frames == 0 or not mask.all()


def test_one_frame_has_no_mask_and_five_frames_have_one() -> None:
    assert not draw_mask(MaskPolicy(), 0, 0, "a", 1).any()
    for draw in range(100):
        assert 1 <= draw_mask(MaskPolicy(), 0, draw, "a", 5).sum() <= 4


def test_no_mask_at_probability_zero() -> None:
    assert not draw_mask(MaskPolicy(mask_prob=0), 0, 0, "a", 500).any()


@pytest.mark.parametrize("space", [1, 2, 5])
def test_spans_keep_their_space(space: int) -> None:
    policy = MaskPolicy(mask_prob=0.7, mask_length=4, no_overlap=True, min_space=space)
    gaps = set()
    for draw in range(300):
        mask = draw_mask(policy, 0, draw, "a", 80)
        gaps |= set(_inner_gaps(mask))
        assert all(length == 4 for length in _runs(mask))
    assert min(gaps) == space


def _runs(mask: np.ndarray) -> list[int]:
    edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0))
    return list(edges[1::2] - edges[::2])


def _inner_gaps(mask: np.ndarray) -> list[int]:
    masked = np.flatnonzero(mask)
    return _runs(~mask[masked[0] : masked[-1] + 1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"selection": "gaussian"}, "'static', 'uniform', 'normal' or 'poisson'"),
        ({"mask_prob": 1.5}, "less than or equal to 1"),
        ({"mask_prob": float("nan")}, "finite"),
        ({"mask_length": 0}, "greater than or equal to 1"),
        ({"min_space": -1}, "greater than or equal to 0"),
        ({"selection": "uniform", "mask_other": 21}, "above 2 x mask_length 20"),
        ({"selection": "uniform", "mask_other": 1.5}, "not a whole number"),
        ({"mask_probability": 0.5}, "Extra inputs"),
    ],
)
def test_invalid_policies_are_errors(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        MaskPolicy(**wrong)


@cache
def our_statistics(case: str) -> dict[str, list[int]]:
    policy, num_frames = reference.CASES[case]
    draws = (draw_mask(MaskPolicy(**policy), 0, n, "utterance", num_frames) for n in range(NUM_DRAWS))
    found: dict[str, list[int]] = reference.statistics(draws, num_frames)
    return found


def assert_same_distribution(ours: dict[str, list[int]], theirs: dict[str, list[int]]) -> None:
    """Apply a Kolmogorov-Smirnov test at 1 in 1000 to the histograms and allow 4.5 standard errors at each position.

    All runs of a mask count as one sample, because they depend on each other.
    """
    n, m = sum(ours["masked"]), sum(theirs["masked"])
    error = np.sqrt(1 / n + 1 / m)
    for histogram in ("runs", "masked"):
        a, b = (np.cumsum(s[histogram]) / np.sum(s[histogram]) for s in (ours, theirs))
        assert np.abs(a - b).max() < 1.95 * error, histogram
    # Number of runs per mask.
    assert sum(ours["runs"]) / n == pytest.approx(sum(theirs["runs"]) / m, rel=0.02)
    a, b = np.array(ours["positions"]) / n, np.array(theirs["positions"]) / m
    pooled = (np.array(ours["positions"]) + np.array(theirs["positions"])) / (n + m)
    deviation = np.abs(a - b) / np.maximum(np.sqrt(pooled * (1 - pooled)) * error, 1e-9)
    assert deviation.max() < 4.5
    # Test all positions together, because the maximum would hide small deviations everywhere.
    assert np.sum(np.array(ours["positions"])) / n == pytest.approx(np.sum(theirs["positions"]) / m, rel=0.02)


@pytest.mark.parametrize("case", reference.CASES)
def test_same_distribution_as_frozen_fairseq(case: str) -> None:
    assert_same_distribution(our_statistics(case), json.loads(reference.PATH.read_text())[case])


@pytest.mark.parametrize("case", reference.CASES)
def test_same_distribution_as_fairseq(case: str) -> None:
    pytest.importorskip("fairseq", reason="fairseq is not installed (it is the [fairseq] extra), so there is no oracle")
    policy, num_frames = reference.CASES[case]
    draw = reference.fairseq_draws(1)
    theirs = reference.statistics((draw(policy, num_frames) for _ in range(NUM_DRAWS)), num_frames)
    assert_same_distribution(our_statistics(case), theirs)


PUBLISHED = MaskPolicy(selection="uniform", mask_prob=0.8, no_overlap=True)
"""Policy of the recipes. Published batches have 18 utterances, here of 12 s."""
BATCH, FRAMES = 18, 600


def _shape(masks: Iterable[np.ndarray]) -> tuple[float, float]:
    """Return the share of masked frames and the mean length of their runs."""
    kept = list(masks)
    return float(np.concatenate(kept).mean()), sum(int(mask.sum()) for mask in kept) / sum(
        len(_runs(mask)) for mask in kept
    )


@cache
def _trimmed() -> list[np.ndarray]:
    trimmed = PUBLISHED.model_copy(update={"trim_batch": BATCH})
    # How many frames others have masked is estimated for each number of frames, so there are some numbers.
    return [draw_mask(trimmed, 0, 0, str(n), FRAMES + n % 8) for n in range(320)]


def test_trimmed_masks_are_as_thin_as_those_of_published_batches() -> None:
    """The figures: 67 % in runs of 4.6 frames in a batch of 12 s, and 78 % in runs of 10.7 of one utterance alone."""
    rng = np.random.default_rng(0)
    alone = [draw_mask(PUBLISHED, 0, 0, str(n), FRAMES) for n in range(BATCH * 25)]
    together = []
    for first in range(0, len(alone), BATCH):
        fewest = min(mask.sum() for mask in alone[first : first + BATCH])
        for mask in alone[first : first + BATCH]:
            kept = np.zeros(FRAMES, bool)
            kept[rng.choice(np.flatnonzero(mask), fewest, replace=False)] = True
            together.append(kept)
    assert _shape(alone) == (pytest.approx(0.78, abs=0.01), pytest.approx(10.7, abs=0.2))
    share, length = _shape(together)
    assert share == pytest.approx(0.67, abs=0.02) and length == pytest.approx(4.6, abs=0.2)
    assert _shape(_trimmed()) == (pytest.approx(share, abs=0.01), pytest.approx(length, rel=0.05))


def test_trimmed_masks_are_frozen_parts_of_the_masks() -> None:
    for number, mask in enumerate(_trimmed()[:20]):
        assert not (mask & ~draw_mask(PUBLISHED, 0, 0, str(number), len(mask))).any()
    frozen = ".x.x..x.xx.xx....xxxx...x.x.x..xx..x......xx.xxx.x.xxx......"
    assert positions(draw_mask(PUBLISHED.model_copy(update={"trim_batch": 4}), 7, 1, "日本語/été", 60)) == frozen
    assert "trim_batch" not in PUBLISHED.model_dump(), "fingerprints of earlier caches stay valid"
    assert MaskPolicy.model_validate_json(MaskPolicy(trim_batch=18).model_dump_json()).trim_batch == 18


def test_trimmed_masks_are_those_of_fairseqs_batches() -> None:
    pytest.importorskip("fairseq", reason="fairseq is not installed (it is the [fairseq] extra), so there is no oracle")
    draw = reference.fairseq_draws(1, BATCH)
    batches = [draw(PUBLISHED.model_dump(exclude={"trim_batch"}), FRAMES) for _ in range(20)]
    share, length = _shape(mask for batch in batches for mask in batch)
    assert _shape(_trimmed()) == (pytest.approx(share, abs=0.015), pytest.approx(length, rel=0.06))
