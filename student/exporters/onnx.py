"""ONNX and `torch.export` programs of a student, of any batch and length; needs the ``onnx`` extra."""

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ray_distill.student.exporters.origin import Origin
from ray_distill.student.exporters.portable import portable_student
from ray_distill.student.exporters.portable_model import PortableStudent
from ray_distill.student.model.student import Student

OPSET = 20
"""The first with a GELU of its own; runtimes since 2024 know it."""


class FeatureProgram(nn.Module):
    """What is exported: (waveforms (B, S) float32, lengths (B,) int64) → (hidden states (B, L + 1, T, d), num_frames (B,)).

    Hidden states are the encoder's input and each layer's output. Values at padded frames are finite and mean nothing.
    """

    def __init__(self, model: PortableStudent) -> None:
        super().__init__()
        self.model = model
        self.model.hold_maps = True  # A graph has its maps at hand: reuse then costs one product.

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """As the class says."""
        frames: Tensor = self.model.num_frames(lengths)
        return torch.stack(self.model(waveforms, lengths), dim=1), frames


def _program(student: Student) -> tuple[torch.export.ExportedProgram, FeatureProgram]:
    if student.config.time_reduction is not None and student.config.position == "rotary":
        raise ValueError(
            "rotary positions behind a time reduction can't be traced for any length; export such a student for s3prl or huggingface"
        )
    module = FeatureProgram(portable_student(student)).eval()
    field, stride = module.model.receptive_field, module.model.stride
    # Two unequal rows, so that nothing is taken for a constant.
    samples = field + 49 * stride + 7
    example = torch.randn(2, samples) * 0.1, torch.tensor([samples, samples - 5 * stride])
    batch = torch.export.Dim("batch", min=1, max=4096)
    # `torch.export` takes sizes of 1 for constants, so a batch must be two (reduced) frames long; its shorter rows may have one.
    reduction = module.model.reduction
    length = torch.export.Dim("samples", min=field + stride * (1 if reduction is None else reduction.factor), max=2**26)
    with torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=({0: batch, 1: length}, {0: batch}))
    return program, module


def export_torch(student: Student, file: Path, origin: Origin) -> None:
    """Writes a `torch.export` program, read by ``torch.export.load``; its origin is its extra file ``origin.json``.

    It takes batches of any size, at least two frames (720 samples) long.

    Raises:
        ValueError: the file exists, or the student has options that exports don't support.
    """
    _check_new(file)
    program, _ = _program(student)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, file, extra_files={"origin.json": json.dumps(origin)})


def export_onnx(student: Student, file: Path, origin: Origin, *, int8: bool = False) -> None:
    """Writes an ONNX file whose metadata holds the origin.

    Args:
        student: to export.
        file: new.
        origin: what the export says of itself.
        int8: weights of matrix products (not of convolutions) in int8, activations quantised as they come. Default False.

    Raises:
        ValueError: the file exists, the packages are not installed, or the student has options that exports don't support.
    """
    _check_new(file)
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch.onnx needs it)
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ValueError(
            f"ONNX needs packages that are not installed ({error}); install the extra named onnx"
        ) from error
    program, _ = _program(student)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "model.onnx"
        with _quiet():
            exported = torch.onnx.export(
                program,
                input_names=["waveforms", "lengths"],
                output_names=["hidden_states", "num_frames"],
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        assert exported is not None
        exported.save(str(plain))
        if int8:
            quantised = Path(folder) / "int8.onnx"
            with _quiet():
                # Seven bits for a weight: with eight, CPUs without VNNI overflow in the sums of two products (error 14 %).
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
        onnx.helper.set_model_props(model, {"origin": json.dumps(origin), "weights": "int8" if int8 else "float32"})
        file.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, str(file))


def _check_new(file: Path) -> None:
    if file.exists():
        raise ValueError(f"{file} exists; give the name of a new file")


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of packages that this model has no use for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
