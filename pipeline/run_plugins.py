"""What a run needs of other packages: found from its configuration, and noted in its folder."""

import json
from pathlib import Path

from ray_distill.pipeline.config import Config
from ray_distill.pipeline.corpus.formats import FORMATS
from ray_distill.pipeline.files import write_text
from ray_distill.plugins import Plugin, find_plugin, missing_plugin, shadowed
from ray_distill.student.objectives.objective_keys import OBJECTIVES
from ray_distill.teacher_cache.codecs import CODECS
from ray_distill.teacher_cache.teachers import NAMED, split_options, teacher_of_package


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


def note_plugins(file: Path, plugins: list[Plugin]) -> None:
    """Write the file that `absent_plugin` reads, or remove it if there are no plug-ins."""
    if plugins:
        write_text(file, json.dumps([plugin.record() for plugin in plugins], indent=2) + "\n")
    else:
        file.unlink(missing_ok=True)


def absent_plugin(file: Path) -> str | None:
    """Return a phrase about a plug-in of a run that is not installed here, or None if none is known."""
    try:
        return missing_plugin(json.loads(file.read_text()))
    except (OSError, ValueError):
        return None  # The configuration says less, but is refused all the same.
