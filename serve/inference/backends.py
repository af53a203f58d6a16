"""Backends that run a model: PyTorch and ONNX Runtime, with one interface."""

import hashlib
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ray_distill.first_line import first_line
from ray_distill.gpu import set_up_gpu
from ray_distill.serve.settings import BackendOptions, Runtime
from ray_distill.student import Student
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, RECEPTIVE_FIELD, SAMPLE_RATE

_LOG = logging.getLogger(__name__)
Array = npt.NDArray[np.float32]
Space = Literal["student", "teacher"]

# Two frames: compilers with dynamic sizes treat a size of 1 as a constant.
_MIN_SAMPLES = RECEPTIVE_FIELD + FRAME_SAMPLES


@dataclass(eq=False)
class LayerRequest:
    """A request for one layer, or all layers, of one utterance.

    Attributes:
        waveform: (S,) float32, 16 kHz, in [-1, 1], at least 400 samples.
        layer: Transformer layer counted from 1, or None for all layers.
        space: ``student`` for hidden states, ``teacher`` for the heads' predictions of the teacher's layers.
    """

    waveform: Array
    layer: int | None
    space: Space


class Backend(Protocol):
    """A loaded model; ``run`` must be called from one thread at a time.

    Attributes:
        runtime: Library that runs the model.
        device: Device that runs the model.
        revision: First 12 hexadecimal digits of the SHA-256 hash of all that the features depend on: configuration and weights.
        num_layers: Number of Transformer layers.
        dim: Dimension of hidden states.
        teacher_dim: Dimension of the predictions of the teacher's layers, or None if the model makes none.
        num_parameters: Number of parameters, heads included.
        stops_early: Whether a batch runs only to the highest layer that it asks for. Otherwise every batch costs all layers.
    """

    runtime: Runtime
    device: str
    revision: str
    num_layers: int
    dim: int
    teacher_dim: int | None
    num_parameters: int
    stops_early: bool

    def run(self, batch: Sequence[LayerRequest]) -> list[Array]:
        """Return (T, d) float32 for each utterance, or (L, T, d) for all layers.

        Padding is removed, and the features of an utterance do not depend on the rest of the batch.
        """


class TorchBackend:
    """A student in PyTorch, in evaluation mode.

    Args:
        student: Model to run; it is moved to the device.
        options: Device, precision and compilation. Default: ``BackendOptions()``.

    Raises:
        ValueError: PyTorch finds no such device.
    """

    runtime: Runtime = "torch"

    def __init__(self, student: Student, options: BackendOptions | None = None) -> None:
        options = options or BackendOptions()
        try:
            device = torch.empty(0, device=options.device).device
        except (RuntimeError, AssertionError) as error:
            # PyTorch's own messages have many lines; builds without CUDA raise AssertionError.
            raise ValueError(
                f"Can't use device '{options.device}': PyTorch finds no such device on this machine."
            ) from error
        set_up_gpu(device)
        self.device = str(device)
        self.revision = revision_of(student)
        self.num_parameters = sum(parameter.numel() for parameter in student.parameters())
        self.num_layers = student.config.encoder_layers
        self.dim = student.config.encoder_embed_dim
        self.teacher_dim = _teacher_dim(student)
        self._compiled = _compile(student, device) if options.compile else None
        self.stops_early = self._compiled is None
        self._student = student.to(device).eval()
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16")
        if self._compiled is not None:
            # The compiler makes separate programs for one row and for several. Audio under two seconds gains little from one.
            _LOG.info("Compiling the model; this may take minutes")
            with torch.inference_mode(), self._autocast:
                for rows in (1, 2):
                    waveforms = torch.zeros(rows, 4 * SAMPLE_RATE, device=device)
                    self._compiled(waveforms, torch.full((rows,), 4 * SAMPLE_RATE, device=device))

    @torch.inference_mode()
    def run(self, batch: Sequence[LayerRequest]) -> list[Array]:
        """Return the features of a batch; see `Backend`."""
        padded, lengths = map(torch.from_numpy, _pad(batch, 0 if self._compiled is None else _MIN_SAMPLES))
        waveforms = padded.to(self.device)
        num_frames = self._student.num_frames(lengths).tolist()  # On the host, which does not wait for a GPU.
        with self._autocast:
            if self._compiled is not None:
                # A batch that fits no compiled program runs uncompiled, so that no request waits for the compiler.
                with torch.compiler.set_stance("eager_on_recompile"):
                    layers = self._compiled(waveforms, lengths.to(self.device))[1:]
            else:
                highest = max(item.layer or self.num_layers for item in batch)
                layers, _, _ = self._student.layer_outputs(waveforms, lengths.tolist(), num_layers=highest)
            arrays = []
            for row, (item, frames) in enumerate(zip(batch, num_frames, strict=True)):
                numbers = range(len(layers)) if item.layer is None else [item.layer - 1]
                selected = [layers[number][row, :frames] for number in numbers]
                if item.space == "teacher":
                    selected = [self._student.heads[number](x) for number, x in zip(numbers, selected, strict=True)]
                features = torch.stack(selected) if item.layer is None else selected[0]
                # Copied, so that a response that is still being sent does not keep the whole batch in memory.
                arrays.append(features.float().cpu().numpy().copy())
        return arrays


