"""Teachers by their names on the hub, against a small hub on this machine."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ray_distill.teacher_cache.teachers import TeacherError, is_path, load_teacher, resolve_teacher
from ray_distill.teacher_cache.teachers.header import hub_model_of, load_header
from ray_distill.teacher_cache.teachers.hub.hub_name import HubName, parse_hub_name
from tests.hub_server import TOKEN, HubServer, running_hub, use_hub

from .huggingface_folders import save_tiny

NAME = "owner/tiny-hubert"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the same HuBERT as safetensors, as a pickle and as shards of safetensors, each with files to leave alone."""
    root = tmp_path_factory.mktemp("models")
    single = Path(save_tiny("hubert", root / "safetensors"))
    pickled, sharded = root / "bin", root / "shards"
    for folder in (pickled, sharded):
        folder.mkdir()
        shutil.copy(single / "config.json", folder)
    from safetensors.torch import load_file, save_file

    state = load_file(single / "model.safetensors")
    torch.save(state, pickled / "pytorch_model.bin")
    parts = {"part-1.safetensors": [*state][::2], "part-2.safetensors": [*state][1::2]}
    for name, keys in parts.items():
        save_file({key: state[key] for key in keys}, sharded / name)
    index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    (single / "preprocessor_config.json").write_text('{"do_normalize": true, "sampling_rate": 16000}')
    (sharded / "processor_config.json").write_text('{"feature_extractor": {"do_normalize": true}}')
    for folder in (single, sharded):
        (folder / "pytorch_model.bin").write_bytes(b"not read")
    for folder in (single, pickled, sharded):
        for name in ("tf_model.h5", "modeling.py", "flax_model.msgpack"):
            (folder / name).write_bytes(b"not read")
    return {"safetensors": single, "bin": pickled, "shards": sharded}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.chdir(tmp_path)
    with running_hub() as server:
        use_hub(server, tmp_path / "hub-cache", monkeypatch)
        yield server


