"""Patches of a log-mel spectrogram in place of frames of a waveform: what AST and its students see.

Shapes: B utterances, S samples, N mel frames (10 ms), M mel bands, C columns (patches side by side in time), R rows (in frequency),
T = C x R patches, D width.
"""

import pydantic
import torch.nn.functional as F
from torch import Tensor

from ray_distill.teacher_cache.frames import Length, conv_output_length, padding_mask
from ray_distill.teacher_cache.spectrograms import MEL_HOP, MEL_WINDOW, kaldi_fbank


class PatchGeometry(pydantic.BaseModel, frozen=True, extra="forbid"):
    """How a spectrogram is cut into square patches. Names follow transformers' ``ASTConfig``, defaults are AST's.

    A sequence of patches goes column by column (AST's own goes row by row): a longer utterance only appends to it, so that
    padding is at its end, and spans of a mask are neighbours in time.

    Attributes:
        num_mel_bins: M.
        patch_size: mel frames and bands of a patch.
        time_stride: mel frames between columns; 10 are 100 ms.
        frequency_stride: bands between rows.
        mean, std: of log-mel values; they become (x - mean) / (2 std). Defaults AudioSet's.
    """

    num_mel_bins: int = pydantic.Field(default=128, ge=1)
    patch_size: int = pydantic.Field(default=16, ge=1)
    time_stride: int = pydantic.Field(default=10, ge=1)
    frequency_stride: int = pydantic.Field(default=10, ge=1)
    mean: float = -4.2677393
    std: float = pydantic.Field(default=4.5689974, gt=0)

    @pydantic.model_validator(mode="after")
    def _possible(self) -> "PatchGeometry":
        if self.patch_size > self.num_mel_bins:
            raise ValueError(f"patch_size {self.patch_size} is above num_mel_bins {self.num_mel_bins}")
        return self

    @property
    def rows(self) -> int:
        """R; 12 for AST."""
        return self.columns_of(self.num_mel_bins, self.frequency_stride)

    @property
    def min_samples(self) -> int:
        """Of audio with one column: 175 ms for AST."""
        return MEL_WINDOW + (self.patch_size - 1) * MEL_HOP

    def columns_of(self, length: Length, stride: int) -> Length:
        """Patches along a side of the spectrogram."""
        return conv_output_length(length, [(self.patch_size, stride)])

    def num_patches(self, num_samples: Length) -> Length:
        """T of audio of so many samples: an int, or an integer tensor of any shape."""
        mel_frames = conv_output_length(num_samples, [(MEL_WINDOW, MEL_HOP)])
        return self.columns_of(mel_frames, self.time_stride) * self.rows

    def spectrogram(self, waveforms: Tensor, lengths: Tensor, mel_frames: int | None = None) -> Tensor:
        """Normalised log-mel values.

        Args:
            waveforms: (B, S) float32, zeros at padding.
            lengths: (B,) real samples.
            mel_frames: N, if more than the waveforms have; what is added, and padding, is log-mel 0, as AST's extractor pads.

        Returns:
            (B, 1, M, N) float32.
        """
        x_BNM = kaldi_fbank(waveforms, self.num_mel_bins)
        real = conv_output_length(lengths, [(MEL_WINDOW, MEL_HOP)])
        x_BNM = x_BNM.masked_fill(padding_mask(real, x_BNM.shape[1])[:, :, None], 0.0)
        if mel_frames is not None:
            x_BNM = F.pad(x_BNM, (0, 0, 0, mel_frames - x_BNM.shape[1]))
        return ((x_BNM - self.mean) / (2 * self.std)).transpose(1, 2)[:, None]


def flatten_by_column(x_BDRC: Tensor) -> Tensor:
    """(B, D, R, C), as a convolution over the spectrogram gives it → (B, T, D), column by column."""
    return x_BDRC.permute(0, 3, 2, 1).flatten(1, 2)
