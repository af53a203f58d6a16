"""The teacher that repair and deep verification run. A cache may come from a stranger, who chooses what it says."""

from ray_distill.plugins import missing_plugin
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError
from ray_distill.teacher_cache.teachers import split_options
from ray_distill.teacher_cache.teachers.builtin import builtin_names

_MAX_WEIGHTS = 500_000_000
"""Maximum number of weights of a ``random:`` teacher, 2 GB, that is made because a cache says so."""


def chosen_teacher(cache: Cache, named: str | None) -> str:
    """Return the specification of the teacher to load for a cache.

    A cache is only trusted to choose ``random:LAYERSxDIM`` of its own size, which is computed, or a teacher of this package:
    nothing is downloaded, and no other file is read. A path or ``torchaudio:NAME`` is loaded only if the user names it.

    Args:
        cache: The cache.
        named: The specification that the user gave, or None.

    Raises:
        CacheError: If the user must name the teacher. The message says which one the cache names.
    """
    if named is not None:
        return named
    spec: str = cache.record["teacher_spec"]
    size = (cache.spec.num_layers, cache.spec.dim)
    name = split_options(spec)[1]
    if name == "random:{}x{}".format(*size) and 12 * size[0] * size[1] ** 2 <= _MAX_WEIGHTS:
        return spec
    if name in [f"builtin:{name}" for name in builtin_names()]:
        return spec
    absent = missing_plugin(cache.record.get("plugins"), "teacher")
    if absent is not None:
        raise CacheError(f"the cache at {cache.store.location} was made with {absent}")
    raise CacheError(
        f"the cache at {cache.store.location} names the teacher {spec!r}, which is not loaded unasked because a cache may come "
        f"from a stranger; if you trust it, run again with --teacher and this name, or the place of your own copy"
    )
