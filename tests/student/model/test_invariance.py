"""The features of an utterance, from the student and from the service, do not depend on its batch."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from fastapi.testclient import TestClient

from ray_distill.serve import create_app
from ray_distill.student import Student, StudentConfig
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.targets.target_batch import pad_waveforms

BASE = StudentConfig(
    conv_layers=((32, 10, 5), (32, 1, 1), (32, 3, 2), (32, 3, 2), (32, 3, 2), (32, 3, 2), (48, 2, 2), (48, 2, 2)),
    encoder_layers=4,
    encoder_embed_dim=48,
    encoder_ffn_embed_dim=96,
    encoder_attention_heads=4,
    conv_pos=32,
    conv_pos_groups=4,
    target_dim=64,
)
VARIANTS = {
    "paper": BASE,
    "released": BASE.model_copy(update={"reuse_behaviour": "released"}),
    "no reuse": BASE.model_copy(update={"attention_reuse": "none"}),
    "layer norm": BASE.model_copy(update={"conv_norm": "layer_norm"}),
}


def speech_like(seconds: list[float]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    waves = []
    for n, length in enumerate(seconds):
        time = np.arange(int(16_000 * length)) / 16_000
        tone = np.sin(2 * np.pi * (100 + 40 * n) * time) * (1 + np.sin(2 * np.pi * 4 * time))
        waves.append((0.2 * tone + 0.02 * rng.normal(size=len(time))).astype(np.float32))
    return waves


def real_speech(shared: Path) -> list[np.ndarray]:
    """Return waveforms of 0.1 s to 20 s: whole utterances, excerpts, and two utterances joined."""
    files = sorted((shared / "speech" / "LibriSpeech").rglob("*.flac"))
    first, second, third, fourth = (load_audio(files[i]) for i in (0, 40, 80, 120))
    joined = np.concatenate([first, second, third])[: 20 * 16_000]
    return [first[:1_600], second[4_000:12_000], third, fourth[: 3 * 16_000], joined]


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def check(student: Student, waves: list[np.ndarray]) -> None:
    alone = []
    for wave in waves:
        with torch.no_grad():
            out = student(torch.from_numpy(wave)[None], torch.tensor([len(wave)]))
        alone.append((out.hidden_states[0].numpy(), out.projections[0].numpy()))
    for order in (range(len(waves)), range(len(waves) - 1, -1, -1)):
        padded, lengths = pad_waveforms([waves[i] for i in order])
        # Padding may hold any values.
        padded = torch.nn.functional.pad(padded, (0, 777), value=0.5)
        with torch.no_grad():
            out = student(padded, lengths)
        for row, i in enumerate(order):
            frames = int(out.num_frames[row])
            assert frames == alone[i][0].shape[1]
            assert relative(out.hidden_states[row, :, :frames].numpy(), alone[i][0]) < 1e-4
            assert relative(out.projections[row, :, :frames].numpy(), alone[i][1]) < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_synthetic(variant: str) -> None:
    torch.manual_seed(0)
    check(Student(VARIANTS[variant]).eval(), speech_like([0.1, 0.5, 1.3, 4.0]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_real_speech(variant: str, shared: Path) -> None:
    torch.manual_seed(0)
    check(Student(VARIANTS[variant]).eval(), real_speech(shared))


def test_served_answers_on_real_speech(shared: Path) -> None:
    torch.manual_seed(0)
    student = Student(BASE).eval()
    waves = [np.round(wave * 32768).clip(-32768, 32767).astype(np.int16) for wave in real_speech(shared)]
    padded, lengths = pad_waveforms([wave.astype(np.float32) / 32768 for wave in waves])
    with torch.no_grad():
        batch, frames = student.encode(padded, lengths)
    with TestClient(create_app(student)) as client:
        for row, wave in enumerate(waves):
            body = io.BytesIO()
            soundfile.write(body, wave, 16_000, format="WAV", subtype="PCM_16")
            answer = client.post("/v1/features?layer=all&format=npy", content=body.getvalue())
            assert answer.status_code == 200, answer.text
            served = np.load(io.BytesIO(answer.content), allow_pickle=False)
            assert relative(served, batch[row, :, : int(frames[row])].numpy()) < 1e-4
