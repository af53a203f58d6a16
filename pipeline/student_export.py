"""A student in the format of another tool, with a record of its origin."""

import json
from pathlib import Path
from typing import Any, Literal

import yaml

from ray_distill.pipeline.composition.suggestions import enumerated
from ray_distill.pipeline.run_folder import RunFolder
from ray_distill.pipeline.run_starts import clone_commit
from ray_distill.student.checkpoints import load_student, student_folder
from ray_distill.student.exporters.origin import Origin
from ray_distill.student.exporters.portable import Features, default_features
from ray_distill.student.model.student import Student
from ray_distill.student.training.run_files import CHECKPOINTS, TEACHER
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError
from ray_distill.teacher_cache.teachers import split_options
from ray_distill.teacher_cache.teachers.hub.hub_name import PREFIX, parse_hub_name

_REPOSITORY = Path(__file__).resolve().parent.parent
"""Root of the clone; in an installed package the package itself."""

Format = Literal["s3prl", "huggingface", "onnx", "torch"]


def open_student(model: Path, model_config: Path | None = None) -> tuple[Student, Origin]:
    """Load a student and the record of its origin.

    Args:
        model: Folder of a run (its export is loaded), of an export or of a checkpoint; or a published ``.ckpt`` file.
        model_config: YAML file of a published ``.ckpt``.

    Returns:
        The student, and what is known of its origin: run, teacher, corpus, training, commit.

    Raises:
        ValueError: There is no such student, or it or a file of its run is damaged.
    """
    model = student_folder(model)
    student = load_student(model, model_config)
    origin: Origin = {"commit": _commit(), "student": student.config.model_dump(mode="json")}
    if (model / "config.json").is_file():
        metadata = json.loads((model / "config.json").read_text()).get("metadata", {})
        origin["metrics"] = {name: value for name, value in metadata.items() if isinstance(value, (int, float))}
    origin |= _recorded_teacher(model / TEACHER)
    prefix = f"{Path(TEACHER).stem}-"
    files = sorted(model.glob(f"{prefix}*.json")) if model.is_dir() else []
    found = [{"name": path.stem.removeprefix(prefix)} | _recorded_teacher(path) for path in files]
    if recorded := [one for one in found if "teacher" in one]:
        origin |= {"teachers": recorded, "teacher": enumerated(one["teacher"] for one in recorded)}
    run = _run_folder(model)
    configuration = None if run is None else _configuration(run.config_file)
    if run is not None and configuration is not None:
        origin |= _origin_in_run(run, configuration, origin.get("metrics", {}))
    return student, origin


