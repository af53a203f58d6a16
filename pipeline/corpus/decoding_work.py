"""The decoding of many sources: by threads of this process."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from ray_distill.pipeline.corpus.decoded_sources import Row, rows_of, table_of
from ray_distill.pipeline.corpus.decoding import Limits, decode
from ray_distill.pipeline.corpus.found import FoundFile

_WAITING = 16
"""Number of sources per thread that are decoded or wait for it."""


def decode_here(sources: Sequence[tuple[bytes, FoundFile]], limits: Limits) -> Iterator[pa.Table]:
    """Decode sources in their order. Decoding and hashing release the GIL.

    Args:
        sources: Keys and entries of the sources.
        limits: What is used of the audio.

    Yields:
        The results of one source each, with the schema RESULTS.
    """

    def work(source: tuple[bytes, FoundFile]) -> list[Row]:
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
