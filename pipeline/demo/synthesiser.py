"""Speech with phones and their times, synthesised by espeak-ng."""

import ctypes
import os
from dataclasses import dataclass

import numpy as np
import torch
import torchaudio.functional

from ray_distill.pipeline.demo.phones import label_of
from ray_distill.pipeline.probing.task import SILENCE
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, RECEPTIVE_FIELD, SAMPLE_RATE, num_frames

# Constants from espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS, _INITIALIZE_PHONEME_EVENTS = 2, 1
_PARAMETER_RATE, _PARAMETER_PITCH = 1, 3
_POSITION_CHARACTER = 1
_CHARS_UTF8 = 1
_EVENT_LIST_END, _EVENT_PHONEME = 0, 7


class _Event(ctypes.Structure):
    """``espeak_EVENT`` of speak_lib.h, with the union of identifiers as text."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


@dataclass(frozen=True)
class Voice:
    """A speaker.

    Attributes:
        name: Language and variant of espeak-ng, joined by ``+``.
        rate: Words per minute.
        pitch: Pitch from 0 to 99.
    """

    name: str
    rate: int
    pitch: int


@dataclass(frozen=True)
class Speech:
    """A synthesised text.

    Attributes:
        waveform: (S,) float32 at 16 kHz in [-1, 1].
        starts: (P,) int64, first sample of each phone, ascending.
        phones: P labels of `PHONES`; None for a sound that has none.
    """

    waveform: np.ndarray
    starts: np.ndarray
    phones: tuple[str | None, ...]

    def frame_phones(self) -> list[str | None]:
        """Return the phone at the centre of each of the T frames of a teacher. Before the first phone there is silence."""
        centres = np.arange(num_frames(len(self.waveform))) * FRAME_SAMPLES + RECEPTIVE_FIELD // 2
        places = np.searchsorted(self.starts, centres, side="right") - 1
        return [self.phones[place] if place >= 0 else SILENCE for place in places]


class Synthesiser:
    """espeak-ng's shared library. It keeps its state in global variables, so use one instance per process.

    The state includes the end of the previous utterance: speech depends slightly on what was spoken before. The same calls in a
    new process give the same speech.

    Raises:
        ValueError: espeakng-loader is not installed or does not work.
    """

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
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, os.fsencode(espeakng_loader.get_data_path()), _INITIALIZE_PHONEME_EVENTS
        )
        if self._rate <= 0:
            raise ValueError(
                f"espeak-ng does not start with the data in {espeakng_loader.get_data_path()}; reinstall espeakng-loader, or set "
                "CORPUS to a folder of speech"
            )
        self._blocks: list[np.ndarray] = []
        self._phones: list[tuple[int, str]] = []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
        # Stored in an attribute, so that it is not freed while the library still calls it.
        self._callback = callback(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(
        self, samples: "ctypes._Pointer[ctypes.c_short]", number: int, events: "ctypes._Pointer[_Event]"
    ) -> int:
        if samples and number:
            self._blocks.append(np.ctypeslib.as_array(samples, (number,)).copy())
        place = 0
        while events and events[place].type != _EVENT_LIST_END:
            if events[place].type == _EVENT_PHONEME:
                self._phones.append((events[place].sample, events[place].name.decode(errors="replace")))
            place += 1
        return 0

    def speak(self, text: str, voice: Voice) -> Speech:
        """Return a text as speech."""
        self._blocks.clear()
        self._phones.clear()
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
        # A change of language, such as "(en)", takes no time.
        phones = [(start, name) for start, name in self._phones if not name.startswith("(")]
        starts = np.array([start for start, _ in phones], dtype=np.int64) * SAMPLE_RATE // self._rate
        return Speech(resampled.clamp(-1, 1).numpy(), starts, tuple(label_of(name) for _, name in phones))
