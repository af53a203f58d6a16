"""Initial weights of a student: another student's, or parts of the teacher (front end, first encoder layers, mask embedding).

The latter is what the published ``init_conv_layers`` and ``init_encoder_layers`` do. In addition, the norms that belong to these parts
are copied: the one between convolutions and projection, and the one before the first layer.
"""

import re
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from ray_distill.pipeline.config import ConfigError
from ray_distill.student import StudentConfig, load_student
from ray_distill.student.model.student import HEAD_WEIGHTS, Student
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.shapes_only import shapes_only
from ray_distill.teacher_cache.teachers import Teacher
from ray_distill.teacher_cache.teachers.wav2vec2 import Wav2Vec2Teacher
from ray_distill.whole_files import replacing

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
    """Return the student's tensors that are copied from the teacher, by their names in the student.

    Args:
        teacher: Teacher.
        config: Architecture of the student.
        settings: Training settings, which choose the parts to copy.

    Raises:
        ConfigError: With the copied weights, the student's part would not compute what the teacher's does, because its shapes,
            tensors, heads, norms or strides differ; the message names the key to change. Or the teacher's architecture has no part
            in common with a student.
    """
    if not isinstance(teacher, Wav2Vec2Teacher):
        raise ConfigError(
            f"train.init_front_end, init_encoder_layers, mask_embedding: {teacher.name} does not have wav2vec 2.0's architecture, "
            "so a student can't copy its weights; remove these keys"
        )
    with shapes_only():
        expected = Student(config).state_dict()
    found: dict[str, Tensor] = {}
    if settings.init_front_end:
        found |= _front_end(teacher, config, expected)
    if settings.init_encoder_layers:
        found |= _encoder_layers(teacher, config, expected, settings.init_encoder_layers)
    if settings.mask_embedding == "teacher":
        found |= _mask_embedding(teacher, expected)
    return found


