"""Verification of a cache: its files against their commit records, and its content against the teacher."""

import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ray_distill.teacher_cache.codecs import relative_error
from ray_distill.teacher_cache.maintenance.verified import part_digests, remember, verified_parts
from ray_distill.teacher_cache.precision import Precision
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.reading.audio_place import AUDIO_ONLY, holder_of, refuse_place
from ray_distill.teacher_cache.reading.known_commits import KnownCommits
from ray_distill.teacher_cache.reading.source_rows import missing_sources
from ray_distill.teacher_cache.storage.cache import CACHE_JSON, COPIES, DATA_FOLDERS, PLAN, Cache, ShardFile, state_name
from ray_distill.teacher_cache.storage.cache_spec import CacheAccessError, CacheError, CacheSpec, parts_of
from ray_distill.teacher_cache.storage.create import is_growth
from ray_distill.teacher_cache.storage.failed_utterances import check_failed
from ray_distill.teacher_cache.storage.shard_plan import Shard
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.teachers import Teacher

_THREADS = 8
DEEP_TOLERANCE = 1.5
"""Allowed error of a layer, relative to the error of its codec on held-out utterances."""
_ROUNDING: dict[Precision, float] = {"fp32": 1e-3, "fp16": 4e-3, "bf16": 3e-2}
"""Allowed error in addition, because batches other than those of the build round differently: 4 machine epsilons, at least 0.1 %."""


@dataclass(frozen=True)
class Problem:
    """A problem of one file.

    Attributes:
        name: Name of the file, relative to the cache.
        text: One sentence that names the file and the problem.
        kind: ``identity`` (one of the two copies of a record), ``shard`` (a shard file or its commit record), ``foreign``
            (a file that does not belong to the cache, or a folder in the place of a file), ``conflict`` (``cache.json``
            and its copy are both intact but describe different caches), or ``audio`` (of the audio to which the cache refers).
        file: The shard file, if the kind is ``shard``.
        unfinished: Whether the shard file was not committed, as after an interrupted build.
    """

    name: str
    text: str
    kind: Literal["identity", "shard", "foreign", "conflict", "audio"]
    file: ShardFile | None = None
    unfinished: bool = False


def verify_cache(
    location: str | Path | Store,
    *,
    checksums: bool = True,
    needed: CacheSpec | None = None,
    audio: str | None = None,
    memory: Literal["none", "write", "use"] = "none",
) -> list[Problem]:
    """Check every file of a cache against its commit record and the plan.

    If the cache refers to audio elsewhere, that is checked only for its fingerprint and the sizes of its files, and a corpus only for
    its files being there, unless there is a need: `verify_audio` checks it.

    Where the bytes of a shard file are not read, its commit record is not read either if the manifest repeats it.

    Args:
        location: Location of the cache.
        checksums: Whether to read every byte and compare SHA-256. Otherwise only sizes and records are checked.
        needed: Check only the shard files that this need reads, and ignore foreign files, because another run may be
            extending the cache. Default: check everything.
        audio: Where the audio is that the cache refers to, as for `CacheReader`. Default: the recorded place.
        memory: With checksums, ``write`` notes in the cache which parts are sound, and ``use`` also does not read the shard files of
            a part again that was sound before, if no file of it has changed since. Default: ``none``.

    Returns:
        The problems found. Empty for an intact cache.

    Raises:
        CacheError: If there is no cache, both copies of a record that identifies it are missing or damaged, a limit is exceeded,
            or a file is a link or can't be read.
    """
    store = location if isinstance(location, Store) else Store(location)
    cache, problems = _identity(store, growing=needed is not None)
    if cache is None or any(problem.kind == "conflict" for problem in problems):
        return problems
    files = {file: shard for shard in cache.shards for file in cache.files(shard, needed)}
    entries = store.entries()
    commits = KnownCommits(cache, entries)
    digests: dict[str, str] = {}
    if checksums and memory != "none":
        digests = part_digests(store, entries, {file.part.folder for file in files})
    sound = verified_parts(store, digests) if memory == "use" else set()

    def check(file: ShardFile) -> Problem | None:
        whole = checksums and file.part.folder not in sound
        return _check_file(cache, file, files[file], commits, whole)

    with ThreadPoolExecutor(_THREADS) as pool:
        problems += [problem for problem in pool.map(check, files) if problem is not None]
    if checksums and memory != "none":
        unsound = {problem.file.part.folder for problem in problems if problem.file is not None}
        remember(store, digests, {*digests} - unsound, unsound)
    if needed is not None:
        return problems
    known = {file.name for file in files} | {file.commit for file in files}
    problems += _obstacles(store, known)
    problems += [
        Problem(name, f"{store.at(name)} does not belong to the cache", "foreign")
        for name in entries
        if name.partition("/")[0] in DATA_FOLDERS and name not in known
    ]
    return problems + verify_audio(cache, audio, checksums=False)


