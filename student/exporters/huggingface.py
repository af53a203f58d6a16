"""Export to a Hugging Face folder with feature extractor and model card, for ``AutoModel.from_pretrained``."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from ray_distill.student.exporters.origin import Origin, describe
from ray_distill.student.exporters.portable import SOURCES, Features, named_weights, portable_student
from ray_distill.student.model.student import Student
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.whole_files import filling

_HERE = Path(__file__).parent
_SOURCES = (*SOURCES, "huggingface_configuration.py", "huggingface_modeling.py")

_AUTO_MAP = {
    "AutoConfig": "huggingface_configuration.DistilledStudentConfig",
    "AutoModel": "huggingface_modeling.DistilledStudentModel",
    "AutoModelForCTC": "huggingface_modeling.DistilledStudentForCTC",
    "AutoModelForAudioClassification": "huggingface_modeling.DistilledStudentForSequenceClassification",
    "AutoModelForAudioFrameClassification": "huggingface_modeling.DistilledStudentForAudioFrameClassification",
}
# transformers' own pipeline of this task takes text.
_PIPELINES = {
    "feature-extraction": {
        "impl": "huggingface_modeling.DistilledStudentFeaturePipeline",
        "pt": ["AutoModel"],
        "type": "audio",
    }
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

A speech encoder distilled from {teacher}. It has {layers} Transformer layers of width {width}, one frame every {milliseconds:g} ms
and {parameters:,} parameters, {heads}.{reuse}

```python
from transformers import AutoFeatureExtractor, AutoModel

extractor = AutoFeatureExtractor.from_pretrained(FOLDER)
model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
inputs = extractor(waveforms, sampling_rate=16_000, padding=True, return_tensors="pt")
features = model(**inputs, output_hidden_states=True).hidden_states
```

{states}.

`AutoModelForCTC`, `AutoModelForAudioClassification` and `AutoModelForAudioFrameClassification` add an untrained linear head
on a learned weighted mean of all hidden states, or on the last one if `use_weighted_layer_sum` is false. Fine-tuning masks
frames as HuBERT's does (SpecAugment, `mask_time_prob`, `mask_feature_prob`; `apply_spec_augment=False` turns it off).

`pipeline("feature-extraction", model=FOLDER, trust_remote_code=True)` takes audio files and waveforms.

## Training

{origin}

The complete configuration of the run is in `config.json`, under `origin`.

## Limitations

- The input is 16 kHz mono audio in [-1, 1], not normalised, with at least {receptive_field} samples. Attention spans the whole
  utterance, so time and memory grow with the square of its length.
- The model was distilled on a limited amount of speech ({data}) and has the biases of its teacher. Other languages, channels
  and noise were not tested.
- The model outputs features, not text. Each task needs a trained head.
- The features of an utterance do not depend on the other utterances in its batch.
- Attention is computed by PyTorch (`attn_implementation` `sdpa` or `eager`). Layer drop, adapters and reentrant gradient
  checkpointing are refused, because layers reuse the attention maps of earlier layers.
"""


def export_huggingface(student: Student, folder: Path, origin: Origin, features: Features = "layers") -> None:
    """Write a folder for ``AutoModel.from_pretrained(folder, trust_remote_code=True)``. Writing does not need transformers.

    Args:
        student: Student to export.
        folder: New or empty folder.
        origin: Origin of the student, for ``config.json`` and the model card.
        features: Features that the model returns as ``hidden_states``. Default ``layers``.

    Raises:
        ValueError: the folder is not empty, or the student has options that exports do not support.
    """
    model = portable_student(student, features)
    with filling(folder) as written:
        tensors = {f"student.{name}": tensor for name, tensor in named_weights(model).items()}
        tensors["masked_spec_embed"] = student.mask_embedding.detach().contiguous()
        (written / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
        config: dict[str, Any] = {
            "architectures": ["DistilledStudentModel"],
            "auto_map": _AUTO_MAP,
            "model_type": "distilled_student",
            "dtype": "float32",
            "custom_pipelines": _PIPELINES,
            "hidden_size": model.width,
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
            (written / name).write_text(json.dumps(tree, indent=2) + "\n")
        for source in _SOURCES:
            (written / source).write_text((_HERE / source).read_text())
        reused = sum(model.config["reuses"])
        hours = origin.get("corpus_hours")
        card = _CARD.format(
            title=origin.get("run") or folder.name,
            teacher=origin.get("teacher") or "an unknown teacher",
            layers=len(model.layers),
            width=model.config["encoder_embed_dim"],
            heads="with its prediction heads"
            if features == "heads"
            else "without the prediction heads, which only distillation uses",
            states=f"`hidden_states` are the heads' predictions of {model.num_features} layers of the teacher, of width {model.width}"
            if features == "heads"
            else "`hidden_states[0]` is the encoder's input and `hidden_states[k]` the output of layer k",
            milliseconds=1000 * model.stride / SAMPLE_RATE,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            reuse=f" {reused} layers reuse the attention map of an earlier layer." if reused else "",
            origin="\n".join(f"- {line}" for line in describe(origin)) or "Unknown.",
            receptive_field=model.receptive_field,
            data=f"{hours} h, see `origin`" if hours is not None else "of unknown duration",
        )
        (written / "README.md").write_text(card)
