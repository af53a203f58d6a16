"""Log-mel spectrograms of padded batches, as Whisper, AST and w2v-BERT compute them. A mel frame depends on its own samples only.

Shapes: B utterances, S samples, N mel frames (10 ms), M mel bands.
"""

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.compliance.kaldi import get_mel_banks
from torchaudio.functional import melscale_fbanks

from ray_distill.teacher_cache.frames import SAMPLE_RATE

MEL_HOP = 160
"""Number of samples between mel frames (10 ms)."""

MEL_WINDOW = 400
"""Number of samples of a mel frame (25 ms)."""

_KALDI_FFT = 512
_KALDI_PREEMPHASIS = 0.97
_POVEY_EXPONENT = 0.85
_KALDI_FLOOR = torch.finfo(torch.float32).eps


def whisper_log_mel(waveforms: Tensor, bands: int = 80) -> Tensor:
    """Return Whisper's log-mel spectrogram of utterances followed by silence.

    It equals that of transformers' ``WhisperFeatureExtractor`` for an utterance shorter than 30 s. Values are clipped to 8 below
    the maximum of the utterance and scaled to (x + 4) / 4.

    Args:
        waveforms: (B, S) float32 at 16 kHz, zeros at padding, S > 200.
        bands: Number of mel bands M: 80 in Whisper's first two versions, 128 in the third. Default 80.

    Returns:
        (B, N, M) float32 with N = (S + 200) // 160 + 1, all frames that overlap with any sample.
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


def kaldi_fbank(waveforms: Tensor, bands: int = 128, window: Literal["hanning", "povey"] = "hanning") -> Tensor:
    """Return Kaldi's log-mel filter bank values, without dither.

    They equal ``torchaudio.compliance.kaldi.fbank`` of each row.

    Args:
        waveforms: (B, S) float32 at 16 kHz in [-1, 1], S >= 400.
        bands: Number of mel bands M from 20 Hz to 8 kHz. Default 128, AST's.
        window: Kaldi's name of the window. Povey's is the Hann window to the power of 0.85. Default ``hanning``, AST's.

    Returns:
        (B, N, M) float32 with N = (S - 400) // 160 + 1.
    """
    with torch.autocast(waveforms.device.type, enabled=False):
        x = waveforms.unfold(1, MEL_WINDOW, MEL_HOP)
        x = x - x.mean(-1, keepdim=True)
        x = x - _KALDI_PREEMPHASIS * torch.cat([x[..., :1], x[..., :-1]], dim=-1)
        shape = torch.hann_window(MEL_WINDOW, periodic=False, device=x.device)
        x = x * (shape**_POVEY_EXPONENT if window == "povey" else shape)
        power = torch.fft.rfft(x, _KALDI_FFT).abs().square()
        energies: Tensor = power @ _kaldi_banks(bands).to(x.device)
        return energies.clamp(min=_KALDI_FLOOR).log()


@cache
def _whisper_banks(bands: int) -> Tensor:
    """Return the (201, M) filter bank."""
    banks: Tensor = melscale_fbanks(MEL_WINDOW // 2 + 1, 0.0, SAMPLE_RATE / 2, bands, SAMPLE_RATE, "slaney", "slaney")
    return banks


@cache
def _kaldi_banks(bands: int) -> Tensor:
    """Return the (257, M) filter bank. Its last row is zero, because Kaldi leaves out the Nyquist frequency."""
    banks, _ = get_mel_banks(bands, _KALDI_FFT, SAMPLE_RATE, 20.0, SAMPLE_RATE / 2, 100.0, -500.0, 1.0)
    padded: Tensor = F.pad(banks, (0, 1)).T.contiguous()
    return padded
