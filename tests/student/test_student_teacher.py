"""A student as the teacher of the next one, from every form in which it is exported."""

import json
from pathlib import Path

import pytest
import torch

from ray_distill.student import Student, save_student
from ray_distill.student.exporters.huggingface import export_huggingface
from ray_distill.student.exporters.portable import Features
from ray_distill.student.exporters.s3prl import export_s3prl
from ray_distill.student.student_teacher import StudentTeacher
from ray_distill.teacher_cache.teachers import TeacherError, load_teacher
from ray_distill.teacher_cache.teachers.header import load_header
from tests.hub_server import running_hub, use_hub
from tests.tiny import sharpen_attention, tiny_student


@pytest.fixture
def student() -> Student:
    torch.manual_seed(0)
    return sharpen_attention(Student(tiny_student(attention_reuse=(False, True)))).eval()


def waveforms() -> tuple[torch.Tensor, torch.Tensor]:
    batch = 0.1 * torch.randn(2, 8_000, generator=torch.Generator().manual_seed(1))
    return batch, torch.tensor([8_000, 5_000])


def test_a_run_and_its_export_are_the_same_teacher(student: Student, tmp_path: Path) -> None:
    run = tmp_path / "my-run"
    save_student(student, run / "export")
    (run / "config.yaml").write_text("name: my-run\n")
    teacher = load_teacher(str(run))
    assert isinstance(teacher, StudentTeacher) and teacher.name == "my-run"
    assert teacher.fingerprint == load_teacher(str(run / "export")).fingerprint
    header = load_header(str(run))
    assert header is not None and (header.num_layers, header.dim) == (2, 16) and header.has_mask_embedding
    batch, lengths = waveforms()
    mask = torch.zeros(2, teacher.num_frames(8_000), dtype=torch.bool)
    mask[:, 3:7] = True
    for frame_mask in (None, mask):
        with torch.no_grad():
            expected = student(batch, lengths, frame_mask).hidden_states
        actual = teacher(batch, lengths, frame_mask)
        for row, length in enumerate(lengths.tolist()):
            frames = slice(0, teacher.num_frames(length))
            torch.testing.assert_close(actual[row, :, frames], expected[row, :, frames])


@pytest.mark.parametrize("features", ["layers", "heads"])
def test_exports_teach_what_the_student_does(
    features: Features, student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_student(student, tmp_path / "own")
    export_huggingface(student, tmp_path / "huggingface", {}, features)
    export_s3prl(student, tmp_path / "upstream", {}, features)
    expected = load_teacher(str(tmp_path / "own"))(*waveforms())
    for form in ("huggingface", "upstream"):
        teacher = load_teacher(str(tmp_path / form))
        assert float((teacher(*waveforms()) - expected).abs().max()) < 1e-5
        assert teacher.has_mask_embedding == (form == "huggingface")
        assert load_teacher(f"layer-norm:{tmp_path / form}").fingerprint != teacher.fingerprint
    with running_hub() as hub:
        use_hub(hub, tmp_path / "hub-cache", monkeypatch)
        for form in ("own", "huggingface"):
            hub.add(f"owner/{form}", tmp_path / form)
            header, teacher = load_header(f"owner/{form}"), load_teacher(f"owner/{form}")
            assert header is not None and header.num_parameters == teacher.num_parameters
            assert teacher.fingerprint == load_teacher(str(tmp_path / form)).fingerprint
        assert not any(name.endswith(".py") for name in hub.downloaded()), "code is not downloaded"


def test_a_pruned_student_teaches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pruned = {"attention_reuse": "none", "layer_heads": (1, 0), "layer_ffn_dims": (0, 5)}
    student = sharpen_attention(Student(tiny_student(**pruned))).eval()
    save_student(student, tmp_path / "own")
    export_s3prl(student, tmp_path / "upstream", {}, "layers")
    expected = load_teacher(str(tmp_path / "own"))(*waveforms())
    assert float((load_teacher(str(tmp_path / "upstream"))(*waveforms()) - expected).abs().max()) < 1e-5


def test_the_fingerprint_of_students_of_earlier_versions_stays(student: Student) -> None:
    plain = StudentTeacher(student, None, name="student")
    assert not {"layer_heads", "layer_ffn_dims"} & plain._identity[1].keys()


def test_students_that_cannot_teach(student: Student, tmp_path: Path) -> None:
    other = tmp_path / "frames"
    save_student(Student(tiny_student(conv_layers=((8, 10, 5), (8, 3, 2)))), other)
    with pytest.raises(TeacherError, match="a student whose frames are not 400 samples wide and 320 apart"):
        load_teacher(str(other))
    export_huggingface(student, tmp_path / "hf", {})
    config = tmp_path / "hf" / "config.json"
    tree = json.loads(config.read_text())
    for change, message in (
        ({"encoder_embed_dim": 32}, "does not fit its configuration"),
        ({"encoder_embed_dim": 10**9}, "the limits are"),
        ({"conv_layers": "x"}, "does not describe a student"),
        ({"reuses": [True, True]}, "does not describe a student"),
    ):
        config.write_text(json.dumps(tree | {"student": tree["student"] | change}))
        with pytest.raises(ValueError, match=message):
            load_teacher(str(tmp_path / "hf"))
    save_student(student, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match="is damaged: its SHA-256"):
        load_teacher(str(tmp_path / "damaged"))
