"""A published YAML file of the ARMHuBERT repository as a configuration of this project."""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import yaml

from ray_distill.pipeline.config import Config, ConfigError
from ray_distill.student.published import literal_list, published_config

DRAWS = 4
"""Number of mask draws of a converted configuration; the published recipe draws a new mask for every step.

docs/in-depth/draws.md compares numbers of draws.
"""

DROPPED = {
    "train.base_dir": "the folder of runs is set by runs=...",
    "train.checkpoint": "a run resumes from its own last checkpoint",
    "train.use_apex": "PyTorch's automatic mixed precision is used instead",
    "train.monitor_losses": "losses are always recorded",
    "distiller.final_dim": "the published student does not use it",
    "distiller.max_positions": "positions are not limited",
    "distiller.attn_type": "both implementations compute the same attention",
    "distiller.fp16": "it affects only Conformer layers; the precision of training is train.precision",
    "distiller.tr_conv1d_kernel": "the published code uses tr_reduce_factor as the kernel size",
    "distiller.required_seq_len_multiple": "padding to a multiple changes no output",
    "optimizer.weight_decay": "the published optimiser overrides it with 0.01 on everything but biases, and so does this project",
    "data.bucketing_path": "the corpus is indexed instead",
    "specaug.time_warp_mode": "features are interpolated linearly in time; bicubic interpolation is for images",
    "specaug.adaptive_number_ratio": "it affects only adaptive masks",
    "specaug.adaptive_size_ratio": "it affects only adaptive masks",
    "specaug.max_n_time_masks": "it affects only adaptive masks",
    "data.test_set": "validation uses dev-clean, as published; training uses no test set",
}
"""Published keys without a counterpart, and the reason for each."""

_SUPPORTED: dict[str, Any] = {
    "train.delete_projections": False,
    "train.rec_loss_type": ("mse", "l1"),
    "distiller.update_teacher_mask": False,
    "optimizer.name": "AdamW_with_schedule",
    "specaug.adaptive": False,
}
"""Published keys that are supported with these values only; other values would change the training."""

_ALTERNATIVES = {
    "train.delete_projections": "; the published loss needs projections too, and `ray-distill convert --without-heads` removes them "
    "from a checkpoint",
    "distiller.update_teacher_mask": "; a teacher whose mask embedding follows the student's can't be cached; set "
    "train.mask_embedding=teacher to make the student use the teacher's instead",
}

_READ = {
    "teacher": "teacher_model mask_length mask_prob mask_selection mask_other no_mask_overlap mask_min_space",
    "train": "output_dir num_epochs gpus batch_size accumulate_grad_batches use_fp16 rec_loss_weight rec_loss_type "
    "distil_random_layer random_layer_weight mask_prob_schedule specaug",
    "distiller": "extractor_mode conv_feature_layers conv_bias conv_pos conv_pos_groups pos_conv_depth layer_type encoder_layers "
    "encoder_embed_dim encoder_ffn_embed_dim encoder_attention_heads activation_fn layer_norm_first layer_grad_scale reuse_pattern "
    "dropout attention_dropout activation_dropout dropout_input pred_head_final_dim layerwise_proj enable_tr_layer "
    "checkpoint_activations crop_seq_to_multiple feature_grad_mult encoder_layerdrop init_conv_layers init_encoder_layers "
    "freeze_student_mask pred_head_inter_dim pred_layer_id depthwise_conv_kernel_size pos_enc_type tr_layer_index tr_reduce_factor "
    "tr_layer_type",
    "optimizer": "lr warmup_proportion betas eps",
    "data": "libri_root train_set",
    "specaug": "apply_time_warp time_warp_window apply_freq_mask freq_mask_width_range num_freq_mask apply_time_mask "
    "time_mask_width_range num_time_mask replace_with_zero",
}
"""Published keys that `import_config` reads; docs/in-depth/published-names.md lists the corresponding keys of this project."""


