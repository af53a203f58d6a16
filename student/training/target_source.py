"""What a training gets its targets from, so that a resumed training can refuse other targets."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from ray_distill.student.objectives.several_teachers import Aggregate
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.storage.cache_spec import Targets
from ray_distill.teacher_cache.storage.shard_plan import Utterance
from ray_distill.teacher_cache.targets.combined_caches import CombinedCaches
from ray_distill.teacher_cache.targets.domains import Weight
from ray_distill.teacher_cache.targets.frame_rate import FrameRule
from ray_distill.teacher_cache.targets.fresh_masks import FreshMasks
from ray_distill.teacher_cache.targets.several_caches import SeveralCaches
from ray_distill.teacher_cache.targets.student_frames import SplitReader, StudentFrames, open_reader
from ray_distill.teacher_cache.targets.target_batch import TargetReader


@dataclass(frozen=True)
class TargetSource:
    """Source of a training's targets.

    Attributes:
        name: Description for messages.
        key: SHA-256 (hex) of all that determines the targets. Equal sources have equal keys wherever they are stored.
        cache_fingerprint: Fingerprint of the cache, or those of several teachers by their names; None for online targets.
    """

    name: str
    key: str
    cache_fingerprint: str | dict[str, str] | None = None


@dataclass(frozen=True)
class TeacherCache:
    """The cache of one of several teachers.

    Attributes:
        name: Name of the teacher.
        cache: Location of the cache.
        layers: Layers to learn from.
        targets: Targets to read, as `CacheSpec.targets`.
        audio: Location of the audio that the cache refers to. Default: the recorded place.
        local, local_gb: Folder of each node for copies of the cache's files, and its limit, as for `CacheReader`. Default: none.
        frames: How frames of another rate are mapped to those of the student; see `StudentFrames`. Default None.
        weight: Weight of the teacher in an average of several, or weights by domain. Default 1.
        labels: File with the domains of the utterances, for weights by domain; see `read_domains`. Default: none.
    """

    name: str
    cache: str
    layers: tuple[int, ...]
    targets: Targets
    audio: str | None = None
    local: str | None = None
    local_gb: float | None = None
    frames: FrameRule | None = None
    weight: Weight = 1.0
    labels: str | None = None


def cached_source(reader: SplitReader, fresh_masks: MaskDraws | None = None) -> TargetSource:
    """Return the source of targets from a cache.

    Layers and mask draws that the training does not read are not part of the key, so a cache may be extended. Utterances that the
    cache lacks are.

    Args:
        reader: Reader of the training split.
        fresh_masks: Masks that are drawn for each epoch. Default None: those of the cache.
    """
    cache = reader.cache
    spec = cache.spec
    # What is not there adds nothing, so that keys of earlier versions stay valid.
    further: dict[str, Any] = {"failed": sorted(reader.failed)} if reader.failed else {}
    if fresh_masks is not None:
        further["fresh_masks"] = fresh_masks.model_dump(mode="json")
    if isinstance(reader, StudentFrames):
        further["frames"] = reader.rule
    key = _digest(
        further
        | {
            "spec": spec.model_dump(mode="json", exclude={"layers", "masks"}),
            # With the SHA-256 of the codec's state.
            "sets": [s.model_dump(mode="json") for s in cache.layer_sets if set(s.layers) & set(reader.layers)],
            "layers": reader.layers,
            "seed": spec.masks.seed,
            "policies": [spec.masks.policy_of(draw).model_dump(mode="json") for draw in range(reader.draws or 0)],
        }
    )
    name = f"the cache with fingerprint {cache.fingerprint[:12]} at {cache.store.location}"
    return TargetSource(name, key, cache.fingerprint)


def several_sources(sources: Mapping[str, TargetSource]) -> TargetSource:
    """Return the source of the targets of several teachers.

    Args:
        sources: Source of each teacher's targets, by its name. Names are not part of the key, but the order is.
    """
    return TargetSource(
        " and ".join(source.name for source in sources.values()),
        _digest([source.key for source in sources.values()]),
        {name: str(source.cache_fingerprint) for name, source in sources.items()},
    )


def several_readers(
    teachers: Sequence[TeacherCache],
    masks: MaskDraws,
    *,
    fresh: bool,
    aggregate: Aggregate = "heads",
) -> tuple[TargetReader, TargetReader, TargetSource]:
    """Return the readers of the training and the validation split of several teachers' caches, and their source.

    Args:
        teachers: Cache of each teacher.
        masks: Masks of the training.
        fresh: Whether masks are drawn for each epoch.
        aggregate: ``heads`` gives the targets of each teacher; ``average`` and ``concatenate`` give one for all.

    Raises:
        CacheError: A cache lacks something, or two don't fit together; see `SeveralCaches`.
    """
    options: dict[str, dict[str, Any]] = {
        t.name: {"audio": t.audio, "local": t.local, "local_gb": t.local_gb, "frames": t.frames} for t in teachers
    }
    by_name = {
        t.name: open_reader(t.cache, "train", t.layers, masks.draws, targets=t.targets, **options[t.name])
        for t in teachers
    }
    held_out = {t.name: open_reader(t.cache, "validation", t.layers, **options[t.name]) for t in teachers}
    weights = [cast(float, t.weight) for t in teachers] if aggregate == "average" else None
    by_domain: dict[str, Weight] = {t.name: t.weight for t in teachers if isinstance(t.weight, dict)}
    labels = next((Path(t.labels) for t in teachers if t.labels is not None), None)
    train, validation = (
        SeveralCaches(readers, by_domain, labels) if aggregate == "heads" else CombinedCaches(readers, weights)
        for readers in (by_name, held_out)
    )
    drawn = masks if fresh else None
    source = several_sources({name: cached_source(reader, drawn) for name, reader in by_name.items()})
    if aggregate != "heads":
        source = replace(source, key=_digest([source.key, aggregate, weights]))
    if train.domains is not None:
        digest = hashlib.sha256(source.key.encode())
        for pair in zip(train.ids, train.domains, strict=True):
            digest.update(json.dumps(pair).encode())
        source = replace(source, key=digest.hexdigest())
    if fresh:
        return FreshMasks(train, masks), FreshMasks(validation, masks), source
    return train, validation, source


def online_source(
    teacher: str,
    fingerprint: str,
    layers: Sequence[int],
    masks: MaskDraws,
    targets: Targets | None,
    utterances: Sequence[Utterance],
    frames: FrameRule | None = None,
) -> TargetSource:
    """Return the source of online targets.

    Args:
        teacher: The teacher's checkpoint.
        fingerprint: Fingerprint of the teacher.
        layers: Layers to learn from.
        masks: Mask draws.
        targets: Kind of targets, as `CacheSpec.targets`; None for the default.
        utterances: Utterances of both splits.
        frames: How frames of another rate are mapped, if that was chosen. Default None.
    """
    corpus = _digest(sorted((u.split, u.id, u.sha256) for u in utterances))
    mask_key = _digest(masks.model_dump(mode="json"))
    name = (
        f"layers {list(layers)} of teacher {teacher} with fingerprint {fingerprint[:12]}, masks with fingerprint "
        f"{mask_key[:12]} and {len(utterances)} utterances with fingerprint {corpus[:12]}"
    )
    return TargetSource(
        name, _digest([fingerprint, list(layers), mask_key, targets, corpus, *([frames] if frames else [])])
    )


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
