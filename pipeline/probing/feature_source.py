"""Frozen features that a probe is trained on: layers of a teacher, layers of a student, or log-mel bands."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ray_distill.memory import memory_named
from ray_distill.pipeline.probing.task import Task
from ray_distill.student.model.student import Student
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.frames import FRAME_RATE, FRAME_SAMPLES, RECEPTIVE_FIELD, SAMPLE_RATE, num_frames
from ray_distill.teacher_cache.targets.frame_rate import MAX_PARTS, FrameRule, map_frames
from ray_distill.teacher_cache.teachers import Teacher


@dataclass(frozen=True)
class FeatureSource:
    """A frozen feature extractor.

    Attributes:
        name: Name shown in tables and reports.
        layers: Number of layers, L.
        dim: Width of a layer, D.
        features: Function from a (S,) float32 waveform at 16 kHz to (L, T, D) float32 features on the CPU.
    """

    name: str
    layers: int
    dim: int
    features: Callable[[np.ndarray], Tensor]

    @classmethod
    def of_teacher(cls, teacher: Teacher, name: str | None = None) -> Self:
        """Return a teacher's Transformer layers. The name defaults to ``teacher NAME``.

        Labels of frames are 20 ms apart, so the frames of a teacher with another rate are averaged over 20 ms, or the nearest
        are taken if that is too many parts; see `ray_distill.teacher_cache.targets.frame_rate`.
        """
        rate = teacher.frame_rate
        rule: FrameRule = "average" if (rate / FRAME_RATE).numerator <= MAX_PARTS else "nearest"

        def features(wave: np.ndarray) -> Tensor:
            x_LTD = teacher.hidden_states(torch.from_numpy(wave)[None])[0].cpu()
            return x_LTD if teacher.stated_rate is None else map_frames(x_LTD, rate, rule, num_frames(len(wave)))

        return cls(name or f"teacher {teacher.name}", teacher.num_layers, teacher.dim, features)

    @classmethod
    def of_student(cls, student: Student, name: str) -> Self:
        """Return a student's Transformer layers before its heads, as an export returns them."""
        device = student.mask_embedding.device

        @torch.no_grad()
        def features(wave: np.ndarray) -> Tensor:
            waveform = torch.from_numpy(wave)[None].to(device)
            states, _ = student.encode(waveform, torch.tensor([len(wave)], device=device))
            return states[0].cpu()

        return cls(name, student.config.encoder_layers, student.config.encoder_embed_dim, features)

    @classmethod
    def log_mel(cls, bands: int = 80) -> Self:
        """Return log-mel bands with the teacher's frames: the baseline without a model."""
        from torchaudio.transforms import MelSpectrogram  # Takes seconds to import, and reports don't need it.

        window = {"n_fft": RECEPTIVE_FIELD, "hop_length": FRAME_SAMPLES, "center": False}
        transform = MelSpectrogram(SAMPLE_RATE, n_mels=bands, **window)
        return cls(f"log-mel, {bands} bands", 1, bands, lambda w: (transform(torch.from_numpy(w)) + 1e-6).log().T[None])


class Features:
    """Normalised features of all utterances of a task.

    For a task with classes, the mean over time of each utterance is kept in memory. For a task with sequences, all frames are
    kept in a file in half precision. Each dimension of each layer has zero mean and unit variance over the training split.

    Args:
        source: Feature extractor.
        task: Utterances.
        folder: Folder for the file; it must exist for as long as this object.
    """

    def __init__(self, source: FeatureSource, task: Task, folder: Path) -> None:
        self._pooled = task.kind == "class"
        shape = source.layers, source.dim
        sums, squares, count = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64), 0
        self._means: list[Tensor] = []
        self.frames: list[int] = []
        file = folder / "frames.f16"
        with file.open("wb") as out:
            for example in task.examples:
                with memory_named(
                    f"{source.name} on {example.address}", "leave this utterance out of the manifest if it is long"
                ):
                    x_LTD = source.features(load_audio(example.address))
                if self._pooled:
                    x_LTD = x_LTD.mean(1, keepdim=True)
                    self._means.append(x_LTD[:, 0])
                else:
                    out.write(x_LTD.transpose(0, 1).half().contiguous().numpy().tobytes())
                self.frames.append(x_LTD.shape[1])
                if not example.test:
                    sums += x_LTD.double().sum(1)
                    squares += x_LTD.double().square().sum(1)
                    count += x_LTD.shape[1]
        mean = sums / count
        self._mean = mean.float()
        self._scale = (squares / count - mean.square()).clamp(min=1e-12).rsqrt().float()
        self._starts = np.concatenate([[0], np.cumsum(self.frames)])
        if not self._pooled:
            self._file = np.memmap(file, np.float16, "r", shape=(int(self._starts[-1]), *shape))

    def __getitem__(self, number: int) -> Tensor:
        """Return the (T, L, D) float32 features of an utterance; T is 1 for means over time."""
        if self._pooled:
            return ((self._means[number] - self._mean) * self._scale)[None]
        rows = self._file[self._starts[number] : self._starts[number + 1]]
        return (torch.from_numpy(np.array(rows)).float() - self._mean) * self._scale