@dataclass(frozen=True)
class Imported:
    """A converted configuration.

    Attributes:
        config: The configuration.
        kept: Published keys with the same meaning here, which docs/in-depth/published-names.md lists.
        changed: A sentence for each key whose meaning or value changed, and for each setting that the published code fixes.
        dropped: A sentence for each key without a counterpart.
    """

    config: Config
    kept: list[str]
    changed: list[str]
    dropped: list[str]


def import_config(path: Path) -> Imported:
    """Convert a published YAML file.

    Args:
        path: YAML file such as ``conf/armhubert/armhubert-960.yaml`` of the published repository.

    Returns:
        The configuration, and what was kept, changed and dropped.

    Raises:
        ConfigError: The file is not a published configuration, has an unknown key, or sets an unsupported option.
    """
    try:
        student = published_config(path)
        tree: dict[str, Any] = yaml.safe_load(path.read_text())
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not tree.get("train", {}).get("specaug"):
        tree.pop("specaug", None)
    tree.pop("model", None)
    given = {
        f"{section}.{key}": value
        for section, values in tree.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
    known = {f"{section}.{key}" for section, keys in _READ.items() for key in keys.split()}
    for key, value in given.items():
        if key not in known and key not in DROPPED and key not in _SUPPORTED:
            raise ConfigError(f"{path}: {key} is not a key of a published configuration")
        allowed = _SUPPORTED.get(key, value)
        if value != allowed and not (isinstance(allowed, tuple) and value in allowed):
            choices = " or ".join(map(repr, allowed)) if isinstance(allowed, tuple) else repr(allowed)
            raise ConfigError(
                f"{path}: {key} is {value!r}, but only {choices} is supported{_ALTERNATIVES.get(key, '')}"
            )
    try:
        config = _convert(given, student.model_dump(mode="json") | {"reuse_behaviour": "paper"})
    except KeyError as error:
        raise ConfigError(f"{path} lacks the key {error.args[0]}, which every published configuration has") from error
    except (pydantic.ValidationError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} can't be converted: {' '.join(str(error).split())}") from error
    changed = _changes(given, config)
    altered = {sentence.partition(":")[0] for sentence in changed}
    return Imported(
        config,
        [key for key in given if key not in DROPPED and key not in altered],
        changed,
        [f"{key}: {DROPPED[key]}" for key in given if key in DROPPED],
    )


def _changes(given: dict[str, Any], config: Config) -> list[str]:
    """Return a sentence for each published key or setting that has another meaning or value here; see docs/fidelity.md."""
    changes = [
        f"masks.draws: the {DRAWS} cached draws are used in turn, where the published recipe draws a new mask each time",
        "optimizer.name: PyTorch's AdamW, where the published optimiser is S3PRL's Lamb without its trust ratio "
        "(train.optimizer published)",
        "train.count_padding: the loss counts real frames, and each micro-batch by its frames, where the published loss counts "
        "padded frames and each micro-batch equally",
        "train.validate_every, train.keep_best: a validation after each epoch, and the three best students, as the published code "
        "fixes them",
    ]
    if any(config.student["attention_reuse"]):  # One entry for each layer.
        changes.append("student.reuse_behaviour: paper, where the published code applies the softmax twice")
    if config.masks.policies:
        shares = ", ".join(f"{policy.mask_prob:g}" for policy in config.masks.policies)
        changes.append(
            f"train.mask_prob_schedule: {DRAWS} levels ({shares}), one for each cached draw, where the published probability changes "
            "after each epoch"
        )
    if config.train.spec_augment is not None:
        changes.append("train.specaug: SpecAugment is applied, where the published forward pass leaves it out")
    return changes


def _schedule(text: Any) -> Sequence[float] | None:
    """Return the first and the last mask probability of ``train.mask_prob_schedule``, a sequence or the text of one; None if empty."""
    if text in (None, "", [], ()):
        return None
    try:
        first, last = ast.literal_eval(text) if isinstance(text, str) else text
        return float(first), float(last)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"train.mask_prob_schedule is {text!r}, but it must have two numbers, such as '(0.4, 0.8)'"
        ) from error


