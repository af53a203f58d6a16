"""``ray-distill export``: a student in the format of another tool."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    model: Annotated[
        Path, typer.Argument(help="Folder of a run, of an export or of a checkpoint; or a published .ckpt file.")
    ],
    output: Annotated[Path, typer.Option(help="New folder; for onnx and torch, new file that ends in .onnx or .pt2.")],
    format: Annotated[
        Literal["s3prl", "huggingface", "onnx", "torch"],
        typer.Option(help="Format to write: s3prl, huggingface, onnx or torch (torch.export)."),
    ],
    features: Annotated[
        Literal["heads", "layers"] | None,
        typer.Option(
            help="Features to export: heads, the predictions of the teacher's layers, or layers, the encoder's input and layers. "
            "Default: heads for ARMHuBERT and MaskHuBERT (one head for each layer, no time reduction), layers for all others, "
            "as the methods' authors evaluate them."
        ),
    ] = None,
    model_config: Annotated[Path | None, typer.Option(help="YAML file of a published .ckpt.")] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise the weights of matrix products to dynamic int8 (onnx only).")
    ] = False,
) -> None:
    """Export a student to S3PRL, Hugging Face, ONNX or PyTorch.

    The export contains a record of its origin.
    """
    from ray_distill.pipeline.student_export import export_student, open_student

    if int8 and format != "onnx":
        raise ValueError(f"--int8 needs --format onnx, not {format}")
    student, origin = open_student(model, model_config)
    exported = export_student(student, origin, format, output, features=features, int8=int8)
    typer.echo(f"export  {output} (features: {exported})")
