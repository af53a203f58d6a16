"""Loading of untrusted checkpoints without running code from their pickles.

PyTorch's weights-only unpickler loads them. Published checkpoints also contain a few harmless objects (a fairseq dictionary, an
omegaconf configuration, Lightning's state). These become inert `StandIn` objects, so their classes need not be installed and
none of their code runs. Any other global is an error.
"""

import pickletools
import re
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._utils import IMPORT_MAPPING, NAME_MAPPING  # Tables by which torch's unpickler renames globals.
from torch.utils.serialization import config as serialization

from ray_distill.first_line import first_line

_ZIP_MAGIC = b"PK\x03\x04"
_PICKLES_IN_LEGACY_FILE = 5  # magic number, protocol, system info, object, storage keys
_MAX_DEPTH = 64
_MAX_EXPANSION = 20
"""Maximum size of an archive's content, relative to its file."""

_HARMLESS_PACKAGES = {
    *("fairseq", "omegaconf", "hydra", "pytorch_lightning", "lightning", "lightning_fabric"),
    *("s3prl", "optimizers"),  # Optimisers and schedulers in checkpoints of S3PRL.
}
_HARMLESS_GLOBALS = {
    "argparse.Namespace",
    "collections.defaultdict",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.Path",
    "pathlib.PosixPath",
    "typing.Any",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "object", "str", "tuple")),
}
_DICTIONARIES = (".defaultdict", ".AttributeDict")
# Globals that torch's weights-only unpickler may allow; torch itself decides.
_TORCH_ROOTS = {"torch", "_codecs"}
_TORCH_GLOBALS = {
    "collections.OrderedDict",
    "collections.Counter",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.set",
}

# torch has one list of safe globals for the whole process.
_lock = threading.Lock()


class UntrustedCheckpointError(ValueError):
    """A checkpoint that can't be loaded safely: it is damaged, has another format, or names a global that is not allowed."""


