"""Probes of real speech: phones, characters and speakers."""

import csv
from collections import Counter
from pathlib import Path

from benchmarks.small_speech import HELD_OUT, TRAIN, shared_data, utterances
from benchmarks.teacher.quality import write_real_manifest


def phones() -> dict[str, str]:
    """Return the phones of each utterance without silence and noise."""
    found = {}
    for line in (shared_data() / "speech" / "phones.tsv").read_text().splitlines()[1:]:
        name, *segments = line.split()
        names = (segment.split(":")[0] for segment in segments)
        found[name] = " ".join(phone for phone in names if phone != "SIL" and not phone.startswith("+"))
    return found


def transcripts() -> dict[str, str]:
    """Return the words of each utterance."""
    lines = (
        line
        for path in (shared_data() / "speech" / "LibriSpeech").rglob("*.trans.txt")
        for line in path.read_text().splitlines()
    )
    return {name: text for name, _, text in (line.partition(" ") for line in lines)}


def write_manifest(path: Path, task: str, seconds: float) -> None:
    """Write the manifest of a task, with at most ``seconds`` of audio per split.

    Args:
        path: File to write.
        task: ``phones`` for the phone of each frame, ``phone sequences`` for sequences (units ``words``), ``characters`` or
            ``speakers``.
        seconds: Limit of the audio of each split.
    """
    if task == "phones":
        write_real_manifest(path, seconds)
        return
    texts = {"phone sequences": phones, "characters": transcripts, "speakers": dict}[task]()
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        if task == "speakers":
            rows.writerow(["path", "label", "split"])
            seen: Counter[str] = Counter()
            for u in utterances(TRAIN, seconds):  # The held-out speakers are not in the training set.
                speaker = u.id.split("-")[0]
                seen[speaker] += 1
                rows.writerow([u.path, speaker, "train" if seen[speaker] % 4 else "test"])
            return
        rows.writerow(["path", "transcript", "split"])
        for split, name in ((TRAIN, "train"), (HELD_OUT, "test")):
            # A few utterances have no alignment.
            rows.writerows([u.path, texts[u.id], name] for u in utterances(split, seconds) if texts.get(u.id))
