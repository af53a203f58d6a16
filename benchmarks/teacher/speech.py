"""Hours of synthetic speech with phones, to train the demo's teacher on.

Texts are random: sentences from the words of ``words.txt``, and words that are invented from syllables of English. Each piece of
speech has a random voice of espeak-ng, rate and pitch. Most voices read with an accent of English, some with the rules of another
language, where sounds that English lacks have no label.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ray_distill.pipeline.demo.phones import PHONES
from ray_distill.pipeline.demo.synthesiser import Synthesiser, Voice
from ray_distill.teacher_cache.frames import SAMPLE_RATE

ENGLISH = ("en-us", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc", "en-gb-x-gbclan")
"""Accents of the training speech. The held-out voices of the demo include a further one, en-gb-x-gbcwmd."""
OTHERS = ("de", "nl", "sv", "it", "es", "pl", "fi", "ro", "cs")
"""Languages whose voices read the same texts."""
_VARIANTS = """
m1 m2 m3 m5 m6 m7 m8 f1 Alex Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mario Michael Mike Nguyen aunty
belinda boris ed gustave ian iven iven2 iven3 john kaukovalta max michel miguel norbert pablo paul pedro quincy rob robert shelby
steph travis zac marcelo antonio grandma grandpa
"""
VARIANTS = tuple(_VARIANTS.split())
"""Voices, without those with breath noise, which differs between processes, robots, effects, and the demo's validation voices."""


@dataclass(frozen=True)
class LabelledSpeech:
    """Pieces of speech, one after the other.

    Attributes:
        samples: (S,) int16 at 16 kHz.
        starts: (U + 1,) int64, first sample of each piece, then S.
        phones: U arrays of (T,) int16: index in `PHONES` of each frame, -1 where there is no label.
    """

    samples: np.ndarray
    starts: np.ndarray
    phones: list[np.ndarray]


class Texts:
    """Random texts.

    Args:
        rng: Source of randomness.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        lines = Path(__file__).with_name("words.txt").read_text(encoding="utf-8").splitlines()
        self._words = {kind: words.split() for kind, _, words in (line.partition(": ") for line in lines)}

    def text(self) -> str:
        """Return a sentence; a third of them consist of invented words."""
        sentence = self._invented() if self._rng.random() < 1 / 3 else self._sentence()
        return sentence[0].upper() + sentence[1:] + str(self._rng.choice([".", ".", "?", "!"]))

    def _pick(self, kind: str) -> str:
        return str(self._rng.choice(self._words[kind]))

    def _some(self, chance: float, kind: str) -> list[str]:
        return [self._pick(kind)] if self._rng.random() < chance else []

    def _thing(self) -> list[str]:
        if self._rng.random() < 0.15:
            return [self._pick("number"), *self._some(0.4, "adjective"), self._pick("noun") + "s"]
        determiner = self._pick("determiner")
        return [determiner, *self._some(0.6, "adjective"), self._pick("noun")]

    def _clause(self) -> list[str]:
        words = [*self._some(0.25, "time"), *self._thing(), self._pick("verb"), *self._thing()]
        if self._rng.random() < 0.5:
            words += [self._pick("place"), *self._thing()]
        return words + self._some(0.2, "time")

    def _sentence(self) -> str:
        words = self._clause()
        if self._rng.random() < 0.3:
            words[-1] += ","
            words += [self._pick("join"), *self._clause()]
        return " ".join(words)

    def _invented(self) -> str:
        words = []
        for _ in range(int(self._rng.integers(5, 11))):
            syllables = [self._pick("onset") + self._pick("nucleus") + self._pick("coda").strip("-")]
            if self._rng.random() < 0.5:
                syllables.append(self._pick("ending"))
            words.append("".join(syllables))
        return " ".join(words)


def synthesise(hours: float, seed: int, shortest: float = 8.5) -> LabelledSpeech:
    """Return random speech. Use it once per process: espeak-ng keeps state between calls.

    Args:
        hours: Length of all pieces together.
        seed: Seed of texts and voices.
        shortest: Length that each piece has at least, in seconds.
    """
    rng = np.random.default_rng(seed)
    texts, synthesiser = Texts(rng), Synthesiser()
    index = {phone: number for number, phone in enumerate(PHONES)} | {None: -1}
    pieces: list[np.ndarray] = []
    phones: list[np.ndarray] = []
    total = 0
    while total < hours * 3600 * SAMPLE_RATE:
        language = rng.choice(ENGLISH) if rng.random() < 0.8 else rng.choice(OTHERS)
        voice = Voice(f"{language}+{rng.choice(VARIANTS)}", int(rng.integers(120, 230)), int(rng.integers(15, 85)))
        # A fast voice speaks up to four words a second.
        words: list[str] = []
        while len(words) < shortest * voice.rate / 60 * 1.15:
            words += texts.text().split()
        speech = synthesiser.speak(" ".join(words), voice)
        if len(speech.waveform) < shortest * SAMPLE_RATE:
            continue
        pieces.append((speech.waveform * 32767).round().astype(np.int16))
        phones.append(np.array([index[phone] for phone in speech.frame_phones()], dtype=np.int16))
        total += len(pieces[-1])
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
    return LabelledSpeech(np.concatenate(pieces), starts, phones)
