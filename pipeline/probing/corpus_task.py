"""Tasks whose labels a run's corpus brings: the characters of its transcripts, or its speakers."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from ray_distill.pipeline.corpus.index import CorpusIndex
from ray_distill.pipeline.corpus.labels import Label, read_labels
from ray_distill.pipeline.probing.task import Example, Task, make_task
from ray_distill.pipeline.run_folder import RunFolder
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.storage.shard_plan import Utterance

CorpusTask = Literal["characters", "speakers"]

_TEST_FRACTION = 0.2


def read_corpus_task(folder: Path, task: CorpusTask, hours: float) -> tuple[Task, str]:
    """Return a task with the labels of a run's corpus.

    For characters, the training split is that of the run, and its validation split is the test split. For speakers, a fifth of the
    utterances of each speaker is for testing, of both splits, and speakers with a single utterance are left out. Utterances are
    chosen by the hashes of their ids.

    Args:
        folder: Folder of a run whose index stage is finished.
        task: ``characters`` or ``speakers``.
        hours: Maximum duration of the utterances, in hours: four fifths for training and one fifth for testing.

    Returns:
        The task, and a digest of its audio and targets.

    Raises:
        ValueError: The run has no corpus index, or its corpus has no such labels in both splits.
    """
    corpus = RunFolder(folder.absolute()).corpus
    utterances = CorpusIndex.load(corpus).utterances
    labels = read_labels(corpus)
    labelled = [(u, labels[u.id]) for u in utterances if u.id in labels]
    labelled = [(u, label) for u, label in labelled if (label.text if task == "characters" else label.speaker)]
    if not labelled:
        raise ValueError(
            f"the corpus of {folder} brings no {'transcripts' if task == 'characters' else 'speakers'}; give a CSV manifest with the "
            f"columns path and {'transcript' if task == 'characters' else 'label'} instead of --task, or run the index stage again if "
            "an earlier version made the index"
        )
    labelled.sort(key=lambda item: hashlib.sha256(item[0].id.encode()).digest())
    if task == "characters":
        tested = {u.id for u, _ in labelled if u.split == "validation"}
    else:
        labelled, tested = _split_speakers(labelled)
    chosen = [
        *_at_most(((u, label) for u, label in labelled if u.id not in tested), hours * (1 - _TEST_FRACTION)),
        *_at_most(((u, label) for u, label in labelled if u.id in tested), hours * _TEST_FRACTION),
    ]
    if task == "speakers":  # The limit may have left a speaker without training utterances.
        known = {label.speaker for u, label in chosen if u.id not in tested}
        chosen = [(u, label) for u, label in chosen if label.speaker in known]
    chosen.sort(key=lambda item: item[0].id)
    examples = [
        Example(u.address, tuple(label.text) if task == "characters" else (label.speaker,), u.id in tested)
        for u, label in chosen
    ]
    digest = hashlib.sha256()
    for (u, _), example in zip(chosen, examples, strict=True):
        digest.update(json.dumps([u.id, u.sha256, example.target, example.test]).encode())
    kind: Literal["ctc", "class"] = "ctc" if task == "characters" else "class"
    return make_task(kind, examples, f"the corpus of {folder}"), digest.hexdigest()


def _split_speakers(labelled: list[tuple[Utterance, Label]]) -> tuple[list[tuple[Utterance, Label]], set[str]]:
    """Return the utterances of speakers with at least two, and the ids of those for testing."""
    of_speaker: dict[str, list[str]] = {}
    for utterance, label in labelled:
        of_speaker.setdefault(label.speaker, []).append(utterance.id)
    tested = {
        id for ids in of_speaker.values() if len(ids) > 1 for id in ids[: max(1, round(_TEST_FRACTION * len(ids)))]
    }
    return [(u, label) for u, label in labelled if len(of_speaker[label.speaker]) > 1], tested


def _at_most(labelled: Iterable[tuple[Utterance, Label]], hours: float) -> list[tuple[Utterance, Label]]:
    """Return the first utterances whose duration is at most a number of hours, but at least one."""
    chosen: list[tuple[Utterance, Label]] = []
    samples = 0
    for utterance, label in labelled:
        samples += utterance.num_samples
        if chosen and samples > hours * 3600 * SAMPLE_RATE:
            break
        chosen.append((utterance, label))
    return chosen
