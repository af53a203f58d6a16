"""The first stages of a run in this process, without Ray: the corpus is indexed and the teacher cached."""

from rich.console import Console

from ray_distill.pipeline.config import Config
from ray_distill.pipeline.stages import Run
from ray_distill.pipeline.stages.index import index_audio
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.storage.shard_plan import plan_shards


def cached_run(config: Config) -> Run:
    """Return a run whose corpus is indexed and whose cache is built."""
    run = Run(config, Console(quiet=True))
    index_audio(run)
    plan = plan_shards(run.utterances, run.spec.shard_seconds, run.teacher.num_frames)
    build_cache(
        run.cache.location, run.spec, plan, config.teacher.checkpoint, teacher_name=run.teacher.name, workers=None
    )
    return run
