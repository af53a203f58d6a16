"""What runs a model: PyTorch or ONNX Runtime, behind one small interface."""

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ray_distill.student import Student
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, RECEPTIVE_FIELD, SAMPLE_RATE

Array = npt.NDArray[np.float32]
Space = Literal["student", "teacher"]
Runtime = Literal["torch", "onnx"]
Precision = Literal["fp32", "bf16"]

_LEAST_SAMPLES = RECEPTIVE_FIELD + FRAME_SAMPLES  # Programs with free sizes take a size of 1 for a constant.


@dataclass(frozen=True)
class BackendOptions:
    """How models are run.

    Attributes:
        runtime: ``torch`` or ``onnx``. Default None: ``onnx`` for a file that ends in .onnx, else ``torch``.
        device: where PyTorch runs: cpu, cuda, cuda:1. ONNX Runtime has the CPU only. Default cpu.
        precision: of PyTorch's matrix products and convolutions, ``fp32`` or ``bf16``. Answers are float32 in any case.
        compile: whether `torch.compile` compiles the model, for any batch and length, before it is ready; sounds
            under two seconds may run uncompiled. Default False.
    """

    runtime: Runtime | None = None
    device: str = "cpu"
    precision: Precision = "fp32"
    compile: bool = False


@dataclass(eq=False)
class Wanted:
    """One utterance, and what is wanted of it.

    Attributes:
        waveform: (S,) float32, 16 kHz, in [-1, 1], at least 400 samples.
        layer: 1-based Transformer layer, or None for all.
        space: ``student`` for hidden states, ``teacher`` for the heads' projections.
    """

    waveform: Array
    layer: int | None
    space: Space


class Backend(Protocol):
    """A loaded model. Whoever has it calls ``run`` from one thread at a time.

    Attributes:
        runtime, device: what runs it, and where.
        revision: first 12 hexadecimal digits of the SHA-256 of its weights.
        num_layers, dim: its Transformer layers and their width.
        teacher_dim: width of its projections, None where it has no heads.
        num_parameters: heads included.
    """

    runtime: Runtime
    device: str
    revision: str
    num_layers: int
    dim: int
    teacher_dim: int | None
    num_parameters: int

    def run(self, batch: Sequence[Wanted]) -> list[Array]:
        """(T, d) float32 for each utterance, or (L, T, d) for all layers: of real frames, whatever the others are."""


class TorchBackend:
    """A student in PyTorch, in evaluation mode.

    Raises:
        ValueError: there is no such device.
    """

    runtime: Runtime = "torch"

    def __init__(self, student: Student, options: BackendOptions | None = None) -> None:
        options = options or BackendOptions()
        try:
            place = torch.empty(0, device=options.device).device
        except (RuntimeError, AssertionError) as error:
            # PyTorch's own messages run over many lines; builds without CUDA raise AssertionError.
            raise ValueError(
                f"Can't use device '{options.device}': PyTorch finds no such device on this machine."
            ) from error
        self.device = str(place)
        self.revision = revision_of(student)
        self.num_parameters = sum(parameter.numel() for parameter in student.parameters())
        self.num_layers = student.config.encoder_layers
        self.dim = student.config.encoder_embed_dim
        self.teacher_dim = _teacher_dim(student)
        self._compiled = _compiled(student, place) if options.compile else None
        self._student = student.to(place).eval()
        self._autocast = torch.autocast(place.type, torch.bfloat16, enabled=options.precision == "bf16")
        if self._compiled is not None:
            # Compilers make programs of their own for one row, and for sounds under two seconds, which gain little.
            with torch.inference_mode(), self._autocast:
                for rows in (1, 2):
                    waveforms = torch.zeros(rows, 4 * SAMPLE_RATE, device=place)
                    self._compiled(waveforms, torch.full((rows,), 4 * SAMPLE_RATE, device=place))

    @torch.inference_mode()
    def run(self, batch: Sequence[Wanted]) -> list[Array]:
        """See `Backend`."""
        waveforms, lengths = (
            torch.from_numpy(x).to(self.device) for x in _pad(batch, 0 if self._compiled is None else _LEAST_SAMPLES)
        )
        with self._autocast:
            if self._compiled is not None:
                # What none of the programs is for runs uncompiled: no request waits for a compiler.
                with torch.compiler.set_stance("eager_on_recompile"):
                    layers = self._compiled(waveforms, lengths)[1:]
            else:
                layers, _, _ = self._student.layer_outputs(waveforms, lengths)
            arrays = []
            for row, (wanted, frames) in enumerate(zip(batch, self._student.num_frames(lengths).tolist(), strict=True)):
                numbers = range(len(layers)) if wanted.layer is None else [wanted.layer - 1]
                chosen = [layers[number][row, :frames] for number in numbers]
                if wanted.space == "teacher":
                    chosen = [self._student.heads[number](x) for number, x in zip(numbers, chosen, strict=True)]
                features = torch.stack(chosen) if wanted.layer is None else chosen[0]
                # A copy, so that an answer being sent doesn't keep the batch alive.
                arrays.append(features.float().cpu().numpy().copy())
        return arrays


