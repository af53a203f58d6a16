"""Training of a linear probe: for a number of epochs, or until it stops improving."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_distill.pipeline.probing.feature_source import Features, FeatureSource
from ray_distill.pipeline.probing.task import NO_LABEL, Task

_BATCH_SIZE = 8
_IGNORED = -100
_DECAY, _DECAYS, _PATIENCE, _IMPROVEMENT = 0.3, 2, 3, 1e-3
_DEVELOPMENT_SHARE = 10
_MAX_EPOCHS = 500


class LinearProbe(nn.Module):
    """A linear layer on a weighted sum of layers.

    Args:
        layers: Number of layers, L.
        dim: Width of a layer, D.
        outputs: Number of classes or symbols.
    """

    def __init__(self, layers: int, dim: int, outputs: int) -> None:
        super().__init__()
        self.layer_weights = nn.Parameter(torch.zeros(layers))
        self.linear = nn.Linear(dim, outputs)

    def forward(self, x_BTLD: Tensor) -> Tensor:
        """Map (B, T, L, D) features to (B, T, outputs) logits."""
        # Weighting the matrix instead of the features is the same, and doesn't touch them.
        weights = self.layer_weights.softmax(0)[None, :, None] * self.linear.weight[:, None, :]
        return F.linear(x_BTLD.flatten(2), weights.flatten(1), self.linear.bias)


@dataclass(frozen=True)
class TrainedProbe:
    """A trained probe.

    Attributes:
        probe: The probe.
        loss: Mean training loss of the last epoch.
        epochs: Number of epochs it was trained for.
    """

    probe: LinearProbe
    loss: float
    epochs: int


def train_probe(features: Features, source: FeatureSource, task: Task, epochs: int | None, seed: int) -> TrainedProbe:
    """Train a probe with AdamW.

    Args:
        features: Normalised features of the task's utterances.
        source: Source of the features.
        task: Labelled utterances.
        epochs: Passes over the training split, with a cosine schedule. None trains until the probe stops improving: a tenth of the
            training utterances is left out, the learning rate falls to 0.3 of its value whenever the loss on that tenth has not
            fallen by 0.1 % for 3 epochs, training ends at the third time or after 500 epochs, and the best probe is returned.
        seed: Seed of initialisation and order.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    fit = _Fit(features, source, task)
    train = np.array([number for number, example in enumerate(task.examples) if not example.test])
    if epochs is not None:
        steps = epochs * -(-len(train) // _BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(fit.optimizer, steps)
        loss = 0.0
        for _ in range(epochs):
            loss = fit.epoch(rng.permutation(train), schedule)
        return TrainedProbe(fit.probe, loss, epochs)
    order = rng.permutation(train)
    # A single utterance has to serve for both.
    held_out = max(1, len(order) // _DEVELOPMENT_SHARE) if len(order) > 1 else 0
    development, train = order[:held_out], order[held_out:]
    best, since, decays, loss, count = float("inf"), 0, 0, 0.0, 0
    state = {name: value.clone() for name, value in fit.probe.state_dict().items()}
    while count < _MAX_EPOCHS:
        count += 1
        loss = fit.epoch(rng.permutation(train))
        found = fit.mean_loss(development if held_out else train)
        since += 1
        if found < best * (1 - _IMPROVEMENT):
            best, since = found, 0
            state = {name: value.clone() for name, value in fit.probe.state_dict().items()}
        elif since == _PATIENCE:
            since, decays = 0, decays + 1
            if decays > _DECAYS:
                break
            fit.probe.load_state_dict(state)
            for group in fit.optimizer.param_groups:
                group["lr"] *= _DECAY
    fit.probe.load_state_dict(state)
    return TrainedProbe(fit.probe, loss, count)


class _Fit:
    """A probe, its optimiser and its loss."""

    def __init__(self, features: Features, source: FeatureSource, task: Task) -> None:
        self._features, self._task = features, task
        blank = int(task.kind == "ctc")  # CTC reserves index 0 for the blank.
        self._ids = {item: number for number, item in enumerate(task.vocabulary, start=blank)}
        if task.kind == "frame":
            self._ids[NO_LABEL] = _IGNORED
        self.probe = LinearProbe(source.layers, source.dim, len(task.vocabulary) + blank)
        # AdamW moves each parameter by about the learning rate per step, and layer weights have further to go.
        groups = [
            {"params": [self.probe.layer_weights], "lr": 5e-2, "weight_decay": 0.0},
            {"params": self.probe.linear.parameters(), "lr": 1e-2, "weight_decay": 1e-2},
        ]
        self.optimizer = torch.optim.AdamW(groups)

    def epoch(self, order: np.ndarray, schedule: torch.optim.lr_scheduler.LRScheduler | None = None) -> float:
        """Train on utterances in this order; return the mean loss."""
        total = 0.0
        for begin in range(0, len(order), _BATCH_SIZE):
            batch = order[begin : begin + _BATCH_SIZE]
            loss = self._loss(batch)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            if schedule is not None:
                schedule.step()
            total += loss.item() * len(batch)
        return total / len(order)

    @torch.no_grad()
    def mean_loss(self, numbers: np.ndarray) -> float:
        """Return the mean loss of utterances."""
        batches = [numbers[begin : begin + _BATCH_SIZE] for begin in range(0, len(numbers), _BATCH_SIZE)]
        return sum(self._loss(batch).item() * len(batch) for batch in batches) / len(numbers)

    def _loss(self, batch: np.ndarray) -> Tensor:
        task = self._task
        logits = self.probe(nn.utils.rnn.pad_sequence([self._features[n] for n in batch], batch_first=True))
        targets = [torch.tensor([self._ids[item] for item in task.examples[n].target]) for n in batch]
        if task.kind == "frame":
            padded = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=_IGNORED)
            return F.cross_entropy(logits.flatten(0, 1), padded.flatten(), ignore_index=_IGNORED)
        if task.kind == "class":
            return F.cross_entropy(logits[:, 0], torch.cat(targets))
        return F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            torch.cat(targets),
            torch.tensor([self._features.frames[n] for n in batch]),
            torch.tensor([len(target) for target in targets]),
            zero_infinity=True,
        )
