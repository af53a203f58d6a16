"""Teachers from Hugging Face folders equal transformers' models, for one utterance without padding."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchaudio
from safetensors.torch import load_file
from torch import Tensor

from ray_distill.teacher_cache.frames import num_frames
from ray_distill.teacher_cache.spectrograms import kaldi_fbank, whisper_log_mel
from ray_distill.teacher_cache.teachers import TeacherError, load_teacher
from ray_distill.teacher_cache.teachers.wav2vec2_bert import Wav2Vec2BertTeacher
from ray_distill.teacher_cache.teachers.whisper import WhisperTeacher

from .huggingface_folders import LARGE, save_tiny, tiny_model

TOLERANCE = 1e-4


def layer_outputs(layers: Any, run: Any) -> Tensor:
    """Return the (L, T, D) outputs of the layers while the model runs, or (L, B, T, D) for B > 1 utterances."""
    outputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda *args: outputs.append(args[2][0] if isinstance(args[2], tuple) else args[2]))
        for layer in layers
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    stacked = torch.stack(outputs)
    return stacked[:, 0] if stacked.shape[1] == 1 else stacked


def noise(samples: int) -> Tensor:
    return 0.1 * torch.randn(1, samples, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("last", "rate", "frames"), [(4, 25, 25), (1, 100, 98)])
def test_other_frame_rates(tmp_path: Path, last: int, rate: int, frames: int) -> None:
    changes = {"conv_stride": [5, 2, 2, 2, 2, 2, last]}
    teacher = load_teacher(save_tiny("hubert", tmp_path, **changes))
    model, waveform = tiny_model("hubert", **changes), noise(8_000)
    assert teacher.stated_rate == str(rate) and teacher.num_frames(16_000) == frames
    expected = layer_outputs(model.encoder.layers, lambda: model(waveform))
    assert float((teacher(waveform)[0] - expected).abs().max()) < TOLERANCE
    wide = save_tiny("hubert", tmp_path, conv_kernel=[10, 3, 3, 3, 3, 2, 3])
    with pytest.raises(
        TeacherError,
        match="frames of 35 ms every 20 ms, by its convolutions.*must have frames of 25 ms, as HuBERT has$",
    ):
        load_teacher(wide)


@pytest.mark.parametrize("kind", ["hubert", "wavlm", "wav2vec2", "unispeech", "unispeech-sat", "data2vec-audio"])
def test_models_with_the_architecture_of_wav2vec2(kind: str, tmp_path: Path) -> None:
    teacher = load_teacher(save_tiny(kind, tmp_path))
    model = tiny_model(kind)
    assert teacher.has_mask_embedding
    waveform = noise(8_000)
    normalised = torch.nn.functional.layer_norm(waveform, waveform.shape, eps=1e-7)
    fed = normalised if kind == "data2vec-audio" else waveform
    mask = torch.zeros(1, num_frames(8_000), dtype=torch.bool)
    mask[:, 5:11] = True
    base = getattr(model, model.base_model_prefix, model)
    for frame_mask in (None, mask):
        # With an explicit mask, transformers also masks in evaluation mode.
        expected = layer_outputs(base.encoder.layers, lambda m=frame_mask: base(fed, mask_time_indices=m))
        actual = teacher.hidden_states(waveform, frame_mask=frame_mask)[0]
        assert float((actual - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize("kind", ["hubert", "wavlm", "wav2vec2"])
def test_large_models_in_a_padded_batch(kind: str, tmp_path: Path) -> None:
    # Base models of transformers normalise over padding, so only Large ones can be compared in a padded batch.
    teacher = load_teacher(save_tiny(kind, tmp_path, **LARGE))
    model = tiny_model(kind, **LARGE)
    base = getattr(model, model.base_model_prefix, model)
    waveforms = [noise(samples)[0] for samples in (8_000, 5_200, 3_000)]
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    batch = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    normalised = [torch.nn.functional.layer_norm(w, w.shape, eps=1e-7) for w in waveforms]
    fed = torch.nn.utils.rnn.pad_sequence(normalised, batch_first=True)
    real = torch.arange(fed.shape[1]) < lengths[:, None]
    expected = layer_outputs(base.encoder.layers, lambda: base(fed, attention_mask=real.long())).transpose(0, 1)
    actual = teacher.hidden_states(batch, lengths)
    for row, length in enumerate(lengths.tolist()):
        frames = slice(0, num_frames(length))
        assert float((actual[row, :, frames] - expected[row, :, frames]).abs().max()) < TOLERANCE


def test_distilhubert_and_plain_mert(tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 2, "feat_proj_layer_norm": False}
    teacher = load_teacher(save_tiny("hubert", tmp_path, **changes))
    assert teacher.num_layers == 2 and not any("feature_projection.layer_norm" in key for key in teacher.weights)
    model, waveform = tiny_model("hubert", **changes), noise(8_000)
    expected = layer_outputs(model.encoder.layers, lambda: model(waveform))
    assert float((teacher(waveform)[0] - expected).abs().max()) < TOLERANCE
    config = tmp_path / "config.json"
    settings = json.loads(config.read_text()) | {"model_type": "mert_model", "sample_rate": 16_000, "deepnorm": False}
    config.write_text(json.dumps(settings))
    assert load_teacher(str(tmp_path)).fingerprint == teacher.fingerprint
    # MERT-v1-330M has attention_relax 32, which is used with deepnorm only.
    config.write_text(json.dumps(settings | {"attention_relax": 32.0}))
    assert load_teacher(str(tmp_path)).fingerprint == teacher.fingerprint
    config.write_text(json.dumps(settings | {"sample_rate": 24_000}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 24_000, "do_normalize": False}))
    music = load_teacher(str(tmp_path))
    resampled = torchaudio.functional.resample(waveform, 16_000, 24_000)
    expected = layer_outputs(model.encoder.layers, lambda: model(resampled))
    assert music.stated_rate == "75" and float((music(waveform)[0] - expected).abs().max()) < TOLERANCE
    assert music.fingerprint != teacher.fingerprint
    (tmp_path / "preprocessor_config.json").unlink()
    for change, message in (
        ({"sample_rate": 22_050}, "sample_rate = 22050, but teachers must take 16000 or 24000 Hz"),
        (
            {"feature_extractor_cqt": True},
            "constant-Q transform that only the code in its repository computes, and code",
        ),
        ({"deepnorm": True}, "deepnorm = True, but only False is supported"),
    ):
        config.write_text(json.dumps(settings | change))
        with pytest.raises(TeacherError, match=message):
            load_teacher(str(tmp_path))


def test_contentvec_has_a_projection_for_training(tmp_path: Path) -> None:
    # HubertModelWithFinalProj of lengyue233/content-vec-best, in a .bin file.
    plain = load_teacher(save_tiny("hubert", tmp_path))
    state = load_file(tmp_path / "model.safetensors")
    torch.save(
        state | {"final_proj.weight": torch.ones(4, 32), "final_proj.bias": torch.ones(4)},
        tmp_path / "pytorch_model.bin",
    )
    (tmp_path / "model.safetensors").unlink()
    assert load_teacher(str(tmp_path)).fingerprint == plain.fingerprint


def test_a_folder_without_a_model_says_where_one_is(tmp_path: Path) -> None:
    def refused(folder: str, message: str) -> None:
        with pytest.raises(TeacherError, match=message):
            load_teacher(str(tmp_path / folder))

    cached = tmp_path / "models--owner--name"
    save_tiny("hubert", cached / "snapshots" / "abc")
    refused(
        cached.name,
        r"models--owner--name/config\.json is missing; .*; give \S+/snapshots/abc, which is in this folder$",
    )
    (tmp_path / "fairseq").mkdir()
    refused("fairseq", "is missing; a Hugging Face folder must have it$")
    (tmp_path / "fairseq" / "hubert.pt").touch()
    refused("fairseq", r"; give \S+/hubert\.pt, which is in this folder$")
    (tmp_path / "fairseq" / "old.pt").touch()
    refused("fairseq", r"; give \S+/hubert\.pt \(or 1 more\), which is in this folder$")
    (tmp_path / "fairseq" / "adapter_config.json").touch()
    refused("fairseq", "; this is an adapter, so merge it into its model and save that")
    torch.save({"dims": {"n_mels": 80}, "model_state_dict": {"x": torch.ones(1)}}, tmp_path / "small.pt")
    refused("small.pt", "small.pt is OpenAI's own checkpoint of Whisper; give the model of the Hugging Face Hub")
    torch.save({"encoder.x": torch.ones(1)}, tmp_path / "other.pth")
    refused(
        "other.pth", "weights alone are not enough, so give the model's Hugging Face folder, or its name on the hub$"
    )
    (tmp_path / "config.json").write_text("{}")
    refused(
        "", "has a config.json without model_type; the supported types are hubert, .*, and a package can add others"
    )


def test_distilhubert_of_s3prl_is_that_of_transformers(tmp_path: Path) -> None:
    model = tiny_model("hubert", num_hidden_layers=2, feat_proj_layer_norm=False)
    rules = (
        (r"conv_layers\.(\d+)\.conv\.", r"conv_layers.\1.0."),
        (r"conv_layers\.0\.layer_norm\.", "conv_layers.0.2."),
        (r"feature_projection\.projection\.", "post_extract_proj."),
        (r"pos_conv_embed\.conv\.", "pos_conv.0."),
        (r"parametrizations\.weight\.original0", "weight_g"),
        (r"parametrizations\.weight\.original1", "weight_v"),
        (r"(layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
        (r"\.attention\.", ".self_attn."),
        (r"feed_forward\.intermediate_dense\.", "fc1."),
        (r"feed_forward\.output_dense\.", "fc2."),
    )
    state = {"output_layer.0.weight": torch.zeros(1)}
    for full_key, value in model.state_dict().items():
        key = full_key
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key) if "conv_layers" in key or "conv_layers" not in pattern else key
        if key != "masked_spec_embed":
            state[key] = value
    config = {
        "extractor_conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
        "encoder_layers": 2,
        "encoder_embed_dim": 32,
        "encoder_ffn_embed_dim": 48,
        "encoder_attention_heads": 4,
        "conv_pos_groups": 4,
        "task_emb_type": "expand-last",
    }
    path = tmp_path / "distilhubert.ckpt"
    torch.save({"Config": {"distiller": config}, "Distiller": state, "Args": argparse.Namespace(x=1), "Step": 1}, path)
    teacher, waveform = load_teacher(str(path)), noise(8_000)
    expected = layer_outputs(model.encoder.layers, lambda: model(waveform))
    assert float((teacher(waveform)[0] - expected).abs().max()) < TOLERANCE and not teacher.has_mask_embedding
    for changed, message in (
        ({"distiller": config | {"task_emb_type": "add"}}, "task_emb_type = 'add', but only 'expand-last' or"),
        ({"distiller": config | {"encoder_embed_dim": 64}}, "shapes don't fit"),
        ({}, "has no section 'distiller'"),
    ):
        torch.save({"Config": changed, "Distiller": state}, path)
        with pytest.raises(TeacherError, match=message):
            load_teacher(str(path))


def test_whisper_on_the_same_spectrogram(tmp_path: Path) -> None:
    teacher = load_teacher(save_tiny("whisper", tmp_path))
    assert isinstance(teacher, WhisperTeacher)
    encoder = tiny_model("whisper").encoder
    mel = torch.randn(1, 200, 80, generator=torch.Generator().manual_seed(3))
    expected = layer_outputs(encoder.layers, lambda: encoder(mel.transpose(1, 2)))
    with torch.no_grad():
        actual = torch.stack([x[0] for x in teacher.layers_of_mel(mel, torch.tensor([100]))])
    assert actual.shape == (3, 100, 32)
    assert float((actual - expected).abs().max()) < TOLERANCE


def test_whisper_spectrogram_is_that_of_audio_followed_by_silence() -> None:
    from transformers import WhisperFeatureExtractor

    waveform = noise(9_100)
    for bands in (80, 128):
        extractor = WhisperFeatureExtractor(feature_size=bands)
        expected = extractor(waveform[0].numpy(), sampling_rate=16_000, return_tensors="pt")["input_features"][0].T
        mel = whisper_log_mel(waveform, bands)[0]
        assert float((mel - expected[: len(mel)]).abs().max()) < TOLERANCE
        assert len(expected[len(mel) :].unique()) == 1, "only silence follows"


@pytest.mark.parametrize("seconds", [1.3, 2.4, 0.2])
def test_ast_by_column(seconds: float, tmp_path: Path) -> None:
    from transformers import ASTFeatureExtractor

    extractor = ASTFeatureExtractor(num_mel_bins=32, max_length=240, mean=-3.0, std=2.5)
    extractor.save_pretrained(tmp_path)
    teacher = load_teacher(save_tiny("audio-spectrogram-transformer", tmp_path))
    model = tiny_model("audio-spectrogram-transformer")
    waveform = noise(int(seconds * 16_000))
    values = extractor(waveform[0].numpy(), sampling_rate=16_000, return_tensors="pt")["input_values"]
    by_row = layer_outputs(model.layers, lambda: model(values))[:, 2:]
    rows, columns = (32 - 8) // 6 + 1, (240 - 8) // 5 + 1
    by_column = by_row.unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2)
    actual = teacher.hidden_states(waveform)[0]
    real_columns = ((waveform.shape[1] - 400) // 160 + 1 - 8) // 5 + 1
    assert actual.shape[1] == real_columns * rows
    assert float((actual - by_column[:, : real_columns * rows]).abs().max()) < TOLERANCE


def test_kaldi_fbank_is_torchaudios() -> None:
    from torchaudio.compliance.kaldi import fbank

    waveforms = torch.cat([noise(5_000), noise(5_000).flip(1)])
    ours = kaldi_fbank(waveforms)
    for row, waveform in zip(ours, waveforms, strict=True):
        expected = fbank(waveform[None], sample_frequency=16_000, window_type="hanning", num_mel_bins=128)
        torch.testing.assert_close(row, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("padding_value", [0.0, 1.0])
def test_wav2vec2_bert_in_a_padded_batch(padding_value: float, tmp_path: Path) -> None:
    from transformers import SeamlessM4TFeatureExtractor

    extractor = SeamlessM4TFeatureExtractor(padding_value=padding_value)
    extractor.save_pretrained(tmp_path)
    teacher = load_teacher(save_tiny("wav2vec2-bert", tmp_path))
    model = tiny_model("wav2vec2-bert")
    # Even and odd numbers of mel frames. With an odd number, transformers treats the last frame as padding.
    waveforms = [noise(samples)[0] for samples in (8_000, 8_160, 5_000, 5_160)]
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    batch = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    inputs = extractor([w.numpy() for w in waveforms], sampling_rate=16_000, return_tensors="pt")
    assert isinstance(teacher, Wav2Vec2BertTeacher)
    mask = torch.zeros(4, num_frames(8_160), dtype=torch.bool)
    mask[:, 5:11] = True
    for frame_mask in (None, mask):
        run = lambda m=frame_mask: model(**inputs, mask_time_indices=m)  # noqa: E731
        expected = layer_outputs(model.encoder.layers, run).transpose(0, 1)
        actual = teacher.hidden_states(batch, lengths, frame_mask)
        assert expected.shape == actual.shape
        for row, length in enumerate(lengths.tolist()):
            real = slice(0, num_frames(length))
            assert float((actual[row, :, real] - expected[row, :, real]).abs().max()) < TOLERANCE


def test_unusable_whisper_folders(tmp_path: Path) -> None:
    folder = Path(save_tiny("whisper", tmp_path))
    config = folder / "config.json"
    text = config.read_text()
    for old, new, message in (
        ('"activation_function": "gelu"', '"activation_function": "relu"', "activation_function = 'relu'"),
        ('"encoder_attention_heads": 4', '"encoder_attention_heads": 5', "sizes from which no model can be built"),
        ('"d_model": 32', '"d_model": "x"', "without a usable value"),
        ('"encoder_layers": 3', '"encoder_layers": 2', "has weights that its configuration doesn't know"),
        ('"d_model": 32', '"d_model": 24000000', "shapes don't fit"),
        (
            '"encoder_layers": 3',
            '"encoder_layers": 999999999',
            "layers and convolutions in its configuration, but only",
        ),
    ):
        assert old in text
        config.write_text(text.replace(old, new))
        with pytest.raises(TeacherError, match=message):
            load_teacher(str(folder))


def test_sizes_and_sampling_rate_of_ast(tmp_path: Path) -> None:
    folder = Path(save_tiny("audio-spectrogram-transformer", tmp_path))
    config = folder / "config.json"
    text = config.read_text()
    for old, new in (
        ('"hidden_size": 32', '"hidden_size": 24000000'),
        ('"max_length": 240', '"max_length": 24000000000'),
    ):
        assert old in text
        config.write_text(text.replace(old, new))
        with pytest.raises(TeacherError, match="shapes don't fit"):
            load_teacher(str(folder))
    config.write_text(text)
    (folder / "preprocessor_config.json").write_text('{"sampling_rate": 44100}')
    with pytest.raises(TeacherError, match="sampling_rate = 44100, but teachers must take 16000 Hz"):
        load_teacher(str(folder))
