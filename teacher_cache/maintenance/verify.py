"""Is a cache whole and unaltered, and does it hold what the teacher says?"""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ray_distill.teacher_cache.build.shard_writer import hidden_states
from ray_distill.teacher_cache.codecs import relative_error
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache import CACHE_JSON, COPIES, DATA_FOLDERS, PLAN, Cache, ShardFile, state_name
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.teachers import Teacher

_THREADS = 8
DEEP_TOLERANCE = 1.5
"""A layer may have this many times the error that its codec was measured to have on held-out utterances, plus 0.1 %."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file.

    Attributes:
        name: of the file, below the cache's folder.
        text: one sentence that names it.
        kind: ``identity`` (one of the two copies of a record), ``shard`` (a shard file or its commit) or ``stranger``.
        file: the shard file concerned.
    """

    name: str
    text: str
    kind: str
    file: ShardFile | None = None


def verify_cache(
    location: str | Path | Store, *, checksums: bool = True, needed: CacheSpec | None = None
) -> list[Problem]:
    """Checks every file of a cache against its commit record and the plan.

    Args:
        location: of the cache.
        checksums: read every byte and compare SHA-256; else sizes and records only.
        needed: look only at the shard files that this need reads, and at no strangers: another run may be adding to the cache.
            Default all.

    Returns:
        The problems; empty for a sound cache.

    Raises:
        CacheError: there is no cache, or nothing is left to tell what it was.
    """
    store = location if isinstance(location, Store) else Store(location)
    cache, problems = _identity(store, growing=needed is not None)
    if cache is None:
        return problems
    files = [file for shard in cache.shards for file in cache.files(shard, needed)]
    sizes = store.sizes()

    def check(file: ShardFile) -> Problem | None:
        return _check_file(cache, file, sizes, checksums)

    with ThreadPoolExecutor(_THREADS) as pool:
        problems += [problem for problem in pool.map(check, files) if problem is not None]
    if needed is not None:
        return problems
    known = {file.name for file in files} | {file.commit for file in files}
    problems += [
        Problem(name, f"{store.at(name)} does not belong to the cache", "stranger")
        for name in sizes
        if name.partition("/")[0] in DATA_FOLDERS and name not in known
    ]
    return problems


def _identity(store: Store, growing: bool) -> tuple[Cache | None, list[Problem]]:
    """The cache, by whichever copy of its identity is sound, and what is wrong with the copies.

    Without a sound plan the cache is None: the problems say all that can be said. Of a growing cache one copy may be
    ahead of the other, with states that it alone knows.
    """
    cache: Cache | None = None
    errors = []
    for name, opened in ((CACHE_JSON, Cache.open), (f"{COPIES}/{CACHE_JSON}", Cache.open_copy)):
        try:
            found = opened(store)
            if cache is not None and found.record != cache.record and not growing:
                errors.append(Problem(name, f"{store.at(name)} differs from {CACHE_JSON}", "identity"))
            cache = cache or found
        except CacheError as error:
            errors.append(Problem(name, str(error), "identity"))
    if cache is None:
        raise CacheError(f"{errors[0].text}; and its copy is no better: {errors[1].text}")
    expected = {PLAN: cache.record["plan"]}
    expected |= {state_name(n): s.state for n, s in enumerate(cache.layer_sets) if s.state is not None}
    bad = [
        Problem(name, f"{store.at(name)} is missing or damaged", "identity")
        for original, sha256 in expected.items()
        for name in (original, f"{COPIES}/{original}")
        if store.size(name) is None or store.sha256(name) != sha256
    ]
    known = {CACHE_JSON, *expected}
    for name in () if growing else (*store.names(COPIES), *store.names("codec")):
        if name.removeprefix(f"{COPIES}/") not in known:
            bad.append(Problem(name, f"{store.at(name)} does not belong to the cache", "stranger"))
    return (None if any(problem.name == PLAN for problem in bad) else cache), errors + bad


def _check_file(cache: Cache, file: ShardFile, sizes: dict[str, int], checksums: bool) -> Problem | None:
    store = cache.store
    try:
        record = cache.commit_of(file)
    except CacheError as error:
        return Problem(file.commit, str(error), "shard", file)
    if record is None:
        return Problem(
            file.commit, f"{store.at(file.commit)} is missing: the file it is for is not finished", "shard", file
        )
    if file.name not in sizes:
        return Problem(file.name, f"{store.at(file.name)} is missing", "shard", file)
    if sizes[file.name] != record["bytes"]:
        return Problem(
            file.name,
            f"{store.at(file.name)} has {sizes[file.name]} bytes where {record['bytes']} were committed",
            "shard",
            file,
        )
    if checksums and store.sha256(file.name) != record["sha256"]:
        return Problem(file.name, f"{store.at(file.name)} is not as committed (SHA-256 differs)", "shard", file)
    return None


@dataclass(frozen=True)
class DeepCheck:
    """One layer's error over the sampled utterances: what was found, and the most that its codec explains."""

    layer: int
    draw: int | None
    error: float
    allowed: float

    @property
    def good(self) -> bool:
        """Whether the codec explains the error."""
        return self.error <= self.allowed


def verify_deep(location: str | Path, teacher: Teacher, *, sample: int = 8, seed: int = 0) -> list[DeepCheck]:
    """Runs the teacher again on a seeded sample of training utterances and compares what the cache holds of them.

    Args:
        location: of the cache.
        teacher: the one it was made with.
        sample: utterances.
        seed: of their choice.

    Returns:
        For the clean pass and every draw, each layer's relative RMS error and the most that the codec's own accounts for.

    Raises:
        CacheError: another teacher, or damage that the reader meets.
    """
    reader = CacheReader(location, "train")
    cache = reader.cache
    if teacher.fingerprint != cache.spec.teacher:
        raise CacheError(f"{teacher.name} is not the teacher that the cache at {location} was made with")
    indices = sorted(random.Random(seed).sample(range(len(reader.ids)), min(sample, len(reader.ids))))
    expected = {
        layer: float(error)
        for number in range(len(cache.layer_sets))
        for codec in cache.codecs(number)
        for layer, error in zip(codec.layers, codec.error, strict=True)
    }
    checks = []
    draws: list[int | None] = [*range(reader.draws or 0)]
    if cache.spec.targets != "composite_only" or not draws:
        draws.insert(0, None)
    for draw in draws:
        pairs = [_both(reader, teacher, index, draw) for index in indices]
        errors = relative_error(torch.cat([truth for truth, _ in pairs]), torch.cat([cached for _, cached in pairs]))
        checks += [
            DeepCheck(layer, draw, float(error), DEEP_TOLERANCE * expected[layer] + 1e-3)
            for layer, error in zip(reader.layers, errors, strict=True)
        ]
    return checks


def _both(reader: CacheReader, teacher: Teacher, index: int, draw: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, L, D) as the teacher gives it and as the cache does."""
    batch = reader.read([index], draw).to(teacher.device)
    layers = [layer - 1 for layer in reader.layers]
    precision = reader.cache.spec.precision
    truth = hidden_states(teacher, precision, batch.waveforms, batch.lengths, None)[:, layers]
    if batch.frame_mask is not None and reader.cache.spec.targets != "clean_only":
        masked = hidden_states(teacher, precision, batch.waveforms, batch.lengths, batch.frame_mask)[:, layers]
        truth = torch.where(batch.frame_mask[:, None, :, None], truth, masked)
    return truth[0].transpose(0, 1).cpu(), batch.targets[0].transpose(0, 1).cpu()
