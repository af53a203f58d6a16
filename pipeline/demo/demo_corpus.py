"""The demo's corpus: a fixed list of sentences, synthesised by espeak-ng in several voices, with the phone of each frame."""

import csv
import shutil
from itertools import count
from pathlib import Path

import soundfile

from ray_distill.pipeline.demo.synthesiser import Synthesiser, Voice
from ray_distill.pipeline.probing.task import NO_LABEL, PHONES_FILE
from ray_distill.teacher_cache.frames import SAMPLE_RATE

_TEXTS = Path(__file__).with_name("demo_sentences.txt")

# The variants f2, f3 and f5 are excluded: espeak-ng gives them breath noise that differs between processes.
VOICES = {
    "train-demo": (
        Voice("en-us+m3", 165, 45),
        Voice("en-gb-x-rp+f1", 150, 55),
        Voice("en-gb-scotland+m7", 175, 40),
        Voice("en-029+Annie", 160, 60),
        Voice("en-us-nyc+steph", 185, 50),
        Voice("en-gb-x-gbclan+m1", 145, 35),
        Voice("en-us+Andy", 155, 65),
        Voice("en-gb-x-rp+Mario", 170, 30),
    ),
    "dev-demo": (
        Voice("en-gb-x-rp+m4", 155, 50),
        Voice("en-us+f4", 170, 58),
        Voice("en-gb-x-gbcwmd+anika", 160, 45),
        Voice("en-gb-scotland+linda", 180, 52),
    ),
}
"""Speakers of each split. The teacher of the demo was trained without the variants of ``dev-demo`` and without en-gb-x-gbcwmd."""


def make_demo_corpus(folder: Path, minutes: float = 9.0) -> Path:
    """Synthesise the demo's corpus, unless the folder contains it already.

    The corpus is 16 kHz 16-bit FLAC in LibriSpeech's layout, with the splits ``train-demo`` and ``dev-demo``. Voices, speeds
    and pitches differ, and the two splits have different voices. ``phones.csv`` has the phone of each frame of 20 ms. The first
    call in a process gives equal files for equal arguments; later calls may not, since espeak-ng keeps state between utterances.

    Args:
        folder: Folder of the corpus. Files that an interrupted call left in the two splits are replaced.
        minutes: Approximate length of the speech in both splits together. Default: 9.

    Returns:
        ``folder``.

    Raises:
        ValueError: espeakng-loader is not installed or does not work.
    """
    done = folder / f".complete-2-{minutes:g}-minutes"
    if done.is_file():
        return folder
    for split in VOICES:
        shutil.rmtree(folder / split, ignore_errors=True)
    for stale in folder.glob(".complete-*"):
        stale.unlink()
    texts = _TEXTS.read_text(encoding="utf-8").splitlines()
    synthesiser = Synthesiser()
    rows = []
    voices = [(split, voice) for split, members in VOICES.items() for voice in members]
    for number, (split, voice) in enumerate(voices):
        samples = 0
        chapter = folder / split / str(number) / "0"
        chapter.mkdir(parents=True)
        for n in count():
            # Voices start at different sentences, so that a short corpus still contains all of them.
            speech = synthesiser.speak(texts[(n + number * 5) % len(texts)], voice)
            file = chapter / f"{number}-0-{n:04d}.flac"
            soundfile.write(file, speech.waveform, SAMPLE_RATE, subtype="PCM_16")
            labels = " ".join(phone or NO_LABEL for phone in speech.frame_phones())
            rows.append((file.relative_to(folder).as_posix(), labels, "train" if split == "train-demo" else "test"))
            samples += len(speech.waveform)
            if samples >= minutes * 60 * SAMPLE_RATE / len(voices):
                break
    with (folder / PHONES_FILE).open("w", newline="", encoding="utf-8") as manifest:
        csv.writer(manifest).writerows([("path", "frame_labels", "split"), *rows])
    done.touch()
    return folder
