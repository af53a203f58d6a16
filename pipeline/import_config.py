"""A published yaml of the ARMHuBERT repository as one of our configurations: ``import-config PUBLISHED.yaml``."""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
import typer
import yaml

from pipeline.config import Config, ConfigError, dump_config
from student.published import published_config

DRAWS = 4
"""Mask draws of a converted configuration; the published recipe draws anew each time. What draws cost: docs/draws.md."""

DROPPED = {
    "train.base_dir": "runs=... says where runs are kept",
    "train.checkpoint": "a run goes on from its own last checkpoint",
    "train.use_apex": "PyTorch's own automatic mixed precision is used",
    "train.monitor_losses": "losses are always recorded",
    "distiller.final_dim": "the published student does not use it",
    "distiller.pred_head_inter_dim": "used by heads of another kind only",
    "distiller.pred_layer_id": "used by heads of another kind only",
    "distiller.max_positions": "there is no limit",
    "distiller.depthwise_conv_kernel_size": "of Conformer layers only",
    "distiller.attn_type": "of Conformer layers only",
    "distiller.pos_enc_type": "of Conformer layers only",
    "distiller.fp16": "of Conformer layers only; train.precision has the training's",
    "distiller.tr_conv1d_kernel": "of the time-reduction layer only",
    "distiller.tr_layer_index": "of the time-reduction layer only",
    "distiller.tr_reduce_factor": "of the time-reduction layer only",
    "distiller.tr_layer_type": "of the time-reduction layer only",
    "distiller.required_seq_len_multiple": "padding to a multiple changes no output",
    "optimizer.weight_decay": "the published optimiser's groups override it by 0.01 on all but biases, which is kept",
    "data.bucketing_path": "the corpus is indexed afresh",
    "data.test_set": "validation is on dev-clean, as published; test sets take no part in training",
}
"""Published keys that have no counterpart, and why none is missed."""

_ONLY: dict[str, Any] = {
    "train.delete_projections": False,
    "train.specaug": False,
    "train.rec_loss_type": ("mse", "l1"),
    "distiller.feature_grad_mult": 1.0,
    "distiller.encoder_layerdrop": 0.0,
    "distiller.init_conv_layers": False,
    "distiller.init_encoder_layers": 0,
    "distiller.freeze_student_mask": False,
    "distiller.update_teacher_mask": False,
    "optimizer.name": "AdamW_with_schedule",
}
"""Published keys whose other values would change the training, and that we don't have."""

_READ = {
    "teacher": "teacher_model mask_length mask_prob mask_selection mask_other no_mask_overlap mask_min_space",
    "train": "output_dir num_epochs gpus batch_size accumulate_grad_batches use_fp16 rec_loss_weight rec_loss_type "
    "distil_random_layer random_layer_weight mask_prob_schedule",
    "distiller": "extractor_mode conv_feature_layers conv_bias conv_pos conv_pos_groups pos_conv_depth layer_type encoder_layers "
    "encoder_embed_dim encoder_ffn_embed_dim encoder_attention_heads activation_fn layer_norm_first layer_grad_scale reuse_pattern "
    "dropout attention_dropout activation_dropout dropout_input pred_head_final_dim layerwise_proj enable_tr_layer "
    "checkpoint_activations crop_seq_to_multiple",
    "optimizer": "lr warmup_proportion betas eps",
    "data": "libri_root train_set",
}
"""Published keys that `import_config` reads; docs/published-names.md has their names here."""


