"""Ray as a run uses it: the cluster to connect to, its resources, and its log."""

import math
import os
import resource
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray_distill
from ray_distill.first_line import first_line
from ray_distill.interruption import kept_handlers
from ray_distill.pipeline.config import Config, ConfigError

_STARTS = 3
"""Attempts to start a local Ray, each of which Ray gives up after 30 s."""
_OPEN_FILES = 1024
"""Lowest limit of open files with which a local Ray starts reliably."""
_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
"""Longest path of a Unix socket, in bytes."""
_FREE_BYTES = 200e6
"""Smallest free space for the logs and spilled objects of a local Ray."""
_CONNECT_SECONDS = 10
"""Time in which the head node of a cluster must take a connection. Ray itself would try for minutes."""
_LAST_LINES = 10
"""Number of lines of Ray's log that are shown if Ray fails."""


class RayStartError(OSError):
    """Ray does not start, or its cluster can't be reached."""


def check_ray() -> None:
    """Check what Ray needs of this machine, before any work. Variables of Ray that are set but empty are unset.

    Raises:
        ConfigError: The limit of open files is too low, or the folder for Ray's temporary files has too long a path or too little
            space, or can't be written to.
        RayStartError: Nothing listens at RAY_ADDRESS.
    """
    for name in [name for name, value in os.environ.items() if not value]:
        if name == "TMPDIR" or name.startswith("RAY_"):
            del os.environ[name]
    if not owns_ray():
        _check_address(os.environ["RAY_ADDRESS"])
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # Ray raises the soft limit to the hard one by itself.
    if most != resource.RLIM_INFINITY and most < _OPEN_FILES:
        raise ConfigError(
            f"this process may open {most} files (ulimit -Hn), but Ray needs at least {_OPEN_FILES}; start it with a higher limit, as "
            "in `ulimit -n 65536`, or raise the limit in the scheduler's or container's settings"
        )
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "")
    folder = Path(os.environ.get(variable, "/tmp")).absolute()
    named = f"{variable}={folder}" if variable else f"Ray's temporary folder {folder}"
    advice = f"set RAY_TMPDIR to another folder{', such as RAY_TMPDIR=/tmp' if variable else ''}"
    excess = (
        len(os.fsencode(f"{folder}/ray/session_2026-01-31_12-00-00_123456_1234567/sockets/plasma_store")) - _SOCKET_PATH
    )
    if excess > 0:
        raise ConfigError(
            f"{named}: this path is {excess} characters too long for Ray's sockets, whose paths may have {_SOCKET_PATH}; {advice}"
        )
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{named}: Ray can't write to {there}; {advice}")
    free = shutil.disk_usage(there).free
    if free < _FREE_BYTES:
        raise ConfigError(
            f"{named}: {free / 1e6:.0f} MB are free, but Ray needs at least {_FREE_BYTES / 1e6:.0f} MB; free some space, or {advice}"
        )


def _check_address(address: str) -> None:
    """Raise RayStartError if an address such as ``10.0.0.1:6379`` takes no connection; other forms, as ``auto``, are left to Ray."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RayStartError(
            f"Ray can't be used at RAY_ADDRESS={address}: {reason}; start that cluster, correct the address, or unset RAY_ADDRESS "
            "to use this machine alone"
        ) from error


def init_ray() -> None:
    """Connect to the cluster of a submitted job, or start a local Ray for this process. Do nothing if Ray is initialised.

    Raises:
        ConfigError: This machine lacks something that Ray needs.
        RayStartError: Ray does not start, or the cluster can't be reached.
    """
    check_ray()
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The workers of a local Ray must be able to import this package. A submitted job ships it.
    root = str(Path(ray_distill.__file__).resolve().parents[1])
    paths = os.environ.get("PYTHONPATH", "")
    if root not in paths.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, paths]))
    _need_no_home()
    for attempt in range(1, _STARTS + 1):
        try:
            with kept_handlers():
                ray.init(
                    # Only a submitted job connects to a cluster. Without an address, Ray would join any that runs on this machine.
                    address="local" if owns_ray() else os.environ["RAY_ADDRESS"],
                    log_to_driver=False,
                    logging_level="ERROR",
                    runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"], "OMP_NUM_THREADS": "1"}},
                )
        except (Exception, SystemExit) as error:  # Ray has no exception type of its own for a failed start.
            ray.shutdown()
            if isinstance(error, SystemExit) and error.code == signal.SIGTERM:
                signal.raise_signal(signal.SIGTERM)  # It came while Ray's own handler was in place.
            if "timed out during startup" not in str(error):
                where = "" if owns_ray() else f" at RAY_ADDRESS={os.environ['RAY_ADDRESS']}"
                raise RayStartError(f"Ray can't be used{where}: {first_line(error)}") from error
            limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
            if limit != resource.RLIM_INFINITY:
                raise RayStartError(
                    f"Ray did not start within 30 s; files may have at most {limit / 1e6:.0f} MB here (ulimit -f), but Ray keeps its "
                    "objects in one file of a third of the memory, so start this with `ulimit -f unlimited`"
                ) from error
            if attempt == _STARTS:
                raise RayStartError(
                    f"Ray did not start within 30 s in {_STARTS} attempts, because this machine is busy; try again later"
                ) from error
        else:
            return


def _need_no_home() -> None:
    """Give a local Ray a token if it could not keep one in the home folder, which can't be written to in many containers."""
    home = next(folder for folder in (Path.home() / ".ray", *(Path.home() / ".ray").parents) if folder.exists())
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    if owns_ray() and not given and not os.access(home, os.W_OK | os.X_OK):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def owns_ray() -> bool:
    """Return whether Ray is a local one of this process, which no other machine can join."""
    return (os.environ.get("RAY_ADDRESS") or "local") == "local"


