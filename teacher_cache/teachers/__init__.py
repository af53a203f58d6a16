"""Loading of teachers from checkpoints, Hugging Face folders and names on the hub, torchaudio bundles and this package."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

from ray_distill.plugins import find_plugin, plugin_names
from ray_distill.teacher_cache.teachers.builtin import load_builtin
from ray_distill.teacher_cache.teachers.bundles import load_bundle
from ray_distill.teacher_cache.teachers.fairseq import is_distiller, load_distiller, load_fairseq
from ray_distill.teacher_cache.teachers.hub.hub_model import RemoteFolder, open_hub_model
from ray_distill.teacher_cache.teachers.hub.hub_name import HubName, parse_hub_name
from ray_distill.teacher_cache.teachers.huggingface import MODEL_TYPES, load_huggingface
from ray_distill.teacher_cache.teachers.huggingface_folder import STUDENT, HuggingFaceFolder
from ray_distill.teacher_cache.teachers.installed import TeacherPlugin
from ray_distill.teacher_cache.teachers.known import suggestion
from ray_distill.teacher_cache.teachers.random_weights import load_random
from ray_distill.teacher_cache.teachers.spectrogram_transformer import load_spectrogram_transformer
from ray_distill.teacher_cache.teachers.teacher import Teacher, TeacherError
from ray_distill.teacher_cache.teachers.wav2vec2_bert import load_wav2vec2_bert
from ray_distill.teacher_cache.teachers.wavlm import is_wavlm, load_wavlm
from ray_distill.teacher_cache.teachers.whisper import load_whisper
from ray_distill.teacher_cache.untrusted import load_untrusted

__all__ = [
    "HUGGINGFACE_LOADERS",
    "NAMED",
    "Teacher",
    "TeacherError",
    "check_supported",
    "is_path",
    "load_teacher",
    "open_folder",
    "resolve_teacher",
    "split_options",
    "teacher_of_package",
]

_OPTIONS = ("mean-mask:", "layer-norm:")

_STUDENT_LOADER = ("ray_distill.student.student_teacher", "load_student_teacher")
"""Module and function, by name as an entry point has them, since this package imports nothing of the student's."""


def _load_student(folder: HuggingFaceFolder, device: str | torch.device) -> Teacher:
    module, function = _STUDENT_LOADER
    teacher: Teacher = getattr(import_module(module), function)(folder, device)
    return teacher


HUGGINGFACE_LOADERS: dict[str, Callable[[HuggingFaceFolder, str | torch.device], Teacher]] = {
    **dict.fromkeys(MODEL_TYPES, load_huggingface),
    "wav2vec2-bert": load_wav2vec2_bert,
    "whisper": load_whisper,
    "audio-spectrogram-transformer": load_spectrogram_transformer,
    STUDENT: _load_student,
}
"""Loaders of Hugging Face folders by ``model_type``."""


_NAMED: dict[str, Callable[[str, str | torch.device], Teacher]] = {
    "torchaudio": load_bundle,
    "builtin": load_builtin,
    "random": load_random,
}

NAMED = (*_NAMED, "hf", *(option.removesuffix(":") for option in _OPTIONS))
"""Words before a colon that have a meaning of their own in a specification."""


def load_teacher(spec: str | Path, device: str | torch.device = "cpu") -> Teacher:
    """Load a frozen teacher.

    No code in a checkpoint is executed, and neither fairseq nor transformers is needed.

    Args:
        spec: One of: the path of a fairseq checkpoint (pre-trained HuBERT or wav2vec 2.0) or of a WavLM checkpoint; the path
            of a Hugging Face folder (config.json, model.safetensors) with a ``model_type`` in HUGGINGFACE_LOADERS; the folder of a
            run, or of a student of this project, exported or not; the name of a model on the hub, ``OWNER/NAME`` or
            ``OWNER/NAME@REVISION`` if there is no file or folder of that name, or ``hf://`` and such a name;
            ``torchaudio:NAME``, a torchaudio bundle such as ``torchaudio:HUBERT_BASE``; ``builtin:phone-hubert``, a small
            HuBERT in this package; ``random:LAYERSxDIM``, a HuBERT with seeded random weights; ``NAME:REST``, a teacher that an
            installed package adds (see `ray_distill.teacher_cache.teachers.installed`). It may begin with options:
            ``mean-mask:`` replaces masked frames by the mean of the utterance's frames, for a teacher without a mask
            embedding; ``layer-norm:`` normalises each frame of each layer's output (see `Teacher`).
        device: Device on which the teacher computes. Default the CPU.

    Raises:
        TeacherError: If the teacher does not exist or is of an unsupported kind.
        UntrustedCheckpointError: If the checkpoint is damaged or names something that could run code. Both errors are
            ``ValueError``s.

    Example:
        >>> load_teacher("random:4x96")
        Wav2Vec2Teacher('random:4x96', num_layers=4, dim=96, num_parameters=594,272, device='cpu')
    """
    options, spec = split_options(os.fspath(spec))
    teacher = _load(spec, device)
    teacher.name = options + teacher.name
    teacher.layer_norm = "layer-norm:" in options
    if "mean-mask:" in options:
        if teacher.has_mask_embedding:
            raise TeacherError(f"{teacher.name} has a mask embedding, so it needs no replacement; leave out mean-mask:")
        teacher.mean_mask = True
    return teacher


