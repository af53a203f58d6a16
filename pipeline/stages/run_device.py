"""What a run's teacher needs of its device: whether it can have the configured precision, and the size of its batches."""

from typing import Literal

from ray_distill.pipeline.composition.sections import CacheSection
from ray_distill.pipeline.config import Config, ConfigError
from ray_distill.teacher_cache.precision import Precision
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.store import Store


def batch_seconds_of(settings: CacheSection) -> float | Literal["auto"]:
    """Return the seconds of audio per teacher batch, or ``auto``: those of the settings or, if ``auto``, of the cache if it exists."""
    if settings.batch_seconds == "auto" and Cache.exists(store := Store(settings.location)):
        return Cache.open(store).spec.batch_seconds
    return settings.batch_seconds


def check_device(config: Config, precision: Precision) -> None:
    """Check that the teacher can run as configured, in the cache's actors or in the training's workers.

    Args:
        config: Configuration of the run, with one teacher.
        precision: Precision of the teacher's arithmetic.

    Raises:
        ConfigError: The precision is fp16 or the size of batches is to be found, and the teacher runs on CPU.
    """
    cache, cached = config.cache, config.train.targets == "cached"
    on_gpu = cache.gpus_per_actor > 0 if cached else config.train.use_gpu
    if on_gpu:
        return
    store = Store(cache.location)
    if precision == "fp16":
        found = Cache.exists(store) and Cache.open(store).spec.precision == "fp16"
        origin = f", and the cache at {store.location} was computed in fp16" if found else ""
        key = "cache.gpus_per_actor" if cached else "train.use_gpu=true"
        raise ConfigError(
            f"cache.precision fp16 needs GPUs{origin}; set {key}, or set cache.precision=fp32"
            f"{' and a new cache.path' if found and cached else ''}"
        )
    if cached and batch_seconds_of(cache) == "auto":
        new = " and a new cache.path" if Cache.exists(store) else ""
        raise ConfigError(
            "cache.batch_seconds auto measures the memory of a GPU, but the teacher runs on the CPU; give the seconds, as in "
            f"cache.batch_seconds=120{new}, or set cache.gpus_per_actor=1"
        )
