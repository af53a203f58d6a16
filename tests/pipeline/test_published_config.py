"""Conversion of published YAML files to configurations."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ray_distill.command_line import application
from ray_distill.pipeline.config import ConfigError, load_config
from ray_distill.pipeline.published_config import DROPPED, import_config
from ray_distill.student.training.spec_augment import SpecAugment

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def published(**changes: Any) -> dict[str, dict[str, Any]]:
    """Return the published ARMHuBERT-S recipe for 960 h; changes are given as section__key."""
    tree: dict[str, dict[str, Any]] = {
        "teacher": {
            "teacher_model": "./hubert_base_ls960.pt",
            "mask_length": 10,
            "mask_prob": 0.8,
            "mask_selection": "uniform",
            "mask_other": 0.0,
            "no_mask_overlap": True,
            "mask_min_space": 1,
        },
        "train": {
            "base_dir": "./",
            "output_dir": "ArmHuBERT-S-960h",
            "checkpoint": None,
            "num_epochs": 100,
            "gpus": 2,
            "batch_size": 18,
            "accumulate_grad_batches": 4,
            "use_fp16": True,
            "use_apex": False,
            "monitor_losses": True,
            "rec_loss_weight": 1.0,
            "rec_loss_type": "mse",
            "distil_random_layer": 11,
            "random_layer_weight": 0.1,
            "delete_projections": False,
            "specaug": False,
            "mask_prob_schedule": "",
        },
        "distiller": {
            "extractor_mode": "default",
            "conv_feature_layers": "[(128, 10, 5)] + [(256, 1, 1)] + [(256, 3, 2)] * 4 + [(432, 1, 1)] + [(432, 2, 2)] * 2",
            "feature_grad_mult": 1.0,
            "conv_bias": False,
            "conv_pos": 128,
            "conv_pos_groups": 16,
            "pos_conv_depth": 1,
            "max_positions": 100000,
            "layer_type": "transformer",
            "encoder_layers": 12,
            "encoder_embed_dim": 432,
            "encoder_ffn_embed_dim": 816,
            "encoder_attention_heads": 12,
            "activation_fn": "gelu",
            "layer_norm_first": False,
            "layer_grad_scale": True,
            "reuse_pattern": str([True, False] * 6),
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "activation_dropout": 0.1,
            "encoder_layerdrop": 0.0,
            "dropout_input": 0.05,
            "final_dim": 256,
            "pred_head_final_dim": 768,
            "pred_head_inter_dim": 0,
            "layerwise_proj": True,
            "pred_layer_id": "[11]",
            "init_conv_layers": False,
            "init_encoder_layers": 0,
            "enable_tr_layer": False,
            "tr_reduce_factor": 2,
            "checkpoint_activations": False,
            "freeze_student_mask": False,
            "update_teacher_mask": False,
        },
        "optimizer": {
            "name": "AdamW_with_schedule",
            "lr": 5.0e-3,
            "warmup_proportion": 0.05,
            "betas": [0.9, 0.98],
            "eps": 1.0e-6,
            "weight_decay": 1.0e-6,
        },
        "data": {
            "bucketing_path": "./data",
            "libri_root": "LibriSpeech",
            "train_set": ["train-clean-100", "train-clean-360", "train-other-500"],
            "test_set": ["test-clean"],
        },
        "specaug": {"adaptive": False},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    return tree


def write(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "published.yaml"
    path.write_text(yaml.safe_dump(published(**changes)))
    return path


def test_the_published_recipe_is_the_one_in_configs(tmp_path: Path) -> None:
    imported = import_config(write(tmp_path))
    config, dropped = imported.config, imported.dropped
    shipped = load_config(CONFIGS / "armhubert-s-960.yaml")
    assert config.train == shipped.train
    assert config.masks == shipped.masks
    assert config.corpus == shipped.corpus
    students = [c.resolve_student(12, 768).model_dump() for c in (config, shipped)]
    for student in students:  # `alternate` is short for its twelve entries.
        student.pop("attention_reuse")
    assert students[0] == students[1]
    assert config.resolve_student(12, 768).reuses == shipped.resolve_student(12, 768).reuses
    assert {sentence.partition(":")[0] for sentence in dropped} == DROPPED.keys() & {
        f"{section}.{key}" for section, values in published().items() for key in values
    }


@pytest.mark.parametrize("text", ["[0.2, 0.8]", "(0.2, 0.8)", "0.2, 0.8", [0.2, 0.8]])
def test_a_mask_schedule_becomes_policies_of_draws(tmp_path: Path, text: Any) -> None:
    imported = import_config(write(tmp_path, train__mask_prob_schedule=text))
    assert [policy.mask_prob for policy in imported.config.masks.policies] == [0.2, 0.4, 0.6, 0.8]
    assert imported.config.train.draw_order == "in_order"
    assert any("4 levels (0.2, 0.4, 0.6, 0.8)" in sentence for sentence in imported.changed)
    assert "train.mask_prob_schedule" not in imported.kept


def test_every_key_is_kept_changed_or_dropped(tmp_path: Path) -> None:
    imported = import_config(write(tmp_path, train__specaug=True, train__mask_prob_schedule="(0.2, 0.8)"))
    named = [sentence.partition(":")[0] for sentence in (*imported.changed, *imported.dropped)]
    given = {f"{section}.{key}" for section, values in published().items() for key in values}
    assert given <= {*imported.kept, *named}
    assert not set(imported.kept) & set(named)
    assert any("the softmax twice" in sentence for sentence in imported.changed)
    plain = import_config(write(tmp_path, distiller__reuse_pattern=str([True] * 12)))
    assert not any("the softmax twice" in sentence for sentence in plain.changed)


def test_validation_and_selection_are_the_published_ones(tmp_path: Path) -> None:
    train = import_config(write(tmp_path)).config.train
    assert (train.validate_every, train.keep_best) == ("epoch", 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__delete_projections": True}, "train.delete_projections is True.*convert --without-heads"),
        ({"train__distil_random_layer": 0}, "train.distil_random_layer is 0, but it must be between 1 and 11"),
        ({"train__distil_random_layer": 12}, "train.distil_random_layer is 12"),
        ({"distiller__update_teacher_mask": True}, "update_teacher_mask is True.*train.mask_embedding=teacher"),
        ({"distiller__activation_fn": "relu"}, "distiller.activation_fn is 'relu'"),
        ({"distiller__enable_tr_layer": True, "distiller__tr_layer_type": "fc3"}, "time_reduction"),
        ({"train__specaug": True, "specaug__adaptive": True}, "specaug.adaptive is True"),
        ({"train__specaug": True, "specaug__freq_mask_width_range": [2, 20]}, "ranges must start at 0"),
        ({"train__mask_prob_schedule": "0.5"}, "mask_prob_schedule is '0.5', but it must have two numbers"),
        ({"train__mask_prob_schedule": "__import__('os')"}, "must have two numbers"),
        ({"train__wrong": 1}, "train.wrong is not a key"),
        ({"optimizer__lr": "fast"}, "learning_rate"),
    ],
)
def test_options_that_would_change_the_training_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
        import_config(write(tmp_path, **changes))


def test_every_option_is_converted(tmp_path: Path) -> None:
    config = import_config(
        write(
            tmp_path,
            train__specaug=True,
            train__distil_random_layer=3,
            train__rec_loss_type="l1",
            specaug__apply_time_warp=False,
            specaug__freq_mask_width_range=[0, 27],
            specaug__num_time_mask=4,
            specaug__replace_with_zero=False,
            distiller__encoder_layerdrop=0.05,
            distiller__feature_grad_mult=0.1,
            distiller__pos_conv_depth=5,
            distiller__enable_tr_layer=True,
            distiller__tr_layer_type="fc1",
            distiller__tr_reduce_factor=3,
            distiller__tr_layer_index=2,
            distiller__init_conv_layers=True,
            distiller__init_encoder_layers=2,
            distiller__freeze_student_mask=True,
            distiller__extractor_mode="layer_norm",
        )
    ).config
    student = config.resolve_student(12, 768)
    assert (student.time_reduction, student.time_reduction_factor, student.time_reduction_index) == ("fc1", 3, 2)
    assert (student.layer_drop, student.feature_grad_mult, student.conv_pos_depth) == (0.05, 0.1, 5)
    assert student.conv_norm == "layer_norm"
    train = config.train
    assert (train.hint_layers, train.loss, train.mask_embedding) == (3, "l1", "frozen")
    assert (train.init_front_end, train.init_encoder_layers) == (True, 2)
    assert train.spec_augment is not None
    assert train.spec_augment.model_dump() == {
        "time_warp_window": 0,
        "frequency_masks": 2,
        "frequency_mask_width": 27,
        "time_masks": 4,
        "time_mask_width": 100,
        "time_mask_share": 1.0,
        "fill": "mean",
    }


def test_the_published_spec_augment_is_the_default(tmp_path: Path) -> None:
    section = {
        "apply_time_warp": False,
        "apply_time_mask": True,
        "apply_freq_mask": True,
        "replace_with_zero": False,
        "time_warp_window": 5,
        "time_mask_width_range": [0, 100],
        "freq_mask_width_range": [0, 27],
        "num_freq_mask": 2,
        "num_time_mask": 2,
    }
    changes = {f"specaug__{key}": value for key, value in section.items()}
    imported = import_config(write(tmp_path, train__specaug=True, **changes))
    config, dropped = imported.config, imported.dropped
    assert config.train.spec_augment == SpecAugment()
    assert not any("replace_with_zero" in sentence for sentence in dropped)
    # Missing keys have the defaults of the published code, which differ.
    bare = import_config(write(tmp_path, train__specaug=True)).config
    assert bare.train.spec_augment == SpecAugment(time_warp_window=5, frequency_mask_width=20, fill="zero")


@pytest.mark.parametrize(
    ("published_name", "ours", "layers"),
    [("abs", "convolution", "[3, 7, 11]"), ("rel_pos", "relative", [3, 7, 11]), ("rope", "rotary", "[3, 7] + [11]")],
)
def test_conformers_and_split_heads(tmp_path: Path, published_name: str, ours: str, layers: Any) -> None:
    config = import_config(
        write(
            tmp_path,
            train__distil_random_layer=2,
            distiller__layer_type="conformer",
            distiller__pos_enc_type=published_name,
            distiller__depthwise_conv_kernel_size=15,
            distiller__layerwise_proj=False,
            distiller__pred_layer_id=layers,
            distiller__pred_head_inter_dim=256,
        )
    ).config
    assert config.teacher.layers == [4, 8, 12]
    student = config.resolve_student(3, 768)
    assert (student.layer_type, student.position, student.depthwise_kernel) == ("conformer", ours, 15)
    assert (student.heads, student.split_heads, student.split_dim, student.encoder_layers) == ("split", 3, 256, 12)
    assert config.train.hint_layers is None  # All layers below the last, here two.


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    tree = published()
    del tree["data"]["libri_root"]
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"lacks the key data\.libri_root"):
        import_config(tmp_path / "x.yaml")


def test_the_command_writes_a_configuration_that_loads(tmp_path: Path) -> None:
    output = tmp_path / "ours.yaml"
    result = CliRunner().invoke(application, ["import-config", str(write(tmp_path)), "--output", str(output)])
    assert result.exit_code == 0, result.output
    for line in (
        "kept    data.libri_root, data.train_set, ",
        "changed masks.draws: ",
        "dropped optimizer.weight_decay: ",
    ):
        assert line in result.output
    assert load_config(output).name == "ArmHuBERT-S-960h"
    again = CliRunner().invoke(application, ["import-config", str(write(tmp_path)), "--output", str(output)])
    assert again.exit_code == 2 and "exists already" in again.output
