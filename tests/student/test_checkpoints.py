"""Students on disk: our folder, a run's folder, the published checkpoint, and refused files."""

import json
import pickle
import random
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ray_distill.student import Student, load_student, save_student
from ray_distill.student.published import published_config

from ..tiny import tiny_student

TINY = tiny_student(
    encoder_layers=3,
    encoder_embed_dim=8,
    encoder_ffn_embed_dim=12,
    conv_pos=4,
    target_dim=16,
    attention_reuse=(False, True, False),
)
PUBLISHED = {
    "conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 4 + [(8,2,2)] * 2",
    "encoder_layers": 3,
    "encoder_embed_dim": 8,
    "encoder_ffn_embed_dim": 12,
    "encoder_attention_heads": 2,
    "conv_pos": 4,
    "conv_pos_groups": 2,
    "pred_head_final_dim": 16,
    "reuse_pattern": "[True, False, True]",
    "layer_grad_scale": True,
    "layerwise_proj": True,
    "enable_tr_layer": False,
    "activation_dropout": 0.1,
    "dropout_input": 0.05,
}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Student, Path]:
    student = Student(TINY)
    save_student(student, tmp_path / "student", {"step": 7})
    return student, tmp_path / "student"


def write_yaml(folder: Path, **changes: object) -> Path:
    path = folder / "published.yaml"
    path.write_text(yaml.safe_dump({"distiller": PUBLISHED | changes, "model": "armhubert"}))
    return path


def test_round_trip(saved: tuple[Student, Path]) -> None:
    student, folder = saved
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json"}
    assert json.loads((folder / "config.json").read_text())["metadata"] == {"step": 7}
    for loaded in (load_student(folder), load_student(str(folder / "model.safetensors"), folder / "config.json")):
        assert loaded.config == TINY
        assert not loaded.training
        for name, tensor in student.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    inputs = torch.randn(2, 4000), torch.tensor([4000, 3000])
    assert torch.equal(load_student(folder)(*inputs).projections, student.eval()(*inputs).projections)


def test_a_run_stands_for_its_export(saved: tuple[Student, Path], tmp_path: Path) -> None:
    student, folder = saved
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("name: run\n")
    with pytest.raises(ValueError, match="has no exported student; run its export stage first"):
        load_student(run)
    folder.rename(run / "export")
    for place in (run, str(run), run / "export"):
        assert torch.equal(load_student(place).mask_embedding, student.mask_embedding)


def test_both_files_can_be_read_by_whom_the_umask_allows(saved: tuple[Student, Path]) -> None:
    # A service in a container may run as another user, but safetensors' save_file writes files with mode 0600.
    modes = {path.name: path.stat().st_mode for path in saved[1].iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_saving_again_replaces(saved: tuple[Student, Path]) -> None:
    _, folder = saved
    other = Student(TINY.model_copy(update={"attention_reuse": "none"}))
    save_student(other, folder)
    loaded = load_student(folder)
    assert loaded.config.attention_reuse == "none"
    assert torch.equal(loaded.mask_embedding, other.mask_embedding)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved: tuple[Student, Path], missing: str) -> None:
    _, folder = saved
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"is not a student: the file .*{missing} is missing"):
        load_student(folder)


