"""What a run needs of other packages: found from its configuration, and noted in its folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_distill.pipeline.config import Config
from ray_distill.pipeline.corpus.formats import FORMATS
from ray_distill.pipeline.files import write_text
from ray_distill.plugins import Plugin, find_plugin, missing_plugin, shadowed
from ray_distill.student.objectives.objective_keys import OBJECTIVES
from ray_distill.teacher_cache.codecs import CODECS
from ray_distill.teacher_cache.teachers import NAMED, split_options, teacher_of_package

PLUGINS = "plugins.json"
"""Name of the file in the run's folder."""


def needed_plugins(config: Config) -> list[Plugin]:
    """Return the teachers, objective, codecs and corpus format of a configuration that other packages have. None is imported."""
    teachers = [teacher_of_package(split_options(part.teacher.checkpoint)[1]) for part in config.parts]
    codecs = dict.fromkeys(part.cache.codec.partition(":")[0] for part in config.parts)
    objective, format = config.train.objective, config.corpus.format
    found = [
        *(None if teacher is None else teacher.plugin for teacher in teachers),
        None if objective in OBJECTIVES else find_plugin("objective", objective),
        *(None if codec in CODECS else find_plugin("codec", codec) for codec in codecs),
        None if format is None or format in FORMATS else find_plugin("corpus format", format),
    ]
    return [plugin for plugin in found if plugin is not None]


def unused_plugins() -> list[str]:
    """Return a sentence for each installed plug-in that has a name of this package, and so is never used."""
    return [
        *shadowed("teacher", NAMED),
        *shadowed("objective", OBJECTIVES),
        *shadowed("codec", CODECS),
        *shadowed("corpus format", tuple(FORMATS)),
    ]


def format_found(name: str) -> Plugin | None:
    """Return the corpus format that was found by looking if another package has it."""
    return None if name in FORMATS else find_plugin("corpus format", name)


def note_plugins(file: Path, config: Config) -> None:
    """Write the file that `absent_plugin` reads, or remove it if there are no plug-ins.

    A format that was found by looking, which `note_format` wrote, is kept.
    """
    records = [plugin.record() for plugin in needed_plugins(config)]
    if config.corpus.format is None:
        records += [record for record in _noted(file) if record.get("kind") == "corpus format"]
    if records:
        write_text(file, json.dumps(records, indent=2) + "\n")
    else:
        file.unlink(missing_ok=True)


def note_format(file: Path, plugin: Plugin) -> None:
    """Add the format that was found by looking to the file that `absent_plugin` reads."""
    others = [record for record in _noted(file) if record.get("kind") != "corpus format"]
    write_text(file, json.dumps([*others, plugin.record()], indent=2) + "\n")


def _noted(file: Path) -> list[dict[str, str]]:
    try:
        records = json.loads(file.read_text())
    except (OSError, ValueError):
        return []  # It is written again.
    return [record for record in records if isinstance(record, dict)] if isinstance(records, list) else []


def absent_of_run(tree: Mapping[str, Any]) -> str | None:
    """Return what `absent_plugin` returns for the run of an unchecked configuration."""
    return absent_plugin(Path(str(tree.get("runs") or "runs")) / str(tree.get("name")) / PLUGINS)


def absent_plugin(file: Path) -> str | None:
    """Return a phrase about a plug-in of a run that is not installed here, or None if none is known."""
    try:
        return missing_plugin(json.loads(file.read_text()))
    except (OSError, ValueError):
        return None  # The configuration says less, but is refused all the same.