def node_resources() -> list[dict[str, float]]:
    """Return the total resources of each live node of Ray: ``CPU``, ``GPU`` and others."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def describe_resources(nodes: Sequence[Mapping[str, float]]) -> str:
    """Return a sentence on the cores and GPUs of Ray's nodes."""
    cores, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"Ray has {counted(cores, 'core')} and {counted(gpus, 'GPU')} on {counted(len(nodes), 'machine')}"


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: ``1 core``, ``2 cores``. The plural is the noun with an s unless it is given."""
    return f"{number:.12g} {noun if number == 1 else plural or f'{noun}s'}"


def count_fitting_workers(nodes: Sequence[Mapping[str, float]], cpus: int, gpus: float) -> int:
    """Return how many workers fit on Ray's nodes at the same time.

    Args:
        nodes: Resources of each node.
        cpus: Cores of each worker, all on one node.
        gpus: GPUs of each worker, all on one node. May be a fraction.
    """
    total = 0
    for node in nodes:
        by_cores = int(node.get("CPU", 0)) // cpus
        total += min(by_cores, int(node.get("GPU", 0) / gpus)) if gpus else by_cores
    return total


def missing_gpus(config: Config) -> str:
    """Say which GPUs a configuration needs and this machine lacks. Empty if it has them."""
    most = max(part.cache.gpus_per_actor for part in config.parts)
    wanted = {
        "the training": config.train.workers if config.train.use_gpu else 0,
        "a teacher of the cache": math.ceil(most) if config.train.targets == "cached" else 0,
    }
    if not any(wanted.values()):
        return ""
    import torch  # Slow to import, and this module starts commands.

    present = torch.cuda.device_count()
    lacking = [f"{who} needs {counted(count, 'GPU')}" for who, count in wanted.items() if count > present]
    return f"{' and '.join(lacking)}, but this machine has {present or 'none'}" if lacking else ""


def require_gpus(config: Config) -> None:
    """Check, before any work, that a local Ray has the GPUs that a configuration needs.

    Raises:
        ConfigError: This machine has too few, and no cluster is used.
    """
    if owns_ray() and (lacking := missing_gpus(config)):
        raise ConfigError(
            f"train.use_gpu, train.workers, cache.gpus_per_actor: {lacking}; submit the job to a cluster, or run on CPUs with "
            "train.use_gpu=false train.precision=fp32 cache.gpus_per_actor=0"
        )


def require_resources(keys: str, workers: int, cpus: int, gpus: float, say: Callable[[str], None]) -> None:
    """Check that a number of workers fits on Ray's nodes.

    On a cluster, which may still grow, workers that don't fit are only announced, and Ray waits for resources.

    Args:
        keys: Configuration keys that decide the workers' number and size, for the message.
        workers: Number of workers.
        cpus: Cores of each worker.
        gpus: GPUs of each worker.
        say: Called with a line for the user if the workers have to wait.

    Raises:
        ConfigError: The workers don't fit on a local Ray.
    """
    nodes = node_resources()
    if count_fitting_workers(nodes, cpus, gpus) >= workers:
        return
    each = counted(cpus, "core") + (f" and {counted(gpus, 'GPU')}" if gpus else "")
    needed = f"{workers} workers with {each} each are needed" if workers > 1 else f"a worker with {each} is needed"
    if owns_ray():
        raise ConfigError(
            f"{keys}: {needed}, but {describe_resources(nodes)} and can't grow; lower these values, or submit the job to a cluster"
        )
    say(f"wait    waiting for resources: {needed}; {describe_resources(nodes)}")


@contextmanager
def quiet_ray(log: Path) -> Iterator[None]:
    """Append standard error to a log while the block runs, because Ray's notices would bury the run's own output.

    This redirects the file descriptor, which Ray's C++ code writes to as well. If Ray fails, the last lines of the log are shown.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    kept = os.dup(2)
    with log.open("a") as file:
        start = file.tell()
        os.dup2(file.fileno(), 2)
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
        raise
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        if failure is not None and _is_of_ray(failure):
            lines = [line for line in log.read_bytes()[start:].decode(errors="replace").splitlines() if line.strip()]
            if lines:
                print(f"The last lines of {log}:", *lines[-_LAST_LINES:], sep="\n", file=sys.stderr, flush=True)


def _is_of_ray(error: BaseException) -> bool:
    """Return whether an error comes from Ray: it is one of Ray's own, wraps one, or ends the process."""
    causes = (error, error.__cause__)
    return any(
        isinstance(cause, (RayStartError, SystemExit)) or type(cause).__module__.partition(".")[0] == "ray"
        for cause in causes
    )
