"""A released checkpoint in our format: ``convert ARMHuBERT-S-100h.ckpt ARMHuBERT-S-100h.yaml FOLDER``."""

from pathlib import Path
from typing import Annotated

import typer

from ray_distill.student import load_student, save_student


def convert(checkpoint: Path, config: Path, output: Path, *, without_heads: bool = False) -> int:
    """Writes a released Lightning checkpoint as `student.save_student` does; the service and the exporters take the folder.

    Args:
        checkpoint: the released ``.ckpt``; nothing pickled in it is run.
        config: its yaml.
        output: a new folder.
        without_heads: leave the projections out, which only training needs (published ``delete_projections``).

    Returns:
        Parameters written.

    Raises:
        ValueError: the checkpoint or yaml can't be read, don't fit each other, or the folder is there already.
    """
    if output.exists():
        raise ValueError(f"{output} is there already; choose another folder")
    student = load_student(checkpoint, config)
    if without_heads:
        student = student.without_heads()
    save_student(student, output, {"converted_from": checkpoint.name})
    return sum(parameter.numel() for parameter in student.parameters())


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A released .ckpt.")],
    config: Annotated[Path, typer.Argument(help="Its yaml.")],
    output: Annotated[Path, typer.Argument(help="A new folder.")],
    without_heads: Annotated[bool, typer.Option("--without-heads", help="Leave out what only training needs.")] = False,
) -> None:
    """Convert a released ARMHuBERT, ARMwavLM or MaskHuBERT checkpoint to a folder that can be served and exported."""
    try:
        parameters = convert(checkpoint, config, output, without_heads=without_heads)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"convert {output}: {parameters:,} parameters, heads {'left out' if without_heads else 'included'}")
