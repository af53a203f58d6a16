"""Noise, reverberation, colour and gain, added to clean speech for training.

Shapes: B pieces of speech, S samples.
"""

import torch
from torch import Tensor

from ray_distill.teacher_cache.frames import SAMPLE_RATE

_ECHO = SAMPLE_RATE // 2
_NOISY, _REVERBERANT, _COLOURED = 0.6, 0.4, 0.5
"""Shares of the pieces with noise, with reverberation and with another spectrum."""


def distort(x_BS: Tensor, generator: torch.Generator) -> Tensor:
    """Return speech as from a room, a microphone and a noisy place, different for each piece.

    Reverberation is white noise that decays by 60 dB in 0.1 s to 0.6 s, after the direct sound. Noise has a power spectrum of
    1/f^a with a from 0 to 2, and a ratio of speech to noise of 3 to 30 dB. Colour is a curve over the logarithm of the frequency
    of at most 10 dB. Levels range from -40 dB to -12 dB.

    Args:
        x_BS: (B, S) float32 speech.
        generator: Source of randomness.

    Returns:
        (B, S) float32 in [-1, 1].
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, 1, generator=generator)

    batch, samples = x_BS.shape
    size = -(-(samples + _ECHO) // 8000) * 8000  # A size with small factors, of which Fourier transforms are fast.
    frequency = torch.linspace(0, 1, size // 2 + 1)
    spectrum = torch.fft.rfft(x_BS, size)

    # The points are an octave apart, from 62.5 Hz to 8 kHz.
    points = (20 * torch.rand(batch, 8, generator=generator) - 10) * (uniform(0, 1) < _COLOURED)
    place = torch.log2(frequency * 127 + 1).clamp(max=6.999)
    left, share = place.long(), place % 1
    spectrum *= 10 ** ((points[:, left] * (1 - share) + points[:, left + 1] * share) / 20)

    decay = torch.exp(-6.9 * torch.arange(_ECHO) / SAMPLE_RATE / uniform(0.1, 0.6))
    echo = torch.randn(batch, _ECHO, generator=generator) * decay
    echo *= uniform(0.2, 1.0) / echo.norm(dim=1, keepdim=True) * (uniform(0, 1) < _REVERBERANT)
    echo[:, 0] = 1.0
    heard = torch.fft.irfft(spectrum * torch.fft.rfft(echo, size), size)[:, :samples]

    noise = torch.fft.rfft(torch.randn(batch, size, generator=generator))
    noise = torch.fft.irfft(noise * frequency.clamp(min=1e-3) ** -uniform(0, 1), size)[:, :samples]
    loudness = 10 ** (-uniform(3, 30) / 20) * (uniform(0, 1) < _NOISY)
    heard = heard + noise * loudness * heard.std(1, keepdim=True) / noise.std(1, keepdim=True)
    heard *= 10 ** (uniform(-40, -12) / 20) / heard.std(1, keepdim=True).clamp(min=1e-6)
    return heard.clamp(-1, 1)
