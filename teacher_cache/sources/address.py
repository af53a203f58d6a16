"""The address of an utterance's audio: a file, a range of its bytes or a row of it, and a piece and a channel of that."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

from ray_distill.teacher_cache.sources.byte_range import ByteRange

Channel = int | Literal["mix"]
"""A channel, counted from 0, or the mean of all channels."""


@dataclass(frozen=True)
class AudioAddress:
    """Where the audio of an utterance is. It is stored as text in indexes and caches.

    The text of a whole file is its path. That of another address is JSON, such as
    ``{"end":32000,"file":"/data/long.wav","start":16000}``; it begins with a brace, and an absolute path does not.

    Attributes:
        file: Absolute path of a file, or a URL such as ``s3://bucket/a.flac``.
        offset: First byte of the audio in the file, as for a member of a tar file. Default: None, the whole file.
        size: Number of bytes from ``offset``. Default: None, all up to the end of the file.
        row: 0-based row of a Parquet file. Default: None.
        column: Column of the Parquet file. Default: None.
        start: First sample frame of the piece, at the audio's own rate. Default: None, the first one.
        end: Sample frame behind the piece. Default: None, the end of the audio.
        channel: Channel to use, counted from 0, or ``mix`` for the mean of all. Default: None, also the mean.
        name: Name of the audio inside the file, for messages. Default: None.
    """

    file: str
    offset: int | None = None
    size: int | None = None
    row: int | None = None
    column: str | None = None
    start: int | None = None
    end: int | None = None
    channel: Channel | None = None
    name: str | None = None

    @classmethod
    def parse(cls, text: str | Path) -> Self:
        """Return the address of a text that `encode` returned, or of a path.

        Raises:
            ValueError: The text is damaged.
        """
        text = str(text)
        if not text.startswith("{"):
            return cls(text)
        try:
            tree: dict[str, Any] = json.loads(text)
            address = cls(**tree)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{text[:200]!r} is not an address of audio ({error})") from error
        numbers = [address.offset, address.size, address.row, address.start, address.end]
        texts = [address.file, address.column or "", address.name or ""]
        good = all(n is None or (type(n) is int and 0 <= n < 2**62) for n in numbers)
        good = good and all(isinstance(t, str) for t in texts) and (address.row is None) == (address.column is None)
        if not good or not (
            address.channel in (None, "mix") or (type(address.channel) is int and address.channel >= 0)
        ):
            raise ValueError(f"{text[:200]!r} is not an address of audio")
        return address

    def encode(self) -> str:
        """Return the text from which `parse` makes this address."""
        tree = {name: value for name, value in asdict(self).items() if value is not None}
        if tree.keys() == {"file"}:
            return self.file
        return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @property
    def whole(self) -> "AudioAddress":
        """The same audio, whole and with all channels."""
        return replace(self, start=None, end=None, channel=None)

    @property
    def is_remote(self) -> bool:
        """Whether the file is in an object store or on a web server."""
        return "://" in self.file

    def with_file(self, file: str | Path) -> "AudioAddress":
        """Return the address of the same audio in another file."""
        return replace(self, file=str(file))

    @contextmanager
    def opened(self) -> Iterator[Path | BinaryIO]:
        """Open the whole audio: its path, or a seekable binary file of its bytes.

        Raises:
            ValueError: The file has no such bytes or row.
            OSError: The file can't be opened.
        """
        path = Path(self.file)
        if self.is_remote:
            # Models and the service work without pyarrow.
            from ray_distill.teacher_cache.sources.remote_file import opened_url

            with opened_url(self.file) as remote:
                yield remote
        elif self.row is not None:
            from ray_distill.teacher_cache.sources.parquet_row import read_row

            yield BytesIO(read_row(path, self.row, str(self.column)))
        elif self.offset is not None:
            with BufferedReader(ByteRange(path, self.offset, self.size), 1 << 16) as file:
                yield file
        else:
            yield path

    def __str__(self) -> str:
        """Return the address for messages."""
        inner = [] if self.row is None else [f"row {self.row}"]
        if self.name:
            inner.append(self.name)
        if self.offset is not None and not inner:
            inner.append(f"byte {self.offset}")
        if self.start is not None or self.end is not None:
            inner.append(f"samples {self.start or 0} to {'the end' if self.end is None else self.end}")
        if isinstance(self.channel, int):
            inner.append(f"channel {self.channel}")
        return f"{self.file} ({', '.join(inner)})" if inner else self.file
