"""Frozen features: their shapes and their normalisation."""

from pathlib import Path

import pytest
import torch

from ray_distill.memory import MemoryRanOutError
from ray_distill.pipeline.probing.feature_source import Features, FeatureSource
from ray_distill.pipeline.probing.task import read_task
from ray_distill.student import Student, StudentConfig
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.frames import num_frames
from ray_distill.teacher_cache.teachers import load_teacher


def test_sources_agree_on_frames(tones: Path) -> None:
    wave = load_audio(tones / "0.flac")
    config = StudentConfig(encoder_layers=2, encoder_embed_dim=48, encoder_ffn_embed_dim=48, target_dim=32)
    teacher = load_teacher("random:2x32")
    student = Student(config).eval()
    for source in (
        FeatureSource.of_teacher(teacher),
        FeatureSource.of_student(student, "student"),
        FeatureSource.log_mel(),
    ):
        assert source.features(wave).shape == (source.layers, num_frames(len(wave)), source.dim)
    expected = teacher.hidden_states(torch.from_numpy(wave)[None])[0]
    assert torch.equal(FeatureSource.of_teacher(teacher).features(wave), expected)


@pytest.mark.parametrize("kind", ["class", "ctc"])
def test_features_are_normalised_over_training_utterances(tmp_path: Path, tones: Path, kind: str) -> None:
    task = read_task(tones / ("first.csv" if kind == "class" else "words.csv"))
    features = Features(FeatureSource.log_mel(), task, tmp_path)
    train = torch.cat([features[n] for n, example in enumerate(task.examples) if not example.test])
    # Frames are kept in half precision.
    torch.testing.assert_close(train.mean(0), torch.zeros(1, 80), rtol=0, atol=5e-3)
    torch.testing.assert_close(train.var(0, unbiased=False), torch.ones(1, 80), rtol=0, atol=5e-3)


def test_an_utterance_that_needs_too_much_memory_is_named(tmp_path: Path, tones: Path) -> None:
    source = FeatureSource("greedy", 1, 80, lambda wave: torch.empty(2**58))
    with pytest.raises(
        MemoryRanOutError, match=r"^memory ran out in greedy on .*\.flac; leave this utterance out of the"
    ):
        Features(source, read_task(tones / "first.csv"), tmp_path)
