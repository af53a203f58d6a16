"""What a cache is: everything that decides its content, and how it may grow."""

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import pydantic

from ray_distill.teacher_cache.codecs import check_codec
from ray_distill.teacher_cache.masks import MaskPolicy

SCHEMA_VERSION = 2

Targets = Literal["clean_and_masked", "composite_only", "clean_only"]


class CacheError(ValueError):
    """A cache that is not there, not whole, or not what was asked for; the message is for the user."""


class MaskDraws(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Which random masks training sees.

    Attributes:
        policy: how spans are drawn.
        policies: of the first draws, one each, where they are to differ: a schedule of mask_prob over draws. Default none.
        draws: number of independent masks of every utterance; 0 trains without masks. Default 1.
        seed: of all of them. Default 0.
    """

    policy: MaskPolicy = MaskPolicy()
    policies: tuple[MaskPolicy, ...] = ()
    draws: int = pydantic.Field(default=1, ge=0)
    seed: int = 0

    def policy_of(self, draw: int) -> MaskPolicy:
        """The policy of a 0-based draw."""
        return self.policies[draw] if draw < len(self.policies) else self.policy

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Self:
        if len(self.policies) > self.draws:
            raise ValueError(
                f"there are {len(self.policies)} policies for {self.draws} draws; give at most one for each"
            )
        return self


class CacheSpec(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Everything that decides a cache's content, but for what a codec learns.

    Attributes:
        teacher: the teacher's fingerprint.
        num_layers: layers the teacher has.
        dim: the teacher's width D.
        layers: 1-based layers kept, ascending.
        masks: mask draws kept.
        targets: ``clean_and_masked`` (default) keeps the clean pass whole and, for each draw, the masked pass at unmasked
            frames: what all draws need. ``composite_only`` keeps one ready tensor for each draw: smaller with a single draw.
            ``clean_only`` keeps the clean pass alone: targets are clean at unmasked frames too, an ablation.
        codec: name of the codec.
        corpus: fingerprint of the corpus (ids, samples, splits).
        shard_seconds: audio per shard the plan aims at.
        batch_seconds: padded audio per teacher batch (it decides rounding, hence bytes).
        precision: of the teacher's arithmetic: ``fp32``, ``fp16`` or ``bf16``.
        audio: ``flac`` or ``pcm``, as the waveforms are embedded: a third smaller, or faster to read.
        schema_version: of the files.
    """

    teacher: str
    num_layers: int
    dim: int
    layers: tuple[int, ...]
    masks: MaskDraws
    targets: Targets = "clean_and_masked"
    codec: Annotated[str, pydantic.AfterValidator(check_codec)]
    corpus: str
    shard_seconds: float
    batch_seconds: float
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    audio: Literal["flac", "pcm"] = "flac"
    schema_version: int = SCHEMA_VERSION

    def differences(self, needed: "CacheSpec") -> list[str]:
        """What keeps this cache, even if it grows, from serving a need; one readable phrase each, ``name: has -> needed``.

        Fewer layers and draws are served as they are, and clean targets where there are masked ones too; more layers and
        draws can be added. Only of ``composite_only`` draws can't be taken away or added altogether: its clean training
        targets are there exactly where it has no draws.
        """
        mine, theirs = (
            spec.model_dump(mode="json", exclude={"layers": True, "masks": True}) for spec in (self, needed)
        )
        if (self.targets, needed.targets) == ("clean_and_masked", "clean_only"):
            theirs["targets"] = self.targets
        if self.targets == needed.targets == "composite_only" and (self.masks.draws == 0) != (needed.masks.draws == 0):
            mine["masks.draws"], theirs["masks.draws"] = self.masks.draws, needed.masks.draws
        for draw in range(min(self.masks.draws, needed.masks.draws)):
            for spec, flat in ((self, mine), (needed, theirs)):
                flat["masks.seed"] = spec.masks.seed
                flat |= _flatten(spec.masks.policy_of(draw).model_dump(mode="json"), f"masks.policy_of_draw_{draw}.")
        return [
            f"{key}: {mine.get(key)!r} -> {theirs.get(key)!r}"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]

    def grown(self, needed: "CacheSpec") -> "CacheSpec":
        """This spec with what a need adds: layers, draws."""
        masks = self.masks
        if needed.masks.draws > masks.draws:
            policies = tuple(
                (masks if draw < masks.draws else needed.masks).policy_of(draw) for draw in range(needed.masks.draws)
            )
            same = all(policy == needed.masks.policy for policy in policies)
            masks = needed.masks.model_copy(update={"policies": () if same else policies})
        layers = tuple(sorted({*self.layers, *needed.layers}))
        return self.model_copy(update={"masks": masks, "layers": layers})


class LayerSet(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Layers that were cached together; those added later are a set of their own, in files of their own.

    Attributes:
        layers: 1-based, ascending.
        state: SHA-256 of the codec's state file; None for a codec that learns nothing.
    """

    layers: tuple[int, ...]
    state: str | None = None


@dataclass(frozen=True)
class Part:
    """A kind of shard file: one pass (or the composite) of one set of layers.

    Attributes:
        kind: ``clean``, ``masked`` or ``composite``.
        layer_set: number of the set of layers. The clean part of set 0 also holds the audio.
        draw: 0-based, of the masks; None for ``clean``.
        features: whether it holds any. False where the clean part of ``composite_only`` carries the audio alone.
    """

    kind: Literal["clean", "masked", "composite"]
    layer_set: int = 0
    draw: int | None = None
    features: bool = True

    @property
    def folder(self) -> str:
        """``clean``, ``masked/draw=0``, ``clean/set=1``, ..."""
        draw = "" if self.draw is None else f"/draw={self.draw}"
        return f"{self.kind}{draw}" + (f"/set={self.layer_set}" if self.layer_set else "")


def parts_of(spec: CacheSpec, layer_sets: int, split: str) -> list[Part]:
    """All parts that shards of a split have. The validation split has the clean pass alone: it is validated unmasked."""
    parts = []
    for number in range(layer_sets):
        composite = spec.targets == "composite_only" and split == "train" and spec.masks.draws > 0
        if number == 0 or not composite:
            parts.append(Part("clean", number, features=not composite))
        if split == "train" and spec.targets != "clean_only":
            kind: Literal["masked", "composite"] = "composite" if composite else "masked"
            parts += [Part(kind, number, draw) for draw in range(spec.masks.draws)]
    return parts


def fingerprint(spec: CacheSpec, layer_sets: tuple[LayerSet, ...]) -> str:
    """SHA-256 (hex): two caches with one fingerprint are interchangeable."""
    return _digest({"spec": spec.model_dump(mode="json"), "sets": [s.model_dump(mode="json") for s in layer_sets]})


def content_key(spec: CacheSpec, layer_set: LayerSet, part: Part, shard: int, split: str) -> str:
    """SHA-256 (hex) of all that decides a file's content: it stays the same when the cache grows by layers or draws."""
    tree = spec.model_dump(mode="json", exclude={"layers": True, "masks": True})
    tree |= {"set": layer_set.model_dump(mode="json"), "part": part.folder, "shard": shard, "split": split}
    if spec.targets == "composite_only" and split == "train" and part.kind == "clean" and part.features:
        # Programs before this key left the features out there, under the same key: repair makes such files again.
        tree["features"] = True
    if part.draw is not None:
        tree |= {"policy": spec.masks.policy_of(part.draw).model_dump(mode="json"), "seed": spec.masks.seed}
    return _digest(tree)


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
