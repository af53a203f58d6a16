"""``ray-distill demo``: the whole job on this machine, with a corpus made on the spot."""

from pathlib import Path
from typing import Annotated

import typer

from ray_distill.pipeline.recipes import complete_recipe, find_recipe


def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to the configuration, as in train.max_steps=20."),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(envvar="CORPUS", help="LibriSpeech or any folder of audio. Default: a synthesised corpus."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            envvar="TEACHER", help="Teacher, as in configurations. Default: a small HuBERT trained on synthetic speech."
        ),
    ] = None,
    config: Annotated[
        str,
        typer.Option(
            metavar="RECIPE",
            autocompletion=complete_recipe(),
            help="YAML configuration, or the name of a recipe in configs/.",
        ),
    ] = "demo",
) -> None:
    """Run the whole job on a small corpus, then try the service.

    The service is started on a free port, features are requested from it over HTTP, and it is stopped.
    """
    typer.echo("start   importing PyTorch and Ray")
    from ray_distill.pipeline.demo.demo import run_demo

    run_demo(find_recipe(config), overrides or [], corpus, teacher)
