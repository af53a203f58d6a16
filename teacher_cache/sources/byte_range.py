"""A range of a file's bytes, read like a file of its own."""

import io
import os
from pathlib import Path


class ByteRange(io.RawIOBase):
    """A read-only, seekable view of a range of a file's bytes. Nothing outside the range is read.

    Args:
        path: The file.
        offset: First byte of the range.
        size: Number of bytes. None means all bytes up to the end of the file.

    Raises:
        ValueError: The range is not inside the file.
        OSError: The file can't be opened.
    """

    def __init__(self, path: Path, offset: int, size: int | None = None) -> None:
        self._at = 0
        self._file = path.open("rb", buffering=0)
        total = os.fstat(self._file.fileno()).st_size
        self._offset, self._size = offset, total - offset if size is None else size
        if offset < 0 or self._size < 0 or offset + self._size > total:
            self._file.close()
            raise ValueError(f"{path} has {total} bytes, so it has no {self._size} bytes from byte {offset}")

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position, counted from the beginning of the range, and return it. It is kept inside the range."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = min(max(start + offset, 0), self._size)
        return self._at

    def tell(self) -> int:
        """Return the position, counted from the beginning of the range."""
        return self._at

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        """Read into a buffer and return the number of bytes, 0 at the end of the range."""
        view = memoryview(buffer).cast("B")[: self._size - self._at]
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(view) or 0
        self._at += count
        return count

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._file.close()
        super().close()