def test_tensors_that_do_not_fit_are_named(saved: tuple[Student, Path]) -> None:
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    for changes, message in (
        ({"layers.9.up.weight": torch.zeros(1)}, "has an unexpected tensor 'layers.9.up.weight'"),
        ({"mask_embedding": torch.zeros(9)}, r"'mask_embedding' is \(9,\), not \(8,\)"),
        ({"mask_embedding": torch.full((8,), torch.nan)}, "has a tensor that is not finite, 'mask_embedding'"),
    ):
        save_file(tensors | changes, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            load_student(folder)
    del tensors["mask_embedding"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lacks tensor 'mask_embedding'"):
        load_student(folder)


def test_damaged_files_are_refused(saved: tuple[Student, Path]) -> None:
    _, folder = saved
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_student(folder)
    for text in ("{", "[]", "{}", '{"student": {"width": 3}}', '{"student": {"encoder_attention_heads": 5}}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json does not describe a student") as refused:
            load_student(folder)
        assert "pydantic" not in str(refused.value)
    (folder / "config.json").write_text('{"model_type": "hubert"}')
    with pytest.raises(
        ValueError, match=r"is a model for transformers \(model_type 'hubert'\); give the folder of a run"
    ):
        load_student(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_embed_dim": 2_400_000}, "would have about .* the limits are"),
        ({"encoder_layers": 10**12}, "would have about .* the limits are"),
        ({"encoder_ffn_embed_dim": 10**7}, "does not fit its configuration: '.*' is"),
        (
            {"encoder_layers": 5000, "attention_reuse": "none"},
            "does not fit its configuration, which has 5,0.. layers and conv",
        ),
    ],
)
def test_absurd_sizes_are_refused_before_allocation(
    saved: tuple[Student, Path], changes: dict[str, object], message: str
) -> None:
    _, folder = saved
    record = json.loads((folder / "config.json").read_text())
    changed = {"student": record["student"] | changes, "metadata": {}}
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=message):
        load_student(folder)


def test_a_published_checkpoint_needs_its_yaml(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the path of its yaml as config"):
        load_student(tmp_path / "student.ckpt")
    with pytest.raises(ValueError, match=r"absent\.yaml does not exist; give the path of the yaml"):
        load_student(tmp_path / "student.ckpt", tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match=r"student\.ckpt is not a file"):
        load_student(tmp_path / "student.ckpt", write_yaml(tmp_path))


class Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_checkpoint_is_refused_and_does_nothing(tmp_path: Path, legacy: bool) -> None:
    witness = tmp_path / "witness"
    torch.save(
        {"state_dict": {"student_model.mask_emb": Malicious(witness)}},
        tmp_path / "bad.ckpt",
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(ValueError, match="is refused: its pickle names .*could run code"):
        load_student(tmp_path / "bad.ckpt", write_yaml(tmp_path))
    assert not witness.exists()
    # A loader that does not check would run the code.
    pickle.loads(pickle.dumps(Malicious(witness)))
    assert witness.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": 1}, "is not a Lightning checkpoint: it has no state_dict"),
        ({"state_dict": {"teacher_model.mask_emb": torch.zeros(8)}}, "holds no student"),
        (
            {"state_dict": {"student_model.encoder.gate.weight": torch.zeros(8)}},
            "no student has: 'encoder.gate.weight'",
        ),
        ({"state_dict": {"student_model.mask_emb": torch.zeros(8)}}, "it has only 1 tensors"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path: Path, content: dict[str, object], message: str) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=message):
        load_student(tmp_path / "other.ckpt", write_yaml(tmp_path))


def test_published_yaml(tmp_path: Path) -> None:
    config = published_config(write_yaml(tmp_path))
    assert config == TINY.model_copy(update={"reuse_behaviour": "released"})
    # MaskHuBERT's yaml has no reuse pattern.
    path = write_yaml(tmp_path)
    tree = yaml.safe_load(path.read_text())
    del tree["distiller"]["reuse_pattern"]
    path.write_text(yaml.safe_dump(tree))
    assert published_config(path).reuses == (False, False, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_feature_layers": "__import__('os').system('touch witness')"}, "is not a sum of lists"),
        ({"conv_feature_layers": "[(8, 10, 5)] * 1000 * 1000 * 1000"}, "does not repeat a list by a small number"),
        ({"conv_feature_layers": "[(8, 10, open('witness', 'w'))]"}, "does not describe a student"),
        ({"conv_feature_layers": " + ".join(["[(8,1,1)]"] * 5000)}, "does not describe a student"),
        ({"conv_feature_layers": "[(8, 10"}, "does not describe a student"),
        ({"reuse_pattern": "[False, True, True]"}, "first layer has no attention map"),
        ({"reuse_pattern": "[True, False]"}, "has 2 entries, but encoder_layers is 3"),
        ({"encoder_layers": "many"}, "does not describe a student"),
        ({"encoder_layers": 10**12, "reuse_pattern": None}, "encoder_layers is 1,000,000,000,000, but at most"),
        ({"encoder_embed_dim": 24_000_000}, "would have about .* parameters; the limits are"),
        ({"extractor_mode": "spectrogram"}, "does not describe a student"),
        ({"layer_type": "lstm"}, "does not describe a student"),
        ({"enable_tr_layer": True, "tr_layer_index": 3}, "time_reduction_index 3 leaves no layer after the reduction"),
        ({"activation_fn": "relu"}, "distiller.activation_fn is 'relu'; only 'gelu'"),
        ({"crop_seq_to_multiple": 2}, "distiller.crop_seq_to_multiple is 2; only 1"),
    ],
)
def test_a_yaml_that_does_not_fit_is_refused_and_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        published_config(write_yaml(tmp_path, **changes))
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("text", ["", "[]", "distiller: 3", "distiller: [", "model: armhubert"])
def test_a_file_that_is_no_published_yaml_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match="has no readable 'distiller' section"):
        published_config(tmp_path / "x.yaml")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_no_flipped_bit_of_a_student_is_loaded(saved: tuple[Student, Path], name: str) -> None:
    student, folder = saved
    whole = (folder / name).read_bytes()
    positions = random.Random(0)
    refused = 0
    for _ in range(60):
        bit = positions.randrange(8 * len(whole))
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(changed)
        try:
            loaded = load_student(folder)
        except ValueError:
            refused += 1
        else:  # The key of the checksum itself.
            assert loaded.config == student.config, bit
            assert all(torch.equal(loaded.state_dict()[key], value) for key, value in student.state_dict().items()), bit
    assert refused >= 55


def test_what_is_wrong_with_a_changed_student_is_said(saved: tuple[Student, Path]) -> None:
    _, folder = saved
    path, weights = folder / "config.json", folder / "model.safetensors"
    text, whole = path.read_text(), weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        ValueError, match=r"model\.safetensors is damaged: its SHA-256 is not that in .*config\.json; restore both"
    ):
        load_student(folder)
    weights.write_bytes(whole)
    path.write_text(text.replace('"dropout": 0.1', '"dropout": 0.2'))
    with pytest.raises(
        ValueError, match=r"config\.json was changed after it was written .*; restore it .* or remove its line 'seal'"
    ):
        load_student(folder)
    record = json.loads(path.read_text())
    del record["seal"]
    path.write_text(json.dumps(record))
    assert load_student(folder).config.dropout == 0.2


def test_a_student_of_an_earlier_version_has_no_checksums(saved: tuple[Student, Path]) -> None:
    student, folder = saved
    record = json.loads((folder / "config.json").read_text())
    earlier = {name: record[name] for name in ("student", "metadata")}
    (folder / "config.json").write_text(json.dumps(earlier, indent=2) + "\n")
    assert torch.equal(load_student(folder).mask_embedding, student.mask_embedding)
