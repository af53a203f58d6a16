"""The cost of a corpus of any size on a cluster, calculated from measured and assumed figures."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pydantic
import yaml
from rich.table import Table

from ray_distill.pipeline.recipes import other_recipes
from ray_distill.teacher_cache.storage.store import WHOLE_BYTES

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
HOURS = (960.0, 60_000.0, 1_000_000.0)
"""Hours of audio to plan by default: LibriSpeech, Libri-Light, and a larger corpus."""

_PART_BYTES = 10 << 20  # Size of a part of a multipart upload by Arrow.


class ClusterError(ValueError):
    """Unusable description of a cluster. The message names the key."""


class Measured(pydantic.BaseModel, frozen=True, extra="forbid"):
    """A number that a benchmark measured.

    Attributes:
        file: Result file in ``benchmarks/results``.
        where: Values that select one row of the file, as in ``{way: build with Ray}``. Default: none, for a file without rows.
        key: Key of the number in that row.
        times: Factor that converts the number to the required unit. Default: 1.
    """

    file: str
    where: dict[str, str] = {}
    key: str
    times: float = 1.0

    def read(self, results: Path) -> float:
        """Return the number from a folder of benchmark results.

        Raises:
            ClusterError: The file, row or key doesn't exist.
        """
        found = sorted(results.rglob(self.file))
        if not found:
            raise ClusterError(
                f"there is no benchmark result {results / self.file}; set --results to the folder of benchmark results"
            )
        path = found[0]
        record = json.loads(path.read_text())
        if self.where:
            rows = [row for row in record["rows"] if all(row.get(key) == value for key, value in self.where.items())]
            if len(rows) != 1:
                raise ClusterError(f"{path} has {len(rows)} rows with {self.where}; exactly one is needed")
            record = rows[0]
        if self.key not in record:
            raise ClusterError(
                f"{path} has no key {self.key!r}" + (f" in the row with {self.where}" if self.where else "")
            )
        return float(record[self.key]) * self.times


Unit = Annotated[float, pydantic.Field(gt=0)] | Measured
"""A positive number (an assumption or a price), or a reference to a measured number."""


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    def number(self, name: str, results: Path) -> float:
        """Return the value of a key, read from the benchmark results if it is a reference."""
        value = getattr(self, name)
        return value.read(results) if isinstance(value, Measured) else float(value)


class Speech(_Section):
    """The corpus and its cache.

    Attributes:
        source_bytes: Size of the source audio, in bytes per second of audio.
        audio_bytes: Size of the audio in the cache, in bytes per second of audio.
        target_bytes: Size of all layers of one complete pass, in bytes per second of audio.
        draws: Number of mask draws.
        masked_fraction: Fraction of masked frames, which a masked pass does not store.
        utterance_seconds: Mean length of an utterance in seconds.
        shard_minutes: Minutes of audio per shard.
    """

    source_bytes: Unit
    audio_bytes: Unit
    target_bytes: Unit
    draws: int = pydantic.Field(ge=0)
    masked_fraction: float = pydantic.Field(ge=0, lt=1)
    utterance_seconds: Unit
    shard_minutes: Unit


class Build(_Section):
    """The machines that build the cache.

    Attributes:
        accelerators: Number of accelerators, each of which runs one teacher.
        nodes: Number of nodes with these accelerators; each has its own network.
        cores: Number of CPU cores that decode audio.
        teacher_audio_per_second: Seconds of audio per second that one accelerator processes in one pass.
        share_of_teacher: Fraction of that rate that a build reaches.
        decode_audio_per_second: Seconds of audio per second that one core decodes.
        price_per_hour: Price per hour of one accelerator with its share of a node.
    """

    accelerators: int = pydantic.Field(ge=1)
    nodes: int = pydantic.Field(ge=1)
    cores: int = pydantic.Field(ge=1)
    teacher_audio_per_second: Unit
    share_of_teacher: Unit
    decode_audio_per_second: Unit
    price_per_hour: Unit


class Train(_Section):
    """The machines that train one student.

    Attributes:
        trainers: Number of ranks, each with one accelerator.
        nodes: Number of nodes with these accelerators.
        epochs: Number of epochs of the training.
        student_audio_per_second: Seconds of audio per second that one accelerator trains on with its data in memory.
        share_of_resident: Fraction of that rate that training from a cache reaches if neither network nor store is the bottleneck.
        requests_per_utterance: Number of GET requests for reading one utterance.
        reader_threads: Number of threads of one trainer's `reader.CacheReader`, each with one request at a time.
        price_per_hour: Price per hour of one accelerator with its share of a node.
    """

    trainers: int = pydantic.Field(ge=1)
    nodes: int = pydantic.Field(ge=1)
    epochs: int = pydantic.Field(ge=1)
    student_audio_per_second: Unit
    share_of_resident: Unit
    requests_per_utterance: Unit
    reader_threads: int = pydantic.Field(ge=1)
    price_per_hour: Unit


class ObjectStore(_Section):
    """The store of the corpus and the cache. For a disk, requests are system calls and cost nothing.

    Attributes:
        bytes_per_second: Bandwidth of all readers and writers together.
        puts_per_second, gets_per_second: Write and read requests per second before the store throttles.
        get_seconds: Latency of a small read request in seconds.
        price_per_terabyte_month, price_per_million_puts, price_per_million_gets: Prices, in the cluster's currency.
    """

    bytes_per_second: Unit
    puts_per_second: Unit
    gets_per_second: Unit
    get_seconds: Unit
    price_per_terabyte_month: float = pydantic.Field(ge=0)
    price_per_million_puts: float = pydantic.Field(ge=0)
    price_per_million_gets: float = pydantic.Field(ge=0)


class Cluster(_Section):
    """The description of a cluster.

    Attributes:
        name: Name of the cluster, for the table's title.
        currency: Currency of all prices. Default: USD.
        node_bytes_per_second: Network bandwidth of one node in each direction.
        speech, build, train, store: See the classes `Speech`, `Build`, `Train` and `ObjectStore`.
    """

    name: str
    currency: str = "USD"
    node_bytes_per_second: Unit
    speech: Speech
    build: Build
    train: Train
    store: ObjectStore


@dataclass(frozen=True)
class ClusterPlan:
    """The cost of one corpus. Every time is a lower bound: it assumes that all parts overlap and that nothing fails.

    Attributes:
        hours: Hours of audio.
        build_hours: Hours that each part alone would need to build the cache, by name.
        epoch_hours: Hours that each part alone would need for one epoch, by name.
        cache_bytes: Size of the finished cache.
        build_puts: Number of write requests of the build.
        build_gets: Number of read requests of the build, one per utterance.
        epoch_bytes: Bytes that all trainers read in one epoch.
        epoch_gets: Number of read requests of one epoch.
        build_accelerator_hours, train_accelerator_hours: Accelerator hours, including idle time.
        online_hours: Wall time of the same training with the teacher in the loop.
        trainer_bytes_per_second: Network traffic of one trainer during training.
        gets_per_second: Read requests per second of all trainers during training.
        build_money, train_money, month_money: Cost of the build, of one training, and of storing the cache for a month.
        epochs: Number of epochs of one training.
    """

    hours: float
    build_hours: dict[str, float]
    epoch_hours: dict[str, float]
    cache_bytes: float
    build_puts: float
    build_gets: float
    epoch_bytes: float
    epoch_gets: float
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


def load_cluster(path: Path) -> Cluster:
    """Read the YAML description of a cluster.

    Raises:
        ClusterError: The file doesn't exist or is not YAML, or has an unknown key or a missing or impossible value.
    """
    if not path.is_file():
        raise ClusterError(f"there is no cluster description at {path}; {other_recipes(path, 'clusters')}")
    try:
        return Cluster.model_validate(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ClusterError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part not in ("constrained-float", "Measured"))
        raise ClusterError(f"{path}: {key}: {first['msg'].lower()}") from error


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
        ClusterError: ``hours`` is not positive, or a measured number doesn't exist.
    """
    if not hours > 0:
        raise ClusterError(f"hours must be above 0, not {hours:g}")
    speech, build, train, store = cluster.speech, cluster.build, cluster.train, cluster.store
    seconds = hours * 3600
    passes = 1 + speech.draws
    stored_draw = (1 - speech.masked_fraction) if speech.draws else 0.0
    audio, target = speech.number("audio_bytes", results), speech.number("target_bytes", results)
    source = seconds * speech.number("source_bytes", results)
    cache_bytes = seconds * (audio + target * (1 + speech.draws * stored_draw))
    utterances = seconds / speech.number("utterance_seconds", results)
    # A shard has one file for the clean pass and one for each draw, and each file has a commit record.
    shard = speech.number("shard_minutes", results) * 60
    draw = upload_requests(shard * target * stored_draw)
    files = upload_requests(shard * (audio + target)) + speech.draws * draw
    puts = (files + passes * upload_requests(0)) * math.ceil(seconds / shard)
    node = cluster.node_bytes_per_second
    node_bytes = node.read(results) if isinstance(node, Measured) else node
    store_bytes = store.number("bytes_per_second", results)
    teacher = build.number("teacher_audio_per_second", results)
    build_seconds = {
        "teachers": seconds * passes / (teacher * build.number("share_of_teacher", results) * build.accelerators),
        "decoding": seconds / (build.number("decode_audio_per_second", results) * build.cores),
        "network of the build": max(source, cache_bytes) / (node_bytes * build.nodes),
        "bandwidth of the store": (source + cache_bytes) / store_bytes,
        "writes of the store": puts / store.number("puts_per_second", results),
        "reads of the store": utterances / store.number("gets_per_second", results),
    }
    epoch_bytes = seconds * (audio + target * (1 + stored_draw))
    epoch_gets = utterances * train.number("requests_per_utterance", results)
    rate = train.number("student_audio_per_second", results)
    epoch_seconds = {
        "students": seconds / (rate * train.number("share_of_resident", results) * train.trainers),
        "network of the trainers": epoch_bytes / (node_bytes * train.nodes),
        "bandwidth of the store": epoch_bytes / store_bytes,
        "reads of the store": epoch_gets / store.number("gets_per_second", results),
        "latency of the readers": epoch_gets
        * store.number("get_seconds", results)
        / (train.trainers * train.reader_threads),
    }
    epoch_wall = max(epoch_seconds.values())
    online = seconds * (1 / rate + min(passes, 2) / teacher) / train.trainers
    build_accelerator_hours = max(build_seconds.values()) / 3600 * build.accelerators
    train_accelerator_hours = epoch_wall * train.epochs / 3600 * train.trainers
    requests = puts * store.price_per_million_puts + utterances * store.price_per_million_gets
    return ClusterPlan(
        hours=hours,
        build_hours={part: value / 3600 for part, value in build_seconds.items()},
        epoch_hours={part: value / 3600 for part, value in epoch_seconds.items()},
        cache_bytes=cache_bytes,
        build_puts=puts,
        build_gets=utterances,
        epoch_bytes=epoch_bytes,
        epoch_gets=epoch_gets,
        build_accelerator_hours=build_accelerator_hours,
        train_accelerator_hours=train_accelerator_hours,
        online_hours=online * train.epochs / 3600,
        trainer_bytes_per_second=epoch_bytes / epoch_wall / train.trainers,
        gets_per_second=epoch_gets / epoch_wall,
        build_money=build_accelerator_hours * build.number("price_per_hour", results) + requests / 1e6,
        train_money=train_accelerator_hours * train.number("price_per_hour", results)
        + epoch_gets * train.epochs * store.price_per_million_gets / 1e6,
        month_money=cache_bytes / 1e12 * store.price_per_terabyte_month,
        epochs=train.epochs,
    )


