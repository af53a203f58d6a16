"""Teachers: a specification becomes a model whose hidden states can be cached."""

from collections.abc import Callable
from pathlib import Path

import torch

from ray_distill.teacher_cache.teachers.bundles import load_bundle
from ray_distill.teacher_cache.teachers.fairseq import load_fairseq
from ray_distill.teacher_cache.teachers.huggingface import KINDS, load_huggingface
from ray_distill.teacher_cache.teachers.huggingface_folder import Folder
from ray_distill.teacher_cache.teachers.random_weights import load_random
from ray_distill.teacher_cache.teachers.spectrogram_transformer import load_spectrogram_transformer
from ray_distill.teacher_cache.teachers.teacher import Teacher, TeacherError
from ray_distill.teacher_cache.teachers.wavlm import is_wavlm, load_wavlm
from ray_distill.teacher_cache.teachers.whisper import load_whisper
from ray_distill.teacher_cache.untrusted import load_untrusted

__all__ = ["FOLDERS", "Teacher", "TeacherError", "load_teacher", "split_options"]

_OPTIONS = ("mean-mask:", "layer-norm:")

FOLDERS: dict[str, Callable[[Folder, str | torch.device], Teacher]] = {
    **dict.fromkeys(KINDS, load_huggingface),
    "whisper": load_whisper,
    "audio-spectrogram-transformer": load_spectrogram_transformer,
}
"""By ``model_type``, what reads a Hugging Face folder."""


def load_teacher(spec: str, device: str | torch.device = "cpu") -> Teacher:
    """A frozen teacher, ready to use.

    Nothing in a checkpoint is executed, and neither fairseq nor transformers is needed.

    Args:
        spec: path of a fairseq checkpoint (pre-trained HuBERT or wav2vec 2.0) or of WavLM's own; path of a Hugging
            Face folder (config.json, model.safetensors) of a kind in FOLDERS; ``torchaudio:NAME`` of a torchaudio bundle,
            such as ``torchaudio:HUBERT_BASE``; or ``random:LAYERSxDIM``, a HuBERT with seeded random weights. Options
            stand before it: ``mean-mask:`` puts the mean over an utterance's frames at masked ones, for a teacher without a
            mask embedding; ``layer-norm:`` normalises each frame of each layer's output (see `Teacher`).
        device: where it computes; default the CPU.

    Raises:
        TeacherError: there is no such teacher, or it is of an unsupported kind.
        UntrustedCheckpointError: the checkpoint is damaged, or names something that could run code. Both are
            ``ValueError``s of one sentence.

    Example:
        >>> load_teacher("random:4x96").dim
        96
    """
    options, spec = split_options(spec)
    teacher = _load(spec, device)
    teacher.name = options + teacher.name
    teacher.layer_norm = "layer-norm:" in options
    if "mean-mask:" in options:
        if teacher.has_mask_embedding:
            raise TeacherError(f"{teacher.name} has a mask embedding, so it needs no stand-in; leave mean-mask: out")
        teacher.mean_mask = True
    return teacher


def split_options(spec: str) -> tuple[str, str]:
    """The options that a specification begins with, such as ``layer-norm:mean-mask:``, and what they are of."""
    options = ""
    while found := next((option for option in _OPTIONS if spec.startswith(option)), None):
        options, spec = options + found, spec.removeprefix(found)
    return options, spec


def _load(spec: str, device: str | torch.device) -> Teacher:
    kind, separator, rest = spec.partition(":")
    if separator and kind == "torchaudio":
        return load_bundle(rest, device)
    if separator and kind == "random":
        return load_random(rest, device)
    path = Path(spec).expanduser()
    if path.is_dir():
        folder = Folder(path)
        if folder.kind not in FOLDERS:
            raise TeacherError(
                f"{path} holds a model of type {folder.kind!r}, but one of {', '.join(FOLDERS)} is needed"
            )
        return FOLDERS[folder.kind](folder, device)
    if not path.is_file():
        raise TeacherError(
            f"there is no teacher {spec!r}: give the path of a checkpoint or of a Hugging Face folder, "
            "torchaudio:NAME, or random:LAYERSxDIM"
        )
    checkpoint = load_untrusted(path)
    load = load_wavlm if is_wavlm(checkpoint) else load_fairseq
    return load(checkpoint, path.name, device)
