"""Pre-trained models that torchaudio downloads by name. They have no mask embedding."""

import torch
import torchaudio.pipelines
from torchaudio.models import Wav2Vec2Model

from ray_distill.teacher_cache.teachers.teacher import TeacherError
from ray_distill.teacher_cache.teachers.wav2vec2 import NORMALIZE_EPS, Wav2Vec2Teacher


def bundle_names() -> list[str]:
    """Return the sorted names of torchaudio's pre-trained HuBERT, WavLM and wav2vec 2.0 bundles, without fine-tuned ones."""
    return sorted(
        name
        for name, bundle in vars(torchaudio.pipelines).items()
        if isinstance(bundle, torchaudio.pipelines.Wav2Vec2Bundle)
        and not isinstance(bundle, torchaudio.pipelines.Wav2Vec2ASRBundle)
    )


def load_bundle(name: str, device: str | torch.device) -> Wav2Vec2Teacher:
    """Load a teacher from a torchaudio bundle. Its weights are downloaded once and stored in torch.hub's folder.

    Args:
        name: One of `bundle_names`, such as ``HUBERT_BASE``.
        device: Device on which the teacher computes.

    Raises:
        TeacherError: If the name is unknown or the weights can't be downloaded.
    """
    if name not in bundle_names():
        raise TeacherError(
            f"{name!r} is not a pre-trained bundle of torchaudio; these are: {', '.join(bundle_names())}"
        )
    bundle = getattr(torchaudio.pipelines, name)
    try:
        with torch.random.fork_rng(devices=[]):
            model = bundle.get_model()
    except (OSError, RuntimeError) as error:
        raise TeacherError(f"the weights of torchaudio's {name} can't be downloaded: {error}") from error
    # torchaudio wraps Large models in a module that normalises the batch as a whole. Ours normalises each utterance.
    normalize = not isinstance(model, Wav2Vec2Model)
    return Wav2Vec2Teacher(
        model.model if normalize else model,
        None,
        name=f"torchaudio:{name}",
        normalize_eps=NORMALIZE_EPS if normalize else None,
        device=device,
    )