def verify_audio(cache: Cache, location: str | None = None, *, checksums: bool = True) -> list[Problem]:
    """Check the files with the audio to which a cache refers. No problems if it embeds its audio.

    If the audio is read from the corpus, its files are looked for. Their content is checked whenever it is read.

    Args:
        cache: The cache.
        location: Where the audio is, as for `CacheReader`. Default: the recorded place.
        checksums: As for `verify_cache`, whose memory is used.
    """
    if cache.spec.embeds_audio:
        refuse_place(cache.store, cache.spec, location)
        return []
    try:
        if cache.spec.audio == "source":
            lost = missing_sources(cache, location)
            return [] if lost is None else [Problem("audio", lost, "audio")]
        holder = holder_of(cache, location)
        problems = verify_cache(holder.store, checksums=checksums, needed=AUDIO_ONLY, memory="use")
    except CacheAccessError:
        raise
    except CacheError as error:
        return [Problem("audio", str(error), "audio")]
    advice = f"the audio of the cache; `ray-distill cache repair {holder.store.location}` restores it"
    return [Problem(problem.name, f"{problem.text} ({advice})", "audio") for problem in problems]


def _identity(store: Store, growing: bool) -> tuple[Cache | None, list[Problem]]:
    """Open a cache from an intact copy of its identity and return it with the problems of both copies.

    The cache is None if its plan is damaged. While a cache is extended, one copy may be newer than the other and name codec
    states that the other does not.
    """
    cache: Cache | None = None
    errors = []
    for name, opened in ((CACHE_JSON, Cache.open), (f"{COPIES}/{CACHE_JSON}", Cache.open_copy)):
        try:
            found = opened(store)
        except CacheAccessError:
            raise
        except CacheError as error:
            errors.append(Problem(name, str(error), "identity"))
            continue
        if cache is not None and found.record != cache.record:
            if not is_growth(cache, found) or (not growing and _has_files_of(found, cache)):
                return cache, [Problem(name, _conflict(store), "conflict")]
            if not growing:
                errors.append(Problem(name, f"{store.at(name)} differs from {CACHE_JSON}", "identity"))
        cache = cache or found
    if cache is None:
        same = str(errors[0].text) == str(errors[1].text)
        raise CacheError(
            str(errors[0].text) if same else f"{errors[0].text}; its copy can't be used either: {errors[1].text}"
        )
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
            bad.append(Problem(name, f"{store.at(name)} does not belong to the cache", "foreign"))
    bad += _obstacles(store, (f"{folder}{name}" for name in known for folder in ("", f"{COPIES}/")))
    return (None if any(problem.name == PLAN for problem in bad) else cache), errors + bad


def _has_files_of(growth: Cache, cache: Cache) -> bool:
    """Return whether there are files of an extension, which an interrupted `grow_cache` does not leave."""
    folders, known = (
        {part.folder for part in parts_of(found.spec, len(found.layer_sets), "train")} for found in (growth, cache)
    )
    return any(cache.store.names(f"commits/{folder}") for folder in folders - known)


def _conflict(store: Store) -> str:
    return (
        f"{store.at(CACHE_JSON)} and its copy {store.at(f'{COPIES}/{CACHE_JSON}')} are both intact but describe different caches; "
        "move the wrong one away and repair the cache again"
    )


