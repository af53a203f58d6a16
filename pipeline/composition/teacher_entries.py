"""The list ``teachers`` of a configuration: each entry gets a whole cache section, and the entries are checked together."""

from collections.abc import Sequence
from typing import Any

from ray_distill.pipeline.composition.config_tree import default_cache, with_default_audio
from ray_distill.pipeline.composition.sections import TeacherEntry
from ray_distill.student.objectives.objective import FeatureObjective
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.targets.domains import counted_domains


def with_teacher_entries(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the sections of a configuration of several teachers, with what each takes from the run written out.

    An entry's ``cache`` has the keys of the run's section ``cache`` where it gives no other; its path is that of `default_cache`
    if it gives none. A text as ``cache`` is its path, and a text as ``objective`` the objective's name. The sections ``teacher`` and
    ``cache`` become those of the first teacher.

    Args:
        tree: Sections with ``teachers``.

    Raises:
        ValueError: The configuration has both ``teacher`` and ``teachers``, or ``teachers`` is no list of tables, or the run's section
            ``cache`` has a path.
    """
    entries, common = tree["teachers"], tree.get("cache", {})
    if tree.get("teacher") is not None:
        raise ValueError(
            "teacher and teachers are both given; put the teacher into the list teachers, and remove teacher"
        )
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("teachers: give a list with one table for each teacher, with name and checkpoint")
    if not isinstance(common, dict) or "path" in common:
        raise ValueError(
            "cache.path: each of several teachers has a cache of its own; give cache.path in the entries of teachers"
        )
    filled = [_filled(entry, common, tree) for entry in entries]
    first = filled[0]
    teacher = {key: first[key] for key in ("checkpoint", "layers", "frames") if key in first}
    cache = first["cache"] if isinstance(first["cache"], dict) else {}
    path = {"path": cache["path"]} if "path" in cache else {}
    return tree | {"teachers": filled, "teacher": teacher, "cache": common | path}


def _filled(entry: dict[str, Any], common: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with its whole cache section."""
    cache, corpus, objective = entry.get("cache", {}), tree.get("corpus"), entry.get("objective")
    if isinstance(cache, str):
        cache = {"path": cache}
    if isinstance(cache, dict):
        own = cache.get("audio", "store") != "store"  # Then the common place of the audio is not for this cache.
        cache = {key: value for key, value in common.items() if not (own and key == "audio_path")} | cache
        if "path" not in cache:
            complete = "checkpoint" in entry and isinstance(corpus, dict) and corpus.get("path")
            # Without its teacher or its corpus the configuration is refused for that alone.
            cache["path"] = (
                default_cache({"teacher": entry, "corpus": corpus, "cache": cache}) if complete else "caches"
            )
        if isinstance(corpus, dict) and corpus.get("path"):
            cache = with_default_audio(cache, corpus)
    named = {"objective": {"objective": objective}} if isinstance(objective, str) else {}
    return entry | {"cache": cache} | named


def check_teachers(teachers: "Sequence[TeacherEntry]", train: TrainSettings) -> None:
    """Check that the entries fit together, and that the keys of the training fit to their number.

    Args:
        teachers: The entries; none if the run has one teacher.
        train: Settings of the training.

    Raises:
        ValueError: They do not. The message names the keys.
    """
    names = [entry.name for entry in teachers]
    if not names:
        given = {
            "balance": train.balance != "weights",
            "init_teacher": train.init_teacher is not None,
            "aggregate": train.aggregate != "heads",
        }
        for key in (key for key, is_given in given.items() if is_given):
            raise ValueError(f"train.{key} is for several teachers, but there is one; remove it, or give teachers")
        return
    if train.prune is not None:
        raise ValueError(
            "train.prune is for one teacher, because the heads of further ones would be lost between the phases; give teacher "
            "in place of teachers"
        )
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ValueError(f"teachers: two have the name {name}; give each a name of its own")
    _check_domains(teachers)
    if train.aggregate != "heads":
        _check_aggregate(teachers, train)
    _check_steps(teachers, train)
    if train.targets == "online":
        raise ValueError("train.targets online runs one teacher; set it to cached, which several teachers need")
    if train.init_teacher is not None and train.init_teacher not in names:
        raise ValueError(f"train.init_teacher: there is no teacher {train.init_teacher}; they are {', '.join(names)}")
    if train.init_teacher is not None and not train.starts_from_teacher:
        raise ValueError(
            "train.init_teacher does nothing without init_front_end, init_encoder_layers or mask_embedding teacher; remove it, or "
            "set one of them"
        )
    for number, entry in enumerate(teachers):
        for other in teachers[:number]:
            same_place = entry.cache.location == other.cache.location
            if same_place and (entry.checkpoint, entry.cache) != (other.checkpoint, other.cache):
                raise ValueError(
                    f"teachers: {other.name} and {entry.name} have the same cache.path {entry.cache.path}, but differ in the "
                    "checkpoint or in other keys of cache; give one of them another cache.path"
                )


def _check_steps(teachers: "Sequence[TeacherEntry]", train: TrainSettings) -> None:
    """Raise ValueError if no teacher is left at a step, so that nothing would be learnt from there on."""
    learnt = [entry for entry in teachers if entry.weight]
    for step in sorted({entry.stop_step for entry in learnt if entry.stop_step is not None}):
        left = any(entry.start_step <= step and (entry.stop_step is None or step < entry.stop_step) for entry in learnt)
        if not left and (train.max_steps is None or step < train.max_steps):
            raise ValueError(
                f"teachers: no teacher takes part in step {step}, so nothing would be learnt there; choose start_step and stop_step "
                "without such a gap"
            )


def _check_domains(teachers: "Sequence[TeacherEntry]") -> None:
    """Raise ValueError if there is a domain from whose utterances nothing would be learnt."""
    active = [entry.weight for entry in teachers if entry.weight]
    if not active or not all(isinstance(weight, dict) for weight in active):
        return
    learnt = {domain for weight in active for domain in counted_domains(weight)}
    for entry in teachers:
        for domain in entry.weight if isinstance(entry.weight, dict) else ():
            if domain not in learnt:
                raise ValueError(
                    f"teachers.{entry.name}.weight: no teacher has a weight for the domain {domain}, so nothing would be learnt from "
                    "its utterances; give a teacher a positive weight there, or leave the domain and its utterances out"
                )


def _check_aggregate(teachers: "Sequence[TeacherEntry]", train: TrainSettings) -> None:
    """Raise ValueError if a key is given that one target for all teachers can't have."""
    aggregate, objective = train.aggregate, train.chosen_objective
    if not isinstance(objective, FeatureObjective):
        raise ValueError(
            f"train.aggregate {aggregate} combines features, which objective {objective.objective} does not learn; set it to heads, "
            "or choose the objective prediction or star"
        )
    if train.balance != "weights":
        raise ValueError(
            f"train.balance {train.balance} balances the losses of several teachers, but with aggregate {aggregate} there is one; "
            "remove it"
        )
    for entry in teachers:
        given = {
            "objective": entry.objective is not None,
            "start_step": entry.start_step != 0,
            "stop_step": entry.stop_step is not None,
            "weight": isinstance(entry.weight, dict) or (entry.weight != 1 and aggregate == "concatenate"),
        }
        for key in (key for key, is_given in given.items() if is_given):
            raise ValueError(
                f"teachers.{entry.name}.{key}: with train.aggregate {aggregate} all teachers have one target and one loss; remove it, "
                "or set train.aggregate to heads"
            )
    if not any(entry.weight for entry in teachers):
        raise ValueError("teachers: all have weight 0, so they have no average; give one of them a positive weight")
