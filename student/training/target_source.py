"""What a training gets its targets from, so that a resumed training can refuse other targets."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache_spec import Targets
from ray_distill.teacher_cache.storage.shard_plan import Utterance


@dataclass(frozen=True)
class TargetSource:
    """Source of a training's targets.

    Attributes:
        name: Description for messages.
        key: SHA-256 (hex) of all that determines the targets. Equal sources have equal keys wherever they are stored.
        cache_fingerprint: Fingerprint of the cache; None for online targets.
    """

    name: str
    key: str
    cache_fingerprint: str | None = None


def cached_source(reader: CacheReader, fresh_masks: MaskDraws | None = None) -> TargetSource:
    """Return the source of targets from a cache.

    Layers and mask draws that the training does not read are not part of the key, so a cache may be extended. Utterances that the
    cache lacks are.

    Args:
        reader: Reader of the training split.
        fresh_masks: Masks that are drawn for each epoch. Default None: those of the cache.
    """
    cache = reader.cache
    spec = cache.spec
    failed: dict[str, Any] = (
        {"failed": sorted(reader.failed)} if reader.failed else {}
    )  # Keys of earlier versions stay valid.
    if fresh_masks is not None:
        failed["fresh_masks"] = fresh_masks.model_dump(mode="json")
    key = _digest(
        failed
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


def online_source(
    teacher: str,
    fingerprint: str,
    layers: Sequence[int],
    masks: MaskDraws,
    targets: Targets | None,
    utterances: Sequence[Utterance],
) -> TargetSource:
    """Return the source of online targets.

    Args:
        teacher: The teacher's checkpoint.
        fingerprint: Fingerprint of the teacher.
        layers: Layers to learn from.
        masks: Mask draws.
        targets: Kind of targets, as `CacheSpec.targets`; None for the default.
        utterances: Utterances of both splits.
    """
    corpus = _digest(sorted((u.split, u.id, u.sha256) for u in utterances))
    mask_key = _digest(masks.model_dump(mode="json"))
    name = (
        f"layers {list(layers)} of teacher {teacher} with fingerprint {fingerprint[:12]}, masks with fingerprint "
        f"{mask_key[:12]} and {len(utterances)} utterances with fingerprint {corpus[:12]}"
    )
    return TargetSource(name, _digest([fingerprint, list(layers), mask_key, targets, corpus]))


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
