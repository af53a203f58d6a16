"""Files and folders that are written whole or not at all, and errors of writing that name what could not be written."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FILLED = ".unfinished.tmp"
"""Folder within a folder that `filling` fills."""


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a hidden path beside ``path``; the file or folder written there takes its place when the block ends.

    Readers see either the old file or the new one, even after a kill. An old folder is removed first, so a kill just then leaves
    neither at ``path``. If the block fails, what it wrote is removed.

    Args:
        path: File or folder to write. Its own folder must exist.
        durable: Whether the new content is on the disk before it takes the place of the old, so that a power failure can't
            leave an empty file. Default False.

    Raises:
        OSError: It can't be written. The error names ``path``.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with _written(path, temporary):
        _remove(temporary)  # A killed process may have left it.
        yield temporary
        if durable:
            for written in (*(temporary.iterdir() if temporary.is_dir() else ()), temporary):
                sync(written)
        if temporary.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder in ``folder``, which is created; what was written there moves to ``folder`` when the block ends.

    The folder may be a mount or the working directory, which could not be replaced. If the block fails, what it wrote is
    removed.

    Args:
        folder: New or empty folder.

    Raises:
        ValueError: ``folder`` is a file or not empty.
        OSError: It can't be written to. The error names ``folder``.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a new folder")
    if folder.is_dir() and any(entry.name != _FILLED for entry in folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder")
    new, temporary = not folder.exists(), folder / _FILLED
    try:
        with _written(folder, temporary):
            _remove(temporary)  # A killed process may have left it.
            temporary.mkdir(parents=True)
            yield temporary
            for written in temporary.iterdir():
                written.rename(folder / written.name)
            temporary.rmdir()
    except BaseException:
        if new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Raise an OSError of the block that has no file, as those of write(), or is about a full disk, as one of ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno and (error.filename is None or is_disk_full(error)):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


@contextmanager
def _written(path: Path, temporary: Path) -> Iterator[None]:
    """Remove ``temporary`` if the block fails, with the errors of `named`."""
    with named(path):
        try:
            yield
        except BaseException:
            _remove(temporary)
            raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_disk_full(error: OSError) -> bool:
    """Return whether an error means that the disk is full or the user's quota is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