class OnnxBackend:
    """A student in ONNX Runtime on the CPU, with as many threads as PyTorch uses. It needs the ``onnx`` extra.

    A file with int8 weights runs one utterance at a time, since its activations have one scale for a whole batch; an utterance would
    get other features beside a louder one.

    Args:
        model: File written by ``export --format onnx``, which has no heads, or a student, which is exported here without its heads;
            NumPy then applies them.
        options: Must hold no options of PyTorch. Default: ``BackendOptions()``.

    Raises:
        ValueError: a package isn't installed, an option is for PyTorch only, or the file isn't such an export.
    """

    runtime: Runtime = "onnx"
    device = "cpu"
    stops_early = False  # ONNX Runtime always runs the whole graph.

    def __init__(self, model: Path | Student, options: BackendOptions | None = None) -> None:
        options = options or BackendOptions()
        if options.device != "cpu" or options.precision != "fp32" or options.compile:
            raise ValueError(
                "The ONNX backend runs on the CPU in fp32 only: device, precision and compile are options of the torch backend."
            )
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(
                f"The ONNX backend needs packages that are not installed ({error}): install the extra named onnx."
            ) from error
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = torch.get_num_threads(), 1
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # The decoders need the cores too.
        settings.log_severity_level = 3

        def load(file: Path) -> Any:
            try:
                return onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
            except Exception as error:  # The exceptions of ONNX Runtime have no other common base class.
                raise ValueError(f"'{file}' is not an ONNX model ({first_line(error)}).") from error

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
            if names == ["waveforms", "lengths", "projections", "num_frames"]:
                raise ValueError(
                    f"'{model}' has the predictions of the heads, but the service needs layers: export it with --features layers."
                )
            if names != ["waveforms", "lengths", "hidden_states", "num_frames"]:
                raise ValueError(
                    f"'{model}' was not written by 'export --format onnx': its inputs and outputs are {', '.join(names)}."
                )
            data = model.read_bytes()
            self.revision = hashlib.sha256(data).hexdigest()[:12]
            self.num_parameters = _parameters_in(data)
        metadata = self._session.get_modelmeta().custom_metadata_map
        self._one_by_one = metadata.get("weights") == "int8"
        states = self._session.run(
            ["hidden_states"], _feed([LayerRequest(np.zeros(RECEPTIVE_FIELD, np.float32), None, "student")])
        )
        _, states_count, _, self.dim = states[0].shape
        self.num_layers = states_count - 1

    def run(self, batch: Sequence[LayerRequest]) -> list[Array]:
        """Return the features of a batch; see `Backend`."""
        if self._one_by_one and len(batch) > 1:
            return [array for item in batch for array in self.run([item])]
        states, num_frames = self._session.run(None, _feed(batch))
        arrays = []
        for item, row, frames in zip(batch, states, num_frames, strict=True):
            numbers = range(self.num_layers) if item.layer is None else [item.layer - 1]
            selected = [row[number + 1, :frames] for number in numbers]
            if item.space == "teacher":
                heads = [self._heads[number] for number in numbers]
                selected = [
                    x if head is None else x @ head[0] + head[1] for x, head in zip(selected, heads, strict=True)
                ]
            arrays.append(np.stack(selected) if item.layer is None else selected[0].copy())
        return arrays


def _teacher_dim(student: Student) -> int | None:
    """Return the dimension of the heads' predictions, or None unless each layer has its own head on the layer's output."""
    return student.config.target_dim if student.config.has_plain_heads else None


def _feed(batch: Sequence[LayerRequest]) -> dict[str, Any]:
    return dict(zip(("waveforms", "lengths"), _pad(batch, _MIN_SAMPLES), strict=True))


def _pad(batch: Sequence[LayerRequest], min_samples: int) -> tuple[Array, npt.NDArray[np.int64]]:
    """Return (B, S) waveforms, zero-padded to the longest or to ``min_samples``, and (B,) lengths in samples."""
    lengths = np.array([len(item.waveform) for item in batch])
    waveforms = np.zeros((len(batch), max(int(lengths.max()), min_samples)), np.float32)
    for row, item in zip(waveforms, batch, strict=True):
        row[: len(item.waveform)] = item.waveform
    return waveforms, lengths


def _compile(student: Student, device: torch.device) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Return the student's encoder, compiled for any batch size and length; its portable form has no data-dependent control flow."""
    from ray_distill.student.exporters.portable import portable_student

    model = portable_student(student).to(device)
    run: Callable[[Tensor, Tensor], list[Tensor]] = torch.compile(model, dynamic=True)
    return run


def revision_of(student: Student) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 hash of a student's configuration, and of its weights and their names."""
    digest = hashlib.sha256(student.config.model_dump_json().encode())
    for key, tensor in sorted(student.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _parameters_in(data: bytes) -> int:
    """Return the number of values in the weights of an ONNX file."""
    import onnx

    return sum(int(np.prod(tensor.dims)) for tensor in onnx.load_from_string(data).graph.initializer if tensor.dims)
