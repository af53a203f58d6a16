"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal): what was interrupted, what the same command does then, and a prompt end."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import typer

SECONDS = 6.0
"""Longest time to release locks after a signal. Then the process ends without releasing them, and the kernel does."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_descriptions: list[Callable[[], str]] = []


class Interrupted(BaseException):
    """A signal that asked this process to stop. The message says what was interrupted.

    Attributes:
        exit_code: 130 after SIGINT, 143 after SIGTERM and 129 after SIGHUP, the codes that shells report for these signals.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number

    def leave(self) -> None:
        """Print the message, and end the process, whose locks are released."""
        with suppress(OSError):  # A closed terminal takes no text.
            typer.secho(str(self), err=True, fg="yellow")
            sys.stdout.flush()
            sys.stderr.flush()
        if "ray" in sys.modules:  # Ray's exit handlers wait for its workers, and have crashed. Its processes end here.
            os._exit(self.exit_code)
        sys.exit(self.exit_code)


@contextmanager
def described(describe: Callable[[], str]) -> Iterator[None]:
    """Let ``describe`` say what was interrupted, and what the same command does then, while the block runs."""
    _descriptions.append(describe)
    try:
        yield
    finally:
        _descriptions.remove(describe)


@contextmanager
def interruptible() -> Iterator[None]:
    """Stop the block at SIGINT, SIGTERM or SIGHUP. A second signal, or a clean-up longer than `SECONDS`, ends the process at once.

    Raises:
        Interrupted: A signal arrived. Inside the block it is a KeyboardInterrupt, which Ray passes on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopping: list[Interrupted] = []
    errors = os.dup(2)  # The block may redirect standard error.

    def end() -> None:
        with suppress(OSError):  # A closed terminal takes no text.
            os.write(errors, f"{stopping[0]}\n".encode())
        os._exit(stopping[0].exit_code)

    limit = threading.Timer(SECONDS, end)
    limit.daemon = True

    def stop(number: int, frame: FrameType | None) -> None:
        if stopping:
            end()
        stopping.append(Interrupted(number, _describe()))
        limit.start()
        raise KeyboardInterrupt

    # A shell starts background jobs with SIGINT ignored, and nohup jobs with SIGHUP ignored. They keep that.
    caught = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in caught}
    try:
        yield
    except BaseException:
        if not stopping:
            raise
    finally:
        limit.cancel()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if stopping and "ray" in sys.modules else handler)
        os.close(errors)
    if stopping:
        raise stopping[0]


@contextmanager
def kept_handlers() -> Iterator[None]:
    """Restore the handlers of `interruptible` after a block in which a library installs its own."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in _SIGNALS} if main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            if callable(handler) and handler is not signal.default_int_handler:
                signal.signal(number, handler)


def _describe() -> str:
    try:
        return _descriptions[-1]() if _descriptions else "interrupted"
    except Exception:  # The description may read a file that is being written.
        return "interrupted"
