"""The teacher, run once: load a teacher, draw masks, cache its layer outputs in Parquet shards, read them back.

``load_teacher`` and ``Teacher`` are imported on first use, so that the small pure modules (frames, audio, masks) stay light.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_distill.teacher_cache.teachers import Teacher, load_teacher

__all__ = ["Teacher", "load_teacher"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ray_distill.teacher_cache import teachers

        return getattr(teachers, name)
    raise AttributeError(f"module 'teacher_cache' has no attribute {name!r}")
