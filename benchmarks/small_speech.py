"""An hour of real speech and a student in proportion to a small teacher: what the quality benchmarks share.

Both come from a folder beside the repository (or at ``SHARED_DATA``) that holds a part of Mini LibriSpeech and trained teachers.
"""

import hashlib
import os
from pathlib import Path

from result_file import REPOSITORY

from ray_distill.student.model.student_config import StudentConfig
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.storage.shard_plan import Utterance

TRAIN, HELD_OUT = "train-clean-5", "heldout-clean-5"


def shared_data() -> Path:
    """The folder; SystemExit with the reason where it is absent."""
    folder = Path(os.environ.get("SHARED_DATA", REPOSITORY.parent / "shared"))
    if not (folder / "speech").is_dir():
        raise SystemExit(
            f"this benchmark needs real speech and trained teachers, which are not at {folder} (set SHARED_DATA)"
        )
    return folder


def whisper_folder(given: str = "") -> Path:
    """Where the shared data's script wrote Whisper-small; SystemExit where it did not."""
    folder = Path(given) if given else shared_data().parent / "whisper-small"
    if not (folder / "model.safetensors").is_file():
        raise SystemExit(
            f"there is no Whisper-small at {folder}; write it with get_whisper_small.py and give --whisper"
        )
    return folder


def utterances(name: str, seconds: float = float("inf")) -> list[Utterance]:
    """Utterances of TRAIN or HELD_OUT, at most ``seconds`` of them but at least one, evenly over speakers."""
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
    """ARMHuBERT-S in small: ``layers`` layers of ``width`` for a teacher of width ``dim``, every second map reused."""
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
