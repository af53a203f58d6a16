"""The cost of a corpus of any size on a cluster, calculated from measured and assumed figures."""

import math
from dataclasses import dataclass
from pathlib import Path

from ray_distill.pipeline.planning.cluster import RESULTS, Cluster, ClusterError, Measured
from ray_distill.teacher_cache.reading.local_copies import RANGE_BYTES, RANGES_AT_ONCE
from ray_distill.teacher_cache.storage.store import WHOLE_BYTES

HOURS = (960.0, 60_000.0, 1_000_000.0)
"""Hours of audio to plan by default: LibriSpeech, Libri-Light, and a larger corpus."""

_PART_BYTES = 10 << 20  # Size of a part of a multipart upload by Arrow.
_SOURCE_GETS = 2  # Requests for an audio file: one for its size, one for its bytes.


@dataclass(frozen=True)
class ClusterPlan:
    """The cost of one corpus. Every time is a lower bound: it assumes that all parts overlap and that nothing fails.

    Attributes:
        hours: Hours of audio.
        build_hours: Hours that each part alone would need to build the cache, by name.
        epoch_hours: Hours that each part alone would need for one epoch, by name.
        audio: Where the audio is, as `Speech`.
        cache_bytes: Size of the finished cache.
        audio_store_bytes: Size of the audio store, which any number of caches share; 0 without one.
        build_puts: Number of write requests of the build.
        build_gets: Number of read requests of the build: one per utterance, and one per shard of an audio store.
        epoch_bytes: Bytes that all trainers read from the store in one epoch; with local copies, the mean over all epochs.
        epoch_gets: Number of read requests of one epoch, in the same way.
        copied: Whether the trainers read the whole cache, and its audio store, from local copies.
        build_accelerator_hours, train_accelerator_hours: Accelerator hours, including idle time.
        online_hours: Wall time of the same training with the teacher in the loop.
        trainer_bytes_per_second: Network traffic of one trainer during training.
        gets_per_second: Read requests per second of all trainers during training.
        build_money, train_money, month_money: Cost of the build, of one training, and of storing the cache and its audio store for a
            month.
        epochs: Number of epochs of one training.
    """

    hours: float
    build_hours: dict[str, float]
    epoch_hours: dict[str, float]
    audio: str
    cache_bytes: float
    audio_store_bytes: float
    build_puts: float
    build_gets: float
    epoch_bytes: float
    epoch_gets: float
    copied: bool
    build_accelerator_hours: float
    train_accelerator_hours: float
    online_hours: float
    trainer_bytes_per_second: float
    gets_per_second: float
    build_money: float
    train_money: float
    month_money: float
    epochs: int

    @property
    def build_wall(self) -> float:
        """Wall time of the build in hours."""
        return max(self.build_hours.values())

    @property
    def train_wall(self) -> float:
        """Wall time of one training in hours."""
        return max(self.epoch_hours.values()) * self.epochs


def bottleneck(hours: dict[str, float]) -> str:
    """Return the part that needs the most hours, which all others wait for."""
    return max(hours, key=lambda part: hours[part])


def upload_requests(size: float) -> int:
    """Return the number of requests for an upload of ``size`` bytes by `storage.store`: one to begin, one per part, one to end.

    A small file is one request.
    """
    return 1 if size <= WHOLE_BYTES else 2 + max(1, math.ceil(size / _PART_BYTES))


