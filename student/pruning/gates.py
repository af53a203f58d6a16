"""Hard-concrete gates (Louizos et al. 2018) beside a student, and the loss that closes them up to a sparsity (DPHuBERT).

A gate is a number from 0 to 1 by which a channel, a head, a hidden unit or a block is multiplied. In training it is drawn for each
step from a distribution with a mass at 0 and at 1, whose parameter is learned. The probability of not being 0 is known, and with it
the expected number of parameters that would be left.

Shape suffixes: N gates, G groups (the gates of one convolution, of one layer's heads, and so on).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ray_distill.student.model.scaled_gradient import scale_gradient
from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.model.transformer import TransformerLayer
from ray_distill.student.pruning.prune_settings import PruneSettings
from ray_distill.teacher_cache.shapes_only import shapes_only

_TEMPERATURE = 2 / 3
_LOW, _HIGH = -0.1, 1.1
"""The interval to which a sample from (0, 1) is stretched before it is cut off at 0 and 1."""
_SHIFT = -_TEMPERATURE * math.log(-_LOW / _HIGH)
"""sigmoid(log alpha + this) is the probability that a gate is not 0."""
_CLOSED_AT_START = {"units": 0.5}
"""Where the sigmoid of -log alpha starts, by kind of gate, as published; 0.01 for all others."""


@dataclass(frozen=True)
class _Group:
    """Gates of one place.

    Attributes:
        kind: ``channels`` of a convolution, ``heads`` or ``units`` of a layer, or its ``attention`` or ``ffn`` as a whole.
        number: 0-based number of the convolution or layer.
        size: Number of gates.
    """

    kind: str
    number: int
    size: int


def _groups(config: StudentConfig, parts: Sequence[str]) -> list[_Group]:
    found = []
    if "channels" in parts:
        # Not the last one: the layer norm behind it averages over its channels, so removing them would change the others.
        found += [_Group("channels", i, layer[0]) for i, layer in enumerate(config.conv_layers[:-1])]
    for number, (heads, units) in enumerate(zip(config.heads_of_layers, config.ffn_dims_of_layers, strict=True)):
        if heads and "heads" in parts:
            found.append(_Group("heads", number, heads))
        if units and "units" in parts:
            found.append(_Group("units", number, units))
        if "blocks" in parts:
            found += [_Group(kind, number, 1) for kind, size in (("attention", heads), ("ffn", units)) if size]
    return found


class Gates(nn.Module):
    """The gates of a student, and the augmented Lagrangian that drives the expected sparsity to a target.

    In training mode the gates are drawn from the seed and the step, so they are the same on all ranks and in all accumulated batches.
    In eval mode they are hard: as many are 0 as the step's sparsity demands, and the others have fixed values.

    Args:
        config: Architecture of the student.
        settings: Settings of the pruning.
        seed: Seed of the initial values and of the draws.

    Attributes:
        log_alpha: (N,) parameter, log alpha of each gate.
        multipliers: (2,) parameter, multipliers of the gap between expected and demanded sparsity, and of its square. Their gradient
            is reversed, so that an optimiser raises what it lowers for all others.
        step: 0-based optimiser step. Default 0.
        total: Number of parameters of the student without heads and without gates.

    Raises:
        ValueError: The student can't be pruned, or not to this sparsity.
    """

    def __init__(self, config: StudentConfig, settings: PruneSettings, seed: int) -> None:
        super().__init__()
        settings.check_student(config)
        self.config, self.settings, self.seed = config, settings, seed
        self.groups = _groups(config, settings.remove)
        self.sizes = [group.size for group in self.groups]
        self.step = 0
        generator = torch.Generator().manual_seed(seed)
        starts = [_CLOSED_AT_START.get(group.kind, 0.01) for group in self.groups]
        means = torch.tensor([math.log(1 / share - 1) for share in starts]).repeat_interleave(torch.tensor(self.sizes))
        self.log_alpha = nn.Parameter(means + 0.01 * torch.randn(len(means), generator=generator))
        self.multipliers = nn.Parameter(torch.zeros(2))
        with shapes_only():
            student = Student(config.without_heads())
        self.total = sum(parameter.numel() for parameter in student.parameters())
        ones = torch.ones(len(self.log_alpha), dtype=torch.float64)
        self._fixed = 0.0
        self._fixed = self.total - float(self.count_parameters(ones))
        highest = 1 - float(self.count_parameters(self._at_least_one_channel(0 * ones))) / self.total
        if settings.sparsity > highest:
            raise ValueError(
                f"train.prune.sparsity is {settings.sparsity:g}, but without all that train.prune.remove names, the student has "
                f"{1 - highest:.1%} of its {self.total:,} parameters, so the highest sparsity is "
                f"{math.floor(1000 * highest) / 1000:g}; lower it, or name more there"
            )

    def target(self) -> float:
        """Return the sparsity that the step demands."""
        return self.settings.sparsity * min(1.0, self.step / self.settings.rise_steps)

    def open_probabilities(self) -> Tensor:
        """Return the (N,) probabilities that a drawn gate is not 0."""
        return (self.log_alpha + _SHIFT).sigmoid()

    def expected_sparsity(self) -> Tensor:
        """Return the () share of the parameters that the gates would remove, expected over their draws."""
        return 1 - self.count_parameters(self.open_probabilities()) / self.total

    def penalty(self) -> Tensor:
        """Return the () loss that drives the expected sparsity to the step's."""
        gap = self.expected_sparsity() - self.target()
        return (scale_gradient(self.multipliers, -1.0) * torch.stack([gap, gap.square()])).sum()

    def row_fields(self) -> dict[str, float]:
        """Return fields for a row of metrics."""
        return {"sparsity": float(self.expected_sparsity().detach()), "target_sparsity": self.target()}

    def values(self) -> Tensor:
        """Return the (N,) gates: the draws of the step in training mode, or else hard gates."""
        if not self.training:
            return self.hard_values()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        uniform = torch.rand(len(self.log_alpha), generator=generator).clamp(1e-6, 1 - 1e-6).to(self.log_alpha.device)
        soft = ((uniform.logit() + self.log_alpha) / _TEMPERATURE).sigmoid()
        return (soft * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    @torch.no_grad()
    def hard_values(self) -> Tensor:
        """Return the (N,) hard gates, of which the least likely to be open are 0, so many that the step's sparsity is met.

        Each group keeps as many as are expected to be open, after one shift of all log alphas by which the sparsity is met.
        """
        log_alpha = self.log_alpha.detach().double().cpu()
        groups = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))
        ranks = torch.cat([(-part).argsort().argsort() for part in log_alpha.split_with_sizes(self.sizes)])
        wanted = (1 - self.target()) * self.total
        low, high = -60.0, 60.0
        best = torch.ones_like(log_alpha)
        for _ in range(40):
            middle = (low + high) / 2
            expected = (log_alpha + _SHIFT + middle).sigmoid()
            kept = torch.zeros(len(self.sizes), dtype=torch.float64).index_add_(0, groups, expected).round()
            is_open = self._at_least_one_channel((ranks < kept[groups]).double())
            count = float(self.count_parameters(is_open))
            if abs(count - wanted) < abs(float(self.count_parameters(best)) - wanted):
                best = is_open
            low, high = (middle, high) if count < wanted else (low, middle)
        # As published; it is near the mean of an open gate's draws.
        fixed = (0.8 * log_alpha / _TEMPERATURE).sigmoid()
        return (best * fixed).to(self.log_alpha)

    def count_parameters(self, is_open: Tensor) -> Tensor:
        """Return the () number of parameters without heads that are left with such gates.

        Args:
            is_open: (N,) float, 1 for each open gate and 0 for the others, or their probabilities, which are taken as independent.
        """
        config, width = self.config, self.config.encoder_embed_dim
        given = {(group.kind, group.number): part for group, part in self._split(is_open)}
        count, one = is_open.new_tensor(self._fixed), is_open.new_ones(())

        inputs = one
        for number, (channels, kernel, _) in enumerate(config.conv_layers if config.patches is None else ()):
            outputs = given.get(("channels", number), one.expand(channels)).sum()
            beside = config.conv_bias + 2 * (number == 0 or config.conv_norm == "layer_norm")
            count, inputs = count + outputs * (inputs * kernel + beside), outputs
        once = width + 2 * width * config.layer_norm_first  # A block's last bias, and its norm if that is before it.
        of_head = config.head_width * (4 * width + 3 + (width + 2) * (config.position == "relative"))
        for number in range(config.encoder_layers):
            for kind, whole, size, of_each in (
                ("heads", "attention", 0 if config.reuses[number] else config.heads_of_layers[number], of_head),
                ("units", "ffn", config.ffn_dims_of_layers[number], 2 * width + 1),
            ):
                if not size:
                    continue
                closed = 1 - given.get((kind, number), one.expand(size))
                own = (size - closed.sum()) * of_each + (1 - closed.prod()) * once
                count = count + given.get((whole, number), one).squeeze() * own
        return count

    def set_gates(self, student: Student) -> None:
        """Multiply what the student computes in its next forward passes by the gates."""
        values = {(group.kind, group.number): part for group, part in self._split(self.values())}
        one = self.log_alpha.new_ones(())
        for (kind, number), gate in values.items():
            if kind == "channels":
                student.conv_blocks[number + 1].input_gate = gate
        for number, layer in enumerate(student.layers):
            assert isinstance(layer, TransformerLayer)
            for linear, kind, whole, width in (
                (
                    None if layer.attention is None else layer.attention.out,
                    "heads",
                    "attention",
                    self.config.head_width,
                ),
                (layer.down, "units", "ffn", 1),
            ):
                if linear is None or not {(kind, number), (whole, number)} & values.keys():
                    continue
                block = values.get((whole, number), one).squeeze()
                inner = values.get((kind, number), one.expand(linear.in_features // width))
                if not self.training:  # A block without heads or units is removed, with its bias.
                    block = block * inner.any()
                linear.input_gate, linear.output_gate = (inner * block).repeat_interleave(width), block

    def _split(self, per_gate: Tensor) -> list[tuple[_Group, Tensor]]:
        return list(zip(self.groups, per_gate.split_with_sizes(self.sizes), strict=True))

    def _at_least_one_channel(self, is_open: Tensor) -> Tensor:
        """Return gates (N,) with the likeliest channel of each convolution open, which can't have none."""
        is_open = is_open.clone()
        for (group, part), log_alpha in zip(
            self._split(is_open), self.log_alpha.detach().cpu().split_with_sizes(self.sizes), strict=True
        ):
            if group.kind == "channels":
                part[log_alpha.argmax()] = 1
        return is_open
