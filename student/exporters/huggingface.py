"""A Hugging Face folder: ``AutoModel.from_pretrained(folder, trust_remote_code=True)``, with its feature extractor and card."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from ray_distill.student.exporters.origin import Origin, describe
from ray_distill.student.exporters.portable import portable_student, weights_of
from ray_distill.student.model.student import Student
from ray_distill.teacher_cache.frames import SAMPLE_RATE

_HERE = Path(__file__).parent
_SOURCES = ("portable_model.py", "huggingface_configuration.py", "huggingface_modeling.py")

_AUTO_MAP = {
    "AutoConfig": "huggingface_configuration.DistilledStudentConfig",
    "AutoModel": "huggingface_modeling.DistilledStudentModel",
    "AutoModelForCTC": "huggingface_modeling.DistilledStudentForCTC",
    "AutoModelForAudioClassification": "huggingface_modeling.DistilledStudentForSequenceClassification",
}

_CARD = """---
library_name: transformers
pipeline_tag: feature-extraction
tags:
- speech
- self-supervised
- distillation
---

# {title}

A speech encoder distilled from {teacher}: {layers} Transformer layers {width} wide, one frame every {milliseconds:g} ms,
{parameters:,} parameters (without the heads that only distillation needs).{reuse}

```python
from transformers import AutoFeatureExtractor, AutoModel

extractor = AutoFeatureExtractor.from_pretrained(FOLDER)
model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
inputs = extractor(waveforms, sampling_rate=16_000, padding=True, return_tensors="pt")
features = model(**inputs, output_hidden_states=True).hidden_states
```

`hidden_states` are the encoder's input and each layer's output. `AutoModelForCTC` and `AutoModelForAudioClassification`
add an untrained linear head, by default on a learnt weighted mean of all of them (`use_weighted_layer_sum`).

## Training

{origin}

The whole configuration is in `config.json`, under `origin`.

## Limits

- Input is 16 kHz mono in [-1, 1], not normalised, of at least {receptive_field} samples. Attention is over the
  whole utterance, so time and memory grow with the square of its length.
- It knows the speech it was distilled on ({data}) and has its teacher's biases; other languages, channels and noise were not tried.
- It gives features, not text: tasks need a head trained on them.
- An utterance's features don't depend on what it is batched with; attention maps and masked prediction are not exported.
"""


def export_huggingface(student: Student, folder: Path, origin: Origin) -> None:
    """Writes the folder. transformers is not needed for it.

    Args:
        student: to export.
        folder: new, or empty.
        origin: what the export says of itself.

    Raises:
        ValueError: a folder that holds files, or a student that exports don't support.
    """
    model = portable_student(student)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder")
    tensors = {f"student.{name}": tensor for name, tensor in weights_of(model).items()}
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    width: int = model.config["encoder_embed_dim"]
    config: dict[str, Any] = {
        "architectures": ["DistilledStudentModel"],
        "auto_map": _AUTO_MAP,
        "model_type": "distilled_student",
        "dtype": "float32",
        "hidden_size": width,
        "num_hidden_layers": len(model.layers),
        "student": model.config,
        "origin": origin,
    }
    extractor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "padding_side": "right",
        "padding_value": 0.0,
        "do_normalize": False,
        "return_attention_mask": True,
    }
    for name, tree in (("config.json", config), ("preprocessor_config.json", extractor)):
        (folder / name).write_text(json.dumps(tree, indent=2) + "\n")
    for source in _SOURCES:
        (folder / source).write_text((_HERE / source).read_text())
    reused = sum(model.config["reuses"])
    hours = origin.get("corpus_hours")
    card = _CARD.format(
        title=origin.get("run") or folder.name,
        teacher=origin.get("teacher") or "a teacher that is not known",
        layers=len(model.layers),
        width=width,
        milliseconds=1000 * model.stride / SAMPLE_RATE,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        reuse=f" {reused} layers reuse the attention map of an earlier one." if reused else "",
        origin="\n".join(f"- {line}" for line in describe(origin)) or "Not known.",
        receptive_field=model.receptive_field,
        data=f"{hours} h, see `origin`" if hours is not None else "not known",
    )
    (folder / "README.md").write_text(card)
