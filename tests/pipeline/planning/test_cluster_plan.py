"""The cluster plan compared with arithmetic, and the descriptions in configs/clusters with the benchmark results."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from ray_distill.command_line import application
from ray_distill.pipeline.planning.cluster import RESULTS, Cluster, ClusterError, load_cluster, origins
from ray_distill.pipeline.planning.cluster_plan import bottleneck, plan_cluster, upload_requests
from ray_distill.pipeline.planning.plan_table import plan_table
from ray_distill.teacher_cache.reading.local_copies import RANGE_BYTES, RANGES_AT_ONCE
from ray_distill.teacher_cache.storage.store import WHOLE_BYTES, Store

CLUSTERS = sorted((Path(__file__).resolve().parents[3] / "configs" / "clusters").glob("*.yaml"))


def round_numbers(**changes: Any) -> Cluster:
    tree: dict[str, Any] = {
        "name": "round",
        "node_bytes_per_second": 1e9,
        "speech": {
            "source_bytes": 16e3,
            "audio_bytes": 16e3,
            "target_bytes": 34e3,
            "draws": 4,
            "masked_fraction": 0.75,
            "utterance_seconds": 10,
            "shard_minutes": 10,
        },
        "build": {
            "accelerators": 10,
            "nodes": 5,
            "cores": 100,
            "teacher_audio_per_second": 5000,
            "share_of_teacher": 0.9,
            "decode_audio_per_second": 1000,
            "price_per_hour": 2,
        },
        "train": {
            "trainers": 8,
            "nodes": 4,
            "epochs": 10,
            "student_audio_per_second": 2000,
            "share_of_resident": 1,
            "requests_per_utterance": 2,
            "reader_threads": 4,
            "price_per_hour": 3,
        },
        "store": {
            "bytes_per_second": 1e10,
            "puts_per_second": 1000,
            "gets_per_second": 5000,
            "get_seconds": 0.001,
            "price_per_terabyte_month": 20,
            "price_per_million_puts": 5,
            "price_per_million_gets": 0.5,
        },
    }
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    return Cluster.model_validate(tree)


def test_arithmetic() -> None:
    plan = plan_cluster(round_numbers(), 1000)
    seconds = 3.6e6
    assert plan.cache_bytes == pytest.approx(seconds * (16e3 + 34e3 * 2))  # 4 draws of a quarter are one more pass
    assert plan.build_hours["teachers"] == pytest.approx(seconds * 5 / 45_000 / 3600)
    assert plan.build_hours["decoding"] == pytest.approx(seconds / 100_000 / 3600)
    # The clean pass (30 MB) has a begin, 3 parts and an end; each draw (5.1 MB) and each commit record is one request.
    assert plan.build_puts == 6000 * (5 + 4 + 5) == 84_000
    assert plan.build_gets == pytest.approx(360_000)
    assert plan.epoch_bytes == pytest.approx(seconds * (16e3 + 34e3 * 1.25))
    assert plan.gets_per_second == pytest.approx(720_000 / (seconds / 16_000))
    assert plan.online_hours == pytest.approx(10 * seconds * (1 / 2000 + 2 / 5000) / 8 / 3600)
    assert plan.build_accelerator_hours == pytest.approx(plan.build_wall * 10)
    assert plan.month_money == pytest.approx(plan.cache_bytes / 1e12 * 20)
    assert plan.build_money == pytest.approx(plan.build_accelerator_hours * 2 + (84_000 * 5 + 360_000 * 0.5) / 1e6)
    assert plan.train_money == pytest.approx(plan.train_accelerator_hours * 3 + 7.2e6 * 0.5 / 1e6)


@pytest.mark.parametrize("size", [0, 1, 10 << 20, (10 << 20) + 1, 35_000_000])
def test_write_requests_are_those_of_an_upload(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The requests are counted by a minimal S3 server, which accepts everything and stores nothing."""
    written: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int = 200, root: str = "") -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while length := int(self.rfile.readline(), 16):
                    self.rfile.read(length + 2)
                self.rfile.readline()
            body = f"<{root}><Bucket>b</Bucket><Key>k</Key><UploadId>u</UploadId></{root}>".encode() if root else b""
            self.send_response(status)
            self.send_header("ETag", '"e"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.answer(404)

        def do_GET(self) -> None:
            self.answer(root="ListBucketResult")

        def do_PUT(self) -> None:
            written.append("part" if "partNumber=" in self.path else "object")
            self.answer()

        def do_POST(self) -> None:
            begins = self.path.endswith("?uploads")
            written.append("begin" if begins else "end")
            self.answer(root="InitiateMultipartUploadResult" if begins else "CompleteMultipartUploadResult")

        def log_message(self, *_: object) -> None:
            """Print nothing, to keep the tests' output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for key, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(key, value)
        Store("s3://bucket/caches/demo").write("part-00000.parquet", bytes(size))
        server.shutdown()
    if size <= WHOLE_BYTES:
        assert written == ["object"]
    else:
        assert (written[0], written[-1]) == ("begin", "end") and set(written[1:-1]) == {"part"}
    assert len(written) == upload_requests(size)


@pytest.mark.parametrize(
    ("change", "stage", "part"),
    [
        ({}, "build", "teachers"),
        ({"build__cores": 1}, "build", "decoding"),
        ({"store__bytes_per_second": 1e6}, "build", "bandwidth of the store"),
        ({"store__puts_per_second": 0.5}, "build", "writes of the store"),
        ({"speech__shard_minutes": 0.01}, "build", "writes of the store"),
        ({}, "train", "students"),
        ({"store__gets_per_second": 100}, "train", "reads of the store"),
        ({"store__bytes_per_second": 1e8}, "train", "bandwidth of the store"),
        ({"store__get_seconds": 0.1}, "train", "latency of the readers"),
    ],
)
def test_the_scarce_resource_is_the_bottleneck(change: dict[str, float], stage: str, part: str) -> None:
    plan = plan_cluster(round_numbers(**change), 960)
    assert bottleneck(plan.build_hours if stage == "build" else plan.epoch_hours) == part


def test_the_cores_of_the_trainers_decode() -> None:
    changed = round_numbers().model_dump()
    changed["train"] |= {"cores": 8, "reader_audio_per_second": 500}
    plan = plan_cluster(Cluster.model_validate(changed), 1000)
    assert plan.epoch_hours["decoding by the readers"] == pytest.approx(1000 / (8 * 500))
    assert bottleneck(plan.epoch_hours) == "decoding by the readers"


def test_the_hosts_dispatch_the_steps_of_the_students() -> None:
    changed = round_numbers().model_dump()
    assert "hosts of the students" not in plan_cluster(Cluster.model_validate(changed), 1000).epoch_hours
    changed["train"] |= {"batch_seconds": 10, "host_seconds_per_step": 0.05}
    plan = plan_cluster(Cluster.model_validate(changed), 1000)
    steps = 3.6e6 / 10 / changed["train"]["trainers"]
    assert plan.epoch_hours["hosts of the students"] == pytest.approx(steps * 0.05 / 3600)
    assert bottleneck(plan.epoch_hours) == "hosts of the students"


def test_local_copies_are_read_once_if_the_cache_fits() -> None:
    small, large = (plan_cluster(round_numbers(train__local_bytes=3.6e6 * 84e3), hours) for hours in (1000, 1001))
    assert (small.copied, large.copied) == (True, False)
    assert small.epoch_bytes == pytest.approx(small.cache_bytes * 4 / 10)  # 4 nodes read it once in 10 epochs.
    assert small.epoch_gets == pytest.approx(small.epoch_bytes / RANGE_BYTES)
    assert large.epoch_bytes == plan_cluster(round_numbers(), 1001).epoch_bytes
    assert large.epoch_gets == pytest.approx(large.epoch_bytes / RANGE_BYTES)


def test_local_copies_never_read_more_than_no_copies() -> None:
    few, none = (plan_cluster(round_numbers(train__epochs=2, train__local_bytes=space), 1000) for space in (1e15, 0))
    assert few.copied and few.epoch_bytes == none.epoch_bytes, (
        "in two epochs four nodes can't read the cache four times"
    )
    # Each process of a node has requests of its own.
    waiting = few.epoch_gets * 0.001 / (8 * RANGES_AT_ONCE)
    assert few.epoch_hours["latency of the readers"] == pytest.approx(waiting / 3600)


def test_audio_that_is_stored_once() -> None:
    plain, plan = (plan_cluster(round_numbers(speech__audio=audio), 1000) for audio in ("cache", "store"))
    seconds = 3.6e6
    assert (plain.audio_store_bytes, plan.audio_store_bytes) == (0, pytest.approx(seconds * 16e3))
    assert plan.cache_bytes == pytest.approx(plain.cache_bytes - seconds * 16e3)
    assert plan.epoch_bytes == pytest.approx(plain.epoch_bytes) and plan.month_money == pytest.approx(plain.month_money)
    # The clean pass (20.4 MB) has 2 parts instead of 3. An audio shard (9.6 MB) has a begin, a part and an end, and a record.
    assert plan.build_puts == 6000 * (4 + 4 + 5 + 3 + 1)
    assert plan.build_gets == pytest.approx(360_000 + 6000) and plan.epoch_gets == pytest.approx(3 * 360_000)
    # The build writes the audio, and reads it again for the cache.
    assert plan.build_hours["bandwidth of the store"] == pytest.approx(seconds * (16e3 + 68e3 + 2 * 16e3) / 1e10 / 3600)
    room = round_numbers(speech__audio="store", train__local_bytes=seconds * 84e3)
    small, large = (plan_cluster(room, hours) for hours in (1000, 1001))
    assert (small.copied, large.copied) == (True, False), "copies of both"
    assert small.epoch_bytes == pytest.approx(seconds * 84e3 * 4 / 10)


def test_audio_that_is_read_from_the_corpus() -> None:
    with pytest.raises(ClusterError, match="^train.cores: with speech.audio source the trainers decode the corpus in"):
        plan_cluster(round_numbers(speech__audio="source"), 1)
    tree = round_numbers(speech__audio="source", speech__source_bytes=40e3).model_dump()
    tree["train"] |= {"cores": 8, "reader_audio_per_second": 5000}
    plan = plan_cluster(Cluster.model_validate(tree), 1000)
    seconds = 3.6e6
    assert plan.cache_bytes == pytest.approx(seconds * 68e3) and plan.audio_store_bytes == 0
    assert plan.epoch_bytes == pytest.approx(seconds * (40e3 + 34e3 * 1.25))
    assert plan.epoch_gets == pytest.approx(360_000 * (2 + 2))
    assert plan.epoch_hours["decoding by the readers"] == pytest.approx(1000 / (8 * 1000)), "as the build decodes"
    tree["train"]["local_bytes"] = seconds * 68e3
    copied = plan_cluster(Cluster.model_validate(tree), 1000)
    assert copied.copied and copied.epoch_bytes == pytest.approx(seconds * (68e3 * 4 / 10 + 40e3))
    assert copied.epoch_gets == pytest.approx(seconds * 68e3 * 4 / 10 / RANGE_BYTES + 2 * 360_000)
    console = Console(width=200, record=True, quiet=True)
    with console.capture() as shown:
        console.quiet = False
        console.print(plan_table(Cluster.model_validate(tree), [copied]))
        console.print(plan_table(round_numbers(), [plan_cluster(round_numbers(speech__audio="store"), 1000)]))
    assert "local copies and the corpus" in shown.get() and "audio store" in shown.get() and "57.60 GB" in shown.get()


def test_without_draws_the_cache_has_one_pass() -> None:
    plan = plan_cluster(round_numbers(speech__draws=0), 1000)
    assert plan.cache_bytes == pytest.approx(3.6e6 * 50e3)
    assert plan.epoch_bytes == plan.cache_bytes
    assert plan.online_hours == pytest.approx(10 * 3.6e6 * (1 / 2000 + 1 / 5000) / 8 / 3600)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_shipped_clusters_are_planned_with_their_assumptions(path: Path) -> None:
    cluster = load_cluster(path)
    measured, assumed = origins(cluster)
    assert measured and assumed
    shown = CliRunner().invoke(application, ["plan-cluster", "--cluster", str(path)], env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.output
    for text in ("960 h", "60,000 h", "1,000,000 h", "bottleneck", "Lower bounds"):
        assert text in shown.output
    small, large = (plan_cluster(cluster, hours) for hours in (960, 960_000))
    assert large.cache_bytes == pytest.approx(1000 * small.cache_bytes)
    assert math.isclose(large.build_wall, 1000 * small.build_wall, rel_tol=1e-3)


def test_measured_numbers_come_from_the_result_files(tmp_path: Path) -> None:
    cluster = load_cluster(next(path for path in CLUSTERS if path.stem == "this-machine"))
    rows = json.loads((RESULTS / "cache" / "cache_build.json").read_text())["rows"]
    bare = next(row for row in rows if row["way"] == "bare teacher")["audio_per_second"]
    assert cluster.build.number("teacher_audio_per_second", RESULTS) == pytest.approx(3 * bare)
    with pytest.raises(ClusterError, match=r"there is no benchmark result .*; set --results"):
        plan_cluster(cluster, 1, tmp_path)


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    tree = round_numbers().model_dump()
    for change, message in (
        ({"stores": 1}, "stores: extra inputs are not permitted"),
        ({"node_bytes_per_second": -1}, "node_bytes_per_second: input should be greater than 0"),
        ({"name": None}, "name: input should be a valid string"),
        ({"train": tree["train"] | {"cores": 8}}, "train: .*give cores and reader_audio_per_second together"),
        (
            {"train": tree["train"] | {"batch_seconds": 8}},
            "train: .*give batch_seconds and host_seconds_per_step together",
        ),
    ):
        path.write_text(yaml.safe_dump(tree | change))
        with pytest.raises(ClusterError, match=message):
            load_cluster(path)
    shown = CliRunner().invoke(application, ["plan-cluster", "--cluster", str(tmp_path / "none.yaml")])
    assert shown.exit_code == 2 and "there is no cluster description at" in shown.output
    with pytest.raises(ClusterError, match="hours must be above 0"):
        plan_cluster(round_numbers(), 0)
    changed = tree | {"build": tree["build"] | {"share_of_teacher": {"file": "cache_build.json", "key": "none"}}}
    with pytest.raises(ClusterError, match="has no key 'none'"):
        plan_cluster(Cluster.model_validate(changed), 1)
    for hours in (math.inf, math.nan):
        with pytest.raises(ClusterError, match="hours must be above 0 and finite"):
            plan_cluster(round_numbers(), hours)
    path.write_text(yaml.safe_dump(tree | {"node_bytes_per_second": math.inf}))
    with pytest.raises(ClusterError, match="node_bytes_per_second: input should be a finite number"):
        load_cluster(path)
    for content, key, message in (
        ('{"rate": 0}', "rate", "rate is 0, but a positive number is needed"),
        ('{"rate": "fast"}', "rate", "rate is 'fast', but a positive number is needed"),
        ("{", "rate", "result.json is not valid JSON"),
        ("[]", "rate", "result.json has no key 'rate'"),
    ):
        (tmp_path / "result.json").write_text(content)
        changed = tree | {"node_bytes_per_second": {"file": "result.json", "key": key}}
        with pytest.raises(ClusterError, match=message):
            plan_cluster(Cluster.model_validate(changed), 1, tmp_path)
    changed = tree | {"node_bytes_per_second": {"file": "result.json", "key": "rate", "where": {"way": "x"}}}
    with pytest.raises(ClusterError, match="has 0 rows with"):
        plan_cluster(Cluster.model_validate(changed), 1, tmp_path)
