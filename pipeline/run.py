"""The job: ``python pipeline/run.py --config configs/demo.yaml``, or the same under ``ray job submit --working-dir . --``.

Its other commands are the first argument: ``python pipeline/run.py export --help``.
"""

import importlib
import sys
from pathlib import Path
from typing import Annotated

# `python pipeline/run.py` puts pipeline/ on the path, not the repository; a submitted job has nothing installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer
from rich.console import Console

from ray_distill.pipeline.config import load_config
from ray_distill.pipeline.stages import STAGES, Run, run_stages, summary_table

COMMANDS = {
    "ablate": "ray_distill.pipeline.ablation.sweep",
    "convert": "ray_distill.pipeline.convert",
    "export": "ray_distill.pipeline.student_export",
    "import-config": "ray_distill.pipeline.published_config",
    "plan-cluster": "ray_distill.pipeline.planning.cluster_plan",
    "probe": "ray_distill.pipeline.probing.probe",
    "profile": "ray_distill.pipeline.model_profile",
}
"""Commands besides the job, and the modules whose ``command`` they are; imported when asked for."""


def main(
    config: Annotated[Path, typer.Option(help="YAML configuration; configs/ has the demo and the published recipes.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as in train.epochs=3")] = None,
    stages: Annotated[str, typer.Option(help="Comma-separated stages; each skips what is done.")] = ",".join(STAGES),
) -> None:
    """Index a corpus, plan, cache teacher features, train a student from the cache, export it, report."""
    console = Console(stderr=False)
    wanted = [stage.strip() for stage in stages.split(",")]
    unknown = sorted(set(wanted) - set(STAGES))
    if unknown:
        console.print(f"[red]--stages: unknown stage {unknown[0]!r}; stages are {', '.join(STAGES)}[/red]")
        raise typer.Exit(2)
    try:
        summary = run_stages(Run(load_config(config, overrides or []), console), wanted)
    except (ValueError, FloatingPointError, OSError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    if summary is not None:
        console.print(summary_table(summary))


def run() -> None:
    """The command line: the job, or one of `COMMANDS`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        name = sys.argv.pop(1)
        app.command()(importlib.import_module(COMMANDS[name]).command)
        app(prog_name=f"run.py {name}")
    app.command(epilog=f"Other commands: run.py {', '.join(COMMANDS)}.")(main)
    app()


if __name__ == "__main__":
    run()
