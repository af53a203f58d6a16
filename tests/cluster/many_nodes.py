"""Index, build a cache and train on several Ray nodes while one node is killed and another joins; the program of test_nodes.py.

It prints one line of JSON that tells which node did what. All nodes are on this machine, and each has its own raylet, object store
and workers.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from ray_distill.pipeline.corpus import decoding_work
from ray_distill.pipeline.corpus.index import index_corpus
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.training.ray_training import train_on_ray
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.build.shard_workers import Workers
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards


def actors_by_node(kind: str) -> dict[str, int]:
    """Count the actors, past and present, whose class name contains ``kind``, per node."""
    found: dict[str, int] = {}
    for actor in ray._private.state.actors().values():
        node = actor["Address"]["NodeID"]
        if kind in actor["ActorClassName"] and node:
            found[node] = found.get(node, 0) + 1
    return found


def index(job: dict[str, Any]) -> None:
    """Index the corpus on both nodes, with a task for every three files."""
    decoding_work._PER_TASK = 3
    index_corpus(Path(job["corpus"]), output=Path(job["index"]), decode=decoding_work.decode_on_ray)


def build(cluster: Cluster, job: dict[str, Any], lost: Any) -> dict[str, Any]:
    """Build the cache. After the first shards, kill the node ``lost`` and add a node of another size."""
    spec = CacheSpec.model_validate(job["spec"])
    members = [Utterance(**u) for u in job["utterances"]]
    told: dict[str, Any] = {"of": "build", "lost": lost.node_id}

    def on_progress(progress: Any) -> None:
        if "shards_when_lost" not in told and progress.shards_done >= 3:
            told["actors_before"] = actors_by_node("ShardWriter")
            cluster.remove_node(lost, allow_graceful=False)
            told["joined"] = cluster.add_node(num_cpus=4).node_id
            told["shards_when_lost"] = len(Cache.open(job["cache"]).shards) - len(Cache.open(job["cache"]).missing())

    report = build_cache(
        job["cache"],
        spec,
        plan_shards(members, spec.shard_seconds),
        job["teacher"],
        teacher_name="test",
        workers=Workers(2, 0, 2),  # With two cores per actor, no node has room for both.
        on_progress=on_progress,
    )
    told["actors_after"] = actors_by_node("ShardWriter")
    return told | {"shards": len(Cache.open(job["cache"]).shards), "written": report.written}


def train(cluster: Cluster, job: dict[str, Any], lost: Any) -> dict[str, Any]:
    """Train on two nodes. During training, kill the node ``lost`` and add a node of another size."""
    folder = Path(job["run"])
    told: dict[str, Any] = {"of": "train", "lost": lost.node_id}
    problems: list[Exception] = []

    def run() -> None:
        try:
            train_on_ray(
                StudentConfig.model_validate(job["student"]),
                TrainSettings.model_validate(job["settings"]),
                folder,
                layers=tuple(job["spec"]["layers"]),
                cache=job["cache"],
                teacher=job["teacher"],
                masks=CacheSpec.model_validate(job["spec"]).masks,
                utterances=[],
            )
        except Exception as error:
            problems.append(error)

    folder.mkdir(parents=True)
    # Nodes can only be started from the main thread, so training runs in another.
    trainer = threading.Thread(target=run)
    trainer.start()
    while trainer.is_alive():
        trainer.join(0.1)
        metrics = folder / "metrics.jsonl"
        rows = metrics.read_text().count("\n") if metrics.is_file() else 0
        if "joined" not in told and rows >= 12 and (folder / "checkpoints" / "last").exists():
            told["workers_before"] = actors_by_node("RayTrainWorker")
            cluster.remove_node(lost, allow_graceful=False)
            told["joined"] = cluster.add_node(num_cpus=2).node_id
    if problems:
        raise problems[0]
    return told | {"workers_after": actors_by_node("RayTrainWorker")}


def main() -> None:
    """Index, build, then train."""
    job = json.loads(Path(sys.argv[1]).read_text())
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        big, small = cluster.add_node(num_cpus=3), cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        index(job)
        built = build(cluster, job, small)
        for node in [node for node in cluster.worker_nodes if node is not big]:
            cluster.remove_node(node)
        cluster.remove_node(big)
        # With one core per node, the two trainers must be on two nodes.
        cluster.add_node(num_cpus=1)
        other = cluster.add_node(num_cpus=1, resources={"other": 1})
        time.sleep(1)
        print(json.dumps([built, train(cluster, job, other)]))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
