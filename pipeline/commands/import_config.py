"""``ray-distill import-config``: a published YAML file as a configuration of this project."""

from pathlib import Path
from typing import Annotated

import typer


def import_config(
    published: Annotated[Path, typer.Argument(help="YAML file of the published ARMHuBERT repository.")],
    output: Annotated[Path | None, typer.Option(help="New file. Default: standard output.")] = None,
) -> None:
    """Convert a published YAML file to a configuration.

    The keys that were dropped or changed are listed on standard error.
    """
    from ray_distill.pipeline import published_config
    from ray_distill.pipeline.config import ConfigError, dump_config

    config, dropped = published_config.import_config(published)
    if output is None:
        typer.echo(dump_config(config), nl=False)
    elif output.exists():
        raise ConfigError(f"{output} exists already; choose another --output")
    else:
        output.write_text(dump_config(config))
    for sentence in dropped:
        typer.echo(f"dropped {sentence}", err=True)
    typer.echo(
        f"changed masks.draws: the {published_config.DRAWS} cached draws are used in turn, where the published recipe draws "
        "a new mask each time; student.reuse_behaviour: paper, where the published code applies the softmax twice",
        err=True,
    )
