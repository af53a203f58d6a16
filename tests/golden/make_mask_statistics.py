"""Write mask_statistics.json, the distribution of fairseq's masks, for environments without fairseq.

Run it once with the `[fairseq]` extra installed: ``python tests/golden/make_mask_statistics.py``. The masks are those of
``fairseq.data.data_utils.compute_mask_indices`` of fairseq-fixed 0.12.3.1, with batch size one.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

PATH = Path(__file__).with_name("mask_statistics.json")
NUM_DRAWS = 16_000

# (policy, frames)
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "static": ({"selection": "static", "mask_prob": 0.8, "mask_length": 10}, 100),
    "static-short": ({"selection": "static", "mask_prob": 0.65, "mask_length": 10}, 24),
    "static-shorter-than-three-spans": ({"selection": "static", "mask_prob": 0.1, "mask_length": 4}, 40),
    "static-apart": (
        {"selection": "static", "mask_prob": 0.8, "mask_length": 10, "no_overlap": True, "min_space": 2},
        100,
    ),
    "uniform": ({"selection": "uniform", "mask_prob": 0.4, "mask_length": 10, "mask_other": 0}, 100),
    "uniform-apart": (
        {
            "selection": "uniform",
            "mask_prob": 0.4,
            "mask_length": 10,
            "mask_other": 0,
            "no_overlap": True,
            "min_space": 1,
        },
        120,
    ),
    "uniform-from-5": ({"selection": "uniform", "mask_prob": 0.6, "mask_length": 8, "mask_other": 5}, 90),
    "normal": ({"selection": "normal", "mask_prob": 0.5, "mask_length": 8, "mask_other": 4}, 100),
    "normal-apart": (
        {
            "selection": "normal",
            "mask_prob": 0.5,
            "mask_length": 8,
            "mask_other": 4,
            "no_overlap": True,
            "min_space": 1,
        },
        100,
    ),
    "poisson": ({"selection": "poisson", "mask_prob": 0.5, "mask_length": 5}, 80),
    "poisson-apart": (
        {"selection": "poisson", "mask_prob": 0.7, "mask_length": 5, "no_overlap": True, "min_space": 3},
        80,
    ),
}


def statistics(masks: Iterable[np.ndarray], num_frames: int) -> dict[str, list[int]]:
    """Return histograms of the lengths of masked runs and of the number of masked frames, and how often each frame is masked."""
    runs = np.zeros(num_frames + 1, int)
    masked = np.zeros(num_frames + 1, int)
    positions = np.zeros(num_frames, int)
    for mask in masks:
        edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0))
        np.add.at(runs, edges[1::2] - edges[::2], 1)
        masked[mask.sum()] += 1
        positions += mask
    return {"runs": runs.tolist(), "masked": masked.tolist(), "positions": positions.tolist()}


def fairseq_draws(seed: int, batch: int = 1) -> Callable[[dict[str, Any], int], np.ndarray]:
    """Return a function of (policy, frames) that draws one mask with fairseq, (T,) bool, or those of a batch, (batch, T)."""
    from fairseq.data.data_utils import compute_mask_indices

    # fairseq calls np.int and Generator.randint, which NumPy removed; RandomState still has everything that it uses.
    state = np.random.RandomState(seed)

    def draw(policy: dict[str, Any], num_frames: int) -> np.ndarray:
        options = dict(policy)
        with (
            mock.patch.object(np, "int", int, create=True),
            mock.patch.object(np.random, "default_rng", return_value=state),
        ):
            mask: np.ndarray = compute_mask_indices(
                (batch, num_frames),
                None,
                options.pop("mask_prob"),
                options.pop("mask_length"),
                options.pop("selection"),
                min_masks=2,
                **options,
            )
        return mask if batch > 1 else mask[0]

    return draw


def main() -> None:
    """Write the file."""
    draw = fairseq_draws(0)
    frozen = {}
    for name, (policy, num_frames) in CASES.items():
        frozen[name] = statistics((draw(policy, num_frames) for _ in range(NUM_DRAWS)), num_frames)
    lines = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in frozen.items()]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
