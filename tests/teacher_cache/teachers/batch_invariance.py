"""Check that a teacher's outputs for an utterance do not depend on its batch."""

import torch
from torch import Tensor

from ray_distill.teacher_cache.teachers import Teacher

RELATIVE = 1e-4


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Return the largest error of a frame's vector, relative to the norm of the vector."""
    return float(((value - reference).norm(dim=-1) / reference.norm(dim=-1)).max())


def assert_batch_invariant(teacher: Teacher, waveforms: list[Tensor], masked: bool) -> None:
    """Compare utterances alone with batches in two orders and with garbage in the padding."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    width = int(lengths.max()) + 700
    masks = torch.rand(len(waveforms), teacher.num_frames(width), generator=generator) < 0.4
    real_frames = [teacher.num_frames(len(waveform)) for waveform in waveforms]
    alone = [
        teacher.hidden_states(w[None], frame_mask=m[None, :frames] if masked else None)[0]
        for w, m, frames in zip(waveforms, masks, real_frames, strict=True)
    ]
    padded = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    padded = torch.nn.functional.pad(padded, (0, width - padded.shape[1]))
    padding = torch.arange(width) >= lengths[:, None]
    noisy = torch.where(padding, 3 * torch.randn(padded.shape, generator=generator), padded)
    for order, batch in ((list(range(len(waveforms))), padded), (list(range(len(waveforms)))[::-1], noisy)):
        out = teacher.hidden_states(batch[order], lengths[order], masks[order] if masked else None)
        assert torch.isfinite(out).all()
        for row, index in enumerate(order):
            assert relative_error(out[row, :, : real_frames[index]], alone[index]) < RELATIVE
