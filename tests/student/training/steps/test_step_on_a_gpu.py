"""A training step on PyTorch's fake tensors of a GPU: devices, types, and that the host waits for nothing."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ray_distill.student.model.convolution import _backward_conv2d
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.steps.trained_parts import TrainedParts
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.validation import batch_loss
from ray_distill.teacher_cache.targets.target_batch import Batch

from ....fake_gpu import GPU, fake_gpu
from ....tiny import tiny_student

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FRAMES = 49
STUDENTS: dict[str, dict[str, Any]] = {
    "reuse": {"attention_reuse": [False, True]},
    "layer drop": {"layer_drop": 0.1, "layer_norm_first": True, "conv_norm": "layer_norm"},
    "rotary": {"position": "rotary", "head_dim": 8},
    "conformer": {"layer_type": "conformer", "position": "relative"},
    "time reduction": {
        "attention_reuse": "none",
        "time_reduction": "fc2",
        "time_reduction_index": 1,
    },
}
_PRODUCTS = ("mm", "addmm", "convolution")
"""Not those of attention, for which fake tensors have no fused kernel."""


class Products(TorchDispatchMode):
    """Notes the types of matrix products and convolutions, by the operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        name = operator.__name__.partition(".")[0]
        first = result[0] if isinstance(result, tuple) else result
        if name in _PRODUCTS and isinstance(first, Tensor):
            self.dtypes.setdefault(name, set()).add(first.dtype)
        return result


class Reader:
    """What `TrainedParts` asks of a reader."""

    layers, dim, draws = (1, 2), 32, 1


@pytest.fixture(autouse=True)
def same_flags() -> Iterator[None]:
    """Restore PyTorch's options for GPUs."""
    cudnn_sdp, tf32 = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.enable_cudnn_sdp(cudnn_sdp)
    torch.backends.cudnn.allow_tf32 = tf32


def batch_on(device: torch.device) -> Batch:
    return Batch(
        ["one", "other"],
        torch.zeros(2, 16_000, device=device),
        torch.zeros(2, dtype=torch.int64, device=device),
        torch.zeros(2, dtype=torch.int64, device=device),
        torch.zeros(2, 2, FRAMES, 32, device=device),
        torch.zeros(2, FRAMES, dtype=torch.bool, device=device),
    )


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("precision", DTYPES)
def test_a_step_stays_on_the_gpu(precision: str, kind: str) -> None:
    settings = TrainSettings.model_validate(
        {"batch_seconds": 8, "precision": precision, "use_gpu": True, "max_grad_norm": 1.0}
    )
    with fake_gpu() as mode:
        reader: Any = Reader()
        parts = TrainedParts(tiny_student(**STUDENTS[kind]), settings, reader, reader, Rank(device=GPU))
        assert parts.defers
        with mode:
            batch = batch_on(GPU)
            for step in range(2):
                parts.distiller.set_progress(0, step)
                with Products() as products:
                    loss = batch_loss(parts.distiller, batch, settings, 90, cosines=True, lengths=[16_000, 9_000])
                assert {device_of(value) for value in vars(loss).values()} <= {GPU, None}
                assert loss.total.dtype == torch.float32
                assert {"addmm", "convolution"} <= products.dtypes.keys()
                found = set.union(*products.dtypes.values())
                assert found == {DTYPES[precision]}, products.dtypes
                parts.scaler.scale(loss.total)
                for parameter in parts.distiller.parameters():
                    if parameter.requires_grad:  # In place of the backward pass.
                        parameter.grad = torch.zeros_like(parameter)
                norm = parts.gradient_norm()
                parts.update(norm)
                parts.end_step()
                assert norm.device == GPU
        states = [value for state in parts.optimizer.state.values() for value in state.values()]
        assert {value.device for value in states} == {GPU}


def device_of(value: object) -> torch.device | None:
    return value.device if isinstance(value, Tensor) else None


def test_a_lengths_tensor_may_be_on_the_host() -> None:
    with fake_gpu() as mode:
        reader: Any = Reader()
        settings = TrainSettings(batch_seconds=8, use_gpu=True)
        student = TrainedParts(tiny_student(), settings, reader, reader, Rank(device=GPU)).student.eval()
        lengths = torch.tensor([16_000, 9_000])
        with mode:
            batch = batch_on(GPU)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Tensor, "tolist", lambda _: [16_000, 9_000])
                layers, inputs, num_frames = student.layer_outputs(batch.waveforms, lengths)
        assert {tensor.device for tensor in (*layers, *inputs, num_frames)} == {GPU}


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_the_convolutions_of_the_front_end_go_back_in_their_own_type(dtype: torch.dtype) -> None:
    with fake_gpu() as mode, mode:
        x, weight = torch.zeros(2, 99, 8, device=GPU, dtype=dtype), torch.zeros(6, 8, 3, device=GPU, dtype=dtype)
        gradient = torch.zeros(2, 49, 6, device=GPU, dtype=dtype)
        grad_x, grad_weight = _backward_conv2d(x, weight, gradient, 2, gelu=True, needs_x=True)
        assert grad_x is not None
        for found, like in ((grad_x, x), (grad_weight, weight)):
            assert (found.shape, found.dtype, found.device) == (like.shape, dtype, GPU)


def test_a_gpu_gets_neither_cudnns_attention_nor_tf32() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cudnn.allow_tf32 = True
    reader: Any = Reader()
    settings = TrainSettings(batch_seconds=8)
    TrainedParts(tiny_student(), settings, reader, reader, Rank())
    assert torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cudnn.allow_tf32
    with fake_gpu():
        TrainedParts(tiny_student(), settings, reader, reader, Rank(device=GPU))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cudnn.allow_tf32
