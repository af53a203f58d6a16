"""A GPU without values, for tests on machines that have none.

Tensors have PyTorch's fake ones behind them: devices, shapes and types are those of a GPU. An
operation on two devices is an error, and so is one that reads a value, for which the host would wait.
Autograd's engine can't run on such tensors, so backward passes are out of reach.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)


@contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """Let modules be moved to a fake GPU and autocast there, and yield the mode in which its tensors are made."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def to(module: nn.Module, device: Any) -> nn.Module:
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or isinstance(tensor, FakeTensor):
                        continue
                    with mode:
                        moved = torch.empty_strided(
                            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=torch.device(device)
                        )
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
        return module

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(nn.Module, "to", to))
        stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False))
        stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", return_value=True))
        yield mode


class CopiesToGpu(TorchDispatchMode):
    """Counts the tensors that are copied from the CPU to another device.

    Attributes:
        count: Number of copies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if operator is torch.ops.aten._to_copy.default and isinstance(args[0], Tensor):
            device = options.get("device")
            self.count += args[0].device.type == "cpu" and device is not None and torch.device(device).type != "cpu"
        return operator(*args, **options)