def split_options(spec: str) -> tuple[str, str]:
    """Split a specification into its options, such as ``layer-norm:mean-mask:``, and the rest."""
    options = ""
    while found := next((option for option in _OPTIONS if spec.startswith(option)), None):
        options, spec = options + found, spec.removeprefix(found)
    return options, spec


def teacher_of_package(spec: str) -> TeacherPlugin | None:
    """Return the teacher of another package that a specification without options names, without importing it. None if it is ours.

    An existing file or folder of that name comes first.

    Raises:
        PluginError: Two packages use the name.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or kind in NAMED or Path(spec).exists():
        return None
    plugin = find_plugin("teacher", kind)
    return None if plugin is None else TeacherPlugin(plugin, rest)


def is_path(spec: str) -> bool:
    """Return whether a specification without options names a file or folder, and not a model that is found by its name."""
    named = spec.startswith(tuple(f"{kind}:" for kind in _NAMED)) or teacher_of_package(spec) is not None
    return not named and parse_hub_name(spec) is None


def resolve_teacher(spec: str) -> str:
    """Return a specification that names the same teacher in every process of every node, now and later.

    A path becomes absolute, and a name on the hub becomes ``hf://OWNER/NAME@COMMIT``, for which the hub is asked unless the
    name has a whole commit.

    Raises:
        TeacherError: If the hub has no such model, or can't be reached and the model is not in its cache.
    """
    options, name = split_options(spec)
    if (other := teacher_of_package(name)) is not None:
        return options + other.resolved()
    if (found := parse_hub_name(name)) is not None:
        return options + str(found if found.is_commit else open_hub_model(found).name)
    path = Path(name).expanduser()
    return options + str(path.absolute()) if name and path.exists() else spec


def open_folder(path: Path) -> HuggingFaceFolder:
    """Return the Hugging Face folder at a path. The folder of a run stands for its exported student, which has the run's name."""
    run = not (path / "config.json").exists() and (path / "export" / "config.json").is_file()
    folder = path / "export" if run else path
    return HuggingFaceFolder(folder, folder.parent.name if folder.name == "export" else None)


def check_supported(folder: HuggingFaceFolder) -> None:
    """Raise TeacherError if the type of a Hugging Face folder's model or its sampling rate is not supported, or it is quantised."""
    if folder.model_type not in HUGGINGFACE_LOADERS:
        typed = "model_type" in folder.config
        what = f"has a model of type {folder.model_type!r}" if typed else "has a config.json without model_type"
        raise TeacherError(
            f"{folder.name} {what}; the supported types are {', '.join(HUGGINGFACE_LOADERS)}, and a package can add others "
            "(docs/how-to/extending.md)"
        )
    if quantised := folder.config.get("quantization_config"):
        method = quantised.get("quant_method", "") if isinstance(quantised, dict) else ""
        raise TeacherError(
            f"{folder.name} is quantised ({method or 'quantization_config'} in its config.json); use the original model"
        )
    _ = folder.preprocessor  # Its sampling rate is checked for every type.


def _load(spec: str, device: str | torch.device) -> Teacher:
    kind, separator, rest = spec.partition(":")
    if separator and kind in _NAMED:
        return _NAMED[kind](rest, device)
    if (other := teacher_of_package(spec)) is not None:
        return other.load(device)
    if (name := parse_hub_name(spec)) is not None:
        return _load_from_hub(name, device)
    path = Path(spec).expanduser()
    if spec and path.is_dir():  # An empty path would be the folder of the process.
        folder = open_folder(path)
        check_supported(folder)
        return HUGGINGFACE_LOADERS[folder.model_type](folder, device)
    if not path.is_file():
        raise TeacherError(
            f"there is no teacher {spec!r}{suggestion(spec)}; give the path of a checkpoint or of a Hugging Face folder, the name "
            "OWNER/NAME of a model on the Hugging Face Hub, torchaudio:NAME, builtin:NAME, or random:LAYERSxDIM"
            f"{''.join(f', or {name}:... of an installed package' for name in plugin_names('teacher'))}"
        )
    if path.suffix in (".safetensors", ".json") or (path.name.startswith("pytorch_model") and path.suffix == ".bin"):
        raise TeacherError(
            f"{path} is a part of a Hugging Face folder; give the folder, which must have config.json and the weights"
        )
    checkpoint = load_untrusted(path)
    load = load_wavlm if is_wavlm(checkpoint) else load_distiller if is_distiller(checkpoint) else load_fairseq
    return load(checkpoint, path.name, device)


def _load_from_hub(name: HubName, device: str | torch.device) -> Teacher:
    """Load a teacher from the hub. On the meta device, its weights are not downloaded if their header can be read alone.

    Raises:
        TeacherError: If it can't be downloaded or loaded, or on the meta device if its weights are neither in the hub's cache nor
            safetensors.
    """
    model = open_hub_model(name)
    folder = model.description
    check_supported(folder)  # Nothing more is downloaded of a model that is refused.
    if torch.device(device).type != "meta":
        model.download()
    elif model.missing and (shapes := model.shapes()) is not None:
        folder = RemoteFolder(model, shapes)
    return HUGGINGFACE_LOADERS[folder.model_type](folder, device)
