"""``ray-distill ablate``: train and compare a grid of students."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ray_distill.pipeline.recipes import complete_recipe, find_recipe, recipe_and_changes, recipe_names

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ray_distill.pipeline.ablation.definition import Ablation


def ablate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[GRID] KEY=VALUE",
            autocompletion=complete_recipe("ablations"),
            help="Ablation, unless --config is given, and changes to all runs, as in train.epochs=3. corpus=, teacher= and "
            "cache= are short keys, as for `run`; name=, seeds=, concurrent= and cpus_per_worker= change the ablation.",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="GRID",
            autocompletion=complete_recipe("ablations"),
            help="YAML file of the ablation, or the name of one in configs/, such as ablations/smoke.",
        ),
    ] = None,
    probe: Annotated[
        Path | None,
        typer.Option(help="Manifest to probe the students with, in place of the file's own; see `probe --help`."),
    ] = None,
    units: Annotated[
        Literal["characters", "words"] | None,
        typer.Option(help="Units of the transcripts of --probe. Default: characters."),
    ] = None,
    only_list: Annotated[
        bool, typer.Option("--list", help="Check the file, show the runs, and start nothing.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Like --list, and also check the corpus, the teacher and the cache for each variant.",
        ),
    ] = False,
    only_report: Annotated[
        bool, typer.Option("--report", help="Write the report from the results so far, without training.")
    ] = False,
) -> None:
    """Train a grid of students from one cache and compare them.

    Each variant is trained with several seeds. Running the same command again resumes the ablation.
    """
    known = f"such as ablations/smoke; they are {', '.join(recipe_names('ablations'))}"
    grid, overrides = recipe_and_changes(config, words or [], known)
    typer.echo("start   importing PyTorch and Ray")
    from rich.console import Console

    from ray_distill.pipeline.ablation.definition import ProbeSection, load_ablation
    from ray_distill.pipeline.ablation.sweep import Sweep
    from ray_distill.pipeline.config import ConfigError
    from ray_distill.pipeline.probing.task import read_task

    # The stream itself: Tune's tables are later redirected by replacing sys.stdout.
    console = Console(file=sys.stdout)
    if units is not None and probe is None:
        raise ConfigError("--units needs --probe; the probe of the ablation's file has its own key `units`")
    section = None if probe is None else ProbeSection(manifest=probe, units=units or "characters")
    ablation = load_ablation(find_recipe(grid), overrides, section)
    for note in ablation.notes:
        typer.echo(f"config  {note}")
    if only_list or dry_run:
        if (labelled := ablation.settings.probe) is not None:
            read_task(labelled.manifest, labelled.units)  # A probe that can't be is refused before the trainings.
        console.print(runs_table(ablation))
        if dry_run:
            plan_ablation(ablation, console)
        return
    sweep = Sweep(ablation, console)
    failures = {} if only_report else sweep.run()
    sweep.report(failures)
    if failures:
        console.print(
            f"{len(failures)} of {len(ablation.runs)} runs failed; run the same command to try them again", style="red"
        )
        raise typer.Exit(1)


def plan_ablation(ablation: "Ablation", console: "Console") -> None:
    """Plan the cache that all runs share and one run of each variant, and print the cache's plan and the students.

    Raises:
        ValueError: A run is impossible with the corpus, the teacher or the cache. The message names the variant.
    """
    from ray_distill.pipeline.planning.dry_run import plan_run, print_plan

    shared = plan_run(ablation.needs, ["index", "plan", "cache"])
    for run in ablation.runs[: len(ablation.variants)]:  # All variants with the first seed.
        try:
            plan = plan_run(run.config, ["index", "plan", "cache", "train"])
        except ValueError as error:
            raise ValueError(f"variant {run.variant}: {error}") from error
        console.print(
            f"{run.variant}: {plan.facts['student']}; {plan.stages['train']}", highlight=False, soft_wrap=True
        )
    print_plan(shared, console)


def runs_table(ablation: "Ablation") -> "Table":
    """Return a table of the variants of an ablation, with their changes and seeds."""
    from rich.table import Table

    table = Table(title=f"{ablation.settings.name}: {len(ablation.runs)} runs")
    for column in ("variant", "changes", "seeds"):
        table.add_column(column, overflow="fold")  # Names that were cut would look alike.
    for variant in ablation.variants:
        changes = "\n".join(f"{key}={value}" for key, value in variant.changes.items()) or "(none)"
        table.add_row(variant.name, changes, ", ".join(map(str, ablation.settings.seeds)))
    return table
