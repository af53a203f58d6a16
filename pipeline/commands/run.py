"""``ray-distill run``: the job from corpus to report."""

from pathlib import Path
from typing import Annotated

import typer

from ray_distill.pipeline.recipes import complete_recipe, find_recipe


def run(
    config: Annotated[
        Path,
        typer.Option(
            parser=find_recipe,
            metavar="RECIPE",
            autocompletion=complete_recipe(),
            help="YAML configuration, or the name of a recipe in configs/, such as demo.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to the configuration, as in train.epochs=3."),
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
) -> None:
    """Run a job: index, plan, cache, train, export, report.

    Running the same command again resumes the job.
    """
    typer.echo("start   importing PyTorch and Ray")
    from rich.console import Console

    from ray_distill.pipeline.config import load_config
    from ray_distill.pipeline.stages import STAGES, Run, run_stages, summary_table

    selected = list(STAGES) if stages is None else [stage.strip() for stage in stages.split(",")]
    unknown = sorted(set(selected) - set(STAGES))
    if unknown:
        raise ValueError(f"--stages: unknown stage {unknown[0]!r}; stages are {', '.join(STAGES)}")
    settings = load_config(config, overrides or [])
    console = Console()
    if dry_run:
        from ray_distill.pipeline.planning.dry_run import plan_run, print_plan

        print_plan(plan_run(settings, selected), console)
        return
    summary = run_stages(Run(settings, console), selected)
    if summary is not None:
        console.print(summary_table(summary))
