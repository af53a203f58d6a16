"""What a training refuses to continue from, and that nothing of the run is lost then."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.training.metric_rows import read_rows
from ray_distill.student.training.metrics import Metrics
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.target_source import TargetSource, cached_source, online_source
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.train_state import Checkpoints, TrainState
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance

Readers = tuple[CacheReader, CacheReader]
Settings = Callable[..., TrainSettings]

STATE = Path("checkpoints", "last", "state.pt")
CHOICES = "give the run another name, or remove .*run to start again"


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@pytest.fixture
def run(tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers) -> Path:
    """The folder of a run that has stopped after two steps."""
    train(tiny, settings(max_steps=2, validate_every=1, keep_best=3), *readers, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def refuse(tiny: StudentConfig, settings: Settings, readers: Readers, run: Path) -> Callable[..., None]:
    """Asserts that continuing the run is refused with a message, and changes no file."""

    def check(message: str, **changes: Any) -> None:
        before = content(run)
        with pytest.raises(ValueError, match=message) as caught:
            train(tiny, settings(max_steps=4, validate_every=1, **changes), *readers, run)
        assert "\n" not in str(caught.value)
        assert content(run) == before

    return check


def test_a_missing_state_is_refused(run: Path, refuse: Callable[..., None]) -> None:
    (run / STATE).unlink()
    message = rf"state.pt, .*, is missing, but .*run has results up to step 2; restore it from a copy, {CHOICES}"
    refuse(message)
    rows = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").unlink()
    refuse(message)
    (run / "metrics.jsonl").write_bytes(rows)
    for step in (0, 1, 2):
        remove(run / "checkpoints" / f"step-{step:06d}")
    refuse(message)


def test_missing_metrics_are_refused(run: Path, refuse: Callable[..., None]) -> None:
    (run / "metrics.jsonl").unlink()
    refuse("metrics.jsonl is missing, but .*state.pt continues from step .*create an empty file of this name")


def test_a_missing_best_student_is_refused(run: Path, refuse: Callable[..., None]) -> None:
    remove((run / "checkpoints" / "best").resolve())
    refuse(rf"step-00000\d, the best student so far, is missing; restore it from a copy, {CHOICES}")


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers
) -> None:
    train(tiny, settings(max_steps=1), *readers, tmp_path / "whole")
    run = tmp_path / "run"
    (run / "checkpoints" / "step-000000").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"kind": "validation", "step": 0, "loss": 1.0}\n')
    train(tiny, settings(max_steps=1), *readers, run)
    assert [row["loss"] for row in read_rows(run / "metrics.jsonl")] == [
        row["loss"] for row in read_rows(tmp_path / "whole" / "metrics.jsonl")
    ]


def test_a_damaged_state_or_other_settings_are_refused(run: Path, refuse: Callable[..., None]) -> None:
    refuse(rf"state.pt is not a checkpoint of this training .*; use its settings, {CHOICES}", ema_decay=0.9)
    (run / STATE).write_bytes((run / STATE).read_bytes()[:1000])
    refuse(rf"state.pt is damaged \(.*\); restore it from a copy, {CHOICES}")
    (run / STATE).write_bytes(b"")
    refuse("state.pt is damaged")


def test_folders_that_are_no_steps_are_kept(
    run: Path, tiny: StudentConfig, settings: Settings, readers: Readers
) -> None:
    copy = run / "checkpoints" / "step-000001-mine"
    copy.mkdir()
    train(tiny, settings(max_steps=3, validate_every=1, keep_best=1), *readers, run)
    assert copy.is_dir()
    assert len(list((run / "checkpoints").glob("step-??????"))) == 1


def test_no_flipped_bit_of_a_state_is_loaded(tmp_path: Path) -> None:
    part = nn.Linear(3, 2)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", {"student": part}, Rank())
    state = TrainState(step=7, first_loss=1.5)
    checkpoints.save(state)
    (tmp_path / "run" / "metrics.jsonl").touch()
    saved = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    generator = torch.get_rng_state()
    path = tmp_path / "run" / STATE
    whole = path.read_bytes()
    assert checkpoints.load() == state
    refused, positions = 0, random.Random(0)
    # Random bits, and in each directory entry of the ZIP file the one that marks a folder.
    bits = [positions.randrange(8 * len(whole)) for _ in range(200)]
    marks = [8 * (match.start() + 38) + 4 for match in re.finditer(b"PK\x01\x02", whole)]
    for bit in bits + marks:
        path.write_bytes(flipped(whole, bit))
        nn.init.zeros_(part.weight)
        torch.manual_seed(0)
        try:
            found = checkpoints.load()
        except ValueError:
            refused += 1
        else:  # Padding between the records, dates and the like.
            assert found == state and torch.equal(torch.get_rng_state(), generator), bit
            assert all(torch.equal(part.state_dict()[name], tensor) for name, tensor in saved.items()), bit
    assert refused > 150


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# Metrics and trackers


@pytest.mark.parametrize(
    "row",
    [
        '{"kind": "train", "st',
        "[]",
        '{"kind": "trbin", "step": 1}',
        '{"kind": "train", "step": 1, "lors": 2}',
        "\udcff",
    ],
)
def test_a_damaged_row_is_named(run: Path, refuse: Callable[..., None], row: str) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], row.encode(errors="surrogateescape") + b"\n", *lines[3:]]))
    refuse("metrics.jsonl is damaged in line 3, which is not a row of metrics; restore the file from a copy, or remove")


@pytest.mark.parametrize("text", ["", '{"wandb": "a', "[]", '{"wandb": 3}', "\udcff"])
def test_damaged_ids_of_trackers_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trackers.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"trackers.json is damaged, so .*; restore it from a copy, or remove it to"):
        Metrics(tmp_path, 3)
    assert path.read_bytes() == text.encode(errors="surrogateescape")


# Targets


def test_another_cache_is_refused(
    tmp_path: Path,
    tiny: StudentConfig,
    settings: Settings,
    readers: Readers,
    make_cache: Callable[..., CacheSpec],
) -> None:
    run, source = tmp_path / "run", cached_source(readers[0])
    train(tiny, settings(max_steps=1), *readers, run, source=source)
    spec = readers[0].cache.spec
    make_cache(tmp_path / "other", masks=spec.masks.model_copy(update={"seed": 5}))
    others = CacheReader(tmp_path / "other", "train"), CacheReader(tmp_path / "other", "validation")
    other = cached_source(others[0])
    before = content(run)
    with pytest.raises(
        ValueError, match=f"was trained with {source.name}, but now .* come from {other.name}, which .*use"
    ):
        train(tiny, settings(max_steps=2), *others, run, source=other)
    assert content(run) == before
    # A copy elsewhere, and a cache that another run has extended, have the same targets.
    (tmp_path / "cache").rename(tmp_path / "moved")
    make_cache(tmp_path / "moved", masks=spec.masks.model_copy(update={"draws": 2}))
    grown = CacheReader(tmp_path / "moved", "train", draws=1), CacheReader(tmp_path / "moved", "validation")
    assert grown[0].cache.fingerprint != source.cache_fingerprint
    train(tiny, settings(max_steps=2), *grown, run, source=cached_source(grown[0]))


def test_a_rebuilt_codec_state_is_another_source(readers: Readers) -> None:
    reader = readers[0]
    source = cached_source(reader)
    assert source.cache_fingerprint == reader.cache.fingerprint
    (layer_set,) = reader.cache.layer_sets
    rebuilt = layer_set.model_copy(update={"state": "0" * 64})
    object.__setattr__(reader.cache, "layer_sets", (rebuilt,))
    assert cached_source(reader).key != source.key


def test_another_teacher_or_mask_is_another_online_source() -> None:
    utterances = [Utterance(name, f"{name}.flac", 16_000, "train", name * 64) for name in "ab"]
    source = online_source("t.pt", "f00", (1, 2), MaskDraws(), None, utterances)
    assert online_source("moved.pt", "f00", (1, 2), MaskDraws(), None, utterances[::-1]).key == source.key
    others = [
        online_source("t.pt", "f01", (1, 2), MaskDraws(), None, utterances),
        online_source("t.pt", "f00", (1,), MaskDraws(), None, utterances),
        online_source("t.pt", "f00", (1, 2), MaskDraws(seed=7), None, utterances),
        online_source("t.pt", "f00", (1, 2), MaskDraws(), None, utterances[:1]),
    ]
    assert len({source.key, *(other.key for other in others)}) == 5
    assert len({source.name, *(other.name for other in others)}) == 5


def test_a_state_without_a_source_is_continued_and_gets_one(tmp_path: Path) -> None:
    folder, part = tmp_path / "checkpoints", nn.Linear(3, 2)
    mine, other = TargetSource("mine", "1"), TargetSource("other", "2")
    Checkpoints(folder, {"student": part}, Rank()).save(TrainState())
    path = folder / "last" / "state.pt"
    before = torch.load(path, weights_only=True)
    del before["source"], before["state"]["shuffle"]
    torch.save(before, path)
    checkpoints = Checkpoints(folder, {"student": part}, Rank(), mine)
    state = checkpoints.load()
    assert state.shuffle == "full", "earlier versions had no other order"
    checkpoints.save(state)
    unknown = Checkpoints(folder, {"student": part}, Rank())
    unknown.save(unknown.load())
    with pytest.raises(ValueError, match="was trained with mine, but now the targets come from other"):
        Checkpoints(folder, {"student": part}, Rank(), other).load()


def test_a_finished_training_can_be_made_longer(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: Readers
) -> None:
    short, long = (
        settings(max_steps=3, validate_every=1, log_every=1),
        settings(max_steps=6, validate_every=1, log_every=1),
    )
    assert train(tiny, short, *readers, tmp_path / "run").steps == 3
    result = train(tiny, long, *readers, tmp_path / "run")
    assert result.steps == 6
    train(tiny, long, *readers, tmp_path / "whole")
    rows, whole = (
        [row for row in read_rows(tmp_path / name / "metrics.jsonl") if row["kind"] == "train"]
        for name in ("run", "whole")
    )
    assert [row["step"] for row in rows] == list(range(1, 7))
    rates = [row["learning_rate"] for row in rows]
    assert rates[3:] == [row["learning_rate"] for row in whole][3:], "the rest follows the schedule of the new length"
    assert rates[2] < rates[3] and rates[:3] != [row["learning_rate"] for row in whole][:3]
