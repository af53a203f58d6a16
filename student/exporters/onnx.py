"""Export to ONNX and to `torch.export` programs, for batches of any size and length. ONNX needs the ``onnx`` extra."""

import io
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ray_distill.student.exporters.origin import Origin
from ray_distill.student.exporters.portable import Features, portable_student
from ray_distill.student.exporters.portable_model import PortableStudent
from ray_distill.student.model.student import Student
from ray_distill.whole_files import replacing

OPSET = 20
"""First ONNX operator set with a GELU; supported by runtimes since 2024."""


class FeatureProgram(nn.Module):
    """The exported program: waveforms (B, S) float32, lengths (B,) int64 → features (B, N, T, width), num_frames (B,).

    With features ``layers``, N is L + 1: 0 is the encoder's input and k the output of layer k. With features ``heads``, they are
    the heads' predictions. Values at padded frames are finite and meaningless.
    """

    def __init__(self, model: PortableStudent) -> None:
        super().__init__()
        self.model = model
        self.model.hold_maps = True  # An exported graph holds its maps anyway; reuse then costs one product.

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and numbers of frames; see the class."""
        frames: Tensor = self.model.num_frames(lengths)
        return torch.stack(self.model(waveforms, lengths), dim=1), frames


def _program(student: Student, features: Features) -> tuple[torch.export.ExportedProgram, FeatureProgram]:
    if student.config.time_reduction is not None and student.config.position == "rotary":
        raise ValueError(
            "rotary positions after a time reduction can't be traced for variable lengths; export this student to s3prl or huggingface"
        )
    module = FeatureProgram(portable_student(student, features)).eval()
    field, stride = module.model.receptive_field, module.model.stride
    # Two rows of different lengths, so that the tracer takes no length for a constant.
    samples = field + 49 * stride + 7
    example = torch.randn(2, samples) * 0.1, torch.tensor([samples, samples - 5 * stride])
    batch = torch.export.Dim("batch", min=1, max=4096)
    # `torch.export` treats sizes of 1 as constants, so a batch needs two (reduced) frames; its shorter rows may have one.
    reduction = module.model.reduction
    length = torch.export.Dim("samples", min=field + stride * (1 if reduction is None else reduction.factor), max=2**26)
    with torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=({0: batch, 1: length}, {0: batch}))
    return program, module


def export_torch(student: Student, file: Path, origin: Origin, features: Features = "layers") -> None:
    """Write a program for ``torch.export.load``, with the origin as extra file ``origin.json``.

    The program takes batches of any size, at least two frames (720 samples) long.

    Args:
        student: Student to export.
        file: New file.
        origin: Origin of the student.
        features: Features that the program returns. Default ``layers``.

    Raises:
        ValueError: the file exists or does not end in ``.pt2``, or the student has options that exports do not support.
    """
    _check_new(file, ".pt2", "torch.export programs")
    with _quiet():
        program, _ = _program(student, features)
    buffer = io.BytesIO()  # On a full disk, torch.export.save to a file would abort the process.
    torch.export.save(program, buffer, extra_files={"origin.json": json.dumps(origin)})
    _write(file, buffer.getbuffer())


def export_onnx(
    student: Student, file: Path, origin: Origin, features: Features = "layers", *, int8: bool = False
) -> None:
    """Write an ONNX file with the origin in its metadata.

    Its first output is named ``hidden_states`` with features ``layers``, and ``projections`` with features ``heads``.

    Args:
        student: Student to export.
        file: New file.
        origin: Origin of the student.
        features: Features that the program returns. Default ``layers``.
        int8: Whether to store the weights of matrix products (not of convolutions) in int8, with dynamic quantisation of
            activations. Default False.

    Raises:
        ValueError: the file exists or does not end in ``.onnx``, packages are not installed, or the student has options that
            exports do not support.
    """
    _check_new(file, ".onnx", "ONNX files, by which the service tells them from folders")
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch.onnx needs it)
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ValueError(
            f"the ONNX export needs packages that are not installed ({error}); install the extra onnx of ray-distill"
        ) from error
    program, _ = _program(student, features)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "model.onnx"
        with _quiet():
            exported = torch.onnx.export(
                program,
                input_names=["waveforms", "lengths"],
                output_names=["projections" if features == "heads" else "hidden_states", "num_frames"],
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        assert exported is not None
        exported.save(str(plain))
        if int8:
            quantised = Path(folder) / "int8.onnx"
            with _quiet():
                # Weights get seven bits: with eight, sums of two products overflow on CPUs without VNNI (error 14 %).
                quantize_dynamic(
                    plain,
                    quantised,
                    weight_type=QuantType.QInt8,
                    reduce_range=True,
                    per_channel=True,
                    op_types_to_quantize=["MatMul", "Gemm"],
                )
            plain = quantised
        model = onnx.load(str(plain))
        _name_axes(model.graph)
        onnx.helper.set_model_props(model, {"origin": json.dumps(origin), "weights": "int8" if int8 else "float32"})
        _write(file, model.SerializeToString())


def _name_axes(graph: Any) -> None:
    """Name the axes of an `onnx.GraphProto` ``batch``, ``samples`` and ``frames``, in place of ``s2``, ``s52`` and a formula."""
    batch, samples = (axis.dim_param for axis in graph.input[0].type.tensor_type.shape.dim)
    frames = graph.output[0].type.tensor_type.shape.dim[-2].dim_param
    names = {batch: "batch", samples: "samples"}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param == frames:
                axis.dim_param = "frames"
            elif axis.dim_param:
                axis.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), axis.dim_param)


def _write(file: Path, content: bytes | memoryview) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_bytes(content)


def _check_new(file: Path, suffix: str, of_what: str) -> None:
    if file.exists():
        raise ValueError(f"{file} already exists; give the name of a new file")
    if file.suffix != suffix:
        raise ValueError(f"{file} must end in {suffix}, the suffix of {of_what}; name it {file.stem}{suffix}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings of the exporters about packages that this model does not use."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