def plan_cluster(cluster: Cluster, hours: float, results: Path = RESULTS) -> ClusterPlan:
    """Calculate the cost of a corpus on a cluster.

    Args:
        cluster: Description of the cluster.
        hours: Hours of audio, above 0.
        results: Folder of the benchmark results that the description refers to. Default: the repository's.

    Raises:
        ClusterError: ``hours`` is not positive and finite, a measured number doesn't exist or is no positive number, or the audio is
            read from the corpus by trainers whose cores are not given.
    """
    if not 0 < hours < math.inf:
        raise ClusterError(f"hours must be above 0 and finite, not {hours:g}")
    speech, build, train, store = cluster.speech, cluster.build, cluster.train, cluster.store
    if speech.audio == "source" and train.cores is None:
        raise ClusterError(
            "train.cores: with speech.audio source the trainers decode the corpus in each epoch; give train.cores and "
            "train.reader_audio_per_second"
        )
    seconds = hours * 3600
    passes = 1 + speech.draws
    stored_draw = (1 - speech.masked_fraction) if speech.draws else 0.0
    audio, target = speech.number("audio_bytes", results), speech.number("target_bytes", results)
    source = seconds * speech.number("source_bytes", results)
    held = audio if speech.audio == "cache" else 0.0
    audio_store = seconds * audio if speech.audio == "store" else 0.0
    cache_bytes = seconds * (held + target * (1 + speech.draws * stored_draw))
    utterances = seconds / speech.number("utterance_seconds", results)
    # A shard has one file for the clean pass and one for each draw, and each file has a commit record.
    shard = speech.number("shard_minutes", results) * 60
    draw = upload_requests(shard * target * stored_draw)
    files, shards = upload_requests(shard * (held + target)) + speech.draws * draw, math.ceil(seconds / shard)
    puts = (files + passes * upload_requests(0)) * shards
    gets = utterances
    if speech.audio == "store":
        puts += (upload_requests(shard * audio) + upload_requests(0)) * shards
        gets += shards
    node = cluster.node_bytes_per_second
    node_bytes = node.read(results) if isinstance(node, Measured) else node
    store_bytes = store.number("bytes_per_second", results)
    teacher = build.number("teacher_audio_per_second", results)
    build_seconds = {
        "teachers": seconds * passes / (teacher * build.number("share_of_teacher", results) * build.accelerators),
        "decoding": seconds / (build.number("decode_audio_per_second", results) * build.cores),
        "network of the build": (max(source, cache_bytes) + audio_store) / (node_bytes * build.nodes),
        "bandwidth of the store": (source + cache_bytes + 2 * audio_store) / store_bytes,
        "writes of the store": puts / store.number("puts_per_second", results),
        "reads of the store": gets / store.number("gets_per_second", results),
    }
    # Bytes of shard files, those of an audio store among them; requests for rows and for audio files; requests for copies.
    shard_bytes = seconds * (held + target * (1 + stored_draw)) + audio_store
    row_gets = utterances * (train.number("requests_per_utterance", results) + (speech.audio == "store"))
    range_gets = 0.0
    if copied := cache_bytes + audio_store <= train.local_bytes:
        # No node reads in an epoch what it does not need there.
        shard_bytes = min(shard_bytes, (cache_bytes + audio_store) * train.nodes / train.epochs)
    if train.local_bytes:
        row_gets, range_gets = 0.0, shard_bytes / RANGE_BYTES
    from_corpus = speech.audio == "source"
    row_gets += utterances * _SOURCE_GETS * from_corpus
    epoch_bytes = shard_bytes + source * from_corpus
    epoch_gets = row_gets + range_gets
    waiting = max(row_gets / train.reader_threads, range_gets / RANGES_AT_ONCE) / train.trainers
    rate = train.number("student_audio_per_second", results)
    epoch_seconds = {
        "students": seconds / (rate * train.number("share_of_resident", results) * train.trainers),
        "network of the trainers": epoch_bytes / (node_bytes * train.nodes),
        "bandwidth of the store": epoch_bytes / store_bytes,
        "reads of the store": epoch_gets / store.number("gets_per_second", results),
        "latency of the readers": waiting * store.number("get_seconds", results),
    }
    if train.cores is not None:
        core = train.number("reader_audio_per_second", results)
        if from_corpus:  # At least the decoding, which takes longer than that of the audio in a cache.
            core = min(core, build.number("decode_audio_per_second", results))
        epoch_seconds["decoding by the readers"] = seconds / (core * train.cores)
    if train.batch_seconds is not None:
        steps = seconds / (train.number("batch_seconds", results) * train.trainers)
        epoch_seconds["hosts of the students"] = steps * train.number("host_seconds_per_step", results)
    epoch_wall = max(epoch_seconds.values())
    online = seconds * (1 / rate + min(passes, 2) / teacher) / train.trainers
    build_accelerator_hours = max(build_seconds.values()) / 3600 * build.accelerators
    train_accelerator_hours = epoch_wall * train.epochs / 3600 * train.trainers
    requests = puts * store.price_per_million_puts + gets * store.price_per_million_gets
    return ClusterPlan(
        hours=hours,
        build_hours={part: value / 3600 for part, value in build_seconds.items()},
        epoch_hours={part: value / 3600 for part, value in epoch_seconds.items()},
        audio=speech.audio,
        cache_bytes=cache_bytes,
        audio_store_bytes=audio_store,
        build_puts=puts,
        build_gets=gets,
        epoch_bytes=epoch_bytes,
        epoch_gets=epoch_gets,
        copied=copied,
        build_accelerator_hours=build_accelerator_hours,
        train_accelerator_hours=train_accelerator_hours,
        online_hours=online * train.epochs / 3600,
        trainer_bytes_per_second=epoch_bytes / epoch_wall / train.trainers,
        gets_per_second=epoch_gets / epoch_wall,
        build_money=build_accelerator_hours * build.number("price_per_hour", results) + requests / 1e6,
        train_money=train_accelerator_hours * train.number("price_per_hour", results)
        + epoch_gets * train.epochs * store.price_per_million_gets / 1e6,
        month_money=(cache_bytes + audio_store) / 1e12 * store.price_per_terabyte_month,
        epochs=train.epochs,
    )
