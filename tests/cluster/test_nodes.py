"""An index, a build and a training run on several Ray nodes of different sizes; one node is lost during each, and others join."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_distill.pipeline.corpus.decoded_sources import DECODED
from ray_distill.pipeline.corpus.index import INDEX, SKIPPED, STATE, index_corpus
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.maintenance.verify import verify_cache
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance

from ..tiny import tiny_student

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

REPOSITORY = Path(__file__).resolve().parents[2]
TEACHER = "random:6x192"  # Slow enough that a node is lost while shards are still missing.


def test_nodes_come_and_go(
    tmp_path: Path, speech_folder: Path, source_utterances: list[Utterance], cache_spec: Callable[..., CacheSpec]
) -> None:
    # Repeat each utterance under many ids, for a corpus of a few minutes.
    utterances = [
        Utterance(f"{u.id}-{n}", u.path, u.num_samples, u.split, u.sha256) for n in range(16) for u in source_utterances
    ]
    spec = cache_spec(TEACHER, shard_seconds=4.0)
    student = tiny_student(encoder_layers=spec.num_layers, target_dim=spec.dim)
    settings = TrainSettings(
        max_steps=60, batch_size=2, workers=2, log_every=1, validate_every=30, checkpoint_every=5, max_failures=3
    )
    job = {
        "corpus": str(speech_folder),
        "index": str(tmp_path / "index"),
        "cache": str(tmp_path / "cache"),
        "run": str(tmp_path / "run"),
        "teacher": TEACHER,
        "spec": spec.model_dump(mode="json"),
        "utterances": [vars(u) for u in utterances],
        "student": student.model_dump(mode="json"),
        "settings": settings.model_dump(mode="json"),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "PYTHONPATH": str(REPOSITORY),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("many_nodes.py")), str(tmp_path / "job.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1000,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    built, trained = json.loads(done.stdout.splitlines()[-1])

    # The index is the same as one that this process makes.
    index_corpus(speech_folder, output=tmp_path / "here")
    for name in (INDEX, SKIPPED, STATE, DECODED):
        assert (tmp_path / "index" / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name

    # The build ran on two nodes, lost one while shards were missing, and continued on the node that joined.
    assert len(built["actors_before"]) == 2 and built["lost"] in built["actors_before"]
    assert 0 < built["shards_when_lost"] < built["shards"]
    assert built["joined"] in built["actors_after"]
    cache = Cache.open(tmp_path / "cache")
    assert not cache.missing() and verify_cache(tmp_path / "cache") == []
    ids = [utterance.id for shard in cache.shards for utterance in shard.utterances]
    assert sorted(ids) == sorted(u.id for u in utterances), "an utterance is missing or duplicated"
    assert built["written"] == built["shards"]

    # Training ran on two nodes, lost one, and finished on the node that joined. No step is missing or duplicated.
    assert len(trained["workers_before"]) == 2 and trained["lost"] in trained["workers_before"]
    assert trained["joined"] in trained["workers_after"]
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 61))
    assert json.loads((tmp_path / "run" / "train.json").read_text())["steps"] == 60
