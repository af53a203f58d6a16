"""Resident memory of this process. (``ru_maxrss`` won't do: it counts what the parent held before this program began.)"""

from pathlib import Path


def resident_bytes() -> int:
    """What is resident now."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most that was resident since `forget_peak`, or since this program began."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Sets the peak back to what is in use."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
