"""The plan stage: what the cache will cost, before anything is built."""

import math
import os
from bisect import bisect
from collections.abc import Sequence

import numpy as np
import torch

from ray_distill.pipeline.config import ConfigError
from ray_distill.pipeline.planning.cache_cost import (
    CostPlan,
    cost_lines,
    cost_table,
    plan_cost,
    shown_bytes,
    shown_hours,
)
from ray_distill.pipeline.ray_session import counted, owns_ray
from ray_distill.pipeline.stages.audio import audio_places
from ray_distill.pipeline.stages.run import Run, TeacherRun
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.create import refuse_derived
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.teachers import load_teacher


def plan_cache(run: Run) -> None:
    """Print what the cache will cost in bytes and teacher time, for several teachers the cache of each.

    Raises:
        ConfigError: The disk is too small for the caches, or the memory for an utterance, the only teacher can't take an utterance
            because of its length, or a teacher can't run at the cache's precision.
    """
    needed: dict[int, int] = {}
    costs = []
    for part in run.parts:
        with part.named():
            costs.append(_plan_cache(part, needed))
    planned = [cost for cost in costs if cost is not None]
    _plan_audio(run, planned, needed)
    if len(planned) > 1:
        size = sum(cost.total_bytes(cost.spec.codec, cost.spec.targets) for cost in planned)
        # The audio of an utterance is read once for all teachers.
        read = sum(cost.bytes_per_epoch - cost.audio_bytes for cost in planned) + max(c.audio_bytes for c in planned)
        hours = sum(cost.teacher_hours for cost in planned)
        run.say(
            f"plan    the {len(planned)} caches: about {shown_bytes(size)}, {shown_bytes(read)} read per epoch, "
            f"{shown_hours(hours)} of teacher time one after another"
        )


def _plan_audio(run: Run, planned: Sequence[CostPlan], needed: dict[int, int]) -> None:
    """Print the size of the audio that is to be stored for the caches of a run, once for all of them.

    Args:
        run: The run.
        planned: Cost of each cache that is to be built.
        needed: Bytes by disk that the caches need.

    Raises:
        ConfigError: The disk is too small.
    """
    sizes = [cost.audio_bytes for cost in planned if cost.spec.refers_to_store]
    for place in audio_places(run) if sizes else []:
        store = Store(place)
        if Cache.exists(store):
            run.say(f"plan    the audio is at {place}")
            continue
        size, free = max(sizes), store.free_bytes()
        run.say(f"plan    the audio, stored once: about {shown_bytes(size)} at {place}")
        needed[store.disk()] = needed.get(store.disk(), 0) + round(size)
        if free is not None and needed[store.disk()] > free:
            raise ConfigError(
                f"cache.audio_path: {place} has {shown_bytes(free)} free, but the audio and the caches need about "
                f"{shown_bytes(needed[store.disk()])} more; choose another disk"
            )


