"""The specification of a cache: what determines its content, and how it may be extended."""

import hashlib
import json
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

import pydantic

from ray_distill.teacher_cache.codecs import check_codec
from ray_distill.teacher_cache.embedded_audio import DECODERS, AudioFormat
from ray_distill.teacher_cache.frames import FRAME_RATE
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.precision import Precision

SCHEMA_VERSION = 2
DEFAULT_BATCH_SECONDS = 120.0
"""Padded audio per teacher batch, in seconds."""

Targets = Literal["clean_and_masked", "masked_everywhere", "composite_only", "clean_only"]
_ALSO_SERVES: dict[Targets, tuple[Targets, ...]] = {
    "clean_and_masked": ("clean_only",),
    "masked_everywhere": ("clean_and_masked", "clean_only"),
}
_OF_AUDIO = ("layers", "corpus", "shard_seconds", "audio", "schema_version")
"""The settings of an audio store. The others describe a teacher, which it lacks."""
_WITHOUT_TEACHER = {
    "teacher": "",
    "num_layers": 0,
    "dim": 0,
    "masks": {"draws": 0},
    "codec": "fp32",
    "batch_seconds": 0,
}


class CacheError(ValueError):
    """A cache that is missing, damaged, incomplete or made for something else. The message is meant for the user."""


class CacheAccessError(CacheError):
    """A file that may not be read or written: a link, a lack of permission, or a store that fails. It does not mean damage."""


