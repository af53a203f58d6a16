"""The teacher that a run first resolved its configuration's name to, kept for when the run is resumed."""

import json
from pathlib import Path

from ray_distill.pipeline.files import write_text
from ray_distill.teacher_cache.teachers import resolve_teacher, split_options
from ray_distill.teacher_cache.teachers.hub.hub_name import PREFIX, HubName, parse_hub_name


def run_checkpoint(file: Path, requested: str) -> str:
    """Return the specification of a run's teacher for any process of any node; see `resolve_teacher`.

    A branch of a model on the hub may move. A run that has resolved it once keeps the commit.

    Args:
        file: File of the run that keeps the commit; see `keep_checkpoint`.
        requested: ``teacher.checkpoint`` of the configuration.

    Raises:
        ValueError: The file is damaged, or the hub has no such model or can't be reached.
    """
    if file.is_file():
        try:
            kept = {key: str(value) for key, value in json.loads(file.read_text()).items()}
            if kept["requested"] == requested and split_options(kept["resolved"])[1].startswith(PREFIX):
                return kept["resolved"]
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is damaged; restore it from a copy, or remove it") from error
    return resolve_teacher(requested)


def keep_checkpoint(file: Path, requested: str, resolved: str) -> None:
    """Write the file that `run_checkpoint` reads if the teacher is on the hub. Otherwise remove it.

    Args:
        file: File in the folder of the run, which must exist.
        requested: ``teacher.checkpoint`` of the configuration.
        resolved: Result of `run_checkpoint`.
    """
    if split_options(resolved)[1].startswith(PREFIX):
        write_text(file, json.dumps({"requested": requested, "resolved": resolved}, indent=2) + "\n")
    else:
        file.unlink(missing_ok=True)


def other_commit(cached: str, resolved: str) -> HubName | None:
    """Return the model of a cache if it is another commit of the same repository on the hub, else None.

    Args:
        cached: Specification of the teacher in ``cache.json``.
        resolved: Result of `run_checkpoint`.
    """
    if not all(split_options(spec)[1].startswith(PREFIX) for spec in (cached, resolved)):
        return None
    before, now = (parse_hub_name(split_options(spec)[1]) for spec in (cached, resolved))
    same = before is not None and now is not None and before.repository == now.repository
    return before if same and before != now else None
