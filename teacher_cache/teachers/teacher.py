"""The interface and the promises of a teacher, which caches rely on, and the checks that all teachers share.

Shapes: B utterances, S samples, T frames, D width, L layers.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_distill.gpu import set_up_gpu
from ray_distill.teacher_cache.frames import FRAME_RATE, RECEPTIVE_FIELD, Length, num_frames, padding_mask
from ray_distill.teacher_cache.patch_geometry import PatchGeometry
from ray_distill.teacher_cache.precision import Precision, autocast


class TeacherError(ValueError):
    """A teacher that can't be loaded, or a request that it can't serve."""


class Teacher(ABC):
    """A frozen Transformer over audio whose layer outputs for an utterance do not depend on its batch.

    A new kind of teacher is a subclass that implements `layer_outputs`. Every teacher must keep these promises:

    - **Batch invariance.** The real frames of an utterance have the same values, up to rounding, whatever else is in the
      batch, in which order, and whatever the padding holds. Normalisation of an utterance uses its own real samples only.
    - **Frames.** An utterance of n samples has ``num_frames(n)`` frames, ``frame_rate`` per second but for the edges. Real frames come
      first, padding after them.
    - **Masks.** The encoder's input is replaced at masked frames, and only there, before positions are added (`masked`).
    - **Identity.** ``identity`` holds everything that changes an output, except for the names, types, shapes and values of
      the weights.
    - **No gradients, no randomness.** There is no dropout and no dependence on the global random state.

    ``tests/teacher_cache/teachers/test_teacher_promises.py`` checks them for every kind.

    Attributes:
        name: Where the teacher was loaded from, for people to read.
        num_layers: Number of Transformer layers, L.
        dim: Width D of every layer's output.
        num_parameters: Number of weights, including the mask embedding.
        model: The network, for code that counts its parts or copies its weights.
        device: Device on which the teacher computes.
        min_samples: Minimum number of samples of an utterance. Default 400, one frame of HuBERT.
        max_samples: Maximum number of samples of an utterance. Default None, no limit.
        patches: How the spectrogram is cut, for teachers with patches instead of frames; their students do the same.
            Default None.
        frame_rate: Number of frames per second, for teachers with frames. Default 50. The frames of others are mapped to those of the
            student, which has 50; see `ray_distill.teacher_cache.targets.frame_rate`.
        mean_mask: Whether masked frames become the mean of the utterance when there is no learned mask embedding.
            Default False.
        layer_norm: Whether each frame of each layer's output is normalised to zero mean and unit variance over its
            channels. Default False. In models with layer norms before the blocks (Whisper, most Large models) the next block
            reads this. It also scales down frames with a thousand times the power of others, which would dominate a
            squared error.

    Example:
        >>> teacher = load_teacher("random:4x96")
        >>> teacher(torch.zeros(1, 16_000)).shape
        torch.Size([1, 4, 49, 96])
    """

    min_samples: int = RECEPTIVE_FIELD
    max_samples: int | None = None
    patches: PatchGeometry | None = None
    frame_rate: Fraction = FRAME_RATE
    mean_mask: bool = False
    layer_norm: bool = False

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        num_layers: int,
        dim: int,
        identity: Sequence[Any],
        mask_embedding: Tensor | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        """Freeze the network and move it to the device. Most callers use `load_teacher` instead.

        Args:
            model: Network with its weights.
            name: Name for people to read.
            num_layers: Number of Transformer layers, L.
            dim: Width D.
            identity: JSON values; any change of them makes another teacher. The first is the name and version of the
                arithmetic, followed by the settings that names and shapes of weights do not show.
            mask_embedding: (D,) float that replaces masked frames, or None if the model has none.
            device: Device on which the teacher computes.
        """
        self.name, self.num_layers, self.dim = name, num_layers, dim
        self.device = torch.device(device)
        set_up_gpu(self.device)
        self.model = model.eval().requires_grad_(False).to(self.device)
        self._identity = list(identity)
        self._mask_embedding = None if mask_embedding is None else mask_embedding.detach().float().to(self.device)
        mask_size = 0 if mask_embedding is None else mask_embedding.numel()
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters()) + mask_size

    @abstractmethod
    def layer_outputs(self, waveforms: Tensor, lengths: Tensor, frame_mask: Tensor | None) -> Iterator[Tensor]:
        """Yield the outputs of layers 1, 2, ... in order. The caller stops after the last layer it needs.

        It runs in inference mode and its arguments have been checked.

        Args:
            waveforms: (B, S) float32 on the teacher's device, zeros at padding. S is the largest of ``lengths``.
            lengths: (B,) int64 on the teacher's device.
            frame_mask: (B, T) bool on the teacher's device, False at padding, or None; see `masked`.

        Yields:
            (B, T, D) with T = ``num_frames(S)``. Values at padding are finite.
        """

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name!r}, num_layers={self.num_layers}, dim={self.dim}, "
            f"num_parameters={self.num_parameters:,}, device={str(self.device)!r})"
        )

    def __call__(
        self,
        waveforms: Tensor,
        lengths: Tensor | None = None,
        frame_mask: Tensor | None = None,
        layers: Sequence[int] | None = None,
        *,
        precision: Precision = "fp32",
    ) -> Tensor:
        """Return the (B, L, T, D) outputs of the Transformer layers; the same as `hidden_states`."""
        return self.hidden_states(waveforms, lengths, frame_mask, layers, precision=precision)

    def num_frames(self, num_samples: Length) -> Length:
        """Return the number of frames of an utterance, given as an int or as an integer tensor of any shape.

        The default is that of HuBERT: frames of 25 ms every 20 ms. A teacher with another ``frame_rate`` has its own.
        """
        return num_frames(num_samples)

    def map_bytes(self, num_samples: int) -> int:
        """Return the least memory, in bytes, that attention maps of one utterance hold at once; 0, the default, if they need none."""
        return 0

    @property
    def stated_rate(self) -> str | None:
        """Frame rate as a cache states it; see `CacheSpec.frame_rate`."""
        return None if self.patches is not None or self.frame_rate == FRAME_RATE else str(self.frame_rate)

    @property
    def has_mask_embedding(self) -> bool:
        """Whether ``frame_mask`` may be given: the teacher has a learned mask embedding or a replacement for it."""
        return self._mask_embedding is not None or self.mean_mask

    @property
    def weights(self) -> dict[str, Tensor]:
        """Tensors by the network's names, and ``mask_embedding`` if the teacher has one."""
        weights = dict(self.model.state_dict())
        if self._mask_embedding is not None:
            weights["mask_embedding"] = self._mask_embedding
        return weights

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the weights and everything else that changes an output, but not of the name or the device."""
        options = [name for name in ("mean_mask", "layer_norm") if getattr(self, name)]
        identity = [*self._identity, *options]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
        weights = self.weights
        for key in sorted(weights):
            value = weights[key].detach().cpu().contiguous()
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.numpy().data)
        return digest.hexdigest()

    def hidden_states(
        self,
        waveforms: Tensor,
        lengths: Tensor | None = None,
        frame_mask: Tensor | None = None,
        layers: Sequence[int] | None = None,
        *,
        precision: Precision = "fp32",
    ) -> Tensor:
        """Return the outputs of the Transformer layers.

        Args:
            waveforms: (B, S) float, 16 kHz, in [-1, 1]. Samples beyond each length are ignored.
            lengths: (B,) integer, number of real samples of each row, ``min_samples`` <= length <= S. Default: S for all.
            frame_mask: (B, T) bool with T = ``num_frames(S)``, True where the mask embedding replaces the input.
                Default: no masking.
            layers: 1-based layers to return, in this order. Layers above the largest of them are not computed.
                Default: all.
            precision: Precision of the arithmetic, whatever autocast the caller has set: ``fp32``, ``fp16`` or ``bf16``.
                Default ``fp32``.

        Returns:
            (B, L, T, D) float32 on the teacher's device, without gradients. Layer k is the output of Transformer layer k,
            the same as in fairseq's layer hook and torchaudio's ``extract_features``, normalised if ``layer_norm`` is set.
            Values at padded frames are finite and meaningless.

        Raises:
            TeacherError: If shapes don't fit, audio is shorter than a frame or longer than ``max_samples``, a layer does not
                exist, or a mask is given to a teacher without a mask embedding.
        """
        lengths = self._checked_lengths(waveforms, lengths)
        wanted = self._checked_layers(layers)
        batch, width = waveforms.shape
        frames = self.num_frames(width)
        if frame_mask is not None:
            self._check_frame_mask(frame_mask, batch, frames)
        longest = int(lengths.max())
        real_frames = self.num_frames(longest)
        # Created outside inference mode so that a loss can use it: autograd refuses inference tensors.
        out = torch.empty(batch, len(wanted), frames, self.dim, device=self.device)
        out[:, :, real_frames:] = 0.0
        with torch.inference_mode(), autocast(self.device, precision):
            lengths = lengths.to(self.device)
            x_BS = waveforms[:, :longest].to(self.device).float()
            x_BS = x_BS.masked_fill(padding_mask(lengths, longest), 0.0)
            mask: Tensor | None = None
            if frame_mask is not None:
                # Values of the mask at padding are ignored.
                padding = padding_mask(self.num_frames(lengths), real_frames)
                mask = frame_mask[:, :real_frames].to(self.device) & ~padding
            for number, x_BTD in enumerate(self.layer_outputs(x_BS, lengths, mask), start=1):
                if self.layer_norm:
                    x_BTD = F.layer_norm(x_BTD.float(), x_BTD.shape[-1:])
                for slot, layer in enumerate(wanted):
                    if layer == number:
                        out[:, slot, :real_frames] = x_BTD
                if number == max(wanted):
                    break
        return out

    def masked(self, x_BTD: Tensor, frame_mask: Tensor | None, frame_counts: Tensor) -> Tensor:
        """Replace the encoder's input at masked frames by the mask embedding or by the mean of the utterance's real frames.

        Args:
            x_BTD: (B, T, D) input of the encoder before positions are added.
            frame_mask: (B, T) bool, or None for no masking.
            frame_counts: (B,) number of real frames.
        """
        if frame_mask is None:
            return x_BTD
        if self._mask_embedding is not None:
            return torch.where(frame_mask[:, :, None], self._mask_embedding, x_BTD)
        padding = padding_mask(frame_counts, x_BTD.shape[1])[:, :, None]
        mean_B1D = (
            x_BTD.masked_fill(padding, 0.0).sum(1, keepdim=True, dtype=torch.float32) / frame_counts[:, None, None]
        )
        return torch.where(frame_mask[:, :, None], mean_B1D, x_BTD)

    def _checked_lengths(self, waveforms: Tensor, lengths: Tensor | None) -> Tensor:
        if not isinstance(waveforms, Tensor):
            raise TeacherError(
                f"waveforms must be a float tensor of shape (batch, samples), not of the type {type(waveforms).__name__}; "
                "torch.from_numpy makes one of an array"
            )
        if waveforms.ndim != 2 or not waveforms.is_floating_point() or waveforms.shape[0] == 0:
            raise TeacherError(
                f"waveforms must be a float tensor of shape (batch, samples), not {waveforms.dtype} of shape "
                f"{tuple(waveforms.shape)}"
            )
        batch, width = waveforms.shape
        if lengths is None:
            lengths = torch.full((batch,), width, dtype=torch.int64)
        if not isinstance(lengths, Tensor):
            raise TeacherError(
                f"lengths must be an integer tensor of shape ({batch},), one length per waveform, not of the type "
                f"{type(lengths).__name__}; torch.tensor makes one of a list"
            )
        integer = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
        if lengths.shape != (batch,) or not integer:
            raise TeacherError(
                f"lengths must be an integer tensor of shape ({batch},), one length per waveform, not "
                f"{lengths.dtype} of shape {tuple(lengths.shape)}"
            )
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < self.min_samples or longest > width:
            raise TeacherError(
                f"lengths range from {shortest} to {longest} samples, but each must be at least {self.min_samples} (one "
                f"frame) and at most {width}, the width of waveforms"
            )
        if self.max_samples is not None and longest > self.max_samples:
            raise TeacherError(
                f"an utterance has {longest} samples, but {self.name} takes at most {self.max_samples}; leave out longer utterances"
            )
        return lengths.long()

    def _checked_layers(self, layers: Sequence[int] | None) -> list[int]:
        if layers is None:
            return list(range(1, self.num_layers + 1))
        if not layers or not all(1 <= layer <= self.num_layers for layer in layers):
            raise TeacherError(
                f"layers must be one or more of 1 to {self.num_layers}, the layers of {self.name}, not {list(layers)}"
            )
        return list(layers)

    def _check_frame_mask(self, frame_mask: Tensor, batch: int, frames: int) -> None:
        if not self.has_mask_embedding:
            raise TeacherError(
                f"{self.name} has no mask embedding, so it can't compute masked targets; use the model's original "
                "checkpoint, the mean of the utterance as a replacement (mean-mask:CHECKPOINT), or targets that need no mask"
            )
        if frame_mask.shape != (batch, frames) or frame_mask.dtype != torch.bool:
            raise TeacherError(
                f"frame_mask must be a bool tensor of shape ({batch}, {frames}), one value per frame, not "
                f"{frame_mask.dtype} of shape {tuple(frame_mask.shape)}"
            )
