"""What a teacher is: the promises that caches rest on, and the checks that every teacher shares.

Shapes: B utterances, S samples, T frames, D width, L layers.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_distill.teacher_cache.frames import RECEPTIVE_FIELD, Length, num_frames, padding_mask
from ray_distill.teacher_cache.patch_geometry import PatchGeometry


class TeacherError(ValueError):
    """A teacher that can't be had, or can't do what is asked of it."""


class Teacher(ABC):
    """Layer outputs of a frozen Transformer over audio, one utterance's independent of what it is batched with.

    A teacher of a new kind is a subclass with one method, `layer_outputs`. Whatever it computes, it must promise:

    - **Batch invariance.** A real frame of one utterance has the same values, to rounding, whatever else is in the batch, in
      which order, and whatever lies in the padding. What an utterance is normalised by comes from its own real samples.
    - **Frames.** An utterance of n samples has ``num_frames(n)`` frames: real ones first, padding after them.
    - **Masks.** At masked frames, and only there, the encoder's input is replaced, before positions are added (`masked`).
    - **Identity.** All that changes an output, and that names, types and shapes of weights don't tell, is in ``identity``.
    - **No gradients, no randomness.** No dropout, no dependence on the global random state.

    `tests/teacher_cache/test_teacher_promises.py` puts every kind through these.

    Attributes:
        name: what it was loaded from, for people to read.
        num_layers: Transformer layers, L.
        dim: width of every layer's output, D.
        num_parameters: weights, mask embedding included.
        model: the network, for those who count its parts or copy its weights.
        device: where it computes.
        min_samples: of an utterance; default 400, one frame of HuBERT.
        max_samples: of an utterance; default None, any length.
        patches: how the spectrogram is cut, where there are patches in place of frames, for students that must do the same;
            default None.
        mean_mask: whether masked frames become the utterance's mean, where there is no learned mask embedding. Default False.
        layer_norm: whether each frame of each layer's output is brought to zero mean and unit variance over its channels.
            Default False. With layer norms before the blocks (Whisper, most Large models) that is what the next block reads,
            and it tames frames of a thousand times the others' power, which a squared error would hear alone.

    Example:
        >>> teacher = load_teacher("random:4x96")
        >>> teacher.hidden_states(torch.zeros(1, 16_000), torch.tensor([16_000])).shape
        torch.Size([1, 4, 49, 96])
    """

    min_samples: int = RECEPTIVE_FIELD
    max_samples: int | None = None
    patches: PatchGeometry | None = None
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
        """Freezes the network and moves it; `load_teacher` is the usual way to get a teacher.

        Args:
            model: with its weights.
            name: for people to read.
            num_layers: L.
            dim: D.
            identity: JSON values of which any change makes another teacher: first the name and version of the arithmetic,
                then the settings that weights' names and shapes don't tell.
            mask_embedding: (D,) float that takes the place of masked frames, or None if there is none.
            device: where to compute.
        """
        self.name, self.num_layers, self.dim = name, num_layers, dim
        self.device = torch.device(device)
        self.model = model.eval().requires_grad_(False).to(self.device)
        self._identity = list(identity)
        self._mask_embedding = None if mask_embedding is None else mask_embedding.detach().float().to(self.device)
        mask_size = 0 if mask_embedding is None else mask_embedding.numel()
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters()) + mask_size

    @abstractmethod
    def layer_outputs(self, waveforms: Tensor, lengths: Tensor, frame_mask: Tensor | None) -> Iterator[Tensor]:
        """Outputs of layers 1, 2, ..., one by one, so that layers nobody wants are not computed.

        Runs in inference mode, on arguments that were checked.

        Args:
            waveforms: (B, S) float32 on the teacher's device, zeros at padding, S the longest of lengths.
            lengths: (B,) int64 on the teacher's device.
            frame_mask: (B, T) bool on the teacher's device, False at padding, or None; see `masked`.

        Yields:
            (B, T, D) with T = ``num_frames(S)``; values at padding are finite.
        """

    def num_frames(self, num_samples: Length) -> Length:
        """Frames of an utterance; an int, or a tensor of any shape. Default: HuBERT's, of 25 ms every 20 ms."""
        return num_frames(num_samples)

    @property
    def has_mask_embedding(self) -> bool:
        """Whether ``frame_mask`` may be given: there is a learned mask embedding, or a stand-in for it."""
        return self._mask_embedding is not None or self.mean_mask

    @property
    def weights(self) -> dict[str, Tensor]:
        """Its tensors by the network's names, and ``mask_embedding`` where it has one."""
        weights = dict(self.model.state_dict())
        if self._mask_embedding is not None:
            weights["mask_embedding"] = self._mask_embedding
        return weights

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the weights and of everything else that changes the output; not of name or device."""
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
        *,
        layers: Sequence[int] | None = None,
    ) -> Tensor:
        """Outputs of the Transformer layers.

        Args:
            waveforms: (B, S) float, 16 kHz, in [-1, 1]; what lies beyond each length is ignored.
            lengths: (B,) integer, real samples of each row, ``min_samples`` <= length <= S. Default: S for all.
            frame_mask: (B, T) bool with T = ``num_frames(S)``, True where the mask embedding takes the place of the input.
                Default: no masking.
            layers: 1-based layers to return, in this order; later ones than the last of them are not computed.
                Default: all.

        Returns:
            (B, L, T, D) float32 on the teacher's device, without gradients: layer k is the output of Transformer layer
            k, as fairseq's layer hook and torchaudio's ``extract_features`` give it, or that normalised (``layer_norm``).
            Values at padded frames are finite and meaningless.

        Raises:
            TeacherError: shapes that don't fit, audio shorter than a frame or longer than ``max_samples``, an unknown layer,
                or a mask where there is no mask embedding.
        """
        lengths = self._checked_lengths(waveforms, lengths)
        wanted = self._checked_layers(layers)
        batch, width = waveforms.shape
        frames = self.num_frames(width)
        if frame_mask is not None:
            self._check_frame_mask(frame_mask, batch, frames)
        longest = int(lengths.max())
        real_frames = self.num_frames(longest)
        # Filled in inference mode but made outside it, so that a loss may use it: autograd refuses inference tensors.
        out = torch.empty(batch, len(wanted), frames, self.dim, device=self.device)
        out[:, :, real_frames:] = 0.0
        with torch.inference_mode():
            lengths = lengths.to(self.device)
            x_BS = waveforms[:, :longest].to(self.device).float()
            x_BS = x_BS.masked_fill(padding_mask(lengths, longest), 0.0)
            mask: Tensor | None = None
            if frame_mask is not None:
                # What a mask says of padding counts for nothing.
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
        """The encoder's input with the mask embedding, or the mean of each utterance's real frames, at masked frames.

        Args:
            x_BTD: (B, T, D) before positions are added.
            frame_mask: (B, T) bool, or None for no masking.
            frame_counts: (B,) real frames.
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
        if waveforms.ndim != 2 or not waveforms.is_floating_point() or waveforms.shape[0] == 0:
            raise TeacherError(
                f"waveforms must be a float tensor of shape (batch, samples), not {waveforms.dtype} of shape "
                f"{tuple(waveforms.shape)}"
            )
        batch, width = waveforms.shape
        if lengths is None:
            lengths = torch.full((batch,), width, dtype=torch.int64)
        integer = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
        if lengths.shape != (batch,) or not integer:
            raise TeacherError(
                f"lengths must be an integer tensor of shape ({batch},), one length for each waveform, not "
                f"{lengths.dtype} of shape {tuple(lengths.shape)}"
            )
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < self.min_samples or longest > width:
            raise TeacherError(
                f"lengths run from {shortest} to {longest} samples, but each must be at least {self.min_samples} (one "
                f"frame) and at most {width}, the width of waveforms"
            )
        if self.max_samples is not None and longest > self.max_samples:
            raise TeacherError(
                f"an utterance has {longest} samples, but {self.name} takes at most {self.max_samples}; leave longer ones out"
            )
        return lengths.long()

    def _checked_layers(self, layers: Sequence[int] | None) -> list[int]:
        if layers is None:
            return list(range(1, self.num_layers + 1))
        if not layers or not all(1 <= layer <= self.num_layers for layer in layers):
            raise TeacherError(
                f"layers {list(layers)} must be one or more of 1 to {self.num_layers}, those {self.name} has"
            )
        return list(layers)

    def _check_frame_mask(self, frame_mask: Tensor, batch: int, frames: int) -> None:
        if not self.has_mask_embedding:
            raise TeacherError(
                f"{self.name} has no mask embedding, so it can't give masked targets: use the model's original "
                "checkpoint, a stand-in (mean-mask:CHECKPOINT), or targets that need no mask"
            )
        if frame_mask.shape != (batch, frames) or frame_mask.dtype != torch.bool:
            raise TeacherError(
                f"frame_mask must be a bool tensor of shape ({batch}, {frames}), one value for each frame, not "
                f"{frame_mask.dtype} of shape {tuple(frame_mask.shape)}"
            )
