"""The Hugging Face export accepts what users do with HuBERT, and refuses in a sentence what attention-map reuse rules out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_distill.student import Student, StudentConfig
from ray_distill.student.exporters.huggingface import export_huggingface

from .conftest import waves

transformers = pytest.importorskip("transformers", reason="needs transformers (the dev extra has it)")

NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0}
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def folders(offline: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Student, Path]]:
    """A student exported with each kind of features."""
    from ...tiny import sharpen_attention, tiny_student

    found = {}
    for features in ("layers", "heads"):
        torch.manual_seed(0)
        student = sharpen_attention(Student(tiny_student()).eval())
        folder = tmp_path_factory.mktemp("exports") / features
        export_huggingface(student, folder, {"run": "tiny"}, features)
        found[features] = student, folder
    return found


@pytest.fixture
def load(folders: dict[str, tuple[Student, Path]]) -> Load:
    """Loads the exported student as a class of transformers, in eval mode."""

    def from_folder(task: str = "AutoModel", features: str = "layers", **options: Any) -> Any:
        model = getattr(transformers, task).from_pretrained(folders[features][1], trust_remote_code=True, **options)
        return model.eval()

    return from_folder


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """A padded batch and its attention mask."""
    long, short = (torch.from_numpy(wave) for wave in waves()[:2])
    mask = torch.ones(2, len(long), dtype=torch.long)
    mask[1, len(short) :] = 0
    return torch.nn.utils.rnn.pad_sequence([long, short], True), mask


@torch.no_grad()
def test_hidden_states_of_the_heads_are_their_predictions(
    load: Load, folders: dict[str, tuple[Student, Path]], batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    student, folder = folders["heads"]
    found = load(features="heads")(*batch, output_hidden_states=True)
    expected = student(batch[0], batch[1].sum(-1))
    assert len(found.hidden_states) == student.config.encoder_layers
    for row, count in enumerate(expected.num_frames.tolist()):
        for layer, state in enumerate(found.hidden_states):
            torch.testing.assert_close(state[row, :count], expected.projections[row, layer, :count], rtol=0, atol=1e-5)
    assert load("AutoModelForCTC", "heads", vocab_size=5)(*batch).logits.shape[2] == 5
    assert "heads' predictions of 2 layers of the teacher, of width 32" in (folder / "README.md").read_text()


@torch.no_grad()
def test_attention_implementations_and_maps(load: Load, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    fused, explicit = load(attn_implementation="sdpa"), load(attn_implementation="eager")
    found, plain = fused(*batch, output_attentions=True), fused(*batch)
    assert plain.attentions is None
    torch.testing.assert_close(explicit(*batch)[0], plain[0], rtol=0, atol=1e-5)
    assert explicit.student.hold_maps and not fused.student.hold_maps
    torch.testing.assert_close(found.last_hidden_state, plain.last_hidden_state, rtol=0, atol=1e-5)
    own, reused = found.attentions
    assert own.shape == (2, 2, 49, 49)
    assert torch.equal(own, reused)  # The second layer applies the map of the first.
    padded = ~fused.frame_mask(batch[1])[1]
    assert own[1, :, :, padded].abs().max() == 0
    torch.testing.assert_close(own.sum(-1), torch.ones(2, 2, 49))
    with pytest.raises(ValueError, match="Flash Attention"):
        load(attn_implementation="flash_attention_2")


@torch.no_grad()
def test_a_pruned_student(offline: None, tmp_path: Path, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    from ...tiny import sharpen_attention, tiny_student

    torch.manual_seed(0)
    config = tiny_student(attention_reuse="none", layer_heads=(1, 0), layer_ffn_dims=(0, 5))
    student = sharpen_attention(Student(config).eval())
    export_huggingface(student, tmp_path / "pruned", {"run": "tiny"}, "layers")
    model = transformers.AutoModel.from_pretrained(tmp_path / "pruned", trust_remote_code=True).eval()
    found = model(*batch, output_attentions=True, output_hidden_states=True)
    expected = student(batch[0], batch[1].sum(-1)).hidden_states
    for layer, state in enumerate(found.hidden_states[1:]):
        torch.testing.assert_close(state[0], expected[0, layer], rtol=0, atol=1e-5)
    assert [attention.shape for attention in found.attentions] == [(2, 1, 49, 49), (2, 0, 49, 49)]


def test_classes_of_frames(load: Load, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = load("AutoModelForAudioFrameClassification", num_labels=3)
    classes = torch.randint(3, (2, 49))
    found = model(*batch, labels=classes)
    assert found.logits.shape == (2, 49, 3)
    real = model.frame_mask(batch[1])
    expected = torch.nn.functional.cross_entropy(found.logits[real], classes[real])
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(model(*batch, labels=torch.nn.functional.one_hot(classes, 3)).loss, expected)
    torch.testing.assert_close(model(*batch, labels=classes.masked_fill(~real, -100)).loss, expected)
    with pytest.raises(ValueError, match="one for each frame"):
        model(*batch, labels=classes[:, 1:])


@pytest.mark.parametrize("task", ["AutoModel", "AutoModelForCTC", "AutoModelForAudioClassification"])
def test_freezing_and_frames(load: Load, task: str) -> None:
    model = load(task)
    model.freeze_feature_encoder()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and all(".conv_blocks." in f".{name}" for name in frozen)
    assert model._get_feat_extract_output_lengths(16_000) == 49
    assert model._get_feat_extract_output_lengths(torch.tensor([16_000, 400])).tolist() == [49, 1]
    with pytest.raises(
        NotImplementedError, match="no token embeddings; for a CTC head of another size give vocab_size"
    ):
        model.resize_token_embeddings(9)


def test_gradient_checkpointing(load: Load, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = load("AutoModelForAudioClassification", apply_spec_augment=False, **NO_DROPOUT).train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(*batch, labels=torch.tensor([0, 1])).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable()
    calls = []
    checkpoint = model.distilled._gradient_checkpointing_func
    model.distilled._gradient_checkpointing_func = lambda *given: calls.append(given) or checkpoint(*given)
    torch.testing.assert_close(gradients(), expected, rtol=0, atol=0)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="use_reentrant=True loses the gradients of reused attention maps"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_types_of_attention_masks(load: Load, batch: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> None:
    model = load("AutoModelForAudioClassification")
    assert torch.equal(model(batch[0], batch[1].to(dtype)).logits, model(*batch).logits)
    with pytest.raises(ValueError, match="as input_values, not"):
        model(batch[0], batch[1][:, :-1])


@torch.no_grad()
def test_half_precision_device_map_and_tuples(load: Load, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    expected = load()(*batch)[0]
    half = load(dtype=torch.float16, device_map="auto")(*batch)[0]
    assert half.dtype == torch.float16
    assert (half.float() - expected)[0].norm() < 0.01 * expected[0].norm()
    assert torch.equal(load(return_dict=False)(*batch)[0], expected)


def test_masking_as_configured(
    load: Load, folders: dict[str, tuple[Student, Path]], batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model, student = (
        load(mask_time_prob=0.5, mask_feature_prob=0.5, mask_feature_length=2, **NO_DROPOUT),
        folders["layers"][0],
    )
    mask = torch.zeros(2, 49, dtype=torch.bool)
    mask[:, 3:9] = True
    with torch.no_grad():
        found = model(*batch, mask_time_indices=mask).last_hidden_state
        expected = student(batch[0], batch[1].sum(-1), mask)
    for row, count in enumerate(expected.num_frames.tolist()):
        torch.testing.assert_close(found[row, :count], expected.hidden_states[row, -1, :count], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="mask_time_indices must be"):
        model(*batch, mask_time_indices=mask[:, 1:])
    model.train()
    model(*batch).last_hidden_state.square().sum().backward()
    assert model.masked_spec_embed.grad.abs().sum() > 0
    first, second = model(*batch)[0], model(*batch)[0]
    assert not torch.equal(first, second)
    model.config.apply_spec_augment = False
    assert torch.equal(model(*batch)[0], model(*batch)[0])


def test_spans_stay_within_real_frames(load: Load) -> None:
    import sys

    spans = sys.modules[type(load()).__module__].span_mask
    torch.manual_seed(0)
    mask = torch.stack([spans([49, 20, 4], 49, 0.3, 10, 2) for _ in range(50)])
    assert not mask[:, 1, 20:].any() and not mask[:, 2, 4:].any()
    assert (mask[:, 0].sum(-1) >= 10).all() and (mask[:, 1].sum(-1) >= 10).all()
    assert mask[:, 0].float().mean() < 0.5


def test_settings_that_reuse_rules_out(load: Load) -> None:
    for options, message in (
        ({"layerdrop": 0.1}, "later layers may reuse their maps; set it to 0"),
        ({"add_adapter": True}, "add_adapter is not supported"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but the weights of this student need 2"),
        ({"ctc_loss_reduction": "max"}, "must be mean or sum, not 'max'"),
    ):
        with pytest.raises(ValueError, match=message):
            load("AutoModelForCTC", **options)
    with pytest.raises(ValueError, match="labels must be below vocab_size, which is 32, not 40"):
        load("AutoModelForCTC")(torch.zeros(1, 16_000), labels=torch.tensor([[40]]))


def test_folder_written_by_transformers_is_complete(load: Load, tmp_path: Path) -> None:
    load("AutoModelForCTC", vocab_size=7).save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert {
        "huggingface_configuration.py",
        "huggingface_modeling.py",
        "portable_attention.py",
        "portable_model.py",
    } < files
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert all("--" not in target for target in auto_map.values()), "refers to the folder that it was loaded from"
    again = transformers.AutoModelForCTC.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.config.vocab_size == 7


@torch.no_grad()
def test_pipelines(load: Load, folders: dict[str, tuple[Student, Path]], tmp_path: Path) -> None:
    folder = str(folders["layers"][1])
    assert "pipeline_tag: feature-extraction" in (folders["layers"][1] / "README.md").read_text()
    extract = transformers.pipeline("feature-extraction", model=folder, trust_remote_code=True)
    wave = waves()[1]
    expected = load()(torch.from_numpy(wave)[None]).last_hidden_state
    assert torch.equal(extract(wave, return_tensors=True), expected)
    assert len(extract([wave, wave])) == 2
    assert len(extract(wave)[0]) == expected.shape[1]
    for batch_size in (1, 2, 3):
        found = extract(waves(), batch_size=batch_size, return_tensors=True)
        for one, features in zip(waves(), found, strict=True):
            alone = load()(torch.from_numpy(one)[None]).last_hidden_state
            torch.testing.assert_close(features, alone, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no option 'truncation'"):
        extract(wave, truncation=True)
    extract.model.save_pretrained(tmp_path / "from_pipeline")
    classify = transformers.pipeline("audio-classification", model=folder, trust_remote_code=True)
    assert {answer["label"] for answer in classify(wave)} == {"LABEL_0", "LABEL_1"}


@pytest.mark.slow
@torch.no_grad()
def test_compiled_in_one_graph(load: Load, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = load()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    count = int(model.frame_mask(batch[1])[1].sum())
    torch.testing.assert_close(compiled(*batch)[0][1, :count], model(*batch)[0][1, :count], rtol=0, atol=1e-5)


def test_students_with_a_time_reduction(offline: None, tmp_path: Path, tiny: StudentConfig) -> None:
    student = Student(tiny.model_copy(update={"time_reduction": "conv1d"})).eval()
    export_huggingface(student, tmp_path / "reduced", {}, "heads")
    model = transformers.AutoModel.from_pretrained(tmp_path / "reduced", trust_remote_code=True).eval()
    wave = torch.from_numpy(waves()[1])[None]
    with torch.no_grad():
        found = model(wave, output_attentions=True)
        expected = student(wave).projections[:, -1]
    torch.testing.assert_close(found.last_hidden_state, expected, rtol=0, atol=1e-5)
    assert found.attentions[0].shape[-1] == -(-expected.shape[1] // 2)