def _convert(given: dict[str, Any], student: dict[str, Any]) -> Config:
    """Return the configuration for the values of published keys and the settings of the student."""
    gpus, hints = given["train.gpus"], given["train.distil_random_layer"]
    split = student["heads"] == "split"
    below = (student["split_heads"] if split else student["encoder_layers"]) - 1
    if not 1 <= hints <= below:
        raise ValueError(
            f"train.distil_random_layer is {hints}, but it must be between 1 and {below}, the number of layers below the last"
        )
    predicted = [layer + 1 for layer in literal_list(given["distiller.pred_layer_id"])] if split else None
    policy = {
        "selection": given["teacher.mask_selection"],
        "mask_prob": given["teacher.mask_prob"],
        "mask_length": given["teacher.mask_length"],
        "mask_other": given["teacher.mask_other"],
        "no_overlap": given["teacher.no_mask_overlap"],
        "min_space": given["teacher.mask_min_space"],
    }
    schedule = _schedule(given.get("train.mask_prob_schedule"))
    policies = []
    if schedule:
        policies = [policy | {"mask_prob": round(float(p), 6)} for p in np.linspace(schedule[0], schedule[1], DRAWS)]
    teacher = Path(given["teacher.teacher_model"])
    return Config.model_validate(
        {
            "name": given["train.output_dir"],
            "corpus": {
                "path": given["data.libri_root"],
                "train_splits": given["data.train_set"],
                "validation_splits": ["dev-clean"],
            },
            "teacher": {"checkpoint": str(teacher), "layers": predicted},
            "masks": {"policy": policy, "policies": policies, "draws": DRAWS},
            "cache": {"path": f"caches/{teacher.stem}-{given['train.output_dir']}"},
            "student": student,
            "train": {
                "epochs": given["train.num_epochs"],
                "workers": len(gpus) if isinstance(gpus, list) else gpus,
                "use_gpu": True,
                "batch_size": given["train.batch_size"],
                "accumulate": given["train.accumulate_grad_batches"],
                "precision": "fp16" if given["train.use_fp16"] else "fp32",
                "final_weight": given["train.rec_loss_weight"],
                "hint_weight": given["train.random_layer_weight"],
                "hint_layers": hints if hints < below else None,
                "spec_augment": _spec_augment(given),
                "mask_embedding": "frozen" if given.get("distiller.freeze_student_mask") else "learned",
                "init_front_end": given.get("distiller.init_conv_layers", False),
                "init_encoder_layers": max(0, given.get("distiller.init_encoder_layers", 0)),
                "loss": given["train.rec_loss_type"],
                "learning_rate": given["optimizer.lr"],
                "warmup_fraction": given["optimizer.warmup_proportion"],
                "betas": given["optimizer.betas"],
                "eps": given["optimizer.eps"],
                "checkpoint_activations": given.get("distiller.checkpoint_activations", False),
                "draw_order": "in_order" if schedule else "rotate",
                "validate_every": "epoch",
                "keep_best": 3,
            },
        }
    )


def _spec_augment(given: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings of SpecAugment; None if it is off. Missing keys have the defaults of the published code.

    The forward pass of the published code never applies them.
    """
    if not given.get("train.specaug"):
        return None
    widths = [given.get("specaug.freq_mask_width_range", [0, 20]), given.get("specaug.time_mask_width_range", [0, 100])]
    if any(low for low, _ in widths):
        raise ValueError(f"specaug masks with a minimum width ({widths}) are not supported; the ranges must start at 0")
    frequency, time = (high for _, high in widths)
    return {
        "time_warp_window": given.get("specaug.time_warp_window", 5)
        if given.get("specaug.apply_time_warp", True)
        else 0,
        "frequency_masks": given.get("specaug.num_freq_mask", 2) if given.get("specaug.apply_freq_mask", True) else 0,
        "frequency_mask_width": frequency,
        "time_masks": given.get("specaug.num_time_mask", 2) if given.get("specaug.apply_time_mask", True) else 0,
        "time_mask_width": time,
        "fill": "zero" if given.get("specaug.replace_with_zero", True) else "mean",
    }
