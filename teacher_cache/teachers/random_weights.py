"""A HuBERT of any size with seeded random weights, for demos and tests."""

import re

import torch
from torch import nn
from torchaudio.models import Wav2Vec2Model

from ray_distill.teacher_cache.teachers.architecture import Architecture, build_model
from ray_distill.teacher_cache.teachers.teacher import TeacherError
from ray_distill.teacher_cache.teachers.wav2vec2 import Wav2Vec2Teacher

_SEED = 0
_MAX_PARAMETERS = 10**10


def load_random(size: str, device: str | torch.device) -> Wav2Vec2Teacher:
    """Build a HuBERT with random weights. ``12x768`` is the size of Base.

    The weights are the same on every machine, up to the last bit of logarithms and cosines, which differs between processors with and
    without AVX2. A cache therefore knows such a teacher by name; see `Cache.is_of_teacher`.

    Args:
        size: LAYERSxDIM, such as ``4x96``. DIM must be a multiple of 16.
        device: Device on which the teacher computes.

    Raises:
        TeacherError: If the size has another form.
    """
    match = re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,4})", size)
    if match is None or int(match[2]) % 16:
        raise TeacherError(f"random:{size} must be random:LAYERSxDIM with DIM a multiple of 16, such as random:4x96")
    layers, dim = int(match[1]), int(match[2])
    if (parameters := 12 * layers * dim**2) > _MAX_PARAMETERS:
        raise TeacherError(
            f"random:{size} would have {parameters:,} parameters in its layers; at most {_MAX_PARAMETERS:,} are allowed"
        )
    channels = min(512, dim * 2 // 3)
    architecture = Architecture(
        conv_layers=[(channels, 10, 5)] + [(channels, 3, 2)] * 4 + [(channels, 2, 2)] * 2,
        conv_bias=False,
        conv_layer_norm=False,
        dim=dim,
        ffn_dim=4 * dim,
        heads=dim // 64 if dim >= 256 and dim % 64 == 0 else 4,
        layers=layers,
        layer_norm_first=False,
        pos_kernel=128,
        pos_groups=16,
    )
    model = build_model(architecture, f"random:{size}")
    generator = torch.Generator().manual_seed(_SEED)
    _initialise(model, generator)
    mask_embedding = torch.rand(dim, generator=generator)
    return Wav2Vec2Teacher(model, mask_embedding, name=f"random:{size}", device=device)


@torch.no_grad()
def _initialise(model: Wav2Vec2Model, generator: torch.Generator) -> None:
    """Initialise convolutions and position convolution as fairseq does, and linear layers with normal(0, 1/sqrt(inputs)).

    With fairseq's standard deviation of 0.02, all layers of a small untrained model would have almost equal outputs.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0.0, module.in_features**-0.5, generator=generator)
            module.bias.zero_()
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
        elif isinstance(module, nn.Conv1d) and module.bias is not None:  # The weight-normalised position convolution.
            std = (4.0 / (module.kernel_size[0] * module.out_channels)) ** 0.5
            module.weight = torch.empty_like(module.weight).normal_(0.0, std, generator=generator)
            module.bias.zero_()
        elif isinstance(module, nn.Conv1d):
            std = (2.0 / (module.kernel_size[0] * module.in_channels)) ** 0.5
            module.weight.normal_(0.0, std, generator=generator)
