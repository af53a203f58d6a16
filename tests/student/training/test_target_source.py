"""Keys of target sources: each thing that determines the targets changes them, and nothing else does."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from ray_distill.student.training import target_source
from ray_distill.student.training.target_source import (
    TargetSource,
    TeacherCache,
    cached_source,
    online_source,
    several_readers,
    several_sources,
)
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec, LayerSet
from ray_distill.teacher_cache.storage.shard_plan import Utterance
from ray_distill.teacher_cache.targets.student_frames import StudentFrames

OFTEN, SELDOM = (MaskPolicy(mask_prob=share, mask_length=4) for share in (0.6, 0.2))
DRAWS = MaskDraws(policy=OFTEN, policies=(SELDOM,), draws=3, seed=1)


def reader(spec: CacheSpec, **changes: Any) -> Any:
    """Return what `cached_source` needs of a reader of layer 1 under two draws of a cache with two sets of layers."""
    sets = [LayerSet(layers=(1,), state="1" * 64), LayerSet(layers=(2,), state="2" * 64)]
    store = SimpleNamespace(location=changes.pop("location", "/cache"))
    cache = SimpleNamespace(spec=spec, fingerprint="f" * 64, layer_sets=changes.pop("sets", sets), store=store)
    made = changes.pop("kind", SimpleNamespace)
    found = made.__new__(made)
    vars(found).update({"cache": cache, "failed": {}, "layers": (1,), "draws": 2} | changes)
    return found


def test_keys_of_cached_targets(cache_spec: Callable[..., CacheSpec]) -> None:
    spec = cache_spec(masks=DRAWS)
    key = cached_source(reader(spec)).key
    other_policy = MaskDraws(policy=SELDOM, policies=(SELDOM,), draws=3, seed=1)
    extended = MaskDraws(policy=OFTEN, policies=(SELDOM, OFTEN, SELDOM), draws=5, seed=1)
    first = LayerSet(layers=(1,), state="1" * 64)
    same = {
        "another place": cached_source(reader(spec, location="s3://bucket/cache")),
        "reasons": cached_source(reader(spec, failed={})),
        "more draws": cached_source(reader(spec.model_copy(update={"masks": extended}))),
        "fewer layers in the cache": cached_source(reader(spec.model_copy(update={"layers": (1,)}), sets=[first])),
        "a set that is not read": cached_source(reader(spec, sets=[first, LayerSet(layers=(2,), state="3" * 64)])),
    }
    assert {name: source.key == key for name, source in same.items()} == dict.fromkeys(same, True)
    others: Mapping[str, TargetSource] = {
        "failed": cached_source(reader(spec, failed={"a": "no audio"})),
        "fresh masks": cached_source(reader(spec), DRAWS),
        "other fresh masks": cached_source(reader(spec), other_policy),
        "layers": cached_source(reader(spec, layers=(2,))),
        "order of layers": cached_source(reader(spec, layers=(2, 1))),
        "both layers": cached_source(reader(spec, layers=(1, 2))),
        "state": cached_source(reader(spec, sets=[LayerSet(layers=(1,), state="4" * 64)])),
        "seed": cached_source(reader(spec.model_copy(update={"masks": DRAWS.model_copy(update={"seed": 2})}))),
        "policy": cached_source(reader(spec.model_copy(update={"masks": other_policy}))),
        "draws": cached_source(reader(spec, draws=1)),
        "codec": cached_source(reader(spec.model_copy(update={"codec": "fp16"}))),
        "averaged frames": cached_source(reader(spec, kind=StudentFrames, rule="average")),
        "nearest frames": cached_source(reader(spec, kind=StudentFrames, rule="nearest")),
    }
    assert len({key, *(source.key for source in others.values())}) == 1 + len(others)
    assert (
        cached_source(reader(spec, failed={"a": "no audio"})).key == cached_source(reader(spec, failed={"a": "x"})).key
    )


def test_keys_of_several_teachers(cache_spec: Callable[..., CacheSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = TargetSource("a", "1", "fa"), TargetSource("b", "2", "fb")
    both = several_sources({"x": a, "y": b})
    assert both.cache_fingerprint == {"x": "fa", "y": "fb"} and both.name == "a and b"
    assert several_sources({"z": a, "w": b}).key == both.key, "names are not part of it"
    assert several_sources({"x": b, "y": a}).key != both.key
    spec = cache_spec(masks=DRAWS)
    combined = SimpleNamespace(domains=None, ids=["u1", "u2"])

    monkeypatch.setattr(target_source, "open_reader", lambda *_, **options: reader(spec))
    for name in ("SeveralCaches", "CombinedCaches", "FreshMasks"):
        monkeypatch.setattr(target_source, name, lambda *_: combined)

    def key(*weights: float, fresh: bool = False, aggregate: Any = "heads") -> str:
        teachers = [TeacherCache(f"t{n}", "c", (1,), "clean_only", weight=weight) for n, weight in enumerate(weights)]
        return several_readers(teachers, DRAWS, fresh=fresh, aggregate=aggregate)[2].key

    heads = key(1.0, 2.0)
    assert heads == key(1.0, 3.0), "weights of losses are settings of the training, not of the targets"
    assert key(1.0, 2.0, aggregate="concatenate") == key(1.0, 3.0, aggregate="concatenate")
    found = [
        heads,
        key(1.0, 2.0, fresh=True),
        key(1.0, 2.0, aggregate="concatenate"),
        key(1.0, 2.0, aggregate="average"),
        key(1.0, 3.0, aggregate="average"),
    ]
    for domains in (["speech", "audio"], ["audio", "speech"]):
        combined.domains = domains
        found.append(key(1.0, 2.0))
    assert len(set(found)) == len(found)


def test_keys_of_online_targets() -> None:
    utterances = [Utterance(name, f"{name}.flac", 16_000, "train", name * 64) for name in "ab"]

    def key(targets: Any = None, frames: Any = None, **changes: Any) -> str:
        changed = [Utterance(**(vars(utterances[0]) | changes)), *utterances[1:]]
        return online_source("t.pt", "f00", (1, 2), MaskDraws(), targets, changed, frames).key

    assert key() == key(path="elsewhere.flac")
    others = [
        key("clean_only"),
        key("composite_only"),
        key("masked_everywhere"),
        key(frames="average"),
        key(frames="nearest"),
        key(split="validation"),
        key(sha256="c" * 64),
        key(id="c"),
    ]
    assert len({key(), *others}) == 1 + len(others)
