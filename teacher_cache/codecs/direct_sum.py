"""Direct-sum quantisation: a vector as the sum of one entry of each of N codebooks.

k2-fsa's ``multi_quantization`` (arXiv 2211.00508) trains such codebooks by gradient descent and refines the choice of entries.
Here the codebooks start as those of residual k-means, and are then improved by turns with the choice, as in additive quantisation
(Babenko and Lempitsky, CVPR 2014). Given the choice, the best codebooks are the solution of a linear least-squares problem. The
choice is a beam search, followed by improvements of one codebook's entry at a time.

Shapes: F frames, D channels, N codebooks of S entries, W candidates of the beam.
"""

import torch
from torch import Tensor

from ray_distill.teacher_cache.codecs.kmeans import cluster, nearest, sums_by_index

SIZE = 256
"""Entries of a codebook, one byte."""
_CHUNK = 1024
"""Number of frames whose entries are chosen at a time."""
_BEAM = 4
_PASSES = 2
"""Maximum number of times that each entry is improved after the beam search."""
_ROUNDS = 8
"""Times that codebooks and entries are improved by turns."""
_RIDGE = 0.03
"""Weight of the squared entries in the least-squares problem, relative to the mean number of frames that have an entry. It keeps
entries that few frames have small, and so lowers the error of other frames."""


def train_codebooks(frames: Tensor, count: int) -> Tensor:
    """Return ``count`` codebooks (N, SIZE, D) for frames (F, D), both float32, with the frames' mean near 0.

    Equal arguments give equal codebooks on one machine.

    Args:
        frames: At least SIZE frames.
        count: Number of codebooks N.
    """
    rest = frames
    codebooks, choice = [], []
    for number in range(count):
        codebooks.append(cluster(rest, SIZE, iterations=10, seed=number))
        index, _ = nearest(rest, codebooks[-1])
        choice.append(index)
        rest = rest - codebooks[-1][index]
    entries = torch.stack(choice, 1)
    books = torch.stack(codebooks)
    for _ in range(_ROUNDS if count > 1 else 0):
        books = best_codebooks(frames, entries, count)
        entries = choose_entries(frames, books)
    return books


def best_codebooks(frames: Tensor, entries: Tensor, count: int) -> Tensor:
    """Return the codebooks (N, SIZE, D) with the least squared error for frames (F, D) and chosen entries (F, N) int64."""
    products = torch.stack([sums_by_index(frames, entries[:, n], SIZE) for n in range(count)])
    normal = torch.empty(count, SIZE, count, SIZE, dtype=torch.float64, device=frames.device)
    for a in range(count):
        for b in range(a, count):
            together = torch.bincount(entries[:, a] * SIZE + entries[:, b], minlength=SIZE * SIZE)
            normal[a, :, b] = together.view(SIZE, SIZE)
            normal[b, :, a] = together.view(SIZE, SIZE).T
    matrix = normal.view(count * SIZE, count * SIZE)
    matrix.diagonal().add_(_RIDGE * len(frames) / SIZE)
    solution = torch.cholesky_solve(products.reshape(count * SIZE, -1).double(), torch.linalg.cholesky(matrix))
    return solution.float().view(count, SIZE, -1)


def sum_entries(codebooks: Tensor, entries: Tensor) -> Tensor:
    """Return the sums (..., D) of the chosen entries (..., N) int64 of codebooks (N, SIZE, D)."""
    total = codebooks[0][entries[..., 0]]
    for number in range(1, len(codebooks)):
        total = total + codebooks[number][entries[..., number]]
    return total


def choose_entries(frames: Tensor, codebooks: Tensor) -> Tensor:
    """Return the entries (F, N) int64 whose sums are close to the frames (F, D). The choice does not depend on other frames."""
    flat = codebooks.flatten(0, 1)
    twice = 2 * (flat @ flat.T).view(len(codebooks), SIZE, len(codebooks), SIZE)
    found = [_choose(part, codebooks, twice) for part in torch.split(frames, _CHUNK)]
    return torch.cat(found) if found else torch.zeros(0, len(codebooks), dtype=torch.int64, device=frames.device)


def _choose(frames: Tensor, codebooks: Tensor, twice: Tensor) -> Tensor:
    """Choose the entries of a chunk of frames, given twice all inner products (N, SIZE, N, SIZE) of entries.

    The squared error of a sum, without the norm of the frame, is the sum over its entries of their squared norms, minus twice their
    products with the frame, plus twice their products with each other.
    """
    count, rows = len(codebooks), torch.arange(len(frames), device=frames.device)
    alone = torch.stack(
        [twice[n, :, n].diagonal() / 2 - 2 * (frames @ codebooks[n].T) for n in range(count)], 1
    )  # (F, N, S)
    # Beam search: for each of the best choices of the first codebooks, all entries of the next one.
    chosen = torch.zeros(len(frames), 1, 0, dtype=torch.int64, device=frames.device)
    cost = torch.zeros(len(frames), 1, device=frames.device)
    for n in range(count):
        costs = cost[..., None] + alone[:, None, n]  # (F, W, S)
        for m in range(n):
            costs += twice[m, :, n][chosen[..., m]]
        width = min(_BEAM if n < count - 1 else 1, costs.shape[1] * SIZE)
        cost, best = costs.flatten(1).topk(width, largest=False)
        parents = torch.gather(chosen, 1, (best // SIZE)[..., None].expand(-1, -1, n))
        chosen = torch.cat([parents, (best % SIZE)[..., None]], 2)
    entries = chosen[:, 0]
    for _ in range(_PASSES if count > 1 else 0):
        before = entries.clone()
        for n in range(count):
            costs = alone[:, n].clone()
            for m in range(count):
                if m != n:
                    costs += twice[m, :, n][entries[:, m]]
            # An entry changes only if another one is better, so that ties do not alternate.
            value, index = costs.min(1)
            entries[:, n] = torch.where(value < costs[rows, entries[:, n]], index, entries[:, n])
        if torch.equal(entries, before):
            break
    return entries
