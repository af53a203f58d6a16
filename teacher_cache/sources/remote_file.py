"""Audio in object stores and on web servers, read through Arrow or fsspec."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BufferedReader, BytesIO
from typing import BinaryIO

import pyarrow.fs as pafs

from ray_distill.teacher_cache.storage.store import open_file_system

_WHOLE = 64 << 20
"""Maximum size of a file that is fetched in one request. Of larger ones, only the parts are fetched that are read."""
_BUFFER = 1 << 20


@contextmanager
def opened_url(url: str) -> Iterator[BinaryIO]:
    """Open the file at a URL, such as ``s3://bucket/a.flac`` or ``https://host/a.flac``, as a seekable binary file.

    Raises:
        ValueError: The URL holds credentials, or nothing knows its scheme.
        OSError: The file can't be read.
    """
    scheme, _, rest = url.partition("://")
    host, slash, name = rest.partition("/")
    filesystem, root = _file_system(f"{scheme}://{host}")
    with filesystem.open_input_file(f"{root.rstrip('/')}{slash}{name}") as file:
        if file.size() <= _WHOLE:
            yield BytesIO(file.read())
        else:
            yield BufferedReader(file, _BUFFER)


@lru_cache(maxsize=64)
def _file_system(root: str) -> tuple[pafs.FileSystem, str]:
    return open_file_system(root)
