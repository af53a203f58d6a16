"""Ray as a run uses it: the cluster to connect to, its resources, and its log."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray_distill
from ray_distill.pipeline.config import ConfigError

_STARTS = 3
"""Attempts to start a local Ray, each of which Ray gives up after 30 s."""


def init_ray() -> None:
    """Connect to the cluster of a submitted job, or start a local Ray for this process. Do nothing if Ray is initialised.

    Raises:
        OSError: The machine is too busy for a local Ray to start.
    """
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The workers of a local Ray must be able to import this package. A submitted job ships it.
    root = str(Path(ray_distill.__file__).resolve().parents[1])
    paths = os.environ.get("PYTHONPATH", "")
    if root not in paths.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, paths]))
    for attempt in range(1, _STARTS + 1):
        try:
            ray.init(
                # Only a submitted job connects to a cluster. Without an address, Ray would join any that runs on this machine.
                address="local" if owns_ray() else os.environ["RAY_ADDRESS"],
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"], "OMP_NUM_THREADS": "1"}},
            )
        except Exception as error:  # Ray has no exception type of its own for a start that timed out.
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if attempt == _STARTS:
                raise OSError(
                    f"Ray did not start within 30 s in {_STARTS} attempts, because this machine is busy; try again later"
                ) from error
        else:
            return


def owns_ray() -> bool:
    """Return whether Ray is a local one of this process, which no other machine can join."""
    return os.environ.get("RAY_ADDRESS", "local") == "local"


def node_resources() -> list[dict[str, float]]:
    """Return the total resources of each live node of Ray: ``CPU``, ``GPU`` and others."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def describe_resources(nodes: Sequence[Mapping[str, float]]) -> str:
    """Return a sentence on the cores and GPUs of Ray's nodes."""
    cores, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"Ray has {counted(cores, 'core')} and {counted(gpus, 'GPU')} on {counted(len(nodes), 'machine')}"


def counted(number: float, noun: str) -> str:
    """Return a number with its noun: ``1 core``, ``2 cores``."""
    return f"{number:.12g} {noun}{'' if number == 1 else 's'}"


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

    This redirects the file descriptor, which Ray's C++ code writes to as well.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    kept = os.dup(2)
    with log.open("a") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
