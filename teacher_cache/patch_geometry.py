"""Patches of a log-mel spectrogram, the input of AST and its students.

Shapes: B utterances, S samples, N mel frames (10 ms), M mel bands, C columns (patches side by side in time), R rows (in frequency),
T = C x R patches, D width.
"""

import pydantic
import torch.nn.functional as F
from torch import Tensor

from ray_distill.teacher_cache.frames import Length, conv_output_length, padding_mask
from ray_distill.teacher_cache.spectrograms import MEL_HOP, MEL_WINDOW, kaldi_fbank


class PatchGeometry(pydantic.BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """How a spectrogram is cut into square patches. Names follow transformers' ``ASTConfig``, defaults are AST's.

    The patches of an utterance are ordered column by column, while AST orders them row by row. A longer utterance then only
    appends patches, so padding is at the end and mask spans cover patches that are neighbours in time.
    """

    num_mel_bins: int = pydantic.Field(default=128, ge=1)
    """Number of mel bands M."""
    patch_size: int = pydantic.Field(default=16, ge=1)
    """Size of a patch, in mel frames and in bands."""
    time_stride: int = pydantic.Field(default=10, ge=1)
    """Number of mel frames (10 ms) between columns."""
    frequency_stride: int = pydantic.Field(default=10, ge=1)
    """Number of bands between rows."""
    mean: float = -4.2677393
    """Mean of log-mel values, which are normalised to (x - mean) / (2 std). The default is AudioSet's."""
    std: float = pydantic.Field(default=4.5689974, gt=0)
    """Standard deviation of log-mel values. The default is AudioSet's."""

    @pydantic.model_validator(mode="after")
    def _check_patch_size(self) -> "PatchGeometry":
        if self.patch_size > self.num_mel_bins:
            raise ValueError(
                f"patch_size {self.patch_size} is above num_mel_bins {self.num_mel_bins}; lower patch_size"
            )
        return self

    @property
    def rows(self) -> int:
        """Number of rows R, 12 for AST."""
        return self.columns_of(self.num_mel_bins, self.frequency_stride)

    @property
    def min_samples(self) -> int:
        """Number of samples of the shortest audio, which has one column: 175 ms for AST."""
        return MEL_WINDOW + (self.patch_size - 1) * MEL_HOP

    def columns_of(self, length: Length, stride: int) -> Length:
        """Return the number of patches along a side of the spectrogram."""
        return conv_output_length(length, [(self.patch_size, stride)])

    def num_patches(self, num_samples: Length) -> Length:
        """Return the number of patches T of audio, given its samples as an int or an integer tensor of any shape."""
        mel_frames = conv_output_length(num_samples, [(MEL_WINDOW, MEL_HOP)])
        return self.columns_of(mel_frames, self.time_stride) * self.rows

    def spectrogram(self, waveforms: Tensor, lengths: Tensor, mel_frames: int | None = None) -> Tensor:
        """Return the normalised log-mel spectrogram.

        Args:
            waveforms: (B, S) float32, zeros at padding.
            lengths: (B,) number of real samples.
            mel_frames: Number of mel frames N to pad to. Padding has log-mel value 0, as in AST's feature extractor.
                Default: no additional padding.

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
    """Flatten (B, D, R, C), the output of a convolution over the spectrogram, column by column to (B, T, D)."""
    return x_BDRC.permute(0, 3, 2, 1).flatten(1, 2)
