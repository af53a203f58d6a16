"""Ctrl-C, SIGTERM and SIGHUP: one sentence about what was interrupted, the exit code, and a prompt end, whatever the work does."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

STAGE = """
import signal, sys, time, typer
signal.signal(signal.SIGINT, signal.default_int_handler)  # A background job of a shell starts with SIGINT ignored.
from ray_distill import interruption
from ray_distill.command_line import Command
interruption.SECONDS = 1.0
app = typer.Typer(pretty_exceptions_enable=False)

@app.command(cls=Command)
def work(kind: str) -> None:
    with interruption.described(lambda: "interrupted in the fake stage"):
        try:
            if kind == "library":
                with interruption.kept_handlers():
                    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
            print("ready", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            if kind != "swallows":
                raise
        finally:
            if kind == "hangs":
                time.sleep(60)
            if kind == "fails":
                raise RuntimeError("in the clean-up")
app()
"""


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGINT, "plain"),
        (signal.SIGTERM, "plain"),
        (signal.SIGHUP, "plain"),
        (signal.SIGHUP, "hangs"),
        (signal.SIGTERM, "library"),
        (signal.SIGINT, "swallows"),
        (signal.SIGINT, "hangs"),
        (signal.SIGTERM, "fails"),
    ],
)
def test_a_signal_ends_a_command_with_one_sentence(number: signal.Signals, kind: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE, kind], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    started = time.monotonic()
    process.send_signal(number)
    rest, said = process.communicate(timeout=60)
    assert (process.returncode, rest, said) == (128 + number, "", "interrupted in the fake stage\n")
    assert time.monotonic() - started < 30  # The work sleeps for a minute.


@pytest.mark.parametrize("kind", ["plain", "hangs"])
def test_a_closed_terminal_ends_a_command(kind: str) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", STAGE, kind], os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert os.read(terminal, 100).strip() == b"ready"
    os.close(terminal)
    started = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert time.monotonic() - started < 30


def test_nohup_is_kept() -> None:
    started = ["nohup", sys.executable, "-c", STAGE, "plain"]
    process = subprocess.Popen(
        started, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
