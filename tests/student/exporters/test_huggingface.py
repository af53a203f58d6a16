"""The Hugging Face folder loads with AutoModel, returns the student's features, and can be fine-tuned with the Trainer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_distill.student import Student, StudentConfig
from ray_distill.student.exporters.huggingface import export_huggingface

from .conftest import ORIGIN, waves

transformers = pytest.importorskip("transformers", reason="needs transformers (the dev extra has it)")
pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.slow
def test_auto_model_gives_our_features(exported: tuple[Student, Path]) -> None:
    student, folder = exported
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = extractor(waves(), sampling_rate=16_000, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        ours, frames = student.encode(inputs["input_values"], inputs["attention_mask"].sum(-1))
    assert len(output.hidden_states) == student.config.encoder_layers + 1
    assert torch.equal(model.frame_mask(inputs["attention_mask"]).sum(-1), frames)
    for row, count in enumerate(frames.tolist()):
        for layer, state in enumerate(output.hidden_states[1:]):
            torch.testing.assert_close(state[row, :count], ours[row, layer, :count], rtol=1e-5, atol=1e-5)
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
    with torch.no_grad():
        assert model(**inputs).hidden_states is None
        assert isinstance(model(**inputs, return_dict=False), tuple)


def test_save_and_load_again(exported: tuple[Student, Path], tmp_path: Path) -> None:
    _, folder = exported
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    wave = torch.from_numpy(waves()[0])[None]
    with torch.no_grad():
        assert torch.equal(model(wave).last_hidden_state, again(wave).last_hidden_state)
    assert again.config.origin["cache_fingerprint"] == "f00"


def test_mistakes_are_named(exported: tuple[Student, Path], tiny: StudentConfig) -> None:
    _, folder = exported
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with pytest.raises(ValueError, match="too short"):
        model(torch.zeros(1, 399))
    with pytest.raises(ValueError, match="pad on the right"):
        mask = torch.ones(1, 1000, dtype=torch.long)
        mask[0, 0] = 0
        model(torch.zeros(1, 1000), mask)
    with pytest.raises(ValueError, match="not empty"):
        export_huggingface(Student(tiny), folder, {})


class Utterances(torch.utils.data.Dataset):
    """A dataset of noise with labels for a task."""

    def __init__(self, labels: list[Any]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, n: int) -> dict[str, Any]:
        return {"input_values": waves()[n % 3], "labels": self.labels[n]}


def trained(model: Any, folder: Path, dataset: Utterances, output: Path) -> float:
    """Train two steps with the Trainer and return the loss."""
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = extractor([r["input_values"] for r in rows], sampling_rate=16_000, padding=True, return_tensors="pt")
        labels = [torch.as_tensor(row["labels"]) for row in rows]
        stacked = labels[0].ndim == 0
        padded = torch.stack(labels) if stacked else torch.nn.utils.rnn.pad_sequence(labels, True, -100)
        return {**inputs, "labels": padded}

    arguments = transformers.TrainingArguments(
        output_dir=str(output),
        max_steps=2,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate)
    return float(trainer.train().training_loss)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["AutoModelForCTC", "AutoModelForAudioClassification"])
def test_the_trainer_fine_tunes_it(exported: tuple[Student, Path], tmp_path: Path, task: str) -> None:
    _, folder = exported
    options: dict[str, Any] = {"vocab_size": 7} if task == "AutoModelForCTC" else {"num_labels": 2}
    model = getattr(transformers, task).from_pretrained(folder, trust_remote_code=True, **options)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    for name, parameter in base.named_parameters():
        assert torch.equal(before[f"distilled.{name}"], parameter)
    labels: list[Any] = [[1, 2, 3], [4, 5], [6]] if task == "AutoModelForCTC" else [0, 1, 1]
    loss = trained(model, folder, Utterances(labels), tmp_path / "trainer")
    assert 0 < loss < 1000
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter.cpu())]
    assert {"head.weight", "layer_weights", "distilled.student.layers.0.attention.query.weight"} <= set(changed)


def test_frozen_base(exported: tuple[Student, Path]) -> None:
    _, folder = exported
    model = transformers.AutoModelForCTC.from_pretrained(folder, trust_remote_code=True, vocab_size=7)
    model.freeze_base_model()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"layer_weights", "head.weight", "head.bias"}


@pytest.mark.parametrize("task", ["AutoModelForCTC", "AutoModelForAudioClassification"])
def test_heads_give_hidden_states_where_their_configuration_says_so(exported: tuple[Student, Path], task: str) -> None:
    student, folder = exported
    options = {"trust_remote_code": True, "output_hidden_states": True}
    model = getattr(transformers, task).from_pretrained(folder, **options).eval()
    wave = torch.from_numpy(waves()[1])[None]
    with torch.no_grad():
        assert len(model(wave).hidden_states) == student.config.encoder_layers + 1
        assert model(wave, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("time_reduction", [None, "conv1d"])
def test_speech_recognition_in_chunks_has_all_of_them(
    tmp_path: Path, tiny: StudentConfig, time_reduction: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "student"
    export_huggingface(Student(tiny.model_copy(update={"time_reduction": time_reduction})), folder, {})
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), bos_token=None, eos_token=None)
    recognise = transformers.pipeline(
        "automatic-speech-recognition",
        model=transformers.AutoModelForCTC.from_pretrained(folder, trust_remote_code=True, vocab_size=5),
        feature_extractor=transformers.AutoFeatureExtractor.from_pretrained(folder),
        tokenizer=tokenizer,
    )
    decoded: list[int] = []
    monkeypatch.setattr(recognise.tokenizer, "decode", lambda ids, **_: decoded.append(len(ids)) or "")
    recognise((0.1 * np.random.default_rng(0).normal(size=5 * 16_000)).astype(np.float32), chunk_length_s=1.2)
    # One frame at the end may be missing, because it would cover samples after the end.
    assert decoded == [pytest.approx(5 * 50, abs=2)]


def test_card_and_origin(exported: tuple[Student, Path]) -> None:
    student, folder = exported
    card = (folder / "README.md").read_text()
    for text in ("tiny run", "hubert_small.pt", "f00", "c0ffee", "0.96 h", "reuse the attention map"):
        assert text in card
    count = sum(p.numel() for n, p in student.named_parameters() if not n.startswith(("heads", "mask_embedding")))
    folded = student.position.conv.parametrizations.weight.original0.numel()
    assert f"{count - folded:,} parameters" in card
    assert json.loads((folder / "config.json").read_text())["origin"] == ORIGIN
