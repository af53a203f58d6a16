"""The passes of every kind of teacher on PyTorch's fake tensors of a GPU: devices, types and warnings."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torchaudio.models.wav2vec2.wavlm_attention import WavLMSelfAttention

from ray_distill.student.student_teacher import StudentTeacher
from ray_distill.teacher_cache import spectrograms
from ray_distill.teacher_cache.precision import Precision, autocast
from ray_distill.teacher_cache.teachers import Teacher, load_teacher
from ray_distill.teacher_cache.teachers.wav2vec2 import Wav2Vec2Teacher, _position_bias

from ...fake_gpu import GPU, fake_gpu
from .test_teacher_promises import KINDS, sound


def passes(teacher: Teacher, precision: Precision, *, masked: bool) -> list[Tensor]:
    """Return the layers of a padded batch on a fake GPU. What reads values reads those of this batch."""
    (waveform,) = sound(teacher, 9_000)
    samples = len(waveform)
    frames = teacher.num_frames(samples)
    teacher.device = GPU
    with fake_gpu() as mode, pytest.MonkeyPatch.context() as patch:
        teacher.model.to(GPU)
        patch.setattr(FakeTensor, "__bool__", lambda _: False, raising=False)  # Some rows are shorter.
        patch.setattr(FakeTensor, "__int__", lambda _: frames, raising=False)
        patch.setattr(FakeTensor, "tolist", lambda _: [samples, samples - 2_000])
        patch.setattr(spectrograms, "_whisper_banks", lambda bands: torch.zeros(201, bands))
        patch.setattr(spectrograms, "_kaldi_banks", lambda bands: torch.zeros(257, bands))
        with mode, torch.inference_mode(), autocast(GPU, precision):
            if teacher._mask_embedding is not None:
                teacher._mask_embedding = torch.zeros(teacher._mask_embedding.shape, device=GPU)
            waveforms = torch.zeros(2, samples, device=GPU)
            mask = torch.zeros(2, frames, dtype=torch.bool, device=GPU) if masked else None
            found = list(teacher.layer_outputs(waveforms, torch.zeros(2, dtype=torch.int64, device=GPU), mask))
    assert {tuple(layer.shape) for layer in found} == {(2, frames, teacher.dim)}
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_passes_stay_on_the_gpu(kind: str, precision: Precision, tmp_path: Path) -> None:
    spec = KINDS[kind](tmp_path)
    for masked in (False, True) if load_teacher(spec).has_mask_embedding else (False,):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Support for mismatched")
            layers = passes(load_teacher(spec), precision, masked=masked)
        assert {layer.device for layer in layers} == {GPU}


def test_the_mean_of_a_student_replaces_masked_frames_on_a_gpu(tmp_path: Path) -> None:
    """Exports have no mask embedding."""
    teacher = load_teacher(KINDS["student"](tmp_path))
    assert isinstance(teacher, StudentTeacher)
    teacher._mask_embedding, teacher.mean_mask = None, True
    assert {layer.device for layer in passes(teacher, "fp32", masked=True)} == {GPU}


def test_wavlms_bias_is_torchaudios_without_its_work_on_the_cpu(tmp_path: Path) -> None:
    teacher = load_teacher(KINDS["wavlm"](tmp_path))
    assert isinstance(teacher, Wav2Vec2Teacher)
    attention = teacher._layers[0].attention
    assert isinstance(attention, WavLMSelfAttention)
    with torch.no_grad():
        for frames in (1, 2, 3, 700, 1_300):  # The distances are clipped at 800.
            found = _position_bias(attention, frames, torch.device("cpu"))
            assert torch.equal(found[0], attention.compute_bias(frames, frames))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "compute_bias", lambda *_: pytest.fail("the GPU would wait for the CPU"))
        passes(teacher, "fp16", masked=False)
