"""``run.py plan-cluster --cluster configs/clusters/NAME.yaml``: what corpora of any size cost on a cluster, on paper."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
import typer
import yaml
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
HOURS = (960.0, 60_000.0, 1_000_000.0)
"""LibriSpeech, Libri-Light, and beyond."""

_PART_BYTES = 10 << 20  # Arrow's, of an upload.


class ClusterError(ValueError):
    """A description of a cluster that can't be used; the message names the key."""


class Measured(pydantic.BaseModel, frozen=True, extra="forbid"):
    """A number that a benchmark measured.

    Attributes:
        file: result file in ``benchmarks/results``.
        where: what its row has, as ``{way: build with Ray}``.
        key: whose value in that row it is.
        times: factor to the unit wanted. Default 1.
    """

    file: str
    where: dict[str, str] = {}
    key: str
    times: float = 1.0

    def read(self, results: Path) -> float:
        """The number.

        Raises:
            ClusterError: no such file, row or key.
        """
        found = sorted(results.rglob(self.file))
        if not found:
            raise ClusterError(
                f"there is no result {results / self.file}; give --results the folder of benchmark results"
            )
        path = found[0]
        record = json.loads(path.read_text())
        if self.where:
            rows = [row for row in record["rows"] if all(row.get(key) == value for key, value in self.where.items())]
            if len(rows) != 1:
                raise ClusterError(f"{path} has {len(rows)} rows with {self.where}; one is needed")
            record = rows[0]
        if self.key not in record:
            raise ClusterError(f"{path} has no {self.key!r} where {self.where or 'the file begins'}")
        return float(record[self.key]) * self.times


Unit = Annotated[float, pydantic.Field(gt=0)] | Measured
"""A positive number in the YAML (an assumption, or a price), or where a benchmark measured it."""


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    def number(self, name: str, results: Path) -> float:
        value = getattr(self, name)
        return value.read(results) if isinstance(value, Measured) else float(value)


class Speech(_Section):
    """What is stored.

    Attributes:
        source_bytes: of audio as it comes, per second of audio.
        audio_bytes: of audio in the cache, per second of audio.
        target_bytes: of all layers of one whole pass, per second of audio.
        draws: mask draws.
        masked_fraction: of frames, which a masked pass does not store.
        utterance_seconds: mean length.
        shard_minutes: audio of a shard.
    """

    source_bytes: Unit
    audio_bytes: Unit
    target_bytes: Unit
    draws: int = pydantic.Field(ge=0)
    masked_fraction: float = pydantic.Field(ge=0, lt=1)
    utterance_seconds: Unit
    shard_minutes: Unit