class OnnxBackend:
    """A student in ONNX Runtime, on the CPU, with as many threads as PyTorch would take; needs the ``onnx`` extra.

    Args:
        model: a file of ``export --format onnx``, which has no heads; or a student, which is exported first, heads apart.

    Raises:
        ValueError: the package isn't installed, the options are of PyTorch, or the file isn't such an export.
    """

    runtime: Runtime = "onnx"
    device = "cpu"

    def __init__(self, model: Path | Student, options: BackendOptions | None = None) -> None:
        options = options or BackendOptions()
        if options.device != "cpu" or options.precision != "fp32" or options.compile:
            raise ValueError(
                "ONNX Runtime runs here on the CPU in fp32 only: device, precision and compile are PyTorch's."
            )
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(
                f"ONNX needs packages that are not installed ({error}): install the extra named onnx."
            ) from error
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = torch.get_num_threads(), 1
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # The cores are the decoders' too.
        settings.log_severity_level = 3

        def load(file: Path) -> Any:
            try:
                return onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime's own exceptions share no other base.
                raise ValueError(f"'{file}' is not an ONNX model ({str(error).splitlines()[0]}).") from error

        self._heads: list[tuple[Array, Array] | None] = []
        self.teacher_dim: int | None = None
        if isinstance(model, Student):
            from ray_distill.student.exporters.onnx import export_onnx

            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "student.onnx"
                export_onnx(model, file, {})
                self._session = load(file)
            self.revision = revision_of(model)
            self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
            self.teacher_dim = _teacher_dim(model)
            for head in model.heads:
                parts = (head.weight, head.bias) if isinstance(head, torch.nn.Linear) else None
                self._heads.append(parts and (parts[0].detach().numpy().T, parts[1].detach().numpy()))
        else:
            self._session = load(model)
            names = [item.name for item in (*self._session.get_inputs(), *self._session.get_outputs())]
            if names != ["waveforms", "lengths", "hidden_states", "num_frames"]:
                raise ValueError(f"'{model}' is not a student as 'export --format onnx' writes it: it has {names}.")
            data = model.read_bytes()
            self.revision = hashlib.sha256(data).hexdigest()[:12]
            self.num_parameters = _parameters_in(data)
        states = self._session.run(
            ["hidden_states"], _feed([Wanted(np.zeros(RECEPTIVE_FIELD, np.float32), None, "student")])
        )
        _, states_count, _, self.dim = states[0].shape
        self.num_layers = states_count - 1

    def run(self, batch: Sequence[Wanted]) -> list[Array]:
        """See `Backend`."""
        states, num_frames = self._session.run(None, _feed(batch))
        arrays = []
        for wanted, row, frames in zip(batch, states, num_frames, strict=True):
            numbers = range(self.num_layers) if wanted.layer is None else [wanted.layer - 1]
            chosen = [row[number + 1, :frames] for number in numbers]
            if wanted.space == "teacher":
                heads = [self._heads[number] for number in numbers]
                chosen = [x if head is None else x @ head[0] + head[1] for x, head in zip(chosen, heads, strict=True)]
            arrays.append(np.stack(chosen) if wanted.layer is None else chosen[0].copy())
        return arrays


def _teacher_dim(student: Student) -> int | None:
    """Width of projections where each layer has a head that sees the layer's output, else None."""
    plain = student.config.heads == "layerwise" and student.config.time_reduction is None
    return student.config.target_dim if plain else None


def _feed(batch: Sequence[Wanted]) -> dict[str, Any]:
    return dict(zip(("waveforms", "lengths"), _pad(batch, _LEAST_SAMPLES), strict=True))


def _pad(batch: Sequence[Wanted], least: int) -> tuple[Array, npt.NDArray[np.int64]]:
    """(B, S) zero-padded to the longest, or ``least``, and (B,) real samples."""
    lengths = np.array([len(wanted.waveform) for wanted in batch])
    waveforms = np.zeros((len(batch), max(int(lengths.max()), least)), np.float32)
    for row, wanted in zip(waveforms, batch, strict=True):
        row[: len(wanted.waveform)] = wanted.waveform
    return waveforms, lengths


def _compiled(student: Student, place: torch.device) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """The student's encoder, compiled for any batch and length: the portable form, which no value decides the course of."""
    from ray_distill.student.exporters.portable import portable_student

    model = portable_student(student).to(place)
    run: Callable[[Tensor, Tensor], list[Tensor]] = torch.compile(model, dynamic=True)
    return run


def revision_of(student: Student) -> str:
    """First 12 hexadecimal digits of the SHA-256 of its weights, names included."""
    digest = hashlib.sha256()
    for key, tensor in sorted(student.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _parameters_in(data: bytes) -> int:
    """Values of an ONNX file's weights."""
    import onnx

    return sum(int(np.prod(tensor.dims)) for tensor in onnx.load_from_string(data).graph.initializer if tensor.dims)
