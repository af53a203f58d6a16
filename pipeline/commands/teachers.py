"""``ray-distill teachers list|show``: which teachers there are, and what is known of one."""

import json
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

COST = (
    "Sizes of a cache are for one pass over all layers, without the audio, with the codec pca unless another is named, as measured "
    "for Whisper-small. "
    "`ray-distill run --stages index,plan` measures them for a teacher and a corpus."
)


def list_teachers(as_json: Json = False) -> None:
    """Show how to name teachers, and list well-known ones on the hub.

    Their facts are stated as published; nothing is read from the network.
    """
    from rich.console import Console

    from ray_distill.pipeline.planning.teacher_facts import facts_lines, kinds_table, published_facts

    teachers = published_facts()
    if as_json:
        typer.echo(json.dumps([teacher.as_json() for teacher in teachers], indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(kinds_table())
    for line in facts_lines(teachers):
        console.print(line, markup=False)
    console.print(f"{COST} `ray-distill teachers show NAME` reads the facts of any teacher.")


def show_teacher(
    name: Annotated[
        str, typer.Argument(help="Teacher, as in teacher.checkpoint: facebook/hubert-base-ls960, a folder, ...")
    ],
    as_json: Json = False,
) -> None:
    """Show the facts of a teacher from its configuration.

    Its weights are not read. For a model on the hub, only the configuration and the headers of safetensors are downloaded.
    """
    from rich.console import Console

    from ray_distill.pipeline.planning.teacher_facts import facts_of, show_table

    facts = facts_of(name)
    if as_json:
        typer.echo(json.dumps(facts.as_json(), indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(show_table(facts))
    if facts.bytes_per_hour:
        console.print(COST)