class Build(_Section):
    """The machines that make the cache.

    Attributes:
        accelerators: teachers side by side, one to each.
        nodes: that hold them; each has its own network.
        cores: that decode audio.
        teacher_audio_per_second: seconds of audio one pass of one accelerator gets through per second.
        share_of_teacher: of that rate, what a build reaches.
        decode_audio_per_second: seconds of audio decoded per second and core.
        price_per_hour: of one accelerator with its share of a node.
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
        trainers: ranks, one accelerator to each.
        nodes: that hold them.
        epochs: of the run.
        student_audio_per_second: seconds of audio one accelerator trains on per second.
        share_of_resident: of that rate, what training from a cache reaches where nothing else is in the way.
        requests_per_utterance: GET requests that reading one utterance takes.
        reader_threads: of one trainer's `reader.CacheReader`, each of which waits for one request at a time.
        price_per_hour: of one accelerator with its share of a node.
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
    """The store, as the cluster sees it; for a disk, requests are system calls and cost nothing.

    Attributes:
        bytes_per_second: of all readers and writers together.
        puts_per_second, gets_per_second: requests that write, that read, which it takes before it slows callers down.
        get_seconds: that a small request takes.
        price_per_terabyte_month, price_per_million_puts, price_per_million_gets: in the currency of the other prices.
    """

    bytes_per_second: Unit
    puts_per_second: Unit
    gets_per_second: Unit
    get_seconds: Unit
    price_per_terabyte_month: float = pydantic.Field(ge=0)
    price_per_million_puts: float = pydantic.Field(ge=0)
    price_per_million_gets: float = pydantic.Field(ge=0)


class Cluster(_Section):
    """A cluster on paper.

    Attributes:
        name: for the table's title.
        currency: of all prices.
        node_bytes_per_second: network of one node, each way.
        speech, build, train, store: see their classes.
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
    """What one corpus costs. Every time is a lower bound: parts overlap perfectly and nothing fails (see `pipeline.simulate`).

    Attributes:
        hours: of audio.
        build_hours: what each part alone would need to make the cache, by its name.
        epoch_hours: what each part alone would need for one epoch.
        cache_bytes: of the finished cache.
        build_puts: requests that write.
        build_gets: requests that read audio, one an utterance.
        epoch_bytes: read by one epoch, of all trainers.
        epoch_gets: requests of one epoch.
        build_accelerator_hours, train_accelerator_hours: paid for, idle time included.
        online_hours: wall time of the same training with the teacher in the loop.
        trainer_bytes_per_second: network of one trainer while it trains.
        gets_per_second: requests of all trainers while they train.
        build_money, train_money, month_money: of the build, of a training run, of keeping the cache a month.
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
        """Hours."""
        return max(self.build_hours.values())

    @property
    def train_wall(self) -> float:
        """Hours."""
        return max(self.epoch_hours.values()) * self.epochs


def first_to_saturate(hours: dict[str, float]) -> str:
    """The part that needs longest, which all others wait for."""
    return max(hours, key=lambda part: hours[part])


def load_cluster(path: Path) -> Cluster:
    """Reads a cluster's YAML.

    Raises:
        ClusterError: no such file, not YAML, an unknown key, a missing or impossible value.
    """
    if not path.is_file():
        raise ClusterError(f"there is no cluster at {path}; configs/clusters/ has examples")
    try:
        return Cluster.model_validate(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ClusterError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part not in ("constrained-float", "Measured"))
        raise ClusterError(f"{path}: {key}: {first['msg'].lower()}") from error


def upload_requests(size: float) -> int:
    """Requests that write an object of ``size`` bytes as `storage.store` uploads it: begin, each part, end."""
    return 2 + max(1, math.ceil(size / _PART_BYTES))


def plan_cluster(cluster: Cluster, hours: float, results: Path = RESULTS) -> ClusterPlan:
    """Works a corpus out.

    Args:
        cluster: where.
        hours: of audio, above 0.
        results: folder of the benchmark results that the cluster refers to. Default the repository's.

    Raises:
        ClusterError: a measured number that is not there.
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
    # A shard is one file with the clean pass and one of each draw, and each file has a commit record.
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
    """Names of the units that benchmarks measured (with their file), and of those that are assumed."""
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
    """One column for each corpus."""
    money = cluster.currency

    def row(what: str, show: Any) -> None:
        table.add_row(what, *(show(plan) for plan in plans))

    table = Table(title=f"{cluster.name}, on paper")
    table.add_column("")
    for plan in plans:
        table.add_column(f"{plan.hours:,.0f} h", justify="right")
    row("cache", lambda p: _bytes(p.cache_bytes))
    row("build: accelerator hours", lambda p: f"{p.build_accelerator_hours:,.1f}")
    row("build: wall time", lambda p: _time(p.build_wall))
    row("build: saturates first", lambda p: first_to_saturate(p.build_hours))
    row("build: writes", lambda p: f"{p.build_puts:,.0f} ({p.build_puts / p.build_wall / 3600:,.1f}/s)")
    row("build: money", lambda p: f"{p.build_money:,.0f} {money}")
    row("keeping it a month", lambda p: f"{p.month_money:,.0f} {money}")
    row(f"training, {plans[0].epochs} epochs: accelerator hours", lambda p: f"{p.train_accelerator_hours:,.1f}")
    row("training: wall time", lambda p: _time(p.train_wall))
    row("training: with the teacher in the loop", lambda p: _time(p.online_hours))
    row("training: saturates first", lambda p: first_to_saturate(p.epoch_hours))
    row("training: network per trainer", lambda p: f"{_bytes(p.trainer_bytes_per_second)}/s")
    row("training: read per epoch", lambda p: _bytes(p.epoch_bytes))
    row("training: requests", lambda p: f"{p.gets_per_second:,.0f}/s")
    row("training: money", lambda p: f"{p.train_money:,.0f} {money}")
    return table


def _bytes(number: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number / 1e3:,.2f} kB"


def _time(hours: float) -> str:
    return f"{hours / 24:,.1f} days" if hours >= 48 else f"{hours:,.2f} h" if hours >= 1 else f"{hours * 60:,.1f} min"


def command(
    cluster: Annotated[Path, typer.Option(help="YAML of a cluster; configs/clusters/ has examples.")],
    hours: Annotated[list[float] | None, typer.Option(help="Hours of audio; may be repeated.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of benchmark results.")] = RESULTS,
) -> None:
    """Say what corpora cost on a cluster: time, store, requests, network, money, and which part saturates first."""
    console = Console(soft_wrap=True, highlight=False)
    try:
        described = load_cluster(cluster)
        console.print(plan_table(described, [plan_cluster(described, h, results) for h in hours or HOURS]))
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from None
    measured, assumed = origins(described)
    console.print(f"Measured: {', '.join(measured) or 'nothing'}.")
    console.print(f"Assumed: {', '.join(assumed) or 'nothing'}.")
    console.print("Lower bounds: all parts overlap and nothing fails.")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(command)

if __name__ == "__main__":
    app()
