"""A teacher and a student with spectrogram patches (AST): cache, training, validation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_distill.serve.inference.models import open_backend
from ray_distill.serve.settings import BackendOptions
from ray_distill.student.checkpoints import load_student, save_student
from ray_distill.student.exporters.portable import portable_student
from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.maintenance.verify import verify_deep
from ray_distill.teacher_cache.patch_geometry import PatchGeometry
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.teachers import load_teacher

GEOMETRY = PatchGeometry(num_mel_bins=32, patch_size=8, time_stride=5, frequency_stride=6)
ROWS = 5


@pytest.fixture
def ast(tmp_path: Path) -> str:
    """A random AST of two layers of width 32 for 2.4 s, as transformers saves it; masked patches become the mean patch."""
    import transformers

    config = transformers.ASTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_length=240,
        initializer_range=0.2,
        **GEOMETRY.model_dump(include={"num_mel_bins", "patch_size", "time_stride", "frequency_stride"}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.ASTModel(config).save_pretrained(tmp_path / "ast")
    return f"mean-mask:{tmp_path / 'ast'}"


def noise(*samples: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(n, generator=generator) for n in samples]


@pytest.mark.parametrize("masked", [False, True])
def test_batch_invariance(tiny: StudentConfig, masked: bool) -> None:
    torch.manual_seed(0)
    student = Student(tiny.model_copy(update={"patches": GEOMETRY})).eval()
    assert GEOMETRY.rows == ROWS
    waveforms = noise(GEOMETRY.min_samples, 6_000, 20_000)
    lengths = torch.tensor([len(w) for w in waveforms])
    frames = student.num_frames(lengths)
    assert frames[0] == ROWS and student.config.receptive_field == GEOMETRY.min_samples == 400 + 7 * 160
    masks = torch.rand(3, int(frames.max()), generator=torch.Generator().manual_seed(1)) < 0.4
    padded = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    padded[0, len(waveforms[0]) :] = 5.0
    with torch.no_grad():
        together = student(padded, lengths, masks if masked else None)
        for row, (waveform, count) in enumerate(zip(waveforms, frames.tolist(), strict=True)):
            mask = masks[row : row + 1, :count] if masked else None
            alone = student(waveform[None], lengths[row : row + 1], mask)
            assert alone.projections.shape == (1, 2, count, 32)
            error = (together.projections[row, :, :count] - alone.projections[0]).abs().max()
            assert float(error) < 1e-4 * float(alone.projections.abs().max())


def test_a_patch_knows_its_row(tiny: StudentConfig) -> None:
    torch.manual_seed(0)
    student = Student(tiny.model_copy(update={"patches": GEOMETRY})).eval()
    (waveform,) = noise(8_000)
    count = int(student.num_frames(torch.tensor([8_000])))
    with torch.no_grad():
        out = student(waveform[None], torch.tensor([8_000]), torch.ones(1, count, dtype=torch.bool))
    column = out.hidden_states[0, 0, ROWS : 2 * ROWS]
    assert float((column[1:] - column[:-1]).abs().max(1).values.min()) > 1e-4, (
        "masked patches of a column differ by row"
    )


@pytest.mark.slow
def test_cache_train_validate(
    ast: str,
    tmp_path: Path,
    tiny: StudentConfig,
    settings: Callable[..., TrainSettings],
    cache_spec: Callable[..., CacheSpec],
    source_utterances: list[Utterance],
    rows: Callable[..., list[dict[str, Any]]],
) -> None:
    teacher, spec = load_teacher(ast), cache_spec(ast)
    cache = tmp_path / "cache"
    arguments: dict[str, Any] = {"teacher_name": "ast", "workers": None}
    with pytest.raises(CacheError, match="was planned for another teacher than .* give a new cache.path"):
        build_cache(tmp_path / "wrong", spec, plan_shards(source_utterances, spec.shard_seconds), ast, **arguments)
    build_cache(cache, spec, plan_shards(source_utterances, spec.shard_seconds, teacher.num_frames), ast, **arguments)
    assert all(check.good for check in verify_deep(cache, teacher, sample=3))
    readers = CacheReader(cache, "train"), CacheReader(cache, "validation")
    batch = readers[0].read([0, 1], 0)
    assert batch.targets.shape[1:] == (2, int(batch.num_frames.max()), 32)
    assert batch.num_frames.tolist() == [GEOMETRY.num_patches(int(n)) for n in batch.lengths]

    config = tiny.model_copy(update={"patches": teacher.patches})
    result = train(config, settings(max_steps=40), *readers, tmp_path / "run")
    assert result.last_validation_loss < 0.9 * result.first_validation_loss
    assert len(rows(tmp_path / "run", "validation")) > 2
    student = load_student(tmp_path / "run" / "checkpoints" / "best")
    assert student.config == config
    save_student(student, tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["student"]["patches"]["num_mel_bins"] == 32
    with pytest.raises(ValueError, match="the student has patches=.* exports do not support"):
        portable_student(student)
    with pytest.raises(ValueError, match="reads patches of a spectrogram"):
        open_backend(tmp_path / "export", BackendOptions())
    with pytest.raises(
        ValueError, match="the student makes .* frames from an utterance of .* set student.patches to the teacher's"
    ):
        train(tiny, settings(max_steps=1), *readers, tmp_path / "other")
