"""Resident memory of processes.

``ru_maxrss`` is not usable, since it includes the parent's memory from before this program started.
"""

from pathlib import Path


def resident_bytes(process: int | str = "self") -> int:
    """Return the current resident memory of this process, or of another one."""
    return _status("VmRSS", process)


def peak_resident_bytes() -> int:
    """Return the peak resident memory since `forget_peak`, or since this program started."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Reset the peak to the current resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str, process: int | str = "self") -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
