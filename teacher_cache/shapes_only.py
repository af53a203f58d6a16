"""Modules without memory: shapes and names of a model's weights, before anything is allocated for them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_INITIALISERS = {torch.Tensor.normal_, torch.Tensor.uniform_} | {f for f in vars(torch.nn.init).values() if callable(f)}


class _NoInitialisation(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in _INITIALISERS:
            return args[0] if args else given["tensor"]
        if func is torch.norm_except_dim:  # Called by weight normalisation with (weight, power, dim).
            weight, dim = args[0], args[2]
            return weight.new_empty([size if axis == dim else 1 for axis, size in enumerate(weight.shape)])
        return func(*args, **given)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build modules on the meta device, where tensors have no memory, and without random initial values.

    On that device, random initial values and norms have no effect, but the first ones import much of PyTorch, which takes seconds.
    """
    with torch.device("meta"), _NoInitialisation():
        yield
