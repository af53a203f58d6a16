"""Training from caches whose audio is read from the corpus: it is bit for bit that from caches with their audio."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_distill.student import StudentConfig
from ray_distill.student.training.target_source import TeacherCache, several_readers
from ray_distill.student.training.train_settings import SeveralTeacherSettings, TrainSettings
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance

from ..conftest import MASKS

Make = Callable[..., CacheSpec]
OTHER = "random:2x48"


class StoppedError(Exception):
    """Stops a training in the middle of an epoch, after its checkpoint."""


def stop(row: dict[str, Any]) -> None:
    if row["step"] == 3:
        raise StoppedError


@pytest.mark.parametrize("shuffle", ["full", "window"])
def test_losses_are_those_of_a_cache_with_audio_and_a_resumed_training_has_them(
    tmp_path: Path,
    make_cache: Make,
    tiny: StudentConfig,
    settings: Callable[..., TrainSettings],
    assert_same_end: Callable[[Path, Path], None],
    shuffle: str,
) -> None:
    chosen = settings(batch_size=2, max_steps=7, validate_every=3, shuffle=shuffle)  # An epoch has five steps.
    for audio in ("flac", "source"):
        make_cache(tmp_path / audio, masks=MASKS, audio=audio)

    def readers(audio: str) -> tuple[CacheReader, CacheReader]:
        return CacheReader(tmp_path / audio, "train"), CacheReader(tmp_path / audio, "validation")

    train(tiny, chosen, *readers("flac"), tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(tiny, chosen, *readers("source"), tmp_path / "run", on_validation=stop)
    train(tiny, chosen, *readers("source"), tmp_path / "run")
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_several_teachers_learn_alike_wherever_the_audio_is(
    tmp_path: Path,
    make_cache: Make,
    tiny: StudentConfig,
    settings: Callable[..., TrainSettings],
    assert_same_end: Callable[[Path, Path], None],
) -> None:
    terms = [
        {"name": name, "settings": {"objective": "prediction"}, "num_layers": 2, "dim": dim}
        for name, dim in (("a", 32), ("b", 48))
    ]
    chosen = SeveralTeacherSettings.model_validate(
        settings(batch_size=2, max_steps=4, validate_every=4).model_dump() | {"terms": terms}
    )
    for run, first, second in (("whole", "flac", "flac"), ("source", "source", "source"), ("mixed", "source", "flac")):
        make_cache(tmp_path / run / "a", masks=MASKS, audio=first)
        make_cache(tmp_path / run / "b", OTHER, masks=MASKS, audio=second, codec="fp16", shard_seconds=3)
        found = [TeacherCache(k, str(tmp_path / run / k), (1, 2), "clean_and_masked") for k in ("a", "b")]
        train(tiny, chosen, *several_readers(found, MASKS, fresh=False)[:2], tmp_path / f"run-{run}")
    for run in ("source", "mixed"):
        assert_same_end(tmp_path / f"run-{run}", tmp_path / "run-whole")


def test_a_file_that_changes_during_a_training_stops_it(
    tmp_path: Path,
    make_cache: Make,
    tiny: StudentConfig,
    settings: Callable[..., TrainSettings],
    source_utterances: list[Utterance],
) -> None:
    make_cache(tmp_path / "cache", masks=MASKS, audio="source")
    train_reader, validation = (CacheReader(tmp_path / "cache", split) for split in ("train", "validation"))
    lost = next(utterance for utterance in source_utterances if utterance.split == "train")
    Path(lost.path).write_bytes(Path(source_utterances[-1].path).read_bytes())
    with pytest.raises(
        CacheError, match=f"utterance {lost.id} can't be read: {lost.path} has changed since the corpus"
    ):
        train(tiny, settings(max_steps=3, validate_every=3), train_reader, validation, tmp_path / "run")