def origins(cluster: Cluster) -> tuple[list[str], list[str]]:
    """Return the keys whose numbers were measured, each with its result file, and the keys whose numbers are assumed."""
    measured, assumed = [], []

    def walk(section: pydantic.BaseModel, prefix: str) -> None:
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, Measured):
                measured.append(f"{prefix}{name} ({value.file})")
            elif isinstance(value, pydantic.BaseModel):
                walk(value, f"{prefix}{name}.")
            elif isinstance(value, float):
                assumed.append(prefix + name)

    walk(cluster, "")
    return measured, assumed


def plan_table(cluster: Cluster, plans: Sequence[ClusterPlan]) -> Table:
    """Return a table with one column per plan."""
    money = cluster.currency

    def row(label: str, value: Callable[[ClusterPlan], str]) -> None:
        table.add_row(label, *map(value, plans))

    table = Table(title=f"{cluster.name}: estimated cost")
    table.add_column("")
    for plan in plans:
        table.add_column(f"{plan.hours:,.0f} h", justify="right")
    row("cache", lambda p: _bytes(p.cache_bytes))
    row("build: accelerator hours", lambda p: f"{p.build_accelerator_hours:,.1f}")
    row("build: wall time", lambda p: _time(p.build_wall))
    row("build: bottleneck", lambda p: bottleneck(p.build_hours))
    row("build: writes", lambda p: f"{p.build_puts:,.0f} ({p.build_puts / p.build_wall / 3600:,.1f}/s)")
    row("build: cost", lambda p: f"{p.build_money:,.0f} {money}")
    row("storage for a month", lambda p: f"{p.month_money:,.0f} {money}")
    row(f"training, {plans[0].epochs} epochs: accelerator hours", lambda p: f"{p.train_accelerator_hours:,.1f}")
    row("training: wall time", lambda p: _time(p.train_wall))
    row("training: with the teacher in the loop", lambda p: _time(p.online_hours))
    row("training: bottleneck", lambda p: bottleneck(p.epoch_hours))
    row("training: network per trainer", lambda p: f"{_bytes(p.trainer_bytes_per_second)}/s")
    row("training: read per epoch", lambda p: _bytes(p.epoch_bytes))
    row("training: requests", lambda p: f"{p.gets_per_second:,.0f}/s")
    row("training: cost", lambda p: f"{p.train_money:,.0f} {money}")
    return table


def _bytes(number: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number / 1e3:,.2f} kB"


def _time(hours: float) -> str:
    return f"{hours / 24:,.1f} days" if hours >= 48 else f"{hours:,.2f} h" if hours >= 1 else f"{hours * 60:,.1f} min"
