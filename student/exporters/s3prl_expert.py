"""S3PRL upstream of a distilled student; see README.md beside this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .portable_model import PortableStudent, pad


class UpstreamExpert(nn.Module):
    """The student as an S3PRL upstream.

    Args:
        ckpt: Weights. Default ``weights.pt`` beside this file.
        model_config: Configuration. Default ``config.json`` beside this file.
        others: Options of other upstreams; ignored.
    """

    def __init__(self, ckpt: str | None = None, model_config: str | None = None, **others: Any) -> None:
        super().__init__()
        folder = Path(__file__).resolve().parent
        config = json.loads(Path(model_config or folder / "config.json").read_text())
        self.origin = config["origin"]
        self.model = PortableStudent(config["model"])
        self.model.load_state_dict(torch.load(ckpt or folder / "weights.pt", map_location="cpu", weights_only=True))

    def get_downsample_rates(self, key: str) -> int:
        """Return the number of samples per frame, the same for all features."""
        return self.model.stride

    def forward(self, wavs: list[Tensor]) -> dict[str, Any]:
        """Return features of waveforms (S_i,), 16 kHz in [-1, 1], of at least one frame each.

        Returns:
            ``hidden_states``: with features ``layers``, L + 1 tensors (B, ceil(S / 320), d), where 0 is the encoder's input and k
            the output of layer k; with features ``heads``, the heads' predictions, (B, ceil(S / 320), D) each.
            ``last_hidden_state``: the last of them. After the real frames of an utterance its last frame is repeated, because
            S3PRL rounds lengths up and would otherwise use a frame of padding.
        """
        waveforms, lengths = pad(wavs)
        states = self.model(waveforms, lengths)
        real = self.model.num_frames(torch.tensor([len(wav) for wav in wavs], device=waveforms.device))
        wanted = torch.arange(-(-waveforms.shape[1] // self.model.stride), device=waveforms.device)
        index = torch.minimum(wanted, real[:, None] - 1)[..., None]
        states = [x.gather(1, index.expand(-1, -1, x.shape[2])) for x in states]
        return {"hidden_states": states, "last_hidden_state": states[-1]}
