"""``ray-distill import-config``: a published YAML file as a configuration of this project."""

from pathlib import Path
from typing import Annotated

import typer


def import_config(
    published: Annotated[Path, typer.Argument(help="YAML file of the published ARMHuBERT repository.")],
    output: Annotated[Path | None, typer.Option(help="New file. Default: standard output.")] = None,
) -> None:
    """Convert a published YAML file to a configuration.

    The keys that were kept, changed and dropped are listed on standard error.
    """
    from ray_distill.pipeline import published_config
    from ray_distill.pipeline.config import ConfigError, dump_config
    from ray_distill.pipeline.files import write_text

    imported = published_config.import_config(published)
    if output is None:
        typer.echo(dump_config(imported.config), nl=False)
    elif output.exists():
        raise ConfigError(f"{output} exists already; choose another --output")
    else:
        write_text(output, dump_config(imported.config))
    typer.echo(f"kept    {', '.join(imported.kept)}", err=True)
    for sentence in imported.changed:
        typer.echo(f"changed {sentence}", err=True)
    for sentence in imported.dropped:
        typer.echo(f"dropped {sentence}", err=True)