def _front_end(teacher: Wav2Vec2Teacher, config: StudentConfig, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of convolutions and projection; ``expected`` has all tensors of the student."""
    key = "train.init_front_end"
    found = _renamed(teacher.weights, _FRONT_END)
    if not config.feature_norm:
        found = {name: value for name, value in found.items() if not name.startswith("feature_norm.")}
    keys = "student.conv_layers, conv_norm, conv_bias and encoder_embed_dim"
    _check(found, expected, ("conv_blocks.", "feature_norm.", "projection."), key, keys)
    if teacher.input_rate != SAMPLE_RATE:
        raise ConfigError(
            f"{key}: the convolutions of {teacher.name} read audio at {teacher.input_rate} Hz, but those of a student at "
            f"{SAMPLE_RATE} Hz; set {key}=false"
        )
    strides = [stride for _, _, stride in config.conv_layers]
    if strides != teacher.strides:
        raise ConfigError(
            f"{key}: the teacher's convolutions have strides {teacher.strides}, the student's {strides}; give student.conv_layers "
            "the teacher's strides"
        )
    return found


def _encoder_layers(
    teacher: Wav2Vec2Teacher, config: StudentConfig, expected: dict[str, Tensor], number: int
) -> dict[str, Tensor]:
    """Return the tensors of the first ``number`` layers and of the position convolution."""
    key = "train.init_encoder_layers"
    if number > min(config.encoder_layers, teacher.num_layers):
        raise ConfigError(
            f"{key}: {number} is more than the student's {config.encoder_layers} or the teacher's {teacher.num_layers} layers"
        )
    if config.layer_type != "transformer" or any(config.reuses[:number]):
        raise ConfigError(
            f"{key}: the teacher's layers compute their own attention maps, so the student's first {number} layers must be "
            "Transformer layers that do the same; change student.layer_type or student.attention_reuse"
        )
    for name, ours, theirs in (
        ("position", config.position, "convolution"),
        ("encoder_attention_heads", config.encoder_attention_heads, teacher.heads),
        ("layer_norm_first", config.layer_norm_first, teacher.layer_norm_first),
    ):
        if ours != theirs:
            raise ConfigError(
                f"{key}: student.{name} is {ours}, but with the teacher's weights it must be {theirs}, like the teacher's"
            )
    weights = teacher.weights
    found = _renamed(weights, _POSITION)
    for layer in range(number):
        prefix = f"encoder.transformer.layers.{layer}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        renamed = _renamed(own, _LAYER)
        if len(renamed) != len(own):
            raise ConfigError(
                f"{key}: the layers of {teacher.name} have gated relative positions, which a student's layers lack; set {key}=0"
            )
        found |= {f"layers.{layer}.{name}": value for name, value in renamed.items()}
    parts = ("position.", "encoder_norm.", *(f"layers.{layer}." for layer in range(number)))
    keys = "student.encoder_embed_dim, encoder_ffn_embed_dim, conv_pos, conv_pos_groups and conv_pos_depth"
    _check(found, expected, parts, key, keys)
    return found


def _mask_embedding(teacher: Wav2Vec2Teacher, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the mask embedding."""
    if "mask_embedding" not in teacher.weights:
        raise ConfigError(
            f"train.mask_embedding: {teacher.name} has no mask embedding that a student could copy; set it to learned"
        )
    found = {"mask_embedding": teacher.weights["mask_embedding"]}
    _check(found, expected, ("mask_embedding",), "train.mask_embedding", "student.encoder_embed_dim")
    return found


def tensors_of_student(model: str, config: StudentConfig) -> dict[str, Tensor]:
    """Return the tensors of another student that a student starts from, by name. Heads with other shapes are left out.

    Args:
        model: Folder of a run, an export or a checkpoint.
        config: Architecture of the student that starts.

    Raises:
        ConfigError: The other student can't be read, or another part than the heads does not have this student's shapes.
    """
    try:
        other = load_student(model)
    except (ValueError, OSError) as error:
        raise ConfigError(f"train.init_from: {error}") from error
    given = other.state_dict()
    with shapes_only():
        expected = Student(config).state_dict()
    fitting = {name: value for name, value in given.items() if name in expected and value.shape == expected[name].shape}
    inner = [name for name in [*expected, *given] if name.startswith(("split.", "inner_heads."))]
    if other.config.layers_with_heads != config.layers_with_heads or any(name not in fitting for name in inner):
        # Heads read certain layers, or what their own inner layer gives, so they start anew with these.
        fitting = {name: value for name, value in fitting.items() if not name.startswith(HEAD_WEIGHTS)}
    for name in [*expected, *given]:
        if name not in fitting and not name.startswith(HEAD_WEIGHTS):
            shapes = [tuple(tensors[name].shape) if name in tensors else "none" for tensors in (given, expected)]
            raise ConfigError(
                f"train.init_from: {name} has the shape {shapes[0]} in {model}, but {shapes[1]} in this student; give the section "
                "student the same architecture, or remove train.init_from"
            )
    return fitting


def write_initial(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write initial weights to a file, atomically, for `ray_distill.student.training.training_loop.train`.

    Args:
        path: File in safetensors format. Its folder is created if it does not exist.
        tensors: Tensors by their names in the student.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}))


def _renamed(weights: dict[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Return the weights whose full names match a rule's pattern, under the names that the rule gives them."""
    return {
        re.sub(pattern, ours, name): value
        for name, value in weights.items()
        for pattern, ours in rules
        if re.fullmatch(pattern, name)
    }


def _check(found: dict[str, Tensor], expected: dict[str, Tensor], parts: tuple[str, ...], key: str, keys: str) -> None:
    """Check that the tensors found in the teacher are exactly those of the student's parts, with the same shapes.

    Args:
        found: Tensors of the teacher, by their names in the student.
        expected: All tensors of the student.
        parts: Prefixes of the names of the parts' tensors.
        key: Training key that requests the copy, for the message.
        keys: Student keys that decide the shapes, for the message.
    """
    for name, value in found.items():
        if name not in expected or expected[name].shape != value.shape:
            ours = (
                "the student has none" if name not in expected else f"the student's has {tuple(expected[name].shape)}"
            )
            raise ConfigError(
                f"{key}: the teacher's {name} has the shape {tuple(value.shape)}, but {ours}; give {keys} the teacher's values"
            )
    lacking = [name for name in expected if name.startswith(parts) and name not in found]
    if lacking:
        raise ConfigError(
            f"{key}: the student has {lacking[0]}, but the teacher does not; give {keys} the teacher's values"
        )
