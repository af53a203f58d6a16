"""Audio that a corpus has more than once: copies of files, links to them, or rows that name one file twice."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def duplicate_notes(hashes: Any, splits: Any, ids: Any) -> tuple[str, ...]:
    """Return a sentence about audio that occurs more than once, or nothing if none does.

    All copies are used: some corpora repeat audio on purpose, and which copy is meant can't be known. Audio that is in both splits
    makes the validation losses too low, so it is counted too.

    Args:
        hashes: Hash of the decoded audio of each utterance: a column of an Arrow table, or texts.
        splits: Split of each utterance, ``train`` or ``validation``.
        ids: ID of each utterance.
    """
    codes = pc.dictionary_encode(_texts(hashes)).combine_chunks().indices.to_numpy(zero_copy_only=False)
    counts = np.bincount(codes)
    rows = np.flatnonzero(counts[codes] > 1) if len(codes) else codes
    if not len(rows):
        return ()
    table = pa.table({"audio": codes[rows], "split": _texts(splits).take(rows), "id": _texts(ids).take(rows)})
    groups = table.group_by("audio").aggregate([("split", "count_distinct"), ("id", "min")])
    copies, crossing = len(rows) - len(groups), pc.sum(pc.greater(groups["split_count_distinct"], 1)).as_py()
    audio = groups.sort_by("id_min")["audio"][0]
    one, other = sorted(table.filter(pc.equal(table["audio"], audio))["id"].to_pylist())[:2]
    leak = ""
    if crossing:
        leak = (
            f"; the audio of {crossing:,} is in both the train and the validation split, so the validation loss is lower than on "
            "new audio"
        )
    return (
        f"{f'{copies:,} utterances have' if copies > 1 else '1 utterance has'} the same audio as another one, such as {one} and "
        f"{other}, and all are used{leak}; remove links and copies that are not meant",
    )


def _texts(column: Any) -> Any:
    """Return a column as one of texts, for which Arrow can group and compare."""
    plain = column if isinstance(column, (pa.Array, pa.ChunkedArray)) else pa.array(column, pa.large_string())
    return pa.chunked_array([plain] if isinstance(plain, pa.Array) else plain.chunks, plain.type).cast(
        pa.large_string()
    )
