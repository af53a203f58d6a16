"""k-means clustering, seeded and deterministic on one machine.

k-means++ seeding (Arthur and Vassilvitskii 2007), then Lloyd's iterations. Sums are matrix products with one-hot matrices, since the
order of additions into an index differs from run to run on GPUs.

Shapes: N frames, D channels, K clusters.
"""

import torch
from torch import Tensor

_CHUNK = 8192
"""Number of frames that are compared with the centroids at a time."""
_SEEDING_FRAMES = 20
"""Frames per cluster that the seeding looks at. More frames improve the seeds little."""
_MIN_GAIN = 1e-4
"""Relative decrease of the squared error below which the iterations end."""


def nearest(frames: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (N,) int64 index of the centroid nearest to each frame, and the (N,) squared distances to it.

    Args:
        frames: (N, D) float32.
        centroids: (K, D) float32.
    """
    norms = centroids.square().sum(1)
    found, distances = [], []
    for part in torch.split(frames, _CHUNK):
        # The frame's own norm is the same for all centroids.
        score, index = torch.addmm(norms, part, centroids.T, alpha=-2).min(1)
        found.append(index)
        distances.append((score + part.square().sum(1)).clamp(min=0))
    if not found:
        return norms.new_zeros(0, dtype=torch.int64), norms.new_zeros(0)
    return torch.cat(found), torch.cat(distances)


def sums_by_index(frames: Tensor, index: Tensor, size: int) -> Tensor:
    """Return the (size, D) sums of the frames (N, D) that have each index (N,)."""
    total = frames.new_zeros(size, frames.shape[1])
    for part, chosen in zip(torch.split(frames, _CHUNK), torch.split(index, _CHUNK), strict=True):
        one_hot = torch.zeros(size, len(part), device=part.device)
        one_hot[chosen, torch.arange(len(part), device=part.device)] = 1
        total += one_hot @ part
    return total


def cluster(frames: Tensor, count: int, *, iterations: int = 20, seed: int = 0) -> Tensor:
    """Return the (count, D) centroids of frames (N, D), float32. Equal arguments give equal centroids on one machine.

    Args:
        frames: (N, D) float32, at least as many frames as clusters.
        count: Number of clusters K.
        iterations: Maximum number of Lloyd's iterations. They end earlier once the error hardly falls. Default 20.
        seed: Seed of the choice of the first centroids. Default 0.
    """
    assert len(frames) >= count
    generator = torch.Generator().manual_seed(seed)
    centroids = _seeds(frames, count, generator)
    before = float("inf")
    for _ in range(iterations):
        index, distances = nearest(frames, centroids)
        error = float(distances.double().sum())
        if error >= before * (1 - _MIN_GAIN):
            break
        before = error
        sizes = torch.bincount(index, minlength=count)
        centroids = sums_by_index(frames, index, count) / sizes.clamp(min=1)[:, None]
        if (empty := (sizes == 0).nonzero()[:, 0]).numel():
            # The frames that are represented worst become centroids of their own.
            centroids[empty] = frames[distances.argsort(descending=True, stable=True)[: len(empty)]]
    return centroids


def _seeds(frames: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Choose frames far from each other: each with a probability in proportion to its squared distance to those before."""
    chosen = torch.randperm(len(frames), generator=generator)[: max(1000, count * _SEEDING_FRAMES)]
    sample = frames[chosen.to(frames.device)]
    norms = sample.square().sum(1)
    seeds = [int(torch.randint(len(sample), (), generator=generator))]
    distances: Tensor | None = None
    for place in torch.rand(count - 1, generator=generator).tolist():
        last = sample[seeds[-1]]
        new = (norms - 2 * (sample @ last) + last.square().sum()).clamp(min=0)
        distances = new if distances is None else torch.minimum(distances, new)
        distances[seeds[-1]] = 0  # Rounding leaves a little.
        cumulative = distances.double().cumsum(0)
        seeds.append(int(torch.searchsorted(cumulative, cumulative[-1] * place, right=True).clamp(max=len(sample) - 1)))
    return sample[torch.tensor(seeds, device=frames.device)].clone()
