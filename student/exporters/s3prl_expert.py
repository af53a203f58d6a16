"""S3PRL upstream of a distilled student; see README.md beside this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .portable_model import PortableStudent, pad


class UpstreamExpert(nn.Module):
    """The student as S3PRL wants an upstream.

    Args:
        ckpt: weights; default ``weights.pt`` beside this file.
        model_config: its configuration; default ``config.json`` beside this file.
        others: options of other upstreams, ignored.
    """

    def __init__(self, ckpt: str | None = None, model_config: str | None = None, **others: Any) -> None:
        super().__init__()
        folder = Path(__file__).resolve().parent
        config = json.loads(Path(model_config or folder / "config.json").read_text())
        self.origin = config["origin"]
        self.model = PortableStudent(config["model"])
        self.model.load_state_dict(torch.load(ckpt or folder / "weights.pt", map_location="cpu", weights_only=True))

    def get_downsample_rates(self, key: str) -> int:
        """Samples per frame, of every feature."""
        return self.model.stride

    def forward(self, wavs: list[Tensor]) -> dict[str, Any]:
        """Features of waveforms (S_i,) of at least one frame each, 16 kHz in [-1, 1].

        Returns:
            ``hidden_states``: the encoder's input and each layer's output, (B, ceil(S / 320), d) each. Beyond an utterance's
            real frames its last one is repeated: S3PRL rounds lengths up, and would else take in a frame of padding.
        """
        waveforms, lengths = pad(wavs)
        states = self.model(waveforms, lengths)
        real = self.model.num_frames(torch.tensor([len(wav) for wav in wavs], device=waveforms.device))
        wanted = torch.arange(-(-waveforms.shape[1] // self.model.stride), device=waveforms.device)
        index = torch.minimum(wanted, real[:, None] - 1)[..., None]
        states = [x.gather(1, index.expand(-1, -1, x.shape[2])) for x in states]
        return {"hidden_states": states, "last_hidden_state": states[-1]}
