"""The package's names: loaded on first use, and reading a cache loads no teacher."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pydantic
import pytest

import ray_distill.teacher_cache
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.patch_geometry import PatchGeometry
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec, LayerSet

REPOSITORY = Path(__file__).resolve().parents[2]


def loaded_modules(code: str) -> set[str]:
    """Return the modules that a new Python process has loaded after running some code."""
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"]
    return set(subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.split())


def test_importing_the_package_loads_no_library() -> None:
    code = "import ray_distill.teacher_cache; assert 'load_teacher' in dir(ray_distill.teacher_cache)"
    assert not loaded_modules(code) & {"torch", "numpy", "pyarrow", "ray"}


def test_every_public_name_can_be_imported() -> None:
    package = ray_distill.teacher_cache
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'ray_distill.teacher_cache' has no attribute 'load_techer'"):
        package.load_techer  # noqa: B018


def test_reading_a_cache_loads_no_teacher(tmp_path: Path, make_cache: Callable[..., CacheSpec]) -> None:
    make_cache(tmp_path / "cache")
    modules = loaded_modules(
        "from ray_distill.teacher_cache import Cache, CacheReader\n"
        f"cache, reader = Cache.open({str(tmp_path / 'cache')!r}), CacheReader({str(tmp_path / 'cache')!r}, 'train')\n"
        "assert reader[0].targets.isfinite().all() and reader.read([0, 1], 1).targets.isfinite().all()"
    )
    assert "ray_distill.teacher_cache.reader" in modules
    unwanted = {"torchaudio", "ray", "ray_distill.teacher_cache.audio", "ray_distill.teacher_cache.teachers"}
    assert not modules & unwanted


@pytest.mark.parametrize("model", [MaskPolicy, MaskDraws, CacheSpec, LayerSet, PatchGeometry])
def test_every_field_has_a_description(model: type[pydantic.BaseModel]) -> None:
    assert [name for name, field in model.model_fields.items() if not field.description] == []
