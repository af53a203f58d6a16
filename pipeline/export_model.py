"""``python -m pipeline.export_model MODEL --format s3prl --output FOLDER``: a student leaves for another tool."""

import json
import subprocess
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from student import load_student
from student.exporters.origin import Origin
from student.model import Student
from teacher_cache.layout import Cache
from teacher_cache.spec import CacheError

_REPOSITORY = Path(__file__).resolve().parent.parent


class Format(StrEnum):
    """What is written."""

    S3PRL = "s3prl"
    HUGGINGFACE = "huggingface"
    ONNX = "onnx"
    TORCH = "torch"


def open_student(model: Path, model_config: Path | None = None) -> tuple[Student, Origin]:
    """A student and where it comes from.

    Args:
        model: a run's folder (its export is taken), an exported or checkpoint folder, or a published ``.ckpt``.
        model_config: the published yaml of a ``.ckpt``.

    Raises:
        ValueError: there is no such student, or it is damaged.
    """
    if (model / "config.yaml").is_file() and not (model / "config.json").is_file():
        if not (model / "export").is_dir():
            raise ValueError(
                f"the run at {model} has no export; run its export stage first, or name one of its checkpoints"
            )
        model = model / "export"
    student = load_student(model, model_config)
    origin: Origin = {"commit": _commit(), "student": student.config.model_dump(mode="json")}
    if (model / "config.json").is_file():
        metadata = json.loads((model / "config.json").read_text()).get("metadata", {})
        origin["metrics"] = {name: value for name, value in metadata.items() if isinstance(value, (int, float))}
    folder = model.absolute()
    for run in (folder.parent, folder.parent.parent):
        if (run / "config.yaml").is_file():
            origin |= _of_run(run, origin.get("metrics", {}))
            break
    return student, origin


def _of_run(run: Path, metrics: dict[str, float]) -> Origin:
    """What a run's folder tells; nothing of it need be there but the configuration."""
    configuration: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").is_file() else {}
    trained = summary.get("training") or {}
    names = ("steps", "last_loss", "last_validation_loss", "best_validation_loss")
    train = configuration["train"]
    origin: Origin = {
        "run": configuration["name"],
        "teacher": summary.get("teacher", configuration["teacher"]["checkpoint"]),
        "corpus_hours": None if "hours" not in summary else round(summary["hours"], 2),
        "targets": train.get("targets"),
        "loss": train.get("loss"),
        "metrics": metrics | {name: trained[name] for name in names if trained.get(name) is not None},
        "configuration": configuration,
    }
    if summary.get("teacher_is_random"):
        origin["teacher"] += " (RANDOM weights: the features mean nothing)"
    if train.get("targets") == "cached":
        try:
            origin["cache_fingerprint"] = Cache.open(configuration["cache"]["path"]).fingerprint
        except (CacheError, OSError):
            origin["cache_fingerprint"] = None  # The cache may have been removed since.
    return origin


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=False)
    except OSError:
        return None  # No git, as in an image.
    return found.stdout.strip() or None


def command(
    model: Annotated[
        Path, typer.Argument(help="A run's folder, an exported or checkpoint folder, or a published .ckpt.")
    ],
    output: Annotated[Path, typer.Option(help="A new folder; for onnx and torch a new file.")],
    format: Annotated[Format, typer.Option(help="What to write.")],
    model_config: Annotated[Path | None, typer.Option(help="The yaml of a published .ckpt.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="onnx: weights of matrix products in dynamic int8.")] = False,
) -> None:
    """Export a student to S3PRL, Hugging Face, ONNX or torch.export, with a statement of its origin."""
    try:
        if int8 and format is not Format.ONNX:
            raise ValueError(f"--int8 is an option of --format onnx, not of {format.value}")
        student, origin = open_student(model, model_config)
        # Each needs packages that the others do not.
        if format is Format.S3PRL:
            from student.exporters.s3prl import export_s3prl

            export_s3prl(student, output, origin)
        elif format is Format.HUGGINGFACE:
            from student.exporters.huggingface import export_huggingface

            export_huggingface(student, output, origin)
        elif format is Format.ONNX:
            from student.exporters.onnx import export_onnx

            export_onnx(student, output, origin, int8=int8)
        else:
            from student.exporters.onnx import export_torch

            export_torch(student, output, origin)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"export  {output}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()
