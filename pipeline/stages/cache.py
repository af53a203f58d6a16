"""The cache stage: run the teacher over the corpus, and store its outputs. The train stage checks what was stored."""

import csv
import io
from collections.abc import Mapping

from rich.markup import escape

from ray_distill.pipeline.files import write_text
from ray_distill.pipeline.ray_session import counted, init_ray, quiet_ray, require_resources
from ray_distill.pipeline.stages.audio import check_audio, store_audio
from ray_distill.pipeline.stages.run import Run
from ray_distill.teacher_cache.build.build_cache import Progress, build_cache
from ray_distill.teacher_cache.build.shard_workers import Workers
from ray_distill.teacher_cache.codecs import is_learned
from ray_distill.teacher_cache.frames import shown_audio
from ray_distill.teacher_cache.maintenance.verify import verify_cache
from ray_distill.teacher_cache.storage.cache import Cache, cache_bytes
from ray_distill.teacher_cache.storage.cache_spec import CacheError
from ray_distill.teacher_cache.storage.failed_utterances import failed_utterances
from ray_distill.teacher_cache.storage.shard_plan import plan_shards

_LITTLE_SECONDS = 60.0
"""Seconds of audio below which the fit of a codec is worth a word."""
_SHOWN_PROBLEMS = 3
"""Number of a cache's problems that an error message lists."""


def cache_targets(run: Run) -> None:
    """Build the cache, or add the layers and mask draws that it lacks. The caches of several teachers are built one after another.

    The audio to which caches refer is stored first.

    Raises:
        ConfigError: A teacher can't run as configured on its device, or Ray has no resources for its workers.
        CacheError: A cache was made for something else, or can't be built.
    """
    if run.config.train.targets == "online":
        run.say("cache   targets are online: skipped")
        return
    store_audio(run)
    for part in run.parts:
        with part.named():
            _cache_targets(part)


def _cache_targets(run: Run) -> None:
    """Build the cache of one teacher."""
    settings = run.config.cache
    complete = Cache.exists(run.cache) and Cache.open(run.cache).covers(run.spec)
    if complete and not Cache.open(run.cache).missing(run.spec):
        detail = "all shards exist, reused"
    else:
        run.check_device()
        with quiet_ray(run.folder.ray_log), run.progress("cache", "utterances") as update:
            init_ray()
            keys = "cache.cpus_per_actor, cache.gpus_per_actor"
            require_resources(keys, 1, settings.cpus_per_actor, settings.gpus_per_actor, run.say)

            def show(progress: Progress) -> None:
                note = (
                    f"{shown_audio(progress.seconds_done)} of {shown_audio(progress.seconds)}, "
                    f"{shown_audio(60 * progress.audio_per_second)} of audio/min, teachers busy {progress.busy:.0%}"
                )
                update(progress.utterances_done, progress.utterances, note)

            report = build_cache(
                run.cache.location,
                run.spec,
                plan_shards(run.utterances, run.spec.shard_seconds, run.teacher.num_frames),
                run.checkpoint,
                teacher_name=run.teacher.name,
                workers=Workers(settings.actors, settings.gpus_per_actor, settings.cpus_per_actor),
                max_failed=settings.max_failed,
                on_progress=show,
                on_note=lambda note: run.say(f"cache   {escape(note)}"),
                audio=settings.audio_location,
            )
        detail = (
            f"{counted(report.written, 'shard')} written in {report.elapsed:.0f} s "
            f"({shown_audio(60 * report.seconds / max(report.elapsed, 1e-9))} of audio per minute)"
        ) + (f", {report.reused} reused" if report.reused else "")
        if sizes := [f"{size:g}" for size in report.batch_seconds]:
            detail += f", in batches of {' to '.join(dict.fromkeys((sizes[0], sizes[-1])))} s (auto)"
    size = cache_bytes(Cache.open(run.cache))
    run.say(
        f"cache   {detail}: {size / 1e6:.1f} MB, {size / run.seconds / 1e3:.1f} kB per second of audio"
        f"{'' if settings.audio in ('flac', 'pcm') else ' beside it'}, at {run.cache.location}"
    )
    if not complete:
        _say_little_audio(run, Cache.open(run.cache))
    _list_failed(run, failed_utterances(Cache.open(run.cache), run.spec))


def _say_little_audio(run: Run, cache: Cache) -> None:
    """Say what the error of the codec is if it was fitted to little audio."""
    seconds = run.utterances.of_split("train").seconds
    if not is_learned(run.spec.codec) or seconds >= _LITTLE_SECONDS:
        return
    error = max(float(codec.error.max()) for number in range(len(cache.layer_sets)) for codec in cache.codecs(number))
    run.say(
        f"[yellow]cache   codec {run.spec.codec} was fitted to less than {shown_audio(seconds)} of training audio, so it fits other "
        f"audio badly: its error is up to {error:.0%} of a layer's standard deviation[/yellow]"
    )


def _list_failed(run: Run, failed: Mapping[str, str]) -> None:
    """Write the list of the utterances that the cache lacks, and say how many they are."""
    file = run.failed_file
    file.unlink(missing_ok=True)
    if failed:
        table = io.StringIO(newline="")
        csv.writer(table).writerows([("id", "reason"), *failed.items()])
        write_text(file, table.getvalue())
        name, reason = next(iter(failed.items()))
        run.say(
            f"[yellow]cache   {counted(len(failed), 'utterance')} failed and {'is' if len(failed) == 1 else 'are'} left out, such as "
            f"{escape(name)}: {escape(reason)} (see {file})[/yellow]"
        )


def check_cache(run: Run) -> None:
    """Check that the caches have the layers and mask draws that the run reads, and that their files are intact.

    Raises:
        CacheError: A layer or draw is missing, or a file is damaged.
    """
    for part in run.parts:
        _check_cache(part)
    if problems := check_audio(run):
        more = len(problems) - _SHOWN_PROBLEMS
        others = f" and {counted(more, 'more problem')}" if more > 0 else ""
        raise CacheError(f"{'; '.join(problem.text for problem in problems[:_SHOWN_PROBLEMS])}{others}")


def _check_cache(run: Run) -> None:
    """Check the cache of one teacher."""
    if not Cache.open(run.cache).covers(run.spec):
        raise CacheError(
            f"the cache at {run.cache.location} lacks layers or draws that this run needs; run the cache stage"
        )
    problems = verify_cache(run.cache, checksums=run.config.cache.verify, needed=run.spec, memory="use")
    if problems and all(problem.unfinished for problem in problems):
        raise CacheError(
            f"the cache at {run.cache.location} is not finished: {counted(len(problems), 'shard file')} that this run needs were not "
            "committed; run the cache stage too, which goes on from there"
        )
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        others = f" and {counted(more, 'more problem')}" if more > 0 else ""
        raise CacheError(
            f"the cache at {run.cache.location} is damaged: {'; '.join(problem.text for problem in problems[:_SHOWN_PROBLEMS])}"
            f"{others}; repair it with `ray-distill cache repair {run.cache.location}`"
        )
