"""Linear probes on frozen features, trained and tested for several feature sources on the same utterances.

As in SUPERB, a probe reads a learnt weighted sum of all layers (a softmax over one weight per layer) and is linear. For classes
it reads the mean over time; for sequences of characters or phones it reads every frame, is trained with CTC and decoded
greedily; for classes of frames it reads every frame. Two differences make the results comparable with one another but not with
SUPERB's: each dimension of each layer is normalised over the training split, so that layers of different scale start equal, and
the encoder's input is not among the layers.

All sources share utterances and optimiser, and the number of epochs if it is given; otherwise each probe is trained until it stops
improving. The 95 % confidence intervals are bootstrapped over test utterances.
They don't cover the variation between trainings, nor between speakers if only a few were tested.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ray_distill.pipeline.probing.feature_source import Features, FeatureSource
from ray_distill.pipeline.probing.probe_training import LinearProbe, train_probe
from ray_distill.pipeline.probing.task import NO_LABEL, Task

_BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True)
class Outcome:
    """Test result of one probe.

    Attributes:
        source: Name of the feature source.
        metric: ``accuracy``, ``error rate`` or ``frame error rate``.
        value: Metric over all test utterances.
        low, high: 95 % bootstrap confidence interval of the value.
        difference: Value minus that of the first source, with the confidence interval from the same bootstrap samples; None for
            the first source.
        layer_weights: Weight of each layer; they sum to 1.
        training_loss: Mean training loss of the last epoch.
        epochs: Number of epochs that the probe was trained for; None in records of earlier versions.
    """

    source: str
    metric: str
    value: float
    low: float
    high: float
    difference: tuple[float, float, float] | None
    layer_weights: list[float]
    training_loss: float
    epochs: int | None = None


def run_probes(
    task: Task,
    sources: Sequence[FeatureSource],
    *,
    epochs: int | None = None,
    seed: int = 0,
    on_progress: Callable[[str], object] = print,
) -> list[Outcome]:
    """Train and test a probe on each feature source.

    Args:
        task: Labelled utterances.
        sources: Feature sources; the others are compared with the first.
        epochs: Passes over the training split; None trains each probe until it stops improving (see `train_probe`).
        seed: Seed of initialisation, order and bootstrap.
        on_progress: Called with one line of text after each source.

    Returns:
        One outcome for each source, in order.
    """
    outcomes: list[Outcome] = []
    count = sum(example.test for example in task.examples)
    samples = np.random.default_rng(seed).integers(count, size=(_BOOTSTRAP_SAMPLES, count))
    first: tuple[float, np.ndarray] | None = None
    for source in sources:
        with tempfile.TemporaryDirectory() as folder:
            features = Features(source, task, Path(folder))
            _check_frame_labels(features, source, task)
            trained = train_probe(features, source, task, epochs, seed)
            errors, items = _count_errors(trained.probe, features, task)
        value = float(errors.sum() / items.sum())
        values = errors[samples].sum(1) / items[samples].sum(1)
        if task.kind == "class":
            value, values = 1 - value, 1 - values
        difference = None
        if first is not None:
            low, high = np.quantile(values - first[1], [0.025, 0.975])
            difference = value - first[0], float(low), float(high)
        first = first or (value, values)
        low, high = np.quantile(values, [0.025, 0.975])
        weights = trained.probe.layer_weights.detach().softmax(0).tolist()
        interval = float(low), float(high)
        outcome = Outcome(source.name, task.metric, value, *interval, difference, weights, trained.loss, trained.epochs)
        outcomes.append(outcome)
        on_progress(f"probe   {source.name}: {task.metric} {value:.1%} ({low:.1%} to {high:.1%})")
    return outcomes


def _check_frame_labels(features: Features, source: FeatureSource, task: Task) -> None:
    """Raise ValueError if an utterance has not one label for each frame of the source."""
    if task.kind != "frame":
        return
    for example, frames in zip(task.examples, features.frames, strict=True):
        if len(example.target) != frames:
            raise ValueError(
                f"{example.address} has {len(example.target)} frame labels, but {source.name} has {frames} frames; give one label for "
                f"each frame, or {NO_LABEL} where there is none"
            )


@torch.no_grad()
def _count_errors(probe: LinearProbe, features: Features, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of errors and the number of target items of each test utterance."""
    from torchaudio.functional import edit_distance  # Takes seconds to import, and reports don't need it.

    errors, items = [], []
    for number, example in enumerate(task.examples):
        if not example.test:
            continue
        best = probe(features[number][None])[0].argmax(-1)
        if task.kind == "frame":
            pairs = [(task.vocabulary[n], label) for n, label in zip(best.tolist(), example.target, strict=True)]
            labelled = [found == label for found, label in pairs if label != NO_LABEL]
            errors.append(labelled.count(False))
            items.append(len(labelled))
            continue
        if task.kind == "class":
            errors.append(int(task.vocabulary[int(best[0])] != example.target[0]))
        else:
            decoded = [task.vocabulary[n - 1] for n in best.unique_consecutive().tolist() if n]
            errors.append(edit_distance(decoded, example.target))
        items.append(len(example.target))
    return np.array(errors), np.array(items)
