"""``ray-distill convert``: a released checkpoint in this project's format."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Released .ckpt file.")],
    config: Annotated[Path, typer.Argument(help="YAML file of the checkpoint.")],
    output: Annotated[Path, typer.Argument(help="New or empty folder.")],
    without_heads: Annotated[
        bool, typer.Option("--without-heads", help="Leave out the prediction heads, which only training needs.")
    ] = False,
) -> None:
    """Convert a released checkpoint to this project's format.

    Released checkpoints are those of ARMHuBERT, ARMwavLM and MaskHuBERT. The folder can be served, exported and probed.
    """
    from ray_distill.pipeline.convert import convert as convert_checkpoint

    parameters = convert_checkpoint(checkpoint, config, output, without_heads=without_heads)
    typer.echo(f"convert {output}: {parameters:,} parameters, heads {'left out' if without_heads else 'included'}")
