"""A summary of a cache on one screen."""

from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from ray_distill.teacher_cache.frames import shown_audio
from ray_distill.teacher_cache.reading.audio_place import holder_of
from ray_distill.teacher_cache.reading.source_rows import SOUGHT_FILES, missing_sources
from ray_distill.teacher_cache.sources.address import AudioAddress
from ray_distill.teacher_cache.storage.cache import Cache, commit_name, file_name
from ray_distill.teacher_cache.storage.cache_spec import CacheAccessError, CacheError
from ray_distill.teacher_cache.storage.failed_utterances import failed_utterances
from ray_distill.teacher_cache.storage.store import Store


def info_table(location: str | Path) -> Table:
    """Return a table with the identity, contents, sizes and completeness of a cache.

    Raises:
        CacheError: If there is no cache or its records are damaged.
    """
    cache = Cache.open(Store(location))
    spec, record = cache.spec, cache.record
    sizes = cache.store.sizes()
    by_folder: dict[str, list[int]] = {}
    finished = missing = total = 0
    for part, members in cache.parts():
        for shard in cache.shards.numbers[members].tolist():
            total += 1
            finished += (is_finished := commit_name(part, shard) in sizes)
            missing += is_finished and file_name(part, shard) not in sizes
            by_folder.setdefault(part.folder, []).append(sizes.get(file_name(part, shard), 0))
    size = sum(sum(part) for part in by_folder.values())
    what = "audio store" if spec.is_audio_store else "teacher cache"
    table = Table(show_header=False, title=f"{what} at {escape(cache.store.location)}")
    table.add_row("fingerprint", f"{cache.fingerprint[:16]}...")
    if not spec.is_audio_store:
        table.add_row(
            "teacher", f"{escape(record['teacher_name'])}: {spec.num_layers} layers x {spec.dim}, {spec.precision}"
        )
    frames = "" if spec.is_audio_store else f"{record['frames']} frames, "
    table.add_row(
        "audio",
        f"{shown_audio(record['seconds'])}, {record['utterances']} utterances, {frames}{_where_audio_is(cache)}",
    )
    if not spec.is_audio_store:
        _add_targets(table, cache)
    for folder, files in by_folder.items():
        table.add_row(f"  {folder}", f"{sum(files) / 1e6:.1f} MB in {len(files)} shards")
    beside = "" if spec.embeds_audio else ", beside the audio"
    table.add_row(
        "size",
        f"{size / 1e6:.1f} MB, {size / max(record['seconds'], 1e-9) / 1e3:.1f} kB per second of audio{beside}",
    )
    if failed := failed_utterances(cache):
        name, reason = next(iter(failed.items()))
        table.add_row("failed", f"{len(failed)} of the utterances, such as {escape(name)}: {escape(reason)}")
    state = "complete" if finished == total else f"{total - finished} of {total} files are not finished"
    advice = "`ray-distill cache verify` checks every byte"
    if missing:
        state = f"damaged, {missing} of {total} files {'is' if missing == 1 else 'are'} missing"
        advice = "`ray-distill cache repair` rebuilds what is damaged"
    table.add_row("state", f"{state}; {advice}")
    return table


def _where_audio_is(cache: Cache) -> str:
    """Return the format of the audio, and its place and size if the cache refers to it."""
    spec = cache.spec
    if spec.embeds_audio:
        return f"{spec.audio}, fingerprint {spec.audio_fingerprint[:16]}..." if spec.is_audio_store else spec.audio
    if spec.audio == "source":
        first = AudioAddress.parse(cache.plan["path"][0].as_py()).file
        return escape(missing_sources(cache, most=SOUGHT_FILES) or f"read from the corpus, such as {first}")
    try:
        holder = holder_of(cache)
    except CacheAccessError:
        raise
    except CacheError as error:
        return escape(str(error))
    sizes = holder.store.sizes()
    size = sum(
        sizes.get(file_name(part, shard), 0)
        for part, members in holder.parts()
        if part.has_audio
        for shard in holder.shards.numbers[members].tolist()
    )
    what = f"{size / 1e6:.1f} MB of {holder.spec.audio}"
    if not holder.spec.is_audio_store:
        what += " and the features of that cache"
    return f"in {escape(holder.store.location)}: {what}"


def _add_targets(table: Table, cache: Cache) -> None:
    """Add the rows about targets, layers and masks."""
    spec = cache.spec
    table.add_row("targets", spec.targets)
    if spec.derived_from is not None:
        table.add_row("derived from", f"the cache with the fingerprint {spec.derived_from[:16]}...")
    for number, layer_set in enumerate(cache.layer_sets):
        codecs = cache.codecs(number)
        error = torch.cat([codec.error for codec in codecs])
        table.add_row(
            f"layers, set {number}",
            f"{' '.join(map(str, layer_set.layers))}: codec {spec.codec}, relative error "
            + " to ".join(dict.fromkeys(f"{float(value):.2g}" for value in (error.min(), error.max()))),
        )
    table.add_row("mask draws", f"{spec.masks.draws}, seed {spec.masks.seed}")
    for draw in range(min(spec.masks.draws, len(spec.masks.policies) or 1)):
        policy = ", ".join(f"{key}={value}" for key, value in spec.masks.policy_of(draw))
        table.add_row(f"  policy of draw {draw}" if spec.masks.policies else "  policy", policy)
