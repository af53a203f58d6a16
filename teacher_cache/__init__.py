"""Cache a teacher's layer outputs once, and read them back to train students.

The names below are imported when they are first used, so importing this package loads neither PyTorch nor a teacher.

Example:
    >>> from ray_distill.teacher_cache import CacheReader, load_teacher
    >>> teacher = load_teacher("random:4x96")
    >>> reader = CacheReader("caches/demo", "train")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_distill.teacher_cache.audio import AudioError, load_audio
    from ray_distill.teacher_cache.build.build_cache import build_cache
    from ray_distill.teacher_cache.build.shard_workers import Workers
    from ray_distill.teacher_cache.maintenance.repair import repair_cache
    from ray_distill.teacher_cache.maintenance.verify import verify_cache, verify_deep
    from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy, draw_mask
    from ray_distill.teacher_cache.reader import CacheReader
    from ray_distill.teacher_cache.storage.cache import Cache
    from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
    from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
    from ray_distill.teacher_cache.targets.online_targets import OnlineReader
    from ray_distill.teacher_cache.targets.target_batch import Batch, CachedUtterance
    from ray_distill.teacher_cache.teachers import Teacher, TeacherError, load_teacher

__all__ = [
    "AudioError",
    "Batch",
    "Cache",
    "CacheError",
    "CacheReader",
    "CacheSpec",
    "CachedUtterance",
    "MaskDraws",
    "MaskPolicy",
    "OnlineReader",
    "Teacher",
    "TeacherError",
    "Utterance",
    "Workers",
    "build_cache",
    "draw_mask",
    "load_audio",
    "load_teacher",
    "plan_shards",
    "repair_cache",
    "verify_cache",
    "verify_deep",
]

_MODULES = {
    "audio": ("AudioError", "load_audio"),
    "build.build_cache": ("build_cache",),
    "build.shard_workers": ("Workers",),
    "maintenance.repair": ("repair_cache",),
    "maintenance.verify": ("verify_cache", "verify_deep"),
    "masks": ("MaskDraws", "MaskPolicy", "draw_mask"),
    "reader": ("CacheReader",),
    "storage.cache": ("Cache",),
    "storage.cache_spec": ("CacheError", "CacheSpec"),
    "storage.shard_plan": ("Utterance", "plan_shards"),
    "targets.online_targets": ("OnlineReader",),
    "targets.target_batch": ("Batch", "CachedUtterance"),
    "teachers": ("Teacher", "TeacherError", "load_teacher"),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
