"""``ray-distill run``: the job from corpus to report."""

from typing import Annotated

import typer

from ray_distill.pipeline.recipes import complete_recipe, find_recipe, recipe_and_changes, recipe_names


def run(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] KEY=VALUE",
            autocompletion=complete_recipe(),
            help="Recipe, unless --config is given, and changes to the configuration, as in train.epochs=3. teacher=, corpus= and "
            "cache= are short for teacher.checkpoint=, corpus.path= and cache.path=.",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            autocompletion=complete_recipe(),
            help="YAML configuration, or the name of a recipe in configs/, such as demo.",
        ),
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE,...",
            help="Comma-separated stages to run: any of index, plan, cache, train, export, report. Default: all. "
            "Each stage skips finished work.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check the configuration, find the audio files, read the header of the teacher's checkpoint, and print the "
            "plan. No audio is decoded, no weights are read or downloaded, and nothing is started.",
        ),
    ] = False,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config",
            help="Print the resolved configuration as YAML, with the origin of each value, and do nothing else.",
        ),
    ] = False,
) -> None:
    """Run a job: index, plan, cache, train, export, report.

    `ray-distill run armhubert-s-100 teacher=/models/hubert_base_ls960.pt corpus=/data/LibriSpeech` is a whole command.
    Running the same command again resumes the job.
    """
    known = f"such as demo; they are {', '.join(recipe_names())}"
    recipe, overrides = recipe_and_changes(config, words or [], known)
    if print_config:
        from ray_distill.pipeline.composition.config_listing import config_with_origins

        typer.echo(config_with_origins(find_recipe(recipe), overrides), nl=False)
        return
    typer.echo("start   importing PyTorch and Ray")
    from rich.console import Console

    from ray_distill.pipeline.composition.config_tree import compose
    from ray_distill.pipeline.config import ConfigError, check_config
    from ray_distill.pipeline.run_plugins import absent_of_run
    from ray_distill.pipeline.stages import STAGES, Run, run_stages, summary_table

    selected = list(STAGES) if stages is None else [stage.strip() for stage in stages.split(",")]
    unknown = sorted(set(selected) - set(STAGES))
    if unknown:
        raise ValueError(f"--stages: unknown stage {unknown[0]!r}; stages are {', '.join(STAGES)}")
    composed = compose(find_recipe(recipe), overrides)
    try:
        settings = check_config(composed.tree)
    except ConfigError as error:
        if (absent := absent_of_run(composed.tree)) is not None:
            raise ConfigError(f"{error}; the run was made with {absent}") from error
        raise
    for note in composed.notes:
        typer.echo(f"config  {note}")
    console = Console()
    if dry_run:
        from ray_distill.pipeline.planning.dry_run import plan_run, print_plan

        print_plan(plan_run(settings, selected), console)
        return
    summary = run_stages(Run(settings, console), selected)
    if summary is not None:
        console.print(summary_table(summary))
