"""A student's first weights from its teacher: the front end, the first encoder layers, the mask embedding.

As the published ``init_conv_layers`` and ``init_encoder_layers``, and with what belongs to them: the norm between convolutions and
projection, and the norm before the first layer.
"""

import re
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from pipeline.config import ConfigError
from student import StudentConfig
from student.model import Student
from student.settings import TrainSettings
from teacher_cache.teachers import Teacher
from teacher_cache.teachers.wav2vec2 import Wav2Vec2Teacher

_FRONT_END = (
    (r"feature_extractor\.conv_layers\.(\d+)\.conv\.(weight|bias)", r"conv_blocks.\1.conv.\2"),
    (r"feature_extractor\.conv_layers\.(\d+)\.layer_norm\.(weight|bias)", r"conv_blocks.\1.norm.\2"),
    (r"encoder\.feature_projection\.layer_norm\.(weight|bias)", r"feature_norm.\1"),
    (r"encoder\.feature_projection\.projection\.(weight|bias)", r"projection.\1"),
)
_POSITION = (
    (r"encoder\.transformer\.pos_conv_embed\.conv\.(.+)", r"position.conv.\1"),
    (r"encoder\.transformer\.layer_norm\.(weight|bias)", r"encoder_norm.\1"),
)
_LAYER = (
    (r"attention\.q_proj\.(weight|bias)", r"attention.query.\1"),
    (r"attention\.k_proj\.(weight|bias)", r"attention.key.\1"),
    (r"attention\.v_proj\.(weight|bias)", r"attention.value.\1"),
    (r"attention\.out_proj\.(weight|bias)", r"attention.out.\1"),
    (r"layer_norm\.(weight|bias)", r"attention_norm.\1"),
    (r"feed_forward\.intermediate_dense\.(weight|bias)", r"up.\1"),
    (r"feed_forward\.output_dense\.(weight|bias)", r"down.\1"),
    (r"final_layer_norm\.(weight|bias)", r"final_norm.\1"),
)


def initial_tensors(teacher: Teacher, config: StudentConfig, settings: TrainSettings) -> dict[str, Tensor]:
    """The student's tensors that ``settings`` has start from the teacher's, by the student's names.

    Raises:
        ConfigError: the student lacks such a tensor, or has it in another shape; the message names the key to change. Or the
            teacher has none that a student has.
    """
    if not isinstance(teacher, Wav2Vec2Teacher):
        raise ConfigError(
            f"train.init_front_end, init_encoder_layers, mask_embedding: {teacher.name} is not built like wav2vec 2.0, so a student "
            "has no part in common with it; leave them out"
        )
    weights = teacher.weights
    expected = Student(config).state_dict()
    found: dict[str, Tensor] = {}
    if settings.init_front_end:
        found |= _renamed(weights, _FRONT_END)
        _check(
            found, expected, "train.init_front_end", "student.conv_layers, conv_norm, conv_bias and encoder_embed_dim"
        )
    if settings.init_encoder_layers:
        key, number = "train.init_encoder_layers", settings.init_encoder_layers
        if number > min(config.encoder_layers, teacher.num_layers):
            raise ConfigError(
                f"{key}: {number} is more than the student's {config.encoder_layers} or the teacher's {teacher.num_layers} layers"
            )
        if config.layer_type != "transformer" or any(config.reuses[:number]):
            raise ConfigError(
                f"{key}: the teacher's layers compute their own attention maps, so the student's first {number} must be Transformer "
                "layers that do too; see student.layer_type and student.attention_reuse"
            )
        layers = _renamed(weights, _POSITION) if config.position == "convolution" else {}
        for layer in range(number):
            prefix = f"encoder.transformer.layers.{layer}."
            own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            renamed = _renamed(own, _LAYER)
            if len(renamed) != len(own):
                raise ConfigError(
                    f"{key}: {teacher.name} has gated relative positions in its layers, which a student has not"
                )
            layers |= {f"layers.{layer}.{name}": value for name, value in renamed.items()}
        _check(layers, expected, key, "student.encoder_embed_dim, encoder_ffn_embed_dim, conv_pos and conv_pos_groups")
        found |= layers
    if settings.mask_embedding == "teacher":
        embedding = {"mask_embedding": weights["mask_embedding"]}
        _check(embedding, expected, "train.mask_embedding", "student.encoder_embed_dim")
        found |= embedding
    return found


def write_initial(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes them where `student.training.train` reads them."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}))
    temporary.replace(path)


def _renamed(weights: dict[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    return {
        re.sub(pattern, ours, name): value
        for name, value in weights.items()
        for pattern, ours in rules
        if re.fullmatch(pattern, name)
    }


def _check(found: dict[str, Tensor], expected: dict[str, Tensor], key: str, keys: str) -> None:
    for name, value in found.items():
        if name not in expected or expected[name].shape != value.shape:
            ours = "does not have" if name not in expected else f"has as {tuple(expected[name].shape)}"
            raise ConfigError(
                f"{key}: the teacher's {name} is {tuple(value.shape)}, which the student {ours}; make {keys} the teacher's"
            )
