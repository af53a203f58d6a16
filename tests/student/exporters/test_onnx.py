"""ONNX and torch.export programs return the student's features for any batch and length."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_distill.student import Student, StudentConfig
from ray_distill.student.exporters.onnx import OPSET, export_onnx, export_torch
from ray_distill.student.exporters.portable import Features
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.targets.target_batch import pad_waveforms

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx", reason="needs the onnx extra (the dev extra has it)")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the onnx extra (the dev extra has it)")

ORIGIN = {"run": "tiny run", "cache_fingerprint": "f00"}
BATCHES = ([16_000], [400], [24_000, 400, 9_000], [5_000, 7_001])


OPTIONS: dict[str, dict[str, object]] = {
    "paper": {},
    "released": {"reuse_behaviour": "released"},
    "fc1": {"time_reduction": "fc1", "layer_norm_first": True},
    "rotary": {"position": "rotary"},
    "pruned": {"attention_reuse": "none", "layer_heads": (1, 0), "layer_ffn_dims": (0, 5)},
    "one head": {"encoder_attention_heads": 1},
}


def make(tiny: StudentConfig, options: str = "paper") -> Student:
    torch.manual_seed(0)
    return Student(tiny.model_copy(update=OPTIONS[options])).eval()


def noise(lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [(0.1 * rng.normal(size=samples)).astype(np.float32) for samples in lengths]


def difference(student: Student, run: object, waves: list[np.ndarray], features: Features = "layers") -> float:
    """Return the largest relative difference over all layers (or heads) and utterances."""
    padded, lengths = pad_waveforms(waves)
    with torch.no_grad():
        found = student(padded, lengths)
    ours, frames = found.projections if features == "heads" else found.hidden_states, found.num_frames
    first = int(features == "layers")  # State 0 of the layers is the encoder's input.
    states, counts = run(padded, lengths)  # type: ignore[operator]
    assert states.shape[:3] == (len(waves), student.config.encoder_layers + first, ours.shape[2])
    assert counts.tolist() == frames.tolist()
    worst = 0.0
    for row, count in enumerate(frames.tolist()):
        for layer in range(ours.shape[1]):
            a, b = ours[row, layer, :count], torch.as_tensor(states[row, layer + first, :count])
            worst = max(worst, float((a - b).norm() / a.norm()))
    return worst


class OnnxRun:
    """Return a function that runs an ONNX file on tensors."""

    def __init__(self, file: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(file))

    def __call__(self, waves: torch.Tensor, lengths: torch.Tensor) -> list[np.ndarray]:
        found: list[np.ndarray] = self.session.run(None, {"waveforms": waves.numpy(), "lengths": lengths.numpy()})
        return found


@pytest.mark.parametrize("options", OPTIONS)
def test_onnx_of_any_batch_and_length(tmp_path: Path, tiny: StudentConfig, options: str) -> None:
    student = make(tiny, options)
    features: Features = "heads" if options in ("released", "fc1") else "layers"
    export_onnx(student, tmp_path / "student.onnx", ORIGIN, features)
    model = onnx.load(tmp_path / "student.onnx")
    onnx.checker.check_model(model)
    assert model.opset_import[0].version == OPSET
    assert json.loads({prop.key: prop.value for prop in model.metadata_props}["origin"]) == ORIGIN
    run = OnnxRun(tmp_path / "student.onnx")
    first_output = "projections" if features == "heads" else "hidden_states"
    assert [output.name for output in run.session.get_outputs()] == [first_output, "num_frames"]
    assert [axes.shape for axes in run.session.get_inputs()] == [["batch", "samples"], ["batch"]]
    features_shape, counts_shape = (axes.shape for axes in run.session.get_outputs())
    assert (features_shape[0], features_shape[2], counts_shape) == ("batch", "frames", ["batch"])
    for lengths in BATCHES:
        assert difference(student, run, noise(lengths), features) < 1e-5


def test_rotary_positions_on_reduced_frames_are_refused(tmp_path: Path, tiny: StudentConfig) -> None:
    student = Student(tiny.model_copy(update={"time_reduction": "conv1d", "position": "rotary"}))
    with pytest.raises(ValueError, match="export this student to s3prl or huggingface"):
        export_onnx(student, tmp_path / "student.onnx", ORIGIN)


def test_int8_is_close_and_smaller(tmp_path: Path, tiny: StudentConfig) -> None:
    wide = tiny.model_copy(update={"encoder_embed_dim": 64, "encoder_ffn_embed_dim": 128})
    student = make(wide)
    export_onnx(student, tmp_path / "plain.onnx", ORIGIN)
    export_onnx(student, tmp_path / "int8.onnx", ORIGIN, int8=True)
    assert (tmp_path / "int8.onnx").stat().st_size < 0.8 * (tmp_path / "plain.onnx").stat().st_size
    assert 1e-5 < difference(student, OnnxRun(tmp_path / "int8.onnx"), noise([16_000, 9_000])) < 0.03


def test_torch_export(tmp_path: Path, tiny: StudentConfig) -> None:
    student = make(tiny)
    file = tmp_path / "new" / "student.pt2"  # Missing folders are created.
    export_torch(student, file, ORIGIN, "heads")
    extra = {"origin.json": ""}
    program = torch.export.load(file, extra_files=extra).module()
    assert json.loads(extra["origin.json"]) == ORIGIN
    for lengths in (*BATCHES, [720]):
        if max(lengths) >= 720:
            with torch.no_grad():
                assert difference(student, program, noise(lengths), "heads") < 1e-5
    with pytest.raises(AssertionError, match="720"):
        program(torch.zeros(1, 719), torch.tensor([719]))


def test_real_speech(tmp_path: Path, tiny: StudentConfig, shared: Path) -> None:
    student = make(tiny)
    export_onnx(student, tmp_path / "student.onnx", ORIGIN)
    paths = sorted((shared / "speech/LibriSpeech/heldout-clean-5").rglob("*.flac"))[:4]
    waves = [np.asarray(load_audio(path)) for path in paths]
    assert difference(student, OnnxRun(tmp_path / "student.onnx"), waves) < 1e-5


def test_a_file_is_not_overwritten(tmp_path: Path, tiny: StudentConfig) -> None:
    (tmp_path / "there").write_text("")
    for export in (export_onnx, export_torch):
        with pytest.raises(ValueError, match="exists"):
            export(Student(tiny), tmp_path / "there", {})
