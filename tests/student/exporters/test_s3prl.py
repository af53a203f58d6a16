"""The S3PRL folder works without this project and returns the student's features."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ray_distill.student import Student, StudentConfig, save_student
from ray_distill.student.exporters.portable import Features
from ray_distill.student.exporters.s3prl import export_s3prl
from ray_distill.teacher_cache.targets.target_batch import pad_waveforms

pytestmark = pytest.mark.slow

USE = """
import sys, torch
sys.path.insert(0, {parent!r})
from my_student.hubconf import my_student, my_student_local
assert not {{"student", "teacher_cache", "pydantic", "fairseq"}} & set(sys.modules), "depends on this project"
waves = torch.load({waves!r})
expert = my_student_local({folder!r} + "/weights.pt", {folder!r} + "/config.json").eval()
assert expert.get_downsample_rates("hidden_states") == 320
with torch.no_grad():
    states = expert(waves)["hidden_states"]
    alone = [my_student().eval()([wave])["hidden_states"] for wave in waves]
torch.save((states, alone), {result!r})
"""


@pytest.mark.parametrize(("behaviour", "features"), [("paper", "heads"), ("released", "layers")])
def test_features_equal_ours_without_this_project(
    tmp_path: Path, tiny: StudentConfig, behaviour: str, features: Features
) -> None:
    torch.manual_seed(0)
    student = Student(tiny.model_copy(update={"reuse_behaviour": behaviour})).eval()
    folder = tmp_path / "my_student"
    export_s3prl(student, folder, {"run": "tiny", "cache_fingerprint": "f00"}, features)
    assert ("the predictions of 2 layers" in (folder / "README.md").read_text()) == (features == "heads")
    waves = [torch.randn(samples) * 0.1 for samples in (16_000, 4_100, 9_000)]
    torch.save(waves, tmp_path / "waves.pt")
    text = USE.format(
        parent=str(tmp_path), folder=str(folder), waves=str(tmp_path / "waves.pt"), result=str(tmp_path / "result.pt")
    )
    (tmp_path / "use.py").write_text(text)
    subprocess.run([sys.executable, "-I", str(tmp_path / "use.py")], check=True, cwd=tmp_path)
    states, alone = torch.load(tmp_path / "result.pt")
    with torch.no_grad():
        found = student(*pad_waveforms([wave.numpy() for wave in waves]))
    ours, frames = found.projections if features == "heads" else found.hidden_states, found.num_frames
    assert len(states) == tiny.encoder_layers + (features == "layers")
    for row, count in enumerate(frames.tolist()):
        for layer, state in enumerate(states[features == "layers" :]):
            torch.testing.assert_close(state[row, :count], ours[row, layer, :count], rtol=0, atol=1e-5)
        # The frames of an utterance do not depend on its batch, including those added by S3PRL's rounding.
        wanted = -(-len(waves[row]) // 320)
        for together, single in zip(states, alone[row], strict=True):
            assert single.shape[1] == wanted
            torch.testing.assert_close(together[row, :wanted], single[0], rtol=0, atol=1e-5)


def test_it_states_its_origin(tmp_path: Path, tiny: StudentConfig) -> None:
    folder = tmp_path / "mine"
    export_s3prl(Student(tiny), folder, {"run": "tiny", "cache_fingerprint": "f00", "metrics": {"last_loss": 0.5}})
    assert json.loads((folder / "config.json").read_text())["origin"]["cache_fingerprint"] == "f00"
    assert "f00" in (folder / "README.md").read_text()
    assert "last_loss: 0.5" in (folder / "README.md").read_text()


def test_folders_that_cant_be_used(tmp_path: Path, tiny: StudentConfig) -> None:
    for name in ("my-student", "class"):
        with pytest.raises(ValueError, match="Python identifier"):
            export_s3prl(Student(tiny), tmp_path / name, {})
    save_student(Student(tiny), tmp_path / "taken")
    with pytest.raises(ValueError, match="not empty"):
        export_s3prl(Student(tiny), tmp_path / "taken", {})
