"""Log-mel spectrograms as Whisper and AST hear them, of padded batches: every mel frame comes from its own samples.

Shapes: B utterances, S samples, N mel frames (10 ms), M mel bands.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.compliance.kaldi import get_mel_banks
from torchaudio.functional import melscale_fbanks

from ray_distill.teacher_cache.frames import SAMPLE_RATE

MEL_HOP = 160
"""Samples between mel frames (10 ms)."""

MEL_WINDOW = 400
"""Samples of a mel frame (25 ms)."""

_KALDI_FFT = 512
_KALDI_PREEMPHASIS = 0.97
_KALDI_FLOOR = torch.finfo(torch.float32).eps


def whisper_log_mel(waveforms: Tensor, bands: int = 80) -> Tensor:
    """Whisper's log-mel spectrogram, as of an utterance followed by silence.

    What transformers' ``WhisperFeatureExtractor`` gives for an utterance shorter than its 30 s. Values are at most 8 below an
    utterance's own largest, then (x + 4) / 4.

    Args:
        waveforms: (B, S) float32 at 16 kHz, zeros at padding, S > 200.
        bands: mel bands M; Whisper's first two versions have 80, its third 128.

    Returns:
        (B, N, M) float32 with N = (S + 200) // 160 + 1: all frames that any sample touches.
    """
    half = MEL_WINDOW // 2
    with torch.autocast(waveforms.device.type, enabled=False):
        x = torch.cat([waveforms[:, 1 : half + 1].flip(1), F.pad(waveforms, (0, 2 * half))], dim=1)
        window = torch.hann_window(MEL_WINDOW, device=x.device)
        spectrum = torch.stft(x, MEL_WINDOW, MEL_HOP, window=window, center=False, return_complex=True)
        power = spectrum.abs().square().transpose(1, 2)
        log_mel = (power @ _whisper_banks(bands).to(x.device)).clamp(min=1e-10).log10()
        log_mel = torch.maximum(log_mel, log_mel.amax((1, 2), keepdim=True) - 8.0)
        return (log_mel + 4.0) / 4.0


def kaldi_fbank(waveforms: Tensor, bands: int = 128) -> Tensor:
    """Kaldi's log mel filter banks with a Hann window and no dither, as ``torchaudio.compliance.kaldi.fbank`` of each row.

    Args:
        waveforms: (B, S) float32 at 16 kHz in [-1, 1], S >= 400.
        bands: mel bands M from 20 Hz to 8 kHz; AST has 128.

    Returns:
        (B, N, M) float32 with N = (S - 400) // 160 + 1.
    """
    with torch.autocast(waveforms.device.type, enabled=False):
        x = waveforms.unfold(1, MEL_WINDOW, MEL_HOP)
        x = x - x.mean(-1, keepdim=True)
        x = x - _KALDI_PREEMPHASIS * torch.cat([x[..., :1], x[..., :-1]], dim=-1)
        x = x * torch.hann_window(MEL_WINDOW, periodic=False, device=x.device)
        power = torch.fft.rfft(x, _KALDI_FFT).abs().square()
        energies: Tensor = power @ _kaldi_banks(bands).to(x.device)
        return energies.clamp(min=_KALDI_FLOOR).log()


@cache
def _whisper_banks(bands: int) -> Tensor:
    """(201, M)."""
    banks: Tensor = melscale_fbanks(MEL_WINDOW // 2 + 1, 0.0, SAMPLE_RATE / 2, bands, SAMPLE_RATE, "slaney", "slaney")
    return banks


@cache
def _kaldi_banks(bands: int) -> Tensor:
    """(257, M); the last row is zero, as Kaldi leaves the Nyquist frequency out."""
    banks, _ = get_mel_banks(bands, _KALDI_FFT, SAMPLE_RATE, 20.0, SAMPLE_RATE / 2, 100.0, -500.0, 1.0)
    padded: Tensor = F.pad(banks, (0, 1)).T.contiguous()
    return padded
