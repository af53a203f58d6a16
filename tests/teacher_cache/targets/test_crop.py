"""Crops of a batch are aligned with its frames, and depend on seed, epoch and utterance only."""

import numpy as np
import pytest
import torch

from ray_distill.teacher_cache.codecs.raw import RawCodec
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, num_frames
from ray_distill.teacher_cache.targets.crop import crop_batch, crop_starts
from ray_distill.teacher_cache.targets.target_batch import Batch, CodedTargets

LENGTHS = [40_000, 9_000, 16_321]


def batch(coded: bool) -> Batch:
    """A batch whose samples hold their number, and whose targets and mask hold the number of their frame."""
    lengths = torch.tensor(LENGTHS)
    frames = num_frames(lengths)
    number = torch.arange(int(frames.max()))
    waveforms = torch.arange(float(max(LENGTHS))).repeat(3, 1)
    targets: torch.Tensor | CodedTargets = number.float()[:, None].expand(3, 2, -1, 4).clone()
    if coded:
        codecs = [RawCodec("fp32", layer, 4) for layer in (1, 2)]
        codes = codecs[0].encode(number.float()[:, None, None].expand(-1, 1, 4))
        targets = CodedTargets((1, 2), tuple((codec, codes.repeat(3, 1, 1)) for codec in codecs))
    return Batch(["a", "b", "c"], waveforms, lengths, frames, targets, (number % 3 == 0).repeat(3, 1))


@pytest.mark.parametrize("coded", [False, True])
def test_frames_of_a_crop_are_frames_of_the_utterance(coded: bool) -> None:
    whole, longest = batch(coded), 16_000
    starts = crop_starts(whole.ids, LENGTHS, longest, 0, 5)
    cropped = crop_batch(whole, longest, 0, 5)
    assert starts[1] == 0 and starts[0] > 0
    assert cropped.lengths.tolist() == [16_000, 9_000, 16_000]
    assert cropped.num_frames.tolist() == num_frames(cropped.lengths).tolist()
    assert cropped.waveforms.shape == (3, 16_000) and cropped.targets.shape == (3, 2, 49, 4)
    for row, start in enumerate(starts):
        count = int(cropped.num_frames[row])
        expected = torch.arange(start, start + count)
        assert torch.equal(cropped.targets[row, 1, :count, 3], expected.float())
        assert torch.equal(cropped.frame_mask[row, :count], expected % 3 == 0)
        assert cropped.waveforms[row, 0] == start * FRAME_SAMPLES
        assert start * FRAME_SAMPLES + int(cropped.lengths[row]) <= LENGTHS[row]
    assert crop_batch(whole, 40_000, 0, 5) is whole


def test_starts_depend_on_seed_epoch_and_utterance() -> None:
    names = [str(n) for n in range(300)]
    starts = crop_starts(names, [48_000] * 300, 16_000, 0, 0)
    assert crop_starts(names[7:9], [48_000] * 2, 16_000, 0, 0) == starts[7:9]
    for seed, epoch in ((1, 0), (0, 1)):
        assert crop_starts(names, [48_000] * 300, 16_000, seed, epoch) != starts
    assert (min(starts), max(starts)) == (0, 100)
    assert np.mean(starts) == pytest.approx(50, abs=6)
