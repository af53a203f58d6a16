"""Teachers: the published arithmetic, batch invariance and error messages."""

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import torchaudio
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ray_distill.teacher_cache.frames import num_frames
from ray_distill.teacher_cache.teachers import TeacherError, load_teacher
from ray_distill.teacher_cache.teachers.architecture import Architecture, build_model
from ray_distill.teacher_cache.teachers.wav2vec2 import Wav2Vec2Teacher

from .batch_invariance import RELATIVE, assert_batch_invariant, relative_error

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "teachers.safetensors"
ABSOLUTE = 2e-5


def golden_checkpoint(kind: str) -> dict[str, Any]:
    """Return the golden tiny model as a checkpoint in its publisher's format."""
    weights = {k.split("weights.")[1]: v for k, v in load_file(GOLDEN).items() if k.startswith(f"{kind}.weights.")}
    with safe_open(GOLDEN, framework="pt") as file:
        cfg = json.loads(file.metadata()[kind])
    if kind == "hubert":
        cfg = {"model": cfg, "task": {"normalize": False, "sample_rate": 16_000}}
    return {"cfg": cfg, "model": weights}


@pytest.fixture(params=["hubert", "wavlm"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def saved(checkpoint: dict[str, Any], path: Path) -> str:
    torch.save(checkpoint, path)
    return str(path)


def test_a_checkpoint_of_a_wrapped_model(kind: str, tmp_path: Path) -> None:
    plain = golden_checkpoint(kind)
    wrapped = plain | {"model": {f"module._orig_mod.{name}": weight for name, weight in plain["model"].items()}}
    expected = load_teacher(saved(plain, tmp_path / "plain.pt")).fingerprint
    assert load_teacher(saved(wrapped, tmp_path / "wrapped.pt")).fingerprint == expected
    assert load_teacher(tmp_path / "plain.pt").fingerprint == expected, "a path is not only text"


def test_own_golden_values(kind: str, tmp_path: Path) -> None:
    golden = load_file(GOLDEN)
    teacher = load_teacher(saved(golden_checkpoint(kind), tmp_path / "teacher.pt"))
    clean = teacher.hidden_states(golden["waveform"][None])[0]
    masked = teacher.hidden_states(golden["waveform"][None], frame_mask=golden["mask"][None])[0]
    assert float((clean - golden[f"{kind}.clean"]).abs().max()) < ABSOLUTE
    assert float((masked - golden[f"{kind}.masked"]).abs().max()) < ABSOLUTE
    assert float((clean - masked).abs().max()) > 0.1


@pytest.mark.parametrize(("file", "prefix"), [("hubert_mini.pt", "teacher"), ("wavlm_mini.pt", "wavlm")])
def test_published_golden_values(shared: Path, file: str, prefix: str) -> None:
    golden = load_file(shared / "golden" / "golden.safetensors")
    teacher = load_teacher(str(shared / "golden" / file))
    lengths = [16_000, 11_200, 8_000]
    for i, length in enumerate(lengths):
        out = teacher.hidden_states(golden["wav"][i : i + 1, :length])[0]
        assert float((out - golden[f"{prefix}_unmasked_single_{i}"]).abs().max()) < ABSOLUTE
    mask = golden["mask_indices" if prefix == "teacher" else "wavlm_mask_indices"]
    # Rows 1 and 2 are padded, and the published code includes padding in its statistics.
    out = teacher.hidden_states(golden["wav"], torch.tensor(lengths), mask)[0]
    assert float((out - golden[f"{prefix}_masked"][0]).abs().max()) < ABSOLUTE


@pytest.mark.parametrize("masked", [False, True])
def test_batch_invariance_on_noise(kind: str, masked: bool, tmp_path: Path) -> None:
    teacher = load_teacher(saved(golden_checkpoint(kind), tmp_path / "teacher.pt"))
    generator = torch.Generator().manual_seed(1)
    waveforms = [0.1 * torch.randn(n, generator=generator) for n in (400, 1_600, 9_000, 9_100, 24_000)]
    assert_batch_invariant(teacher, waveforms, masked)


def speech(shared: Path, seconds: list[float]) -> list[Tensor]:
    """Return excerpts of real speech of the given lengths."""
    files = sorted((shared / "speech" / "LibriSpeech" / "heldout-clean-5").rglob("*.flac"))
    long = torch.cat([torch.from_numpy(soundfile.read(file, dtype="float32")[0]) for file in files[:8]])
    starts = torch.linspace(0, len(long) - 320_001, len(seconds)).long().tolist()
    return [long[start : start + int(length * 16_000)] for start, length in zip(starts, seconds, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("file", ["teacher/hubert_small.pt", "golden/wavlm_mini.pt"])
def test_batch_invariance_on_speech(shared: Path, file: str, masked: bool) -> None:
    assert_batch_invariant(load_teacher(str(shared / file)), speech(shared, [0.1, 0.7, 3.3, 20.0]), masked)


def test_large_models_normalise_each_utterance() -> None:
    # Biases and layer norms as in Large. A group norm after convolutions without bias would hide scale and offset.
    architecture = Architecture(
        conv_layers=[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2,
        conv_bias=True,
        conv_layer_norm=True,
        dim=32,
        ffn_dim=48,
        heads=4,
        layers=2,
        layer_norm_first=True,
        pos_kernel=16,
        pos_groups=4,
    )
    model = build_model(architecture, "large")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(6)
        for layer in model.feature_extractor.conv_layers:
            layer.conv.weight.normal_(0.0, layer.conv.weight[0].numel() ** -0.5, generator=generator)
            layer.conv.bias.normal_(0.0, 0.1, generator=generator)
    plain = Wav2Vec2Teacher(model, torch.ones(32), name="plain")
    teacher = Wav2Vec2Teacher(model, torch.ones(32), name="normalised", normalize_eps=1e-5)
    assert teacher.fingerprint != plain.fingerprint
    waveforms = [a * torch.randn(n, generator=generator) + 0.1 for a, n in ((0.02, 8_000), (0.3, 5_000))]
    expected = plain.hidden_states(torch.nn.functional.layer_norm(waveforms[0], waveforms[0].shape)[None])
    torch.testing.assert_close(teacher.hidden_states(waveforms[0][None]), expected, atol=ABSOLUTE, rtol=0)
    assert relative_error(plain.hidden_states(waveforms[0][None]), expected) > 0.01
    assert_batch_invariant(teacher, waveforms, masked=True)


def test_layers_are_selected_in_order() -> None:
    teacher = load_teacher("random:4x48")
    waveforms = 0.1 * torch.randn(2, 4_000, generator=torch.Generator().manual_seed(0))
    every = teacher.hidden_states(waveforms)
    assert every.shape == (2, 4, num_frames(4_000), 48)
    assert torch.equal(teacher.hidden_states(waveforms, layers=[3, 1]), every[:, [2, 0]])
    assert all(relative_error(a, b) > 0.1 for a, b in pairwise(every.unbind(1)))


def test_output_can_be_a_loss_target() -> None:
    target = load_teacher("random:1x16").hidden_states(torch.zeros(1, 400))
    prediction = torch.zeros_like(target, requires_grad=True)
    torch.nn.functional.mse_loss(prediction, target).backward()
    assert prediction.grad is not None


def test_random_teacher_is_the_same_every_time_and_leaves_the_random_state() -> None:
    torch.manual_seed(7)
    first = load_teacher("random:2x32")
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(8)
    second = load_teacher("random:2x32")
    assert first.fingerprint == second.fingerprint != load_teacher("random:3x32").fingerprint
    assert (first.num_layers, first.dim, first.has_mask_embedding) == (2, 32, True)
    assert first.device == torch.device("cpu")


def test_the_fingerprint_covers_every_weight_and_the_mask_embedding(kind: str, tmp_path: Path) -> None:
    fingerprints = set()
    for key in ("none", "mask_emb", "encoder.layers.1.fc2.bias", "feature_extractor.conv_layers.3.0.weight"):
        checkpoint = golden_checkpoint(kind)
        if key != "none":
            checkpoint["model"][key] = checkpoint["model"][key] + 1e-6
        fingerprints.add(load_teacher(saved(checkpoint, tmp_path / "teacher.pt")).fingerprint)
    assert len(fingerprints) == 4
    checkpoint = golden_checkpoint(kind)
    (checkpoint["cfg"]["model"] if kind == "hubert" else checkpoint["cfg"])["encoder_attention_heads"] = 8
    if kind == "hubert":
        fingerprints.add(load_teacher(saved(checkpoint, tmp_path / "other.pt")).fingerprint)
        assert len(fingerprints) == 5


@pytest.mark.parametrize("style", ["args namespace", "cfg namespace", "wav2vec2"])
def test_older_and_wav2vec2_checkpoints(style: str, tmp_path: Path) -> None:
    checkpoint = golden_checkpoint("hubert")
    reference = load_teacher(saved(checkpoint, tmp_path / "reference.pt"))
    model_cfg = checkpoint["cfg"]["model"]
    weights = dict(checkpoint["model"])
    if style == "args namespace":
        model_cfg = {k: v for k, v in model_cfg.items() if k != "_name"}
        checkpoint = {"args": argparse.Namespace(arch="hubert", normalize=False, **model_cfg), "cfg": None}
    elif style == "cfg namespace":
        checkpoint = {"cfg": {"model": argparse.Namespace(**model_cfg), "task": argparse.Namespace(normalize=False)}}
    else:
        weights |= {
            "quantizer.vars": torch.zeros(1),
            "project_q.weight": torch.zeros(1),
            "final_proj.bias": weights["mask_emb"],
        }
        checkpoint = {"cfg": {"model": {**model_cfg, "_name": "wav2vec2"}, "task": {}}, "args": None}
    teacher = load_teacher(saved(checkpoint | {"model": weights}, tmp_path / "teacher.pt"))
    assert teacher.fingerprint == reference.fingerprint


def write_huggingface(folder: Path, kind: str, new_weight_norm: bool, prefix: str) -> None:
    """Write the golden model as transformers would save it."""
    names = [
        ("post_extract_proj", "feature_projection.projection"),
        ("self_attn_layer_norm", "layer_norm"),
        ("self_attn.relative_attention_bias", "attention.rel_attn_embed"),
        ("self_attn.grep_linear", "attention.gru_rel_pos_linear"),
        ("self_attn.grep_a", "attention.gru_rel_pos_const"),
        ("self_attn", "attention"),
        ("fc1", "feed_forward.intermediate_dense"),
        ("fc2", "feed_forward.output_dense"),
        ("pos_conv.0", "pos_conv_embed.conv"),
        ("mask_emb", "masked_spec_embed"),
        ("conv_layers.0.2.", "conv_layers.0.layer_norm."),
    ]
    if new_weight_norm:
        names += [(f"weight_{p}", f"parametrizations.weight.original{i}") for i, p in enumerate("gv")]
    checkpoint = golden_checkpoint(kind)
    cfg = checkpoint["cfg"].get("model", checkpoint["cfg"])
    weights = {}
    for key, value in checkpoint["model"].items():
        new = f"feature_projection.{key}" if key.startswith("layer_norm") else key
        new = new.replace(".0.weight", ".conv.weight") if new.startswith("feature_extractor") else new
        for old, replacement in names:
            new = new.replace(old, replacement)
        weights[prefix + new] = value.contiguous()
    config = {
        "model_type": kind,
        "conv_dim": [16] * 7,
        "hidden_size": cfg["encoder_embed_dim"],
        "intermediate_size": cfg["encoder_ffn_embed_dim"],
        "num_hidden_layers": cfg["encoder_layers"],
        "num_attention_heads": cfg["encoder_attention_heads"],
        "num_conv_pos_embeddings": cfg["conv_pos"],
        "num_conv_pos_embedding_groups": cfg["conv_pos_groups"],
        "num_buckets": cfg.get("num_buckets"),
        "max_bucket_distance": cfg.get("max_distance"),
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    config_text = json.dumps({key: value for key, value in config.items() if value is not None})
    (folder / "config.json").write_text(config_text)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))


@pytest.mark.parametrize("new_weight_norm", [False, True])
@pytest.mark.parametrize("prefixed", [False, True])
def test_huggingface_folder_is_the_same_teacher(
    kind: str, new_weight_norm: bool, prefixed: bool, tmp_path: Path
) -> None:
    reference = load_teacher(saved(golden_checkpoint(kind), tmp_path / "reference.pt"))
    write_huggingface(tmp_path / "hf", kind, new_weight_norm, f"{kind}." if prefixed else "")
    teacher = load_teacher(str(tmp_path / "hf"))
    assert teacher.fingerprint == reference.fingerprint
    assert teacher.has_mask_embedding
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    normalised = load_teacher(str(tmp_path / "hf")).fingerprint
    assert normalised != reference.fingerprint
    # transformers 5 saves the feature extractor of a processor in the processor's file, and reads that one first.
    nested = tmp_path / "hf" / "processor_config.json"
    nested.write_text(json.dumps({"feature_extractor": {"do_normalize": False, "sampling_rate": 16000}}))
    assert load_teacher(str(tmp_path / "hf")).fingerprint == reference.fingerprint
    nested.write_text(json.dumps({"feature_extractor": {"do_normalize": False, "sampling_rate": 8000}}))
    with pytest.raises(TeacherError, match="processor_config.json has sampling_rate = 8000"):
        load_teacher(str(tmp_path / "hf"))
    nested.write_text(json.dumps({"processor_class": "Wav2Vec2Processor"}))  # as transformers 4 wrote it
    assert load_teacher(str(tmp_path / "hf")).fingerprint == normalised


def test_huggingface_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hf"
    with pytest.raises(TeacherError, match="there is no teacher"):
        load_teacher(str(folder))
    write_huggingface(folder, "hubert", False, "")
    monkeypatch.chdir(folder)
    for empty in ("", "layer-norm:"):  # It is not the folder of the process.
        with pytest.raises(TeacherError, match="there is no teacher ''"):
            load_teacher(empty)
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"model_type": "bert"}, "type 'bert'; the supported types are hubert, wavlm, wav2vec2, .*whisper"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"num_hidden_layers": 3}, "lacks weights that its configuration needs"),
        ({"num_hidden_layers": "x"}, "wrong kind"),
        (
            {"conv_stride": [5, 2, 2, 2, 2, 4, 1]},
            "frames of 35 ms every 20 ms, .* must have frames of 25 ms, as HuBERT",
        ),
        (
            {"conv_stride": [5, 2, 2, 2, 2, 2, 400]},
            "has a frame every 4000 ms; teachers need 1 to 1000 frames per second",
        ),
        ({"hidden_size": 64}, "shapes don't fit"),
        ({"hidden_size": 24_000_000}, "shapes don't fit"),
        ({"hidden_size": 2**40}, "shapes don't fit|from which no model can be built"),
        ({"intermediate_size": 10**12}, "shapes don't fit"),
        ({"num_hidden_layers": 10**9}, r"1,000,000,\d+ layers and convolutions in its configuration, but only"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(TeacherError, match=message):
            load_teacher(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(TeacherError, match="not readable JSON"):
        load_teacher(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 8000}))
    with pytest.raises(TeacherError, match="has sampling_rate = 8000, but teachers must take 16000 Hz"):
        load_teacher(str(folder))
    (folder / "preprocessor_config.json").unlink()
    weights = load_file(folder / "model.safetensors")
    for name, value, message in (
        (
            "lm_head.bias",
            torch.zeros(3),
            "is a fine-tuned model, since it has the weight 'lm_head.bias' of a task's head; use",
        ),
        ("classifier.weight", torch.zeros(3, 3), "drop the head with transformers.AutoModel"),
        ("masked_spec_embed", torch.full((config["hidden_size"],), torch.inf), "a mask embedding that is not finite"),
        (
            "encoder.layers.0.attention.k_proj.bias",
            torch.full((config["hidden_size"],), torch.nan),
            "weights that are not finite: encoder.transformer.layers.0.attention.k_proj.bias",
        ),
    ):
        save_file(weights | {name: value}, folder / "model.safetensors")
        with pytest.raises(TeacherError, match=message):
            load_teacher(str(folder))
    save_file(weights | {"lm_head.bias": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "preprocessor_config.json").write_text("{}")
    with pytest.raises(TeacherError, match=r"and copy preprocessor_config\.json to NEW_FOLDER"):
        load_teacher(str(folder))
    (folder / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(TeacherError, match="not a readable safetensors file, so it may be cut off; download it again"):
        load_teacher(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(TeacherError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_teacher(str(folder))


def test_a_checkpoint_that_s3prl_converted(tmp_path: Path) -> None:
    checkpoint = golden_checkpoint("hubert")
    converted = {
        "task_cfg": checkpoint["cfg"]["task"],
        "model_cfg": checkpoint["cfg"]["model"],
        "model_weight": checkpoint["model"],
        "dictionaries_symbols": [],
    }
    expected = load_teacher(saved(checkpoint, tmp_path / "fairseq.pt"))
    assert load_teacher(saved(converted, tmp_path / "s3prl.pt")).fingerprint == expected.fingerprint


def test_unsupported_checkpoints(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"

    def refused(change: Any, message: str) -> None:
        checkpoint = golden_checkpoint(kind)
        change(checkpoint, checkpoint["cfg"].get("model", checkpoint["cfg"]))
        with pytest.raises(TeacherError, match=message) as caught:
            load_teacher(saved(checkpoint, path))
        assert "\n" not in str(caught.value)

    refused(lambda c, _: c.pop("cfg"), "neither 'cfg' nor 'args'")
    refused(lambda c, _: c.pop("model"), "no weights under the key 'model'")
    refused(lambda c, _: c["model"].pop("encoder.layers.0.fc1.bias"), "lacks weights .*intermediate_dense.bias")
    refused(lambda c, _: c["model"].update({"w2v_encoder.x": torch.zeros(1)}), "a weight 'w2v_encoder.x'")
    refused(lambda _, cfg: cfg.update(activation_fn="relu"), "activation_fn = 'relu', but only 'gelu'")
    refused(lambda _, cfg: cfg.update(encoder_layers=1), "has weights that its configuration doesn't know")
    refused(lambda _, cfg: cfg.update(encoder_embed_dim=24_000_000), "shapes don't fit")
    refused(lambda _, cfg: cfg.update(encoder_layers=10**9), "layers and convolutions in its configuration, but only")
    refused(
        lambda c, _: c["model"]["encoder.layers.0.fc1.bias"].fill_(torch.nan), "not finite: .*intermediate_dense.bias"
    )
    refused(lambda _, cfg: cfg.update(encoder_attention_heads=5), "the number of heads must divide the width")
    refused(lambda _, cfg: cfg.update(encoder_layers="2"), "not a positive integer")
    refused(lambda _, cfg: cfg.update(conv_feature_layers="__import__('os').getcwd()"), "not a list of")
    refused(lambda _, cfg: cfg.update(conv_feature_layers="[(1,1,1)] * 9999999999"), "not a list of")
    refused(lambda c, _: c["model"].update(mask_emb=torch.zeros(3)), "mask embedding of shape")
    if kind == "hubert":
        refused(
            lambda _, cfg: cfg.update(_name="hubert_ctc"),
            "'hubert_ctc'; it must be a pre-trained model, not a fine-tuned one",
        )
        refused(lambda c, _: c["cfg"]["task"].update(sample_rate=8000), "trained on audio at 8000 Hz")
    else:
        refused(lambda _, cfg: cfg.update(gru_rel_pos=False), "gru_rel_pos = False")


def test_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TeacherError, match=r"'HUBERT_BAS' is not a pre-trained bundle.*HUBERT_BASE, .*WAVLM_LARGE"):
        load_teacher("torchaudio:HUBERT_BAS")
    with pytest.raises(TeacherError, match="not a pre-trained bundle"):
        load_teacher("torchaudio:HUBERT_ASR_LARGE")

    random = load_teacher("random:1x32")
    inner = random.model
    wrapper = torchaudio.pipelines._wav2vec2.utils._extend_model(inner, normalize_waveform=True)
    waveforms = 0.1 * torch.randn(1, 4_000, generator=torch.Generator().manual_seed(0))
    for model in (inner, wrapper):
        monkeypatch.setattr(torchaudio.pipelines.Wav2Vec2Bundle, "get_model", lambda _, model=model: model)
        teacher = load_teacher("torchaudio:HUBERT_LARGE")
        assert teacher.name == "torchaudio:HUBERT_LARGE"
        expected = torch.stack(model.extract_features(waveforms)[0], dim=1)
        torch.testing.assert_close(teacher.hidden_states(waveforms), expected, atol=ABSOLUTE, rtol=0)
    with pytest.raises(TeacherError, match="HUBERT_LARGE has no mask embedding, so it can't compute masked targets"):
        teacher.hidden_states(waveforms, frame_mask=torch.zeros(1, 12, dtype=torch.bool))

    def unreachable(_: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(torchaudio.pipelines.Wav2Vec2Bundle, "get_model", unreachable)
    with pytest.raises(TeacherError, match="HUBERT_BASE can't be downloaded: no route"):
        load_teacher("torchaudio:HUBERT_BASE")


@pytest.mark.parametrize("spec", ["random:4", "random:0x96", "random:4x97", "random:", "nowhere.pt"])
def test_unknown_specifications(spec: str) -> None:
    with pytest.raises(TeacherError, match="random:LAYERSxDIM"):
        load_teacher(spec)


def test_arguments_that_do_not_fit() -> None:
    teacher = load_teacher("random:2x16")
    waveforms = torch.zeros(2, 1_000)
    lengths = torch.tensor([1_000, 400])
    mask = torch.zeros(2, 2, dtype=torch.bool)
    assert teacher.hidden_states(waveforms, lengths, mask).shape == (2, 2, 2, 16)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((waveforms[0],), "waveforms must be a float tensor of shape"),
        ((waveforms.long(),), "waveforms must be a float tensor of shape"),
        (
            (waveforms.numpy(),),
            "waveforms must be a float tensor .* not of the type ndarray; torch.from_numpy makes one",
        ),
        (
            (waveforms, [1_000, 400]),
            "lengths must be an integer tensor .* not of the type list; torch.tensor makes one",
        ),
        ((waveforms, lengths[:1]), "lengths must be an integer tensor of shape"),
        ((waveforms, lengths.float()), "lengths must be an integer tensor of shape"),
        ((waveforms, torch.tensor([1_000, 399])), "from 399 to 1000 samples, but each must be at least 400"),
        ((waveforms, torch.tensor([1_001, 400])), "at most 1000"),
        ((waveforms[:, :399],), "at least 400"),
        ((waveforms, lengths, mask[:, :1]), r"frame_mask must be a bool tensor of shape \(2, 2\)"),
        ((waveforms, lengths, mask.float()), "frame_mask must be a bool tensor"),
    ]
    for arguments, message in cases:
        with pytest.raises(TeacherError, match=message):
            teacher.hidden_states(*arguments)
    for layers in ([], [0], [3]):
        with pytest.raises(TeacherError, match="one or more of 1 to 2"):
            teacher.hidden_states(waveforms, layers=layers)


def test_a_teacher_is_called_as_a_student_is() -> None:
    teacher = load_teacher("random:2x16")
    waveforms = 0.1 * torch.randn(2, 2_000, generator=torch.Generator().manual_seed(0))
    lengths, mask = torch.tensor([2_000, 900]), torch.tensor([[True, False] * 3, [True] + [False] * 5])
    assert torch.equal(teacher(waveforms), teacher.hidden_states(waveforms, torch.tensor([2_000, 2_000])))
    expected = teacher.hidden_states(waveforms, lengths, mask, layers=[2], precision="bf16")
    assert torch.equal(teacher(waveforms, lengths, mask, [2], precision="bf16"), expected)
    assert expected.dtype == torch.float32
    assert not torch.equal(teacher(waveforms, lengths, mask, [2]), expected)
    assert repr(teacher) == (
        f"Wav2Vec2Teacher('random:2x16', num_layers=2, dim=16, num_parameters={teacher.num_parameters:,}, device='cpu')"
    )


def test_nan_in_padding_does_not_spread() -> None:
    teacher = load_teacher("random:2x16")
    waveforms = 0.1 * torch.randn(2, 2_000, generator=torch.Generator().manual_seed(0))
    expected = teacher.hidden_states(waveforms[1:, :900])
    waveforms[1, 900:] = torch.nan
    out = teacher.hidden_states(waveforms, torch.tensor([2_000, 900]))
    assert relative_error(out[1:, :, : num_frames(900)], expected) < RELATIVE
