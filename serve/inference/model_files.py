"""Files of models: what a path must be, and how the model in it is called."""

from pathlib import Path


def check_model_path(path: Path, runtime: str | None) -> None:
    """Check a model's path without reading the model.

    Args:
        path: Folder of an exported student or of a run, or a file of ``export --format onnx``.
        runtime: ``torch``, ``onnx``, or None to choose by the path.

    Raises:
        ValueError: the path holds no model, or ``runtime`` can't run it.
    """
    if path.suffix == ".onnx":
        if runtime == "torch":
            raise ValueError(f"PyTorch can't run '{path}': give the folder that the export stage wrote.")
        if not path.is_file():
            raise ValueError(f"There is no ONNX file at '{path}'.")
    elif path.is_file():
        raise ValueError(
            f"'{path}' is a file: give the folder that the export stage wrote, or an ONNX file named .onnx."
        )
    elif not path.is_dir():
        raise ValueError(f"There is no model folder at '{path}': give the folder that the export stage wrote.")
    elif not (model_folder(path) / "config.json").is_file():
        raise ValueError(f"'{path}' holds no student (no config.json): give the folder that the export stage wrote.")


def model_folder(path: Path) -> Path:
    """Return the folder ``export`` in the folder of a run that has one; any other path as it is."""
    run = (path / "export" / "config.json").is_file() and not (path / "config.json").is_file()
    return path / "export" if run else path


def model_name(path: Path) -> str:
    """Return the default name of a model: NAME of ``NAME/export``, of ``NAME.onnx`` and of any other folder NAME."""
    path = path.resolve()
    if path.name == "export" and path.parent.name:
        return path.parent.name
    return path.stem if path.suffix == ".onnx" else path.name


def can_be_named(name: str) -> bool:
    """Return whether requests can name a model so: ``@`` separates a name from a revision."""
    return bool(name) and "@" not in name


def models_in(folder: Path, named: bool = True) -> dict[str, Path]:
    """Return the models in a folder by name: ONNX files, exported students, and runs with an ``export`` folder.

    Args:
        folder: Folder of models.
        named: Whether to return those that requests can name, or all others. Default: those that can be named.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".onnx":
            found[path.stem] = path
        elif ((model := model_folder(path)) / "config.json").is_file():
            found[path.name] = model
    return {name: path for name, path in found.items() if can_be_named(name) is named}
