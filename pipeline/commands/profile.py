"""``ray-distill profile``: parameters and operations of a student and its teacher."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ray_distill.pipeline.recipes import complete_recipe, find_recipe


def _find_model(name: str) -> Path:
    """Return an existing path, else the recipe of that name."""
    return Path(name) if Path(name).exists() else find_recipe(name)


def profile(
    model: Annotated[
        Path,
        typer.Argument(
            parser=_find_model,
            metavar="MODEL",
            autocompletion=complete_recipe(),
            help="YAML configuration, name of a recipe in configs/, or folder of a run or of an exported student.",
        ),
    ],
    teacher: Annotated[
        str | None,
        typer.Option(help="Teacher to compare with. Default: the run's, or the shape of HuBERT Base (random:12x768)."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Length of the utterance in seconds; attention grows with its square.")
    ] = 10.0,
    output: Annotated[Path | None, typer.Option(help="New JSON file to write the counts to as well.")] = None,
) -> None:
    """Count parameters and operations of student and teacher.

    Operations are multiply-accumulate operations (MACs) of one forward pass, in total and by part of the model.
    """
    from rich.console import Console

    from ray_distill.pipeline.files import check_room
    from ray_distill.pipeline.model_profile import load_models, profile_student, profile_table, profile_teacher
    from ray_distill.teacher_cache.frames import RECEPTIVE_FIELD, SAMPLE_RATE
    from ray_distill.whole_files import named

    if seconds * SAMPLE_RATE < RECEPTIVE_FIELD:
        raise ValueError(
            f"--seconds {seconds:g} is shorter than one frame; give at least {RECEPTIVE_FIELD / SAMPLE_RATE}"
        )
    if output is not None:
        check_room(output.parent)
        if output.is_dir():
            raise ValueError(f"--output {output} is a folder; give the name of a file")
        if output.exists():
            raise ValueError(f"{output} exists already; choose another --output")
    student, loaded = load_models(model, teacher)
    profiles = profile_student(student, seconds), profile_teacher(loaded, seconds)
    Console().print(profile_table(*profiles, ("student", loaded.name)))
    if output is not None:
        record = {"student": asdict(profiles[0]), "teacher": asdict(profiles[1]), "teacher_name": loaded.name}
        output.parent.mkdir(parents=True, exist_ok=True)
        with named(output):
            output.write_text(json.dumps(record, indent=2) + "\n")
