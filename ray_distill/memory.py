"""Running out of memory: recognise it in the errors of PyTorch, Python, Arrow and Ray, and say it in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

# PyTorch raises a plain RuntimeError for the memory of a CPU; cuBLAS and C++ libraries have errors of their own.
_TEXTS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "ALLOC_FAILED",
    "running low on memory",  # Ray's memory monitor, in the error of the worker that it killed.
)


class MemoryRanOutError(ValueError):
    """Memory ran out. The message names the setting to lower."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or the one that it wraps, means that the memory of a CPU or a GPU ran out.

    Only the type's name and the text are read, so neither PyTorch nor Ray is imported.
    """
    causes = [error, error.__cause__, getattr(error, "cause", None), getattr(error, "_base_exc", None)]
    return any(
        isinstance(cause, MemoryError)
        or type(cause).__name__ == "OutOfMemoryError"
        or (isinstance(cause, Exception) and not isinstance(cause, (ValueError, OSError)) and _says_so(str(cause)))
        for cause in causes
    )


def _says_so(text: str) -> bool:
    return any(words in text for words in _TEXTS)


@contextmanager
def memory_named(what: str, advice: str) -> Iterator[None]:
    """Turn an error of the block about memory into one sentence.

    Args:
        what: The work that needs memory, as in "the index stage".
        advice: What to do, as in "lower corpus.max_seconds".

    Raises:
        MemoryRanOutError: Memory ran out in the block.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (ValueError, OSError)) or not ran_out_of_memory(error):
            raise
        raise MemoryRanOutError(f"memory ran out in {what}; {advice}, or stop other work on this machine") from error
