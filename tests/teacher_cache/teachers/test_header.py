"""A teacher's header: equal to the whole teacher in all but the values of its weights."""

from pathlib import Path

import pytest
import torch

from ray_distill.teacher_cache.teachers import HUGGINGFACE_LOADERS, Teacher, TeacherError, load_teacher
from ray_distill.teacher_cache.teachers.header import load_header

from .huggingface_folders import save_tiny


def facts(teacher: Teacher) -> tuple[object, ...]:
    return (
        teacher.name,
        teacher.num_layers,
        teacher.dim,
        teacher.num_parameters,
        teacher.has_mask_embedding,
        teacher.patches,
        teacher.min_samples,
        teacher.max_samples,
    )


@pytest.mark.parametrize("kind", sorted(HUGGINGFACE_LOADERS.keys() - {"mert_model", "distilled_student"}))
def test_folders(kind: str, tmp_path: Path) -> None:
    spec = save_tiny(kind, tmp_path)
    header = load_header(spec)
    assert header is not None
    assert facts(header) == facts(load_teacher(spec))
    assert {parameter.device.type for parameter in header.model.parameters()} == {"meta"}  # type: ignore[attr-defined]


def test_checkpoints(shared: Path) -> None:
    spec = str(shared / "teacher" / "hubert_small.pt")
    header = load_header(spec)
    assert header is not None
    assert facts(header) == facts(load_teacher(spec))
    assert not torch.utils.serialization.config.load.mmap, "the option is set back"


def test_random_weights_and_bundles() -> None:
    header = load_header("random:2x32")
    assert header is not None and facts(header) == facts(load_teacher("random:2x32"))
    assert load_header("mean-mask:torchaudio:HUBERT_BASE") is None
    with pytest.raises(TeacherError, match="no pre-trained bundle 'HUBERT'; it has HUBERT_BASE"):
        load_header("torchaudio:HUBERT")


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    spec = save_tiny("hubert", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(TeacherError, match="lacks weights that its configuration needs"):
        load_header(spec)
