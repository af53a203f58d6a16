"""A released checkpoint in this project's format."""

from pathlib import Path

from ray_distill.student import load_student, save_student
from ray_distill.whole_files import filling


def convert(checkpoint: Path, config: Path, output: Path, *, without_heads: bool = False) -> int:
    """Convert a released Lightning checkpoint to a folder as `student.save_student` writes it.

    The folder can be served, exported and probed.

    Args:
        checkpoint: Released ``.ckpt`` file. Nothing that is pickled in it is executed.
        config: YAML file of the checkpoint.
        output: New or empty folder.
        without_heads: Leave out the prediction heads, which only training needs (published as
            ``delete_projections``). Default: False.

    Returns:
        Number of parameters written.

    Raises:
        ValueError: The checkpoint or the YAML file can't be read, they don't fit each other, or ``output`` has files.
    """
    with filling(output) as folder:
        student = load_student(checkpoint, config)
        if without_heads:
            student = student.without_heads()
        save_student(student, folder, {"converted_from": checkpoint.name})
    return sum(parameter.numel() for parameter in student.parameters())