class CacheSpec(pydantic.BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Everything that determines the content of a cache, except for the codec's state.

    An audio store is a cache without layers. It holds the audio of a corpus, to which caches refer.
    """

    teacher: str
    """Fingerprint of the teacher."""
    num_layers: int
    """Number of layers of the teacher."""
    dim: int
    """Width D of the teacher."""
    layers: tuple[int, ...]
    """Cached layers, 1-based, ascending."""
    masks: MaskDraws
    """Cached mask draws."""
    targets: Targets = "clean_and_masked"
    """Kind of targets. ``clean_and_masked`` stores the whole clean pass and, per draw, the masked pass at unmasked frames,
    which is enough for the targets of every draw. ``composite_only`` stores one complete tensor per draw, which is smaller
    for a single draw. ``clean_only`` stores the clean pass only, so targets are clean at unmasked frames too (an
    ablation). ``masked_everywhere`` stores the clean pass and, per draw, the whole masked pass, which is the target at masked
    frames too (an ablation); the files serve ``clean_and_masked`` as well."""
    codec: Annotated[str, pydantic.AfterValidator(check_codec)]
    """Name of the codec."""
    corpus: str
    """Fingerprint of the corpus (ids, samples, splits)."""
    shard_seconds: float
    """Target duration of the audio per shard, in seconds."""
    batch_seconds: float | Literal["auto"]
    """Padded audio per teacher batch, in seconds. It affects rounding and so the stored bytes. ``auto``: each worker measures how much
    fits on its GPU. What it finds is no part of the identity, so the bytes are only known up to that rounding."""
    precision: Precision = "fp32"
    """Precision of the teacher's arithmetic: ``fp32``, ``fp16`` or ``bf16``."""
    audio: AudioFormat | Literal["store", "source"] = "flac"
    """Format of the embedded waveforms: ``flac`` is a third smaller, ``pcm`` is faster to read. ``store`` embeds none: the cache
    refers to the audio of an audio store or of another cache. ``source`` embeds none either: audio is read from the corpus."""
    audio_store: str | None = pydantic.Field(default=None, pattern="^[0-9a-f]{64}$")
    """Fingerprint of the audio that a cache with ``audio`` ``store`` refers to; see `audio_fingerprint`."""
    frame_rate: str | None = pydantic.Field(default=None, pattern="^[1-9][0-9]{0,5}(/[1-9][0-9]{0,5})?$")
    """Frames per second of the teacher, such as ``75`` or ``100/3``, if they are not 50. The cache holds its frames, and masks
    are drawn in frames of 20 ms. None for a teacher with 50 or with patches of a spectrogram."""
    derived_from: str | None = pydantic.Field(default=None, pattern="^[0-9a-f]{64}$")
    """Fingerprint of the cache whose decoded features were encoded. None if they are the teacher's own."""
    schema_version: int = SCHEMA_VERSION
    """Version of the file format."""

    @classmethod
    def of_audio(cls, corpus: str, shard_seconds: float, audio: AudioFormat = "flac") -> "CacheSpec":
        """Return the specification of an audio store, given the fingerprint of its corpus."""
        return cls.model_validate({"layers": (), "corpus": corpus, "shard_seconds": shard_seconds, "audio": audio})

    @pydantic.model_validator(mode="before")
    @classmethod
    def _without_teacher(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("layers") in ((), []) and tree.keys() <= set(_OF_AUDIO):
            return _WITHOUT_TEACHER | tree
        return tree

    @pydantic.model_validator(mode="after")
    def _check_audio(self) -> Self:
        if (self.audio_store is not None) != self.refers_to_store:
            raise ValueError("audio_store belongs to the audio format store, and to no other")
        return self

    @pydantic.model_serializer(mode="wrap")
    def _without_absent(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what an audio store lacks, and keys of later versions that are None, so that earlier fingerprints stay valid."""
        tree: dict[str, Any] = dump(self)
        for key in ("frame_rate", "derived_from", "audio_store"):
            if getattr(self, key) is None:
                tree.pop(key, None)
        return {key: tree[key] for key in _OF_AUDIO if key in tree} if self.is_audio_store else tree

    @property
    def is_audio_store(self) -> bool:
        """Whether the cache is an audio store."""
        return not self.layers

    @property
    def embeds_audio(self) -> bool:
        """Whether the cache holds its audio itself."""
        return self.audio in DECODERS

    @property
    def refers_to_store(self) -> bool:
        """Whether the audio is in an audio store or another cache. If it is neither there nor embedded, it is read from the corpus."""
        return self.audio == "store"

    @property
    def audio_fingerprint(self) -> str:
        """SHA-256 (hex) of what determines the audio and its place in shards: the corpus, the seconds per shard and the format.

        A store and a cache that embed the same audio in the same shards have the same one, and can replace each other.
        """
        if self.audio_store is not None:
            return self.audio_store
        return _digest({key: getattr(self, key) for key in ("corpus", "shard_seconds", "audio")})

    @property
    def rate(self) -> Fraction:
        """Frames per second; 50 for a teacher with patches too."""
        return Fraction(self.frame_rate or FRAME_RATE)

    def lacking(self, needed: "CacheSpec") -> str | None:
        """Return which layers and how many draws of a need this specification lacks, in words; None if it has all."""
        layers = sorted(set(needed.layers) - set(self.layers))
        draws = max(0, needed.masks.draws - self.masks.draws)
        parts = [f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}"] if layers else []
        parts += [f"{draws} mask draw{'' if draws == 1 else 's'}"] if draws else []
        return " and ".join(parts) or None

    def differences(self, needed: "CacheSpec") -> list[str]:
        """Return the differences that prevent this cache, even when extended, from serving a need.

        A cache serves needs with fewer layers or draws, and some targets serve others; see `serves`. Missing layers and
        draws can be added. The exception is ``composite_only``: such a cache has clean training targets only if it has no
        draws, so a cache with draws and one without can't serve each other. A need that does not name a cache to be derived from
        is served by any.

        Returns:
            One phrase per difference, ``name: present -> needed``.
        """
        mine, theirs = (
            spec.model_dump(mode="json", exclude={"layers": True, "masks": True}) for spec in (self, needed)
        )
        if needed.derived_from is None:
            mine.pop("derived_from", None)
        if self.audio != needed.audio:  # That alone is said.
            mine.pop("audio_store", None)
            theirs.pop("audio_store", None)
        if serves(self.targets, needed.targets):
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
        """Return this specification extended by the layers and draws of a need."""
        masks = self.masks
        if needed.masks.draws > masks.draws:
            policies = tuple(
                (masks if draw < masks.draws else needed.masks).policy_of(draw) for draw in range(needed.masks.draws)
            )
            same = all(policy == needed.masks.policy for policy in policies)
            masks = needed.masks.model_copy(update={"policies": () if same else policies})
        layers = tuple(sorted({*self.layers, *needed.layers}))
        return self.model_copy(update={"masks": masks, "layers": layers})


def serves(cached: Targets, needed: Targets) -> bool:
    """Return whether a cache of some targets has all that others need.

    ``masked_everywhere`` serves ``clean_and_masked``, and both serve ``clean_only``.
    """
    return needed == cached or needed in _ALSO_SERVES.get(cached, ())


class LayerSet(pydantic.BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Layers that were cached together. Layers added later form another set, in separate files."""

    layers: tuple[int, ...]
    """Layers, 1-based, ascending."""
    state: str | None = None
    """SHA-256 of the codec's state file, or None for a codec without state. The state is fitted to floats that depend on the
    machine, so caches built on two machines have two states and two fingerprints, rightly: codes can only be decoded with their
    own state. Nothing is refused because of it, since a need names no state."""


@dataclass(frozen=True)
class Part:
    """A kind of shard file: one pass (or the composite of two) of one set of layers.

    Attributes:
        kind: ``clean``, ``masked``, ``composite``, or ``audio`` for the only part of an audio store.
        layer_set: Number of the set of layers.
        draw: 0-based mask draw, or None for ``clean`` and ``audio``.
        features: Whether the file holds features. False for ``audio``, and if the clean part of ``composite_only`` holds the audio
            only.
        has_audio: Whether the file holds the audio: that of an audio store, and otherwise the clean part of set 0, unless the audio is
            elsewhere.
        at_masked: Whether a ``masked`` file holds the masked frames too. Default False: the unmasked ones only.
    """

    kind: Literal["clean", "masked", "composite", "audio"]
    layer_set: int = 0
    draw: int | None = None
    features: bool = True
    has_audio: bool = False
    at_masked: bool = False

    @property
    def leads(self) -> bool:
        """Whether an utterance that fails in this file is in no file of its shard."""
        return self.kind in ("clean", "audio") and self.layer_set == 0

    @property
    def folder(self) -> str:
        """Folder of the files: ``clean``, ``masked/draw=0``, ``clean/set=1``, ..."""
        draw = "" if self.draw is None else f"/draw={self.draw}"
        return f"{self.kind}{draw}" + (f"/set={self.layer_set}" if self.layer_set else "")


def parts_of(spec: CacheSpec, layer_sets: int, split: str) -> list[Part]:
    """Return the parts of the shards of a split. The validation split has the clean pass only, as validation uses no masks."""
    if spec.is_audio_store:
        return [Part("audio", features=False, has_audio=True)]
    parts = []
    for number in range(layer_sets):
        composite = spec.targets == "composite_only" and split == "train" and spec.masks.draws > 0
        has_audio = number == 0 and spec.embeds_audio
        if has_audio or not composite:
            parts.append(Part("clean", number, features=not composite, has_audio=has_audio))
        if split == "train" and spec.targets != "clean_only":
            kind: Literal["masked", "composite"] = "composite" if composite else "masked"
            everywhere = spec.targets == "masked_everywhere"
            parts += [Part(kind, number, draw, at_masked=everywhere) for draw in range(spec.masks.draws)]
    return parts


def fingerprint(spec: CacheSpec, layer_sets: tuple[LayerSet, ...]) -> str:
    """Return the SHA-256 (hex) of a cache's identity. Caches with equal fingerprints are interchangeable.

    The numbers in it are settings, which JSON writes exactly. Hashes of audio and weights are exact too (`load_identified_audio`,
    `Cache.is_of_teacher`). Masks are identified by policy and seed.
    """
    return _digest({"spec": spec.model_dump(mode="json"), "sets": [s.model_dump(mode="json") for s in layer_sets]})


def content_key(spec: CacheSpec, layer_set: LayerSet, part: Part, shard: int, split: str) -> str:
    """Return the SHA-256 (hex) of all that determines a file's content. Adding layers or draws does not change it."""
    return content_key_of(content_tree(spec, layer_set, part, split), shard)


def content_key_of(tree: dict[str, Any], shard: int) -> str:
    """Return the content key of a shard's file from the `content_tree` of its part."""
    return _digest(tree | {"shard": shard})


def content_tree(spec: CacheSpec, layer_set: LayerSet, part: Part, split: str) -> dict[str, Any]:
    """Return all that determines the content of a part's files, but the number of the shard."""
    tree = spec.model_dump(mode="json", exclude={"layers": True, "masks": True})
    tree |= {"set": layer_set.model_dump(mode="json"), "part": part.folder, "split": split}
    if spec.targets == "composite_only" and split == "train" and part.kind == "clean" and part.features:
        # Versions before this key wrote such files without features; with the key, repair rebuilds those.
        tree["features"] = True
    if part.draw is not None:
        tree |= {"policy": spec.masks.policy_of(part.draw).model_dump(mode="json"), "seed": spec.masks.seed}
    return tree


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
