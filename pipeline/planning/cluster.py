"""The description of a cluster in YAML: measured and assumed speeds, sizes and prices."""

import json
import math
from pathlib import Path
from typing import Annotated, Literal, Self

import pydantic

from ray_distill.pipeline.composition.yaml_text import read_yaml
from ray_distill.pipeline.recipes import other_kind, other_recipes

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


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
    times: float = pydantic.Field(default=1.0, gt=0, allow_inf_nan=False)

    def read(self, results: Path) -> float:
        """Return the number from a folder of benchmark results.

        Raises:
            ClusterError: The file, row or key doesn't exist, or there is no positive number.
        """
        found = sorted(results.rglob(self.file))
        if not found:
            raise ClusterError(
                f"there is no benchmark result {results / self.file}; set --results to the folder of benchmark results"
            )
        path = found[0]
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise ClusterError(f"{path} is not valid JSON ({error}); run its benchmark again") from error
        if self.where:
            found_rows = record.get("rows", []) if isinstance(record, dict) else []
            rows = [row for row in found_rows if all(row.get(key) == value for key, value in self.where.items())]
            if len(rows) != 1:
                raise ClusterError(f"{path} has {len(rows)} rows with {self.where}; exactly one is needed")
            record = rows[0]
        if not isinstance(record, dict) or self.key not in record:
            raise ClusterError(
                f"{path} has no key {self.key!r}" + (f" in the row with {self.where}" if self.where else "")
            )
        value = record[self.key]
        if not isinstance(value, (int, float)) or not 0 < value * self.times < math.inf:
            raise ClusterError(f"{path}: {self.key} is {value!r}, but a positive number is needed")
        return float(value) * self.times


Unit = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)] | Measured
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
        audio: Where the audio of the cache is, as its setting ``cache.audio``: ``cache`` (in the cache itself; the default), ``store``
            (in an audio store, once for any number of caches) or ``source`` (in the corpus, which the trainers decode in each epoch).
        audio_bytes: Size of the audio in the cache or the audio store, in bytes per second of audio.
        target_bytes: Size of all layers of one complete pass, in bytes per second of audio.
        draws: Number of mask draws.
        masked_fraction: Fraction of masked frames, which a masked pass does not store.
        utterance_seconds: Mean length of an utterance in seconds.
        shard_minutes: Minutes of audio per shard.
    """

    audio: Literal["cache", "store", "source"] = "cache"
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
        cores: Number of CPU cores of the trainers that read and decode the cache. None: more than they need.
        reader_audio_per_second: Seconds of audio per second that one core reads and decodes, from a cache with audio. Given with
            ``cores``.
        batch_seconds: Seconds of audio in a batch of one trainer. None: so many that no card waits for the host.
        host_seconds_per_step: Seconds that the host needs to dispatch the training step of a batch, whatever its size.
            Given with ``batch_seconds``.
        local_bytes: Space for copies on the disks of one node (``cache.local`` with ``train.shuffle: window``), so that files
            are read from the store in large ranges: once if the space holds the cache, else in each epoch. 0, the default: no
            copies, and single utterances are read.
        price_per_hour: Price per hour of one accelerator with its share of a node.
    """

    trainers: int = pydantic.Field(ge=1)
    nodes: int = pydantic.Field(ge=1)
    epochs: int = pydantic.Field(ge=1)
    student_audio_per_second: Unit
    share_of_resident: Unit
    requests_per_utterance: Unit
    reader_threads: int = pydantic.Field(ge=1)
    cores: int | None = pydantic.Field(default=None, ge=1)
    reader_audio_per_second: Unit | None = None
    batch_seconds: Unit | None = None
    host_seconds_per_step: Unit | None = None
    local_bytes: float = pydantic.Field(default=0, ge=0)
    price_per_hour: Unit

    @pydantic.model_validator(mode="after")
    def _check_pairs(self) -> Self:
        for one, other in (("cores", "reader_audio_per_second"), ("batch_seconds", "host_seconds_per_step")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise ValueError(f"give {one} and {other} together")
        return self


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


def load_cluster(path: Path) -> Cluster:
    """Read the YAML description of a cluster.

    Raises:
        ClusterError: The file doesn't exist or is not YAML, or has an unknown key or a missing or impossible value.
    """
    if not path.is_file():
        raise ClusterError(f"there is no cluster description at {path}; {other_recipes(path, 'clusters')}")
    try:
        tree = read_yaml(path)
    except ValueError as error:
        raise ClusterError(str(error)) from error
    if tree is None:
        raise ClusterError(f"{path} is empty; copy one of configs/clusters and change its numbers")
    if isinstance(tree, dict) and (other := other_kind(tree, "cluster")):
        raise ClusterError(f"{path} {other}")
    try:
        return Cluster.model_validate(tree)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part not in ("constrained-float", "Measured"))
        raise ClusterError(f"{path}: {key}: {first['msg'].lower()}") from error


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
