"""Real speech, and a student in proportion to a small teacher, for the benchmarks of quality.

Speech (a part of Mini LibriSpeech, about an hour) and trained teachers are in a folder beside the repository or at ``SHARED_DATA``.
"""

import hashlib
import os
from pathlib import Path

from benchmarks.result_file import REPOSITORY
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.storage.shard_plan import Utterance

TRAIN, HELD_OUT = "train-clean-5", "heldout-clean-5"


def shared_data() -> Path:
    """Return the folder with speech and teachers; exit with the reason if it does not exist."""
    folder = Path(os.environ.get("SHARED_DATA", REPOSITORY.parent / "shared"))
    if not (folder / "speech").is_dir():
        raise SystemExit(
            f"this benchmark needs real speech and trained teachers, which are not in {folder}; set SHARED_DATA to their folder"
        )
    return folder


def whisper_folder(given: str = "") -> Path:
    """Return the folder with Whisper-small; exit with the reason if it does not exist."""
    folder = Path(given) if given else shared_data().parent / "whisper-small"
    if not (folder / "model.safetensors").is_file():
        raise SystemExit(
            f"{folder} has no Whisper-small; create it with get_whisper_small.py and pass its folder as --whisper"
        )
    return folder


def utterances(name: str, seconds: float = float("inf")) -> list[Utterance]:
    """Return utterances of TRAIN or HELD_OUT, evenly over speakers: at least one, at most ``seconds`` of audio."""
    files = sorted((shared_data() / "speech" / "LibriSpeech" / name).rglob("*.flac"))
    files.sort(key=lambda path: hashlib.sha256(path.stem.encode()).digest())
    split = "train" if name == TRAIN else "validation"
    found: list[Utterance] = []
    total = 0.0
    for path in files:
        waveform = load_audio(path)
        total += len(waveform) / SAMPLE_RATE
        if found and total > seconds:
            break
        digest = hashlib.sha256(waveform.tobytes()).hexdigest()
        found.append(Utterance(path.stem, str(path), len(waveform), split, digest))
    return found


def small_student(layers: int, dim: int, width: int = 96) -> StudentConfig:
    """Return a small ARMHuBERT-S: ``layers`` layers, every second map reused, for a teacher of width ``dim``."""
    return StudentConfig(
        conv_layers=((32, 10, 5), *((48, 3, 2),) * 4, *((64, 2, 2),) * 2),
        encoder_layers=layers,
        encoder_embed_dim=width,
        encoder_ffn_embed_dim=2 * width,
        encoder_attention_heads=4,
        conv_pos=64,
        conv_pos_groups=8,
        attention_reuse="alternate",
        target_dim=dim,
    )
