"""The demo's corpus: a fixed list of sentences, synthesised by espeak-ng in several voices."""

import ctypes
import os
import shutil
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio.functional

from ray_distill.teacher_cache.frames import SAMPLE_RATE

_TEXTS = Path(__file__).with_name("demo_sentences.txt")

# Constants from espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_PARAMETER_RATE, _PARAMETER_PITCH = 1, 3
_POSITION_CHARACTER = 1
_CHARS_UTF8 = 1


@dataclass(frozen=True)
class Voice:
    """A speaker.

    Attributes:
        split: Split of the corpus that contains the speaker.
        name: Language and variant of espeak-ng, joined by ``+``.
        rate: Words per minute.
        pitch: Pitch from 0 to 99.
    """

    split: str
    name: str
    rate: int
    pitch: int


# The variants f2, f3 and f5 are excluded: espeak-ng gives them breath noise that differs between processes.
VOICES = (
    Voice("train-demo", "en-us+m3", 165, 45),
    Voice("train-demo", "en-gb-x-rp+f1", 150, 55),
    Voice("train-demo", "en-gb-scotland+m7", 175, 40),
    Voice("train-demo", "en-029+f4", 160, 60),
    Voice("train-demo", "en-us-nyc+f4", 185, 50),
    Voice("train-demo", "en-gb-x-gbclan+m1", 145, 35),
    Voice("dev-demo", "en-gb-x-rp+m4", 155, 50),
    Voice("dev-demo", "en-gb-scotland+f4", 170, 58),
)


def make_demo_corpus(folder: Path, minutes: float = 6.0) -> Path:
    """Synthesise the demo's corpus, unless the folder contains it already.

    The corpus is 16 kHz 16-bit FLAC in LibriSpeech's layout, with the splits ``train-demo`` and ``dev-demo``. Voices, speeds
    and pitches differ, and the two splits have different voices. The first call in a process gives equal files for equal
    arguments; later calls may not, since espeak-ng keeps state between utterances.

    Args:
        folder: Folder of the corpus. Files that an interrupted call left in the two splits are replaced.
        minutes: Approximate length of the speech in both splits together. Default: 6.

    Returns:
        ``folder``.

    Raises:
        ValueError: espeakng-loader is not installed or does not work.
    """
    done = folder / f".complete-{minutes:g}-minutes"
    if done.is_file():
        return folder
    for split in {voice.split for voice in VOICES}:
        shutil.rmtree(folder / split, ignore_errors=True)
    for stale in folder.glob(".complete-*"):
        stale.unlink()
    texts = _TEXTS.read_text(encoding="utf-8").splitlines()
    synthesiser = _Synthesiser()
    for number, voice in enumerate(VOICES):
        samples = 0
        chapter = folder / voice.split / str(number) / "0"
        chapter.mkdir(parents=True)
        for n in count():
            # Voices start at different sentences, so that a short corpus still contains all of them.
            waveform = synthesiser.speak(texts[(n + number * 5) % len(texts)], voice)
            soundfile.write(chapter / f"{number}-0-{n:04d}.flac", waveform, SAMPLE_RATE, subtype="PCM_16")
            samples += len(waveform)
            if samples >= minutes * 60 * SAMPLE_RATE / len(VOICES):
                break
    done.touch()
    return folder


class _Synthesiser:
    """espeak-ng's shared library. It keeps its state in global variables, so use one instance per process."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise ValueError(
                "the demo corpus needs the package espeakng-loader; install the 'demo' extra (pip install '.[demo]'), or set "
                "CORPUS to a folder of speech"
            ) from error
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._rate = self._library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, os.fsencode(espeakng_loader.get_data_path()), 0
        )
        if self._rate <= 0:
            raise ValueError(
                f"espeak-ng does not start with the data in {espeakng_loader.get_data_path()}; reinstall espeakng-loader, or set "
                "CORPUS to a folder of speech"
            )
        self._blocks: list[np.ndarray] = []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        # Stored in an attribute, so that it is not freed while the library still calls it.
        self._callback = callback(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: "ctypes._Pointer[ctypes.c_short]", number: int, _events: int | None) -> int:
        if samples and number:
            self._blocks.append(np.ctypeslib.as_array(samples, (number,)).copy())
        return 0

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        """Return the synthesised text: (S,) float32 at 16 kHz in [-1, 1]."""
        self._blocks.clear()
        data = text.encode()
        library = self._library
        errors = [
            library.espeak_SetVoiceByName(voice.name.encode()),
            library.espeak_SetParameter(_PARAMETER_RATE, voice.rate, 0),
            library.espeak_SetParameter(_PARAMETER_PITCH, voice.pitch, 0),
            library.espeak_Synth(
                data, ctypes.c_size_t(len(data) + 1), 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None
            ),
            library.espeak_Synchronize(),
        ]
        assert not any(errors) and self._blocks, f"espeak-ng failed on {text!r} with {voice}: {errors}"
        spoken = torch.from_numpy(np.concatenate(self._blocks).astype(np.float32) / 32768)
        resampled = torchaudio.functional.resample(spoken, self._rate, SAMPLE_RATE)
        return np.asarray(resampled.clamp(-1, 1).numpy())