def _recorded_teacher(path: Path) -> Origin:
    """Return the name and the commit of a teacher on the hub that an export records; nothing if it records none.

    Raises:
        ValueError: The file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        source = split_options(json.loads(path.read_text())["resolved"])[1]
        name = parse_hub_name(source)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged; restore it from a copy, or remove it") from error
    return {} if name is None else {"teacher": name.repository, "teacher_source": source}


def _run_folder(model: Path) -> RunFolder | None:
    """Return the folder of the run whose export or checkpoint a model is; None if it is neither."""
    if model.suffix == ".ckpt":
        return None
    folder = model.resolve() if model.is_dir() else model.resolve().parent
    if folder.name == "export":
        return RunFolder(folder.parent)
    return RunFolder(folder.parent.parent) if folder.parent.name == CHECKPOINTS else None


def _configuration(path: Path) -> dict[str, Any] | None:
    """Return a run's configuration, unchecked; None if the file is missing or belongs to another program.

    Raises:
        ValueError: The file is not YAML.
    """
    if not path.is_file():
        return None
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}, the configuration of the student's run, is not valid YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(tree, dict) or "name" not in tree or not isinstance(tree.get("train"), dict):
        return None
    return tree if checkpoints(tree) else None


def checkpoints(configuration: dict[str, Any]) -> list[str]:
    """Return the checkpoints of the teachers of an unchecked configuration; nothing if it has none."""
    teacher, teachers = configuration.get("teacher"), configuration.get("teachers")
    entries: list[Any] = teachers if isinstance(teachers, list) and teachers else [teacher]
    complete = all(isinstance(entry, dict) and "checkpoint" in entry for entry in entries)
    return [str(entry["checkpoint"]) for entry in entries] if complete else []


def _origin_in_run(run: RunFolder, configuration: dict[str, Any], metrics: dict[str, float]) -> Origin:
    """Return what a run's folder records of the origin; only its configuration is required."""
    summary = run.summary() or {}
    trained = run.result() or summary.get("training") or {}
    names = ("steps", "last_loss", "last_validation_loss", "best_validation_loss")
    train = configuration["train"]
    origin: Origin = {
        "run": configuration["name"],
        "teacher": summary.get("teacher", enumerated(checkpoints(configuration))),
        "corpus_hours": None if "hours" not in summary else round(summary["hours"], 2),
        "targets": train.get("targets"),
        "loss": train.get("loss"),
        "metrics": metrics | {name: trained[name] for name in names if trained.get(name) is not None},
        "configuration": configuration,
    }
    if teachers := summary.get("teachers"):
        origin["teachers"] = [
            {key: one.get(key) for key in ("name", "teacher", "teacher_source", "objective")} for one in teachers
        ]
    elif (source := split_options(str(summary.get("teacher_source", "")))[1]).startswith(PREFIX):
        origin["teacher_source"] = source
    if summary.get("teacher_is_random"):
        origin["teacher"] += " (RANDOM weights: the features are meaningless)"
    elif some := summary.get("random_teachers"):
        origin["teacher"] += f" (RANDOM weights: {enumerated(some)})"
    if train.get("targets") == "cached":
        # Earlier versions did not record the fingerprint in train.json.
        origin["cache_fingerprint"] = trained.get("cache_fingerprint") or _fingerprint(summary.get("cache"))
    return origin


def _fingerprint(location: str | None) -> str | None:
    """Return the fingerprint of the cache that is at a location now; None if it was removed."""
    try:
        return None if location is None else Cache.open(location).fingerprint
    except (CacheError, OSError):
        return None


def _commit() -> str | None:
    """Return the abbreviated commit of the program, as ``git describe --always --dirty``; None if it is not in a clone of its own."""
    if (found := clone_commit(_REPOSITORY)) is None:
        return None
    commit, changed = found
    return f"{commit[:12]}{'-dirty' if changed else ''}"


def export_student(
    student: Student,
    origin: Origin,
    format: Format,
    output: Path,
    *,
    features: Features | None = None,
    int8: bool = False,
) -> Features:
    """Write a student in the format of another tool, and return which features it has.

    Args:
        student: Student to export.
        origin: Record of its origin, which the export contains.
        format: ``s3prl``, ``huggingface``, ``onnx`` or ``torch`` (`torch.export`).
        output: New folder; for ``onnx`` and ``torch``, new file.
        features: Features to export, which the record of the origin names: ``heads`` (the heads' predictions of the teacher's
            layers) or ``layers`` (the encoder's input and layers). Default None: those that the authors of the student's
            method evaluate, see `default_features`.
        int8: Quantise the weights of matrix products to dynamic int8; only for ``onnx``. Default: False.

    Raises:
        ValueError: ``output`` exists or has an unusable name, the format can't represent the student, or a package that the
            format needs is not installed.
    """
    assert format == "onnx" or not int8, "int8 is an option of onnx"
    features = features or default_features(student.config)
    origin = {**origin, "features": features}
    # Each exporter needs packages that the others do not.
    match format:
        case "s3prl":
            from ray_distill.student.exporters.s3prl import export_s3prl

            export_s3prl(student, output, origin, features)
        case "huggingface":
            from ray_distill.student.exporters.huggingface import export_huggingface

            export_huggingface(student, output, origin, features)
        case "onnx":
            from ray_distill.student.exporters.onnx import export_onnx

            export_onnx(student, output, origin, features, int8=int8)
        case "torch":
            from ray_distill.student.exporters.onnx import export_torch

            export_torch(student, output, origin, features)
    return features
