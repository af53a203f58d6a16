"""A teacher without Transformer: layer 1 is a log-mel spectrogram, layer 2 a seeded random network of it."""

from collections.abc import Iterator

import torch
import torchaudio
from torch import Tensor, nn

from ray_distill.teacher_cache.teachers import Teacher, TeacherError


def load(size: str, device: str | torch.device) -> Teacher:
    """Return the teacher of ``mel:BANDS``, such as ``mel:40``."""
    if not (size.isascii() and size.isdigit() and 1 <= int(size) <= 80):
        raise TeacherError(f"mel:{size} must be mel:BANDS with 1 to 80 bands, such as mel:40")
    return MelTeacher(int(size), device)


class MelTeacher(Teacher):
    """Log-mel bands every 20 ms. A window has 400 samples and does not reach beyond the audio, as the frames of HuBERT."""

    def __init__(self, bands: int, device: str | torch.device) -> None:
        linear = nn.Linear(bands, bands)
        generator = torch.Generator().manual_seed(0)  # Not the global random state.
        nn.init.normal_(linear.weight, std=bands**-0.5, generator=generator)
        nn.init.zeros_(linear.bias)
        mel = torchaudio.transforms.MelSpectrogram(n_fft=400, hop_length=320, n_mels=bands, center=False)
        super().__init__(
            nn.ModuleDict({"mel": mel, "linear": linear}),
            name=f"mel:{bands}",
            num_layers=2,
            dim=bands,
            identity=["speech_extras.mel", 1],  # Raise the number when the arithmetic changes.
            mask_embedding=torch.zeros(bands),
            device=device,
        )

    def layer_outputs(self, waveforms: Tensor, lengths: Tensor, frame_mask: Tensor | None) -> Iterator[Tensor]:
        """See `Teacher.layer_outputs`. A frame depends on its own samples only, so batches change nothing."""
        x_BTD = (self.model["mel"](waveforms).transpose(1, 2) + 1e-5).log() / 4 + 1
        x_BTD = self.masked(x_BTD, frame_mask, self.num_frames(lengths))
        yield x_BTD
        yield self.model["linear"](x_BTD).tanh()