def offline(patch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    patch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("safetensors", ["config.json", "model.safetensors", "preprocessor_config.json"]),
        ("bin", ["config.json", "pytorch_model.bin"]),
        (
            "shards",
            [
                "config.json",
                "model.safetensors.index.json",
                "part-1.safetensors",
                "part-2.safetensors",
                "processor_config.json",
            ],
        ),
    ],
)
def test_only_what_is_needed_is_downloaded_once(
    kind: str, files: list[str], hub: HubServer, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add(NAME, folders[kind])
    header = load_header(NAME)
    if kind == "bin":
        assert header is None, "the names and shapes in a pickle are known only after its download"
    else:
        assert header is not None and header.num_layers == 3
    model = hub_model_of(NAME)
    assert model is not None and sorted(model.missing) == [name for name in files if name.endswith((".bin", "tensors"))]
    assert all(size > 1000 for size in model.missing.values())
    teacher = load_teacher(NAME)
    assert teacher.name == f"{NAME}@{commit[:12]}"
    assert teacher.fingerprint == load_teacher(str(folders[kind])).fingerprint
    stored = {path.name for path in model.folder.iterdir()}
    assert sorted(stored) == files
    assert resolve_teacher(f"mean-mask:{NAME}") == f"mean-mask:hf://{NAME}@{commit}"
    hub.requests.clear()
    load_teacher(f"hf://{NAME}@{commit}")
    assert hub.requests == [], "a commit in the cache needs no request"
    offline(monkeypatch)
    assert load_teacher(NAME).fingerprint == teacher.fingerprint


def test_header_reads_no_weights(hub: HubServer, folders: dict[str, Path], tmp_path: Path) -> None:
    hub.add(NAME, folders["safetensors"])
    header = load_header(NAME)
    assert header is not None and header.num_parameters == load_teacher(str(folders["safetensors"])).num_parameters
    assert not any(path.name == "model.safetensors" for path in (tmp_path / "hub-cache").rglob("*"))


def test_revisions(hub: HubServer, folders: dict[str, Path]) -> None:
    first, second = hub.add(NAME, folders["safetensors"]), hub.add(NAME, folders["bin"])
    assert resolve_teacher(NAME) == resolve_teacher(f"hf://{NAME}@main") == f"hf://{NAME}@{second}"
    assert load_teacher(f"{NAME}@{first}").name.endswith(first[:12])
    with pytest.raises(TeacherError, match=f"{NAME} has no revision 'v9'; give a branch"):
        load_teacher(f"{NAME}@v9")


def test_what_can_go_wrong_is_a_sentence(
    hub: HubServer, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("owner/private", folders["safetensors"], "private")
    hub.add("owner/gated", folders["safetensors"], "gated")
    for name in ("config.json", "weights"):
        (tmp_path / name).mkdir()
    (tmp_path / "weights" / "config.json").write_text('{"model_type": "hubert"}')
    (tmp_path / "weights" / "tf_model.h5").write_bytes(b"x")
    hub.add("owner/other-weights", tmp_path / "weights")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "bert"}')
    hub.add("owner/text", tmp_path / "text")
    for shard in ("*", "part-9.safetensors"):
        folder = tmp_path / f"shard-{len(shard)}"
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "hubert"}')
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
        hub.add(f"owner/{folder.name}", folder)
    hub.add("owner/empty", tmp_path / "config.json")

    def refused(spec: str, message: str) -> None:
        with pytest.raises(TeacherError, match=message) as caught:
            load_teacher(spec)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500

    near = r"\(did you mean facebook/hubert-base-ls960\?\)"
    refused("facebook/hubert-base-ls96", f"neither a file or folder facebook/hubert-base-ls96 here nor .* {near}")
    refused("hubert-base-ls960", f"there is no teacher 'hubert-base-ls960' {near}; give the path")
    refused("owner/private", "if it is private or gated, note that HF_TOKEN or `hf auth login` sets a token")
    refused("owner/gated", "owner/gated is gated: .* set HF_TOKEN")
    refused("owner/other-weights", "has only tf_model.h5, but a teacher needs model.safetensors or pytorch_model.bin")
    refused("owner/shard-1", r"lacks \*, a shard that its model.safetensors.index.json names")
    refused("owner/shard-18", "lacks part-9.safetensors, a shard")
    refused("owner/text", "has a model of type 'bert'; the supported types are hubert")
    refused("owner/empty", "owner/empty@.* has no config.json")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert load_teacher("owner/private").num_layers == load_teacher("owner/gated").num_layers == 3
    hub.status = 500
    refused("owner/else", "owner/else can't be read from http://127.0.0.1:.*, which answers 500; try again later")
    offline(monkeypatch)
    refused("owner/else", "HF_HUB_OFFLINE is set, and .* run `hf download owner/else`")


def test_no_network(hub: HubServer, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.add(NAME, folders["safetensors"])
    expected = load_teacher(NAME).fingerprint
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert load_teacher(NAME).fingerprint == expected, "the cache has it"
    with pytest.raises(
        TeacherError, match="is no file or folder here, and can't be downloaded from .*check the network"
    ):
        load_teacher("owner/else")


def test_copy_of_another_program_without_a_list_of_its_files(
    hub: HubServer, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    hub.add(NAME, folders["safetensors"])
    for name in ("config.json", "model.safetensors"):
        hf_hub_download(NAME, name)
    offline(monkeypatch)
    with pytest.raises(TeacherError, match=r"may lack|lacks preprocessor_config.json, and the hub can't be reached"):
        load_teacher(NAME)


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_hub_name("owner/name@refs/pr/3") == HubName("owner/name", "refs/pr/3")
    assert not is_path("owner/name") and not is_path("hf://owner/name") and not is_path("builtin:phone-hubert")
    for path in ("models/hubert.pt", "./owner/name", "/owner/name", "a/b/c", "name", "owner/a--b", "~/name"):
        assert is_path(path), path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert is_path("owner/name"), "an existing folder wins"
    assert resolve_teacher("layer-norm:owner/name") == f"layer-norm:{tmp_path}/owner/name"
    assert not is_path("hf://owner/name")
    with pytest.raises(TeacherError, match="'hf://a/b/c' is not the name of a model on the hub; write hf://OWNER/NAME"):
        load_teacher("hf://a/b/c")
