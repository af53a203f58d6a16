"""This process's rank in a distributed training."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Rank:
    """One of ``world_size`` processes that train together, with its student on ``device``. Default: a single process on the CPU."""

    index: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place, and return it. Every rank must call this."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order. Every rank must call this, and waits for the others."""
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values
