"""The decoding of many sources: by threads of this process, or by tasks on all nodes of Ray."""

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_distill.pipeline.corpus.decoded_sources import RESULTS, Row, rows_of, table_of
from ray_distill.pipeline.corpus.decoding import Limits, decode
from ray_distill.pipeline.corpus.found import FoundFile

Source = tuple[bytes, FoundFile]
"""Key and entry of a source."""
Decode = Callable[[Sequence[Source], Limits], Iterator[pa.Table]]
"""Function that decodes sources and yields their results, with the schema RESULTS. A table has all results of its sources."""

_WAITING = 16
"""Number of sources per thread that are decoded or wait for it."""
_PER_TASK = 100
"""Number of sources of a task of Ray, about two seconds of work."""
_AT_ONCE = 200_000
"""Number of sources that are given to Ray at a time."""


def decode_here(sources: Sequence[Source], limits: Limits) -> Iterator[pa.Table]:
    """Decode sources in their order with threads, one for each table. Decoding and hashing release the GIL."""

    def work(source: Source) -> list[Row]:
        return rows_of(source[0], decode(source[1], limits))

    threads = os.cpu_count() or 1
    waiting: deque[Future[list[Row]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for source in sources:
                waiting.append(pool.submit(work, source))
                if len(waiting) >= _WAITING * threads:
                    yield table_of(waiting.popleft().result())
            while waiting:
                yield table_of(waiting.popleft().result())
        finally:
            pool.shutdown(cancel_futures=True)


def decode_on_ray(sources: Sequence[Source], limits: Limits) -> Iterator[pa.Table]:
    """Decode sources with Ray Data, one task per core of each node. Tables come as they are finished. Ray must be initialised.

    Raises:
        ValueError: A file that exists here is missing on another node, or a task failed too often.
    """
    import ray.data
    import ray.exceptions

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    def work(batch: pa.Table) -> pa.Table:
        members: list[Source] = pickle.loads(batch["sources"][0].as_py())  # Written below.
        return table_of([row for key, entry in members for row in rows_of(key, decode(entry, limits))])

    for begin in range(0, len(sources), _AT_ONCE):
        wave = sources[begin : begin + _AT_ONCE]
        tasks: list[dict[str, Any]] = [
            {"sources": pickle.dumps(wave[first : first + _PER_TASK])} for first in range(0, len(wave), _PER_TASK)
        ]
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
        decoded = dataset.map_batches(work, batch_size=1, batch_format="pyarrow", num_cpus=1)
        try:
            for rows in decoded.iter_batches(batch_size=None, batch_format="pyarrow"):
                _check_reachable(rows)
                yield rows.cast(RESULTS)
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            line = lines[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0]
            raise ValueError(
                f"the index stage stopped because a worker failed ({line}); what was decoded is kept: remove the cause, and run the "
                "same command again"
            ) from error


def _check_reachable(rows: pa.Table) -> None:
    """Raise ValueError if a file that a node lacks exists here."""
    for row in rows.filter(pc.equal(rows["reason"], "missing")).select(["path"]).to_pylist():
        path = os.fsdecode(row["path"])
        if os.path.isfile(path):  # noqa: PTH113 (Path.is_file raises if a parent folder can't be searched)
            raise ValueError(
                f"{path} exists here, but not on all nodes of the cluster; put the corpus on storage that all nodes reach under the "
                "same path"
            )