class StandIn:
    """Replacement of an object whose class is not loaded. It has the pickled data and no behaviour.

    Attributes:
        args: Arguments with which the class would have been called.
        state: State for ``__setstate__`` or ``__dict__``, or None.
    """

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "StandIn":
        """Store any arguments, because the replaced class may take them."""
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *args: Any) -> None:
        """Do nothing: `__new__` has stored the arguments, and unpickling may skip this method."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _DictionaryStandIn:
    """Replacement of a subclass of dict. It creates an OrderedDict, because torch sets items on no other class."""

    def __new__(cls, *_: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]  # It returns another class on purpose.
        return OrderedDict()


def load_untrusted(path: Path) -> dict[str, Any]:
    """Load a checkpoint written by ``torch.save`` to the CPU without executing code in it.

    Args:
        path: File in PyTorch's zip format or the older one. The checksums (CRC-32) of a zip are compared, unless PyTorch is
            configured to map files into memory (``torch.utils.serialization.config.load.mmap``) instead of reading them.

    Returns:
        The dictionary in the file. Objects of harmless classes are `StandIn` objects; `plain` converts configurations among
        them to dictionaries.

    Raises:
        UntrustedCheckpointError: If the file does not exist, is damaged, has no dictionary, or names a global that is
            neither PyTorch's nor known to be harmless. The message names the global.
    """
    path = Path(path)
    if not path.is_file():
        raise UntrustedCheckpointError(f"{path} is not a file; a checkpoint written by torch.save is needed")
    if what := what_instead(path):
        raise UntrustedCheckpointError(f"{path} {what}")
    try:
        found = _globals(path)
    except Exception as error:  # The parsers can raise anything for damaged bytes.
        raise UntrustedCheckpointError(_unreadable(path, error)) from error
    refused = sorted(name for name in found if not _is_harmless(name) and not _may_be_torch(name))
    if refused:
        raise UntrustedCheckpointError(
            f"{path} is refused: its pickle names {', '.join(refused)}, which could run code when loaded"
        )
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (_DictionaryStandIn if name.endswith(_DICTIONARIES) else StandIn, name) for name in found if _is_harmless(name)
    ]
    try:
        with _lock, torch.serialization.safe_globals(stand_ins):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # See above.
        unsupported = re.search(r"GLOBAL ([\w.]+)", str(error))
        if unsupported:
            raise UntrustedCheckpointError(
                f"{path} is refused: its pickle names {unsupported[1]}, which could run code when loaded"
            ) from error
        raise UntrustedCheckpointError(_unreadable(path, error)) from error
    if not isinstance(checkpoint, dict):
        raise UntrustedCheckpointError(f"{path} has a {type(checkpoint).__name__}, not the dictionary of a checkpoint")
    return checkpoint


def _unreadable(path: Path, error: Exception) -> str:
    reason = first_line(error)[:200]
    return f"{path} is not a readable PyTorch checkpoint, so it may be cut off; download or save it again ({reason})"


def what_instead(path: Path) -> str | None:
    """Return what a file is that a failed download left in place of weights, after its name. None if it is none of these."""
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS and not the weights; fetch them with git lfs pull, or download the file"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page and not the weights; download the file itself"
    return None if start else "is empty; download it again"


def plain(value: Any) -> Any:
    """Convert a configuration in a checkpoint to plain dictionaries, lists and values.

    It converts ``argparse.Namespace``, omegaconf's containers and nodes (``_content``, ``_val``), enumerations (to their value)
    and subclasses of dict.

    Args:
        value: Any part of a result of `load_untrusted`.

    Raises:
        UntrustedCheckpointError: If it is nested deeper than any configuration.
    """
    return _plain(value, 0)


def _plain(value: Any, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise UntrustedCheckpointError(f"the checkpoint's configuration is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, dict):
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if not isinstance(value, StandIn):
        return value
    state = value.state
    if isinstance(state, dict) and "_content" in state:
        return _plain(state["_content"], depth + 1)
    if isinstance(state, dict) and "_val" in state:
        return _plain(state["_val"], depth + 1)
    if isinstance(state, dict):
        return _plain(state, depth + 1)
    return _plain(value.args[0], depth + 1) if value.args else {}


def _is_harmless(name: str) -> bool:
    return name in _HARMLESS_GLOBALS or ("." in name and name.split(".")[0] in _HARMLESS_PACKAGES)


def _may_be_torch(name: str) -> bool:
    return name in _TORCH_GLOBALS or name.split(".")[0] in _TORCH_ROOTS


def _globals(path: Path) -> set[str]:
    """Return the dotted names of all globals in the file's pickles. This only parses opcodes and creates no objects."""
    with path.open("rb") as file:
        if file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC:
            with zipfile.ZipFile(path) as archive:
                # PyTorch does not compress. An archive of zeros from a stranger could otherwise unpack to any size.
                unpacked = sum(info.file_size for info in archive.infolist())
                if unpacked > _MAX_EXPANSION * path.stat().st_size:
                    raise ValueError(f"the archive would unpack to {unpacked} bytes")
                if not serialization.load.mmap and (damaged := archive.testzip()) is not None:
                    raise ValueError(f"its part {damaged!r} does not have the checksum that the archive records")
                pickles = [name for name in archive.namelist() if name.split("/")[-1] == "data.pkl"]
                if not pickles:
                    raise ValueError("the archive has no data.pkl")
                with archive.open(pickles[0]) as pickle:
                    return _globals_of_pickle(pickle)
        file.seek(0)
        found: set[str] = set()
        for _ in range(_PICKLES_IN_LEGACY_FILE):
            found |= _globals_of_pickle(file)
            if any(not _is_harmless(name) and not _may_be_torch(name) for name in found):
                break  # The file will be refused, and the rest may not be a checkpoint.
        return found


def _globals_of_pickle(pickle: Any) -> set[str]:
    file: BinaryIO = pickle
    found: set[str] = set()
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            found.add(_current_name(*str(argument).split(" ", 1)))
        elif opcode.name == "STACK_GLOBAL":
            # torch refuses protocol 4 in any case. The name is for the message.
            found.add(_current_name(*strings[-2:]) if len(strings) > 1 else "an unnamed global")
        elif opcode.name.startswith("EXT"):
            found.add("a copyreg extension")
        elif isinstance(argument, str) and "UNICODE" in opcode.name:
            strings.append(argument)
    return found


def _current_name(module: str, name: str) -> str:
    """Return the dotted name in Python 3 of a global. Protocol 2 uses the names of Python 2."""
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[(module, name)]
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"
