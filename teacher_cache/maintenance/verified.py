"""The memory of a verification: which parts of a cache were read whole, and the sizes and times that their files had then.

    CACHE/verified.json      SHA-256 by the folder of a part; with a checksum

A digest covers the place of the cache, and the names, sizes and times of the part's shard files and commit records. A copy is read
even if it keeps the times of modification, since a disk also knows when a file came to its place.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress

from ray_distill.teacher_cache.storage.cache_spec import CacheAccessError, CacheError
from ray_distill.teacher_cache.storage.json_record import MAX_RECORD_BYTES, decode_record, encode_record
from ray_distill.teacher_cache.storage.local_files import FileEntry
from ray_distill.teacher_cache.storage.store import Store

VERIFIED = "verified.json"


def part_digests(store: Store, entries: Mapping[str, FileEntry], folders: Iterable[str]) -> dict[str, str]:
    """Return the digests of parts by folder, without those of which a file has no known modification time.

    Args:
        store: Store of the cache.
        entries: A listing of it, from before its files are read.
        folders: Folders of the parts.
    """
    place: list[str | int] = [store.location]
    if store.local is not None:
        found = store.local.stat()
        place += [found.st_dev, found.st_ino]
    digests = {folder: hashlib.sha256(json.dumps(place).encode()) for folder in folders}
    undated = set()
    for name in sorted(entries):
        folder = name.rpartition("/")[0].removeprefix("commits/")
        if folder in digests:
            entry = entries[name]
            digests[folder].update(json.dumps([name, *entry]).encode())
            if entry.changed is None:
                undated.add(folder)
    return {folder: digest.hexdigest() for folder, digest in digests.items() if folder not in undated}


def verified_parts(store: Store, digests: Mapping[str, str]) -> set[str]:
    """Return the folders of the parts that were verified before and have the same digests now."""
    known = _read(store)
    return {folder for folder, digest in digests.items() if known.get(folder) == digest}


def remember(store: Store, digests: Mapping[str, str], sound: Iterable[str], unsound: Iterable[str]) -> None:
    """Note which parts were read just now and are sound. A cache that can't be written to is verified again next time."""
    before = _read(store)
    known = {folder: digest for folder, digest in before.items() if folder not in set(unsound)}
    known |= {folder: digests[folder] for folder in sound if folder in digests}
    if known != before:
        with suppress(CacheError, OSError):
            store.write(VERIFIED, encode_record(known))


def _read(store: Store) -> dict[str, str]:
    try:
        return decode_record(store.read(VERIFIED, MAX_RECORD_BYTES))
    except CacheAccessError:
        raise
    except (FileNotFoundError, ValueError):  # It is missing or damaged.
        return {}
