"""Audio that a corpus has more than once: copies of files, links to them, or rows that name one file twice."""

from collections.abc import Sequence


def duplicate_notes(hashes: Sequence[str], splits: Sequence[str], ids: Sequence[str]) -> tuple[str, ...]:
    """Return a sentence about audio that occurs more than once, or nothing if none does.

    All copies are used: some corpora repeat audio on purpose, and which copy is meant can't be known. Audio that is in both splits
    makes the validation losses too low, so it is counted too.

    Args:
        hashes: Hash of the decoded audio of each utterance.
        splits: Split of each utterance, ``train`` or ``validation``.
        ids: ID of each utterance.
    """
    first: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    crossing: set[str] = set()
    for number, digest in enumerate(hashes):
        known = first.setdefault(digest, number)
        if known != number:
            pairs.append((known, number))
            if splits[known] != splits[number]:
                crossing.add(digest)
    if not pairs:
        return ()
    one, other = sorted(ids[number] for number in pairs[0])
    copies = "1 utterance has" if len(pairs) == 1 else f"{len(pairs):,} utterances have"
    leak = ""
    if crossing:
        leak = (
            f"; the audio of {len(crossing):,} is in both the train and the validation split, so the validation loss is lower than "
            "on new audio"
        )
    return (
        f"{copies} the same audio as another one, such as {one} and {other}, and all are used{leak}; remove links and copies that "
        "are not meant",
    )