def _obstacles(store: Store, names: Iterable[str]) -> list[Problem]:
    """Return a problem for each folder in the place of a file, and for each file in the place of a folder."""
    found = {obstacle for name in names if (obstacle := store.obstacle(name)) is not None}
    return [
        Problem(name, f"{store.at(name)} stands in the place of a file or folder of the cache", "foreign")
        for name in sorted(found)
    ]


def _check_file(cache: Cache, file: ShardFile, shard: Shard, commits: KnownCommits, checksums: bool) -> Problem | None:
    store, entries = cache.store, commits.entries
    try:
        record = cache.commit_of(file) if checksums else commits.record(file)
    except CacheAccessError:
        raise
    except CacheError as error:
        return Problem(file.commit, str(error), "shard", file)
    if record is None:
        text = f"{store.at(file.commit)} is missing, so its shard file is not finished"
        return Problem(file.commit, text, "shard", file, unfinished=True)
    try:
        check_failed(record, list(shard.utterances.ids()))
    except ValueError as error:
        return Problem(file.commit, f"{store.at(file.commit)} does not fit the plan ({error})", "shard", file)
    if file.name not in entries:
        return Problem(file.name, f"{store.at(file.name)} is missing", "shard", file)
    if entries[file.name].size != record["bytes"]:
        return Problem(
            file.name,
            f"{store.at(file.name)} has {entries[file.name].size} bytes, but {record['bytes']} bytes were committed",
            "shard",
            file,
        )
    if checksums and store.sha256(file.name) != record["sha256"]:
        return Problem(
            file.name, f"{store.at(file.name)} does not match its commit record (SHA-256 differs)", "shard", file
        )
    return None


@dataclass(frozen=True)
class DeepCheck:
    """Error of one layer over the sampled utterances.

    Attributes:
        layer: Number of the layer, 1-based.
        draw: 0-based mask draw, or None for the clean pass.
        error: Relative RMS error that was measured.
        allowed: Largest error that the codec and rounding explain.
    """

    layer: int
    draw: int | None
    error: float
    allowed: float

    @property
    def good(self) -> bool:
        """Whether the error is at most the allowed one."""
        return self.error <= self.allowed


def verify_deep(
    location: str | Path, teacher: Teacher, *, sample: int = 8, seed: int = 0, audio: str | None = None
) -> list[DeepCheck]:
    """Run the teacher again on a random sample of training utterances and compare its outputs with the cached ones.

    Args:
        location: Location of the cache.
        teacher: The teacher that the cache was made with.
        sample: Number of utterances. Default 8.
        seed: Seed of their choice. Default 0.
        audio: Where the audio is that the cache refers to, as for `CacheReader`. Default: the recorded place.

    Returns:
        One check per layer, for the clean pass and every draw.

    Raises:
        CacheError: If the teacher is not the cache's, or a file is damaged.
    """
    reader = CacheReader(location, "train", audio=audio)
    cache = reader.cache
    cache.check_teacher(teacher.name, teacher.fingerprint)
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
        pairs = [_teacher_and_cached(reader, teacher, index, draw) for index in indices]
        errors = relative_error(torch.cat([truth for truth, _ in pairs]), torch.cat([cached for _, cached in pairs]))
        checks += [
            DeepCheck(layer, draw, float(error), DEEP_TOLERANCE * expected[layer] + _ROUNDING[cache.spec.precision])
            for layer, error in zip(reader.layers, errors, strict=True)
        ]
    return checks


def _teacher_and_cached(
    reader: CacheReader, teacher: Teacher, index: int, draw: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (T, L, D) targets of an utterance from the teacher and from the cache."""
    batch = reader.read([index], draw).to(teacher.device)
    waveforms, lengths, mask, layers = batch.waveforms, batch.lengths, batch.frame_mask, reader.layers
    precision = reader.cache.spec.precision
    kind = reader.cache.spec.targets
    if kind == "clean_only":
        mask = None
    targets = teacher(waveforms, lengths, mask, layers, precision=precision)
    if mask is not None and kind != "masked_everywhere":
        clean = teacher(waveforms, lengths, layers=layers, precision=precision)
        targets = torch.where(mask[:, None, :, None], clean, targets)
    return targets[0].transpose(0, 1).cpu(), batch.targets[0].transpose(0, 1).cpu()
