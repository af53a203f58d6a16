"""Derivation of a cache from another one: its decoded features are encoded with another codec, without the teacher."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from ray_distill.teacher_cache.build.codec_fit import CodecSample, sample_order
from ray_distill.teacher_cache.build.shard_audio import ReferredAudio, ShardAudio, load_shard_audio
from ray_distill.teacher_cache.build.shard_output import open_output
from ray_distill.teacher_cache.codecs import check_codec, is_discrete, sample_frames
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.reading.audio_place import check_holds, holder_of, open_holder, recorded_place
from ray_distill.teacher_cache.reading.commit_manifest import MANIFEST, take_manifest, update_manifest
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.create import check_location, create_cache, remove_unused_states
from ray_distill.teacher_cache.storage.failed_utterances import reason_of
from ray_distill.teacher_cache.storage.lock import cache_lock
from ray_distill.teacher_cache.storage.shard_plan import Shard, Utterances
from ray_distill.teacher_cache.storage.store import Store


def derive_cache(
    source: str | Path,
    location: str | Path,
    codec: str,
    layers: Sequence[int],
    *,
    on_progress: Callable[[int, int], None] = lambda done, shards: None,
    audio: str | None = None,
) -> int:
    """Write a cache of the clean pass of another cache's layers, encoded with another codec, or finish an interrupted one.

    The codec is fitted to the source's decoded features, whose errors it inherits. The new cache has the teacher, the corpus and the
    plan of the source, whose fingerprint is part of its identity. The audio is copied, unless it is elsewhere.

    Args:
        source: Location of a finished cache with a clean pass, of any codec but a discrete one.
        location: Location of the new cache.
        codec: Name of its codec, such as ``units:500`` or ``mvq:8``.
        layers: Its layers, 1-based.
        on_progress: Called after each shard with the numbers of finished and of all shards.
        audio: Location of the audio that the new cache refers to: an audio store, or a cache with audio such as the source. Default
            None: it refers to what the source refers to, reads its audio from the corpus as the source does, or holds a copy of the
            audio that the source holds.

    Returns:
        The number of shards that were written now.

    Raises:
        CacheError: If the source is missing, incomplete or damaged or has no such layer or no clean pass, if its codec is discrete, if
            the location holds something else, or if the codec can't be fitted.
    """
    origin = Cache.open(source)
    spec = _derived_spec(origin, codec, layers)
    store = Store(location)
    refers = audio is not None or origin.spec.refers_to_store
    if refers:
        holder = holder_of(origin, audio) if origin.spec.refers_to_store else open_holder(str(audio))
        spec = CacheSpec.model_validate(
            spec.model_dump() | {"audio": "store", "audio_store": holder.spec.audio_fingerprint}
        )
    if store.location == origin.store.location:
        raise CacheError(f"a cache can't be derived into its own location, {store.location}; give another output")
    check_location(store)
    written = 0
    with cache_lock(store) as check_lock:
        store.remove_leftovers()
        readers = {
            split: CacheReader(
                origin.store, split, spec.layers, 0, audio=audio if origin.spec.refers_to_store else None
            )
            for split in sorted({shard.split for shard in origin.shards})
        }
        if Cache.exists(store):
            cache = Cache.open(store)
            if cache.spec != spec:
                different = "; ".join(cache.spec.differences(spec)) or "other layers"
                raise CacheError(f"{store.location} holds another cache ({different}); give another output")
        else:
            if refers:
                check_holds(holder, Utterances(origin.plan), store.location)
            state = _fit(spec, readers["train"])
            check_lock()
            record = origin.record
            cache = create_cache(
                store,
                spec,
                origin.plan,
                teacher_name=record["teacher_name"],
                teacher_spec=record["teacher_spec"],
                state=state,
                threads=record["threads"],
                audio_path=recorded_place(store, holder.store) if refers else None,
            )
        remove_unused_states(cache)
        referred = ReferredAudio(origin, audio) if origin.spec.refers_to_store else None
        missing = cache.missing()
        manifest = take_manifest(store) if missing else None
        for shard in (shard for shard in cache.shards if shard.number in missing):
            check_lock()
            # Utterances whose audio failed are in no file of the source.
            decoded = origin.spec.audio != "source"
            shard_audio = load_shard_audio(origin, shard, referred) if decoded else ShardAudio([], [], {})
            _write(cache, shard, readers[shard.split], shard_audio)
            written += 1
            on_progress(len(cache.shards) - len(missing) + written, len(cache.shards))
        if written or not store.size(MANIFEST):
            update_manifest(cache, manifest)
        store.remove_leftovers()
    return written


def _derived_spec(origin: Cache, codec: str, layers: Sequence[int]) -> CacheSpec:
    spec, place = origin.spec, origin.store.location
    try:
        check_codec(codec)
    except ValueError as error:
        raise CacheError(str(error)) from error
    if spec.is_audio_store:
        raise CacheError(
            f"{place} is an audio store, which has no features to derive targets from; give a cache of a teacher"
        )
    if unknown := sorted(set(layers) - set(spec.layers)):
        raise CacheError(f"the cache at {place} has no layer {unknown[0]}; it has layers {list(spec.layers)}")
    if is_discrete(spec.codec):
        raise CacheError(
            f"the cache at {place} has the codec {spec.codec}, which keeps too little to derive other targets from; use a cache "
            "of codec pca, int8 or fp16"
        )
    if spec.targets == "composite_only" and spec.masks.draws:
        raise CacheError(
            f"the cache at {place} has no clean pass of the training split, because its targets are composite_only; use another cache"
        )
    return CacheSpec.model_validate(
        spec.model_dump()
        | {
            "layers": tuple(sorted(set(layers))),
            "codec": codec,
            "masks": MaskDraws(draws=0),
            "targets": "clean_and_masked",
            "derived_from": origin.fingerprint,
        }
    )


def _fit(spec: CacheSpec, reader: CacheReader) -> Mapping[str, Tensor]:
    """Fit the codec to utterances of the training split, chosen by the hash of their ids, as for the teacher's own outputs."""
    index = {name: number for number, name in enumerate(reader.ids)}
    plan = reader.cache.plan
    known = Utterances(plan.filter(pc.is_in(plan["id"].cast(pa.string()), value_set=pa.array(reader.ids, pa.string()))))
    wanted = sample_frames(spec.codec, len(spec.layers), spec.dim)
    sample = CodecSample()
    for number, utterance in enumerate(sample_order(known)):
        if sample.num_fitted >= wanted:
            break
        sample.add(_features(reader, index[utterance.id]), last=number == len(known) - 1)
    try:
        return sample.fit(spec.codec)
    except ValueError as error:
        raise CacheError(f"the codec could not be fitted: {error}") from error


def _features(reader: CacheReader, index: int) -> Tensor:
    """Return the (T, L, D) features of an utterance in the clean pass, without reading its audio."""
    return reader.read([index], None, audio=False).targets[0].transpose(0, 1)


def _write(cache: Cache, shard: Shard, reader: CacheReader, audio: ShardAudio) -> None:
    """Write the clean file of a shard."""
    (file,) = cache.files(shard)
    if audio.problem:
        raise CacheError(audio.problem)
    index = {name: number for number, name in enumerate(reader.ids)}
    codecs = cache.codecs(0)
    with open_output(cache, file, [codecs], shard, audio) as output:
        output.fail({u.id: reader.failed[u.id] for u in shard.utterances if u.id in reader.failed})
        for row, utterance in enumerate(shard.utterances):
            if utterance.id in output.failed:
                continue
            frames = _features(reader, index[utterance.id])
            codes: list[np.ndarray] = []
            try:
                for codec in codecs:
                    positions = [cache.spec.layers.index(layer) for layer in codec.layers]
                    codes.append(codec.encode(frames[:, positions]).numpy())
            except ValueError as error:
                output.fail({utterance.id: reason_of(error)})
                continue
            output.write([row], codes, None)