def _plan_cache(run: Run, needed: dict[int, int]) -> CostPlan | None:
    """Print what the cache of one teacher will cost, and return it; None if nothing is to be built.

    Args:
        run: The run as the teacher sees it.
        needed: Bytes by disk that the caches of earlier teachers need, to which those of this one are added.
    """
    if isinstance(run, TeacherRun) and (left := len(run.whole.utterances) - len(run.utterances)):
        verb = "is" if left == 1 else "are"
        run.say(f"plan    {counted(left, 'utterance')} {verb} too short or too long for it, and left out for it only")
    _check_lengths(run)
    _check_memory(run)
    if run.config.train.targets == "online":
        run.check_device()
        run.say("plan    targets are online: no cache is needed")
        return None
    if Cache.exists(run.cache) and (cache := Cache.open(run.cache)).covers(run.spec):
        # The cache stage lists a cache once more, which takes minutes in a large bucket.
        lacking = len(cache.missing(run.spec)) if run.cache.local is not None else 0
        rest = f", and lacks {counted(lacking, 'shard')}, which the cache stage builds" if lacking else ""
        run.say(f"plan    the cache at {run.cache.location} has all layers and draws that are needed{rest}")
        return None
    if Cache.exists(run.cache):
        refuse_derived(Cache.open(run.cache), run.spec)
    run.check_device()
    run.cache.check_writable()
    teacher = run.teacher
    if run.config.cache.gpus_per_actor and torch.cuda.is_available():
        teacher = load_teacher(run.checkpoint, "cuda")
    with run.progress("plan", "measurements") as update:  # They take minutes for a large teacher on a CPU.
        cost = plan_cost(run.utterances, run.spec, teacher, run.cache.location, update)
    if teacher is not run.teacher:
        del teacher
        torch.cuda.empty_cache()  # The workers need its memory, while this process waits for them.
    if isinstance(run, TeacherRun):
        run.say(f"plan    {run.teacher.name}, cache at {run.cache.location}")
    run.console.print(cost_table(cost))
    for line in cost_lines(cost):
        run.say(f"plan    {line}")
    more = cost.total_bytes(run.spec.codec, run.spec.targets) - cost.there_bytes
    if cost.free_bytes is None:
        return cost
    disk = run.cache.disk()
    needed[disk] = needed.get(disk, 0) + round(more)
    if needed[disk] > cost.free_bytes:
        what = "the cache needs" if needed[disk] == round(more) else "the caches of the teachers so far need"
        raise ConfigError(
            f"cache.path: {run.cache.location} has {shown_bytes(cost.free_bytes)} free, but {what} about "
            f"{shown_bytes(needed[disk])} more; choose another disk, a smaller codec, fewer layers or fewer draws"
        )
    return cost


def _check_memory(run: Run) -> None:
    """Raise a ConfigError if the teacher's attention maps of the longest utterance alone are more than this machine's memory.

    Only workers on CPUs of this machine are checked: the memory of others is not known here.
    """
    on_gpu = run.config.train.use_gpu if run.config.train.targets == "online" else run.config.cache.gpus_per_actor
    if on_gpu or not owns_ray():
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lengths = np.sort(run.utterances.num_samples)
    fitting = bisect(lengths, memory, key=lambda samples: run.teacher.map_bytes(int(samples)))
    if fitting < len(lengths):
        longest = int(lengths[-1])
        limit = math.floor(int(lengths[fitting - 1]) / SAMPLE_RATE * 100) / 100 if fitting else 0.0
        advice = (
            f"; set corpus.max_seconds={limit:g} to skip {counted(len(lengths) - fitting, 'utterance')}"
            if limit
            else ""
        )
        raise ConfigError(
            f"corpus.max_seconds: {run.teacher.name} needs {run.teacher.map_bytes(longest) / 1e9:.1f} GB for the attention maps of an "
            f"utterance of {longest / SAMPLE_RATE:g} s, but this machine has {memory / 1e9:.1f} GB{advice}"
        )


def _check_lengths(run: Run) -> None:
    """Raise a ConfigError if an utterance is too short or too long for the teacher."""
    teacher, samples = run.teacher, run.utterances.num_samples
    least, most = teacher.min_samples, teacher.max_samples or int(samples.max())
    upper = f"to {most / SAMPLE_RATE:g} s" if teacher.max_samples else "s or more"
    # The suggested limits are rounded inwards.
    for key, limit, what, wrong in (
        ("min_seconds", math.ceil(least / SAMPLE_RATE * 1000) / 1000, "shorter", int((samples < least).sum())),
        ("max_seconds", math.floor(most / SAMPLE_RATE * 100) / 100, "longer", int((samples > most).sum())),
    ):
        if wrong:
            raise ConfigError(
                f"corpus.{key}: {teacher.name} takes audio of {least / SAMPLE_RATE:g} {upper}, but "
                f"{counted(wrong, 'utterance')} {'is' if wrong == 1 else 'are'} {what}; set corpus.{key}={limit:g} to skip them"
            )
