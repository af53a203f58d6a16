"""Teachers that are part of the package."""

import pytest
import torch
from safetensors import safe_open

from ray_distill.teacher_cache.teachers import TeacherError, is_path, load_teacher
from ray_distill.teacher_cache.teachers.builtin import builtin_folder, builtin_names
from ray_distill.teacher_cache.teachers.header import load_header


@pytest.mark.parametrize("name", builtin_names())
def test_a_teacher_of_the_package(name: str) -> None:
    spec = f"builtin:{name}"
    folder = builtin_folder(name)
    teacher = load_teacher(spec)
    assert teacher.name == spec and not is_path(spec) and teacher.has_mask_embedding
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.float32}  # type: ignore[attr-defined]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    assert (folder / "model.safetensors").stat().st_size < 2_000_000
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{teacher.num_parameters:,} parameters" in card and "license: apache-2.0" in card
    header = load_header(spec)
    assert header is not None and (header.name, header.num_parameters) == (spec, teacher.num_parameters)
    # The same weights under another name are the same teacher.
    assert load_teacher(str(folder)).fingerprint == teacher.fingerprint


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(TeacherError, match="no built-in teacher 'hubert'; these are: phone-hubert"):
        load_teacher("builtin:hubert")
