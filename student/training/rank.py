"""This process among the others of a training."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Rank:
    """One of ``world_size`` processes that train together. ``device`` is where its student lives."""

    index: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place. Every rank must call it."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. Every rank must call it, and waits for the others."""
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values
