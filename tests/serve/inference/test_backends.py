"""Every backend returns PyTorch's features for every batch, and refuses what it can't run."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from fastapi.testclient import TestClient
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from ray_distill.serve import create_app
from ray_distill.serve.inference.backends import Backend, LayerRequest, OnnxBackend, TorchBackend
from ray_distill.serve.inference.models import open_backend
from ray_distill.serve.settings import BackendOptions
from ray_distill.student import Student, save_student

from ..conftest import TINY

pytest.importorskip("onnxruntime", reason="needs the extra named onnx")


@pytest.fixture(scope="module")
def reference(student: Student) -> Backend:
    return TorchBackend(student)


@pytest.fixture(scope="module")
def onnx(student: Student) -> Backend:
    return open_backend(student, BackendOptions(runtime="onnx"))


@pytest.fixture(scope="module")
def onnx_file(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ray_distill.student.exporters.onnx import export_onnx

    file = tmp_path_factory.mktemp("exports") / "tiny.onnx"
    export_onnx(student, file, {})
    return file


def layer_requests(space: Any = "student", layer: int | None = None) -> list[LayerRequest]:
    rng = np.random.default_rng(0)
    lengths = (400, 16_000, 9_123, 719, 40_000)
    return [LayerRequest(rng.normal(0, 0.1, length).astype(np.float32), layer, space) for length in lengths]


def assert_same(found: list[np.ndarray], expected: list[np.ndarray], relative: float) -> None:
    for left, right in zip(found, expected, strict=True):
        assert left.shape == right.shape and left.dtype == np.float32
        assert np.abs(left - right).max() <= relative * np.abs(right).max()


@pytest.mark.slow
@pytest.mark.parametrize(("space", "layer"), [("student", None), ("student", 2), ("teacher", None), ("teacher", 3)])
def test_onnx_gives_what_torch_gives(reference: Backend, onnx: Backend, space: Any, layer: int | None) -> None:
    batch = layer_requests(space, layer)
    assert_same(onnx.run(batch), reference.run(batch), 1e-5)
    assert (onnx.revision, onnx.num_layers, onnx.dim, onnx.teacher_dim, onnx.num_parameters) == (
        reference.revision,
        reference.num_layers,
        reference.dim,
        reference.teacher_dim,
        reference.num_parameters,
    )


@pytest.fixture(scope="module")
def int8(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Backend:
    from ray_distill.student.exporters.onnx import export_onnx

    file = tmp_path_factory.mktemp("exports") / "int8.onnx"
    export_onnx(student, file, {}, int8=True)
    return open_backend(file, BackendOptions())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference", "onnx", "int8"])
def test_answers_of_every_backend_do_not_depend_on_the_batch(name: str, request: pytest.FixtureRequest) -> None:
    backend: Backend = request.getfixturevalue(name)
    batch = layer_requests()
    batch[1].waveform *= 8  # One scale for all rows would be too coarse for the others.
    alone = [backend.run([item])[0] for item in batch]
    assert_same(backend.run(batch), alone, 1e-5)
    assert_same(backend.run(batch[::-1])[::-1], alone, 1e-5)


def test_torch_runs_to_the_highest_layer_of_the_batch(
    student: Student, reference: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [item for layer in (1, 2) for item in layer_requests("teacher", layer)]
    expected = [
        array[item.layer - 1] for array, item in zip(reference.run(layer_requests("teacher") * 2), batch, strict=True)
    ]
    monkeypatch.setattr(student.layers[2], "forward", lambda *_: 1 / 0)
    for found, whole in zip(reference.run(batch), expected, strict=True):
        np.testing.assert_array_equal(found, whole)


@pytest.mark.slow
def test_an_exported_file_is_served_without_its_heads(onnx_file: Path, reference: Backend) -> None:
    backend = open_backend(onnx_file, BackendOptions())
    assert_same(backend.run(layer_requests()), reference.run(layer_requests()), 1e-5)
    assert backend.teacher_dim is None and 0 < backend.num_parameters < reference.num_parameters
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(16_000) / 20), 16_000, format="WAV")
    with TestClient(create_app(onnx_file)) as client:
        model = client.get("/v1/models").json()["data"][0]
        assert (model["id"], model["runtime"], model["teacher_dim"]) == ("tiny", "onnx", None)
        assert client.post("/v1/features", content=buffer.getvalue()).json()["shape"] == [49, 16]
        refused = client.post("/v1/features?space=teacher", content=buffer.getvalue())
        assert (refused.status_code, refused.json()["error_type"]) == (422, "bad_parameter")


def test_every_tensor_is_on_the_device_of_the_waveforms() -> None:
    """PyTorch's fake tensors have devices but no values, so this needs no GPU; an operation with two devices is an error."""
    with FakeTensorMode(), torch.inference_mode():
        with torch.device("cuda"):
            student = Student(TINY).eval()
        layers, _, num_frames = student.layer_outputs(
            torch.zeros(2, 16_000, device="cuda"), [16_000, 9_000], num_layers=2
        )
        predicted = [head(layer) for head, layer in zip(student.heads, layers, strict=False)]
        assert {tensor.device.type for tensor in (*layers, *predicted, num_frames)} == {"cuda"} and len(layers) == 2
        with pytest.raises(RuntimeError, match="device"):
            student.layer_outputs(torch.zeros(1, 16_000), [16_000])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_is_one_sentence(student: Student) -> None:
    with pytest.raises(ValueError, match=r"^Can't use device 'cuda': PyTorch finds no such device on this machine\.$"):
        TorchBackend(student, BackendOptions(device="cuda", precision="bf16"))


