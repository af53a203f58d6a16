"""The weights of a Hugging Face folder in each of its formats: one file or shards, safetensors or pickles."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_distill.teacher_cache.teachers import TeacherError, load_teacher
from ray_distill.teacher_cache.teachers.header import load_header
from ray_distill.teacher_cache.untrusted import UntrustedCheckpointError

from .huggingface_folders import save_tiny, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(save_tiny("hubert", tmp_path))


def to_pickle(folder: Path, old_names: bool = False) -> dict[str, torch.Tensor]:
    """Replace model.safetensors by pytorch_model.bin, as published before safetensors."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if old_names:
        names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        for new, old in names.items():
            state = {key.replace(new, old): value for key, value in state.items()}
    torch.save(state, folder / "pytorch_model.bin")
    return state


def to_index(folder: Path, file: str, weight_map: object) -> None:
    (folder / f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("old_names", [False, True])
def test_a_pickle_is_the_same_teacher_as_safetensors(folder: Path, old_names: bool) -> None:
    expected = load_teacher(str(folder)).fingerprint
    to_pickle(folder, old_names)
    assert load_teacher(str(folder)).fingerprint == expected
    header = load_header(str(folder))
    assert header is not None and header.num_layers == 3


@pytest.mark.parametrize("safe", [True, False])
def test_shards_are_the_same_teacher_as_one_file(folder: Path, safe: bool) -> None:
    expected = load_teacher(str(folder)).fingerprint
    state = load_file(folder / "model.safetensors")
    if safe:
        (folder / "model.safetensors").unlink()
        tiny_model("hubert").save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    else:
        to_pickle(folder).clear()
        (folder / "pytorch_model.bin").unlink()
        keys = sorted(state)
        files = {key: f"pytorch_model-{n % 2 + 1:05d}-of-00002.bin" for n, key in enumerate(keys)}
        for file in set(files.values()):
            torch.save({key: state[key] for key in keys if files[key] == file}, folder / file)
        to_index(folder, "pytorch_model.bin", files)
    assert load_teacher(str(folder)).fingerprint == expected


def test_shards_that_are_missing_or_elsewhere_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    for weight_map, message in (
        ({"masked_spec_embed": "../model.safetensors"}, "shards must be files of the same folder"),
        ({"masked_spec_embed": "model-00002-of-00002.safetensors"}, "is missing, one of the 1 shards"),
        (
            {"masked_spec_embed": "model-00001-of-00001.safetensors", "other": "model-00001-of-00001.safetensors"},
            "lacks 'other'",
        ),
        (["model-00001-of-00001.safetensors"], "has no weight_map"),
        ({"masked_spec_embed": 1}, "has no weight_map"),
    ):
        to_index(folder, "model.safetensors", weight_map)
        with pytest.raises(TeacherError, match=message):
            load_teacher(str(folder))


@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_what_wrappers_add_to_names_is_left_out(folder: Path, prefix: str, safetensors: bool) -> None:
    expected = load_teacher(str(folder)).fingerprint
    state = to_pickle(folder)
    wrapped = {
        prefix + name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."): state[name] for name in state
    }
    if safetensors:
        (folder / "pytorch_model.bin").unlink()
        save_file(wrapped, folder / "model.safetensors")
    else:
        torch.save(wrapped, folder / "pytorch_model.bin")
    assert load_teacher(str(folder)).fingerprint == expected
    assert load_header(str(folder)) is not None


def test_a_weight_inside_and_outside_of_a_wrapper_is_refused(folder: Path) -> None:
    state = to_pickle(folder)
    name = next(iter(state))
    torch.save(state | {f"_orig_mod.{name}": state[name]}, folder / "pytorch_model.bin")
    with pytest.raises(TeacherError, match=f"has weights twice, .*: {name}"):
        load_teacher(str(folder))


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("harm"),)


def test_a_pickle_with_code_or_without_weights_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    to_pickle(folder)
    torch.save({"weight": Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(UntrustedCheckpointError, match="could run code when loaded"):
        load_teacher(str(folder))
    assert not (folder / "harm").exists()
    torch.save({"step": 3}, folder / "pytorch_model.bin")
    with pytest.raises(TeacherError, match="has 'step', which is not a tensor"):
        load_teacher(str(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(TeacherError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_teacher(str(folder))


def test_quantised_weights_are_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    name = "encoder.layers.0.attention.k_proj.weight"
    for kind in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        save_file(state | {name: state[name].to(kind)}, folder / "model.safetensors")
        message = "has quantised weights, .* of at least 16 bits: .*k_proj.weight; use the original model"
        for load in (load_teacher, load_header):
            with pytest.raises(TeacherError, match=message):
                load(str(folder))
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(TeacherError, match="is quantised .bitsandbytes in its config"):
        load_teacher(str(folder))


def test_names_with_another_prefix_are_said(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({f"speech.{name}": weight for name, weight in state.items()}, folder / "model.safetensors")
    with pytest.raises(TeacherError, match=r"lacks weights .* more; it has others instead, such as speech\.encoder\."):
        load_teacher(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a pointer of Git LFS and not the"),
        (b"<!DOCTYPE html><html>", "is a web page and not the weights"),
        (b"", "is empty; download it again"),
    ],
)
def test_what_a_failed_download_left_is_named(folder: Path, content: bytes, message: str) -> None:
    for file in (folder / "model.safetensors", folder / "a.pt"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file.name} {message}"):
            load_teacher(str(folder if file.name.startswith("model") else file))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_a_file_of_a_folder_is_no_teacher(folder: Path, name: str) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(TeacherError, match=f"{name} is a part of a Hugging Face folder; give the folder"):
        load_teacher(str(folder / name))
