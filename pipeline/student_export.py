"""``python -m pipeline.export_model MODEL --format s3prl --output FOLDER``: a student leaves for another tool."""

import json
import subprocess
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ray_distill.student.checkpoints import load_student, student_folder
from ray_distill.student.exporters.origin import Origin
from ray_distill.student.model.student import Student
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError

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
    model = student_folder(model)
    student = load_student(model, model_config)
    origin: Origin = {"commit": _commit(), "student": student.config.model_dump(mode="json")}
    if (model / "config.json").is_file():
        metadata = json.loads((model / "config.json").read_text()).get("metadata", {})
        origin["metrics"] = {name: value for name, value in metadata.items() if isinstance(value, (int, float))}
    run = _run_of(model)
    configuration = None if run is None else _configuration(run / "config.yaml")
    if run is not None and configuration is not None:
        origin |= _of_run(run, configuration, origin.get("metrics", {}))
    return student, origin


def _run_of(model: Path) -> Path | None:
    """The folder of the run that a student is still in: its export, or one of its checkpoints."""
    if model.suffix == ".ckpt":
        return None
    folder = model.resolve() if model.is_dir() else model.resolve().parent
    if folder.name == "export":
        return folder.parent
    return folder.parent.parent if folder.parent.name == "checkpoints" else None


def _configuration(path: Path) -> dict[str, Any] | None:
    """A run's configuration; None where there is none, or it is another program's. ValueError where it can't be read."""
    if not path.is_file():
        return None
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}, the configuration of the student's run, is not YAML ({' '.join(str(error).split())})"
        ) from error
    sections = isinstance(tree, dict) and all(isinstance(tree.get(name), dict) for name in ("teacher", "train"))
    return tree if sections and "name" in tree and "checkpoint" in tree["teacher"] else None


def _record(path: Path) -> dict[str, Any]:
    """What a JSON file of the run holds; nothing where there is none. ValueError where it is damaged."""
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); without that file the export says less of its origin"
        ) from error
    return tree if isinstance(tree, dict) else {}


def _of_run(run: Path, configuration: dict[str, Any], metrics: dict[str, float]) -> Origin:
    """What a run's folder tells; nothing of it need be there but the configuration."""
    summary = _record(run / "summary.json")
    trained = _record(run / "train.json") or summary.get("training") or {}
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
        # Trainings of earlier versions did not record it.
        origin["cache_fingerprint"] = trained.get("cache_fingerprint") or _fingerprint(summary.get("cache"))
    return origin


def _fingerprint(location: str | None) -> str | None:
    """Of the cache that is at a place now; None where there is none, as when it was removed."""
    try:
        return None if location is None else Cache.open(location).fingerprint
    except (CacheError, OSError):
        return None


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
            from ray_distill.student.exporters.s3prl import export_s3prl

            export_s3prl(student, output, origin)
        elif format is Format.HUGGINGFACE:
            from ray_distill.student.exporters.huggingface import export_huggingface

            export_huggingface(student, output, origin)
        elif format is Format.ONNX:
            from ray_distill.student.exporters.onnx import export_onnx

            export_onnx(student, output, origin, int8=int8)
        else:
            from ray_distill.student.exporters.onnx import export_torch

            export_torch(student, output, origin)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"export  {output}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()