def test_bf16_is_near_and_depends_on_the_batch_by_rounding_only(student: Student, reference: Backend) -> None:
    backend = TorchBackend(student, BackendOptions(precision="bf16"))
    batch = layer_requests("teacher")
    found = backend.run(batch)
    assert_same(found, reference.run(batch), 0.05)
    assert_same(found, [backend.run([item])[0] for item in batch], 0.05)
    assert any(np.abs(a - b).max() > 1e-5 for a, b in zip(found, reference.run(batch), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_gives_what_torch_gives_in_any_batch_and_compiles_before_it_is_ready(student: Student) -> None:
    small = Student(TINY.model_copy(update={"encoder_layers": 1})).eval()
    backend, reference = TorchBackend(small, BackendOptions(compile=True)), TorchBackend(small)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled >= 2
    rng = np.random.default_rng(0)
    for lengths in ((400,), (16_000,), (80_000,), (500, 16_000), (40_001, 33_000, 400), (719,) * 20):
        for space in ("student", "teacher"):
            batch = [LayerRequest(rng.normal(0, 0.1, length).astype(np.float32), None, space) for length in lengths]
            assert_same(backend.run(batch), reference.run(batch), 1e-5)
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.slow
def test_what_a_backend_cannot_do_is_refused(student: Student, onnx_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="CPU in fp32 only"):
        open_backend(student, BackendOptions(runtime="onnx", precision="bf16"))
    with pytest.raises(ValueError, match="can't run"):
        open_backend(onnx_file, BackendOptions(runtime="torch"))
    with pytest.raises(ValueError, match="no ONNX file"):
        open_backend(tmp_path / "none.onnx", BackendOptions())
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="is not an ONNX model") as refused:
        OnnxBackend(tmp_path / "bad.onnx")
    assert "\n" not in str(refused.value)


def test_reload_takes_new_weights_and_keeps_what_works(student: Student, tmp_path: Path) -> None:
    import torch

    save_student(student, tmp_path, None)
    app = create_app(tmp_path, name="tiny")
    models = app.state.models
    before = models.get("tiny")
    models.reload()
    assert models.get("tiny") is before  # The files have not changed.
    torch.manual_seed(5)
    save_student(Student(student.config).eval(), tmp_path, None)
    models.reload()
    after = models.get("tiny")
    assert after.revision != before.revision and after.engine.alive and not before.engine.alive
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    models.reload()
    assert models.get("tiny") is after
    models.put("tiny", student)  # From memory, so the folder is no longer read.
    save_student(Student(student.config).eval(), tmp_path, None)
    models.reload()
    assert models.get("tiny").engine.backend.revision == before.engine.backend.revision
    models.close()


def test_a_reload_sees_a_changed_configuration_and_refuses_weights_that_are_not_finite(
    student: Student, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    save_student(student, tmp_path, None)
    models = create_app(tmp_path, name="tiny").state.models
    before = models.get("tiny")
    file = tmp_path / "config.json"
    tree = json.loads(file.read_text())
    assert not tree["student"].get("layer_norm_first")
    tree["student"]["layer_norm_first"] = True
    del tree["seal"]
    file.write_text(json.dumps(tree))
    models.reload()
    after = models.get("tiny")
    assert after.revision != before.revision
    broken = Student(student.config).eval()
    with torch.no_grad():
        broken.layers[1].up.weight[0, 0] = float("nan")
    save_student(broken, tmp_path, None)
    models.reload()
    assert models.get("tiny") is after and after.engine.alive and "not finite" in caplog.text
    with pytest.raises(ValueError, match="not finite"):
        create_app(tmp_path)
    models.close()


@pytest.mark.parametrize("options", [{"heads": "none"}, {"heads": "split"}])
def test_a_student_without_a_head_for_each_layer_has_no_teacher_space(options: dict[str, Any]) -> None:
    backend = TorchBackend(Student(TINY.model_copy(update=options)).eval())
    assert backend.teacher_dim is None
    assert backend.run(layer_requests())[0].shape == (3, 1, 16)


def test_an_onnx_file_of_the_heads_is_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the onnx extra (the dev extra has it)")
    make, types = onnx.helper, onnx.TensorProto
    pairs = {"waveforms": ("projections", types.FLOAT, [1, 400]), "lengths": ("num_frames", types.INT64, [1])}
    graph = make.make_graph(
        [make.make_node("Identity", [given], [output]) for given, (output, _, _) in pairs.items()],
        "heads",
        [make.make_tensor_value_info(given, kind, shape) for given, (_, kind, shape) in pairs.items()],
        [make.make_tensor_value_info(output, kind, shape) for output, kind, shape in pairs.values()],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(tmp_path / "heads.onnx"))
    with pytest.raises(ValueError, match="export it with --features layers"):
        open_backend(tmp_path / "heads.onnx", BackendOptions())