def import_config(path: Path) -> tuple[Config, list[str]]:
    """Converts a published yaml.

    Args:
        path: of the yaml, as ``conf/armhubert/armhubert-960.yaml`` of the published repository.

    Returns:
        Our configuration, and a sentence for each key that was dropped.

    Raises:
        ConfigError: not a published yaml, an unknown key, or an option that we don't have.
    """
    try:
        student = published_config(path)
        tree: dict[str, Any] = yaml.safe_load(path.read_text())
    except ValueError as error:
        raise ConfigError(str(error)) from error
    tree.pop("specaug", None)  # Read only where train.specaug is true.
    tree.pop("model", None)
    given = {
        f"{section}.{key}": value
        for section, values in tree.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
    known = {f"{section}.{key}" for section, keys in _READ.items() for key in keys.split()}
    for key, value in given.items():
        if key not in known and key not in DROPPED and key not in _ONLY:
            raise ConfigError(f"{path}: {key} is no key of a published configuration")
        allowed = _ONLY.get(key, value)
        if value != allowed and not (isinstance(allowed, tuple) and value in allowed):
            some = " or ".join(map(repr, allowed)) if isinstance(allowed, tuple) else repr(allowed)
            raise ConfigError(f"{path}: {key} is {value!r}, which this student does not have; only {some}")
    try:
        config = _convert(given, student.model_dump(mode="json") | {"reuse_behaviour": "paper"})
    except KeyError as error:
        raise ConfigError(f"{path} lacks {error.args[0]}, which a published configuration has") from error
    except (pydantic.ValidationError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} does not convert: {' '.join(str(error).split())}") from error
    return config, [f"{key}: {DROPPED[key]}" for key in given if key in DROPPED]


def _convert(given: dict[str, Any], student: dict[str, Any]) -> Config:
    gpus, hints = given["train.gpus"], given["train.distil_random_layer"]
    if hints != student["encoder_layers"] - 1:
        raise ValueError(
            f"train.distil_random_layer is {hints}, but all {student['encoder_layers'] - 1} hint layers are learnt from in each step"
        )
    policy = {
        "selection": given["teacher.mask_selection"],
        "mask_prob": given["teacher.mask_prob"],
        "mask_length": given["teacher.mask_length"],
        "mask_other": given["teacher.mask_other"],
        "no_overlap": given["teacher.no_mask_overlap"],
        "min_space": given["teacher.mask_min_space"],
    }
    schedule = given.get("train.mask_prob_schedule") or None
    policies = []
    if schedule:
        first, last = yaml.safe_load(schedule) if isinstance(schedule, str) else schedule
        policies = [policy | {"mask_prob": round(float(p), 6)} for p in np.linspace(first, last, DRAWS)]
    teacher = Path(given["teacher.teacher_model"])
    return Config.model_validate(
        {
            "name": given["train.output_dir"],
            "corpus": {
                "path": given["data.libri_root"],
                "train_splits": given["data.train_set"],
                "validation_splits": ["dev-clean"],
            },
            "teacher": {"checkpoint": str(teacher)},
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
                "loss": given["train.rec_loss_type"],
                "learning_rate": given["optimizer.lr"],
                "warmup_fraction": given["optimizer.warmup_proportion"],
                "betas": given["optimizer.betas"],
                "eps": given["optimizer.eps"],
                "checkpoint_activations": given.get("distiller.checkpoint_activations", False),
                "draw_order": "in_order" if schedule else "rotate",
            },
        }
    )


def command(
    published: Annotated[Path, typer.Argument(help="A yaml of the published repository.")],
    output: Annotated[Path | None, typer.Option(help="A new file; default standard output.")] = None,
) -> None:
    """Convert a published yaml to a configuration, and say what was dropped."""
    try:
        config, dropped = import_config(published)
        if output is not None and output.exists():
            raise ConfigError(f"{output} is there already; choose another --output")
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if output is None:
        typer.echo(dump_config(config), nl=False)
    else:
        output.write_text(dump_config(config))
    for sentence in dropped:
        typer.echo(f"dropped {sentence}", err=True)
    typer.echo(
        f"changed masks.draws: {DRAWS} kept draws take turns, published is a new mask each time; "
        "student.reuse_behaviour: paper, where the published code applied softmax twice",
        err=True,
    )
