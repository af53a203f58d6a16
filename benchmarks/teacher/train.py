"""Train the demo's teacher: a small HuBERT that predicts phones of synthetic speech at masked and unmasked frames.

The same machine and versions give the same weights again, since seeds and the number of threads are fixed. It takes less than an hour
on two idle cores: ``python -m benchmarks.teacher.train FOLDER``.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram

from benchmarks.teacher.distortion import distort
from benchmarks.teacher.speech import LabelledSpeech, synthesise
from ray_distill.pipeline.demo.phones import PHONES
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, RECEPTIVE_FIELD, SAMPLE_RATE, num_frames
from ray_distill.teacher_cache.masks import MaskPolicy, draw_mask
from ray_distill.teacher_cache.teachers.architecture import Architecture, build_model

ARCHITECTURE = Architecture(
    conv_layers=[(32, 10, 5), *[(48, 3, 2)] * 4, *[(48, 2, 2)] * 2],
    conv_bias=False,
    conv_layer_norm=False,
    dim=128,
    ffn_dim=256,
    heads=4,
    layers=6,
    layer_norm_first=False,
    pos_kernel=64,
    pos_groups=16,
)
MASKS = MaskPolicy(selection="static", mask_prob=0.5, mask_length=10)
_THREADS = 2
"""Number of parts of a step, each computed by one thread."""
_PART_SECONDS, _PIECE_SECONDS = 8, (2, 4, 4, 8)
_SPECTRUM_STEPS, _SPECTRUM_RATE = 250, 4e-3
"""First steps, in which only the convolutions are trained, on the bands, and their learning rate then."""
_LEARNING_RATE, _WARM_UP, _DECAY = 1e-3, 100, 300
"""Learning rate after that, steps in which the Transformer's rises to it, and steps in which both fall to zero at the end."""
_EASY = 3000
"""Number of steps in which the shares of masked and distorted pieces rise from none to all."""
_BANDS = 40
_CLASSIFIED = (2, 4, 6)
"""Layers whose outputs predict phones."""
_SEED = 0


class InFullPrecision(nn.Module):
    """A module that computes in float32 under autocast."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Return the module's output."""
        with torch.autocast("cpu", enabled=False):
            y: Tensor = self.module(x.float())
            return y


class PhonePredictor(nn.Module):
    """A HuBERT with a mask embedding, and linear layers that are not exported.

    They predict phones from some layers' outputs, and log-mel bands from the output of the convolutions. Without the bands, the
    convolutions take thousands of steps to find more in a waveform than its loudness.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hubert = build_model(ARCHITECTURE, "the demo's teacher")
        positions: Any = self.hubert.encoder.transformer.pos_conv_embed
        # In bf16, PyTorch 2.11 computes a wrong grouped convolution on CPUs with AMX: the error is as large as the result.
        self.hubert.encoder.transformer.pos_conv_embed = InFullPrecision(positions)
        self.mask_embedding = nn.Parameter(torch.rand(ARCHITECTURE.dim))
        self.classifiers = nn.ModuleDict(
            {str(layer): nn.Linear(ARCHITECTURE.dim, len(PHONES)) for layer in _CLASSIFIED}
        )
        self.bands = nn.Linear(ARCHITECTURE.conv_layers[-1][0], _BANDS)
        self.log_mel = MelSpectrogram(
            SAMPLE_RATE, RECEPTIVE_FIELD, hop_length=FRAME_SAMPLES, center=False, n_mels=_BANDS
        )
        for module in self.hubert.feature_extractor.modules():
            if isinstance(module, nn.Conv1d):  # As in fairseq. With PyTorch's default, GELUs would be almost linear.
                nn.init.kaiming_normal_(module.weight)

    def forward(self, waveforms: Tensor, frame_mask: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Map (B, S) waveforms of equal length and (B, T) masks to (layers, B, T, phones) logits and (B, T, bands).

        Without masks there are no logits.
        """
        features, _ = self.hubert.feature_extractor(waveforms, None)
        bands = self.bands(features)
        if frame_mask is None:
            return None, bands
        x_BTD = self.hubert.encoder.feature_projection(features)
        x_BTD = torch.where(frame_mask[:, :, None], self.mask_embedding, x_BTD)
        layers = self.hubert.encoder.transformer.get_intermediate_outputs(x_BTD)
        logits = [classifier(layers[int(layer) - 1]) for layer, classifier in self.classifiers.items()]
        return torch.stack(logits), bands

    @torch.no_grad()
    def spectrum(self, waveforms: Tensor) -> Tensor:
        """Return the (B, T, bands) log-mel bands, with zero mean over each utterance; the model does not see its level."""
        power = self.log_mel(waveforms)
        floor = 1e-6 * power.mean((1, 2), keepdim=True) + 1e-9
        bands_BTF = (power + floor).log().transpose(1, 2)
        return (bands_BTF - bands_BTF.mean(1, keepdim=True)) / 2


def batch(speech: LabelledSpeech, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the waveforms (B, S), phones (B, T) and masks (B, T) of one part of a step."""
    rng = np.random.default_rng([_SEED, number])
    seconds = int(rng.choice(_PIECE_SECONDS))
    frames = num_frames(seconds * SAMPLE_RATE)
    waveforms, phones, masks = [], [], []
    for row, piece in enumerate(rng.integers(len(speech.phones), size=_PART_SECONDS // seconds)):
        labels = speech.phones[piece]
        first = int(rng.integers(len(labels) - frames + 1))
        begin = speech.starts[piece] + first * FRAME_SAMPLES
        waveforms.append(speech.samples[begin : begin + seconds * SAMPLE_RATE])
        phones.append(labels[first : first + frames])
        masks.append(draw_mask(MASKS, _SEED, number, str(row), frames))
    targets = torch.from_numpy(np.stack(phones)).long()
    clean = torch.from_numpy(np.stack(waveforms)).float() / 32768
    distorted = distort(clean, torch.Generator().manual_seed(number))
    hard = torch.from_numpy(rng.random((2, len(clean), 1)) < (number / _THREADS - _SPECTRUM_STEPS) / _EASY)
    return torch.where(hard[0], distorted, clean), targets, torch.from_numpy(np.stack(masks)) & hard[1]


def part_gradients(
    model: PhonePredictor, speech: LabelledSpeech, number: int
) -> tuple[tuple[Tensor, ...], dict[str, float]]:
    """Return the gradients of one part of a step, with its losses and the accuracies of the last layer."""
    waveforms, targets, masks = batch(speech, number)
    only_bands = number < _THREADS * _SPECTRUM_STEPS
    with torch.autocast("cpu", torch.bfloat16):
        logits, bands = model(waveforms, None if only_bands else masks)
    spectrum = model.spectrum(waveforms)
    loss = F.mse_loss(bands.float(), spectrum)
    figures = {"bands": loss.item() / spectrum.square().mean().item()}
    if logits is not None:
        logits = logits.float()
        phones = F.cross_entropy(logits.flatten(0, 2), targets.expand(len(logits), -1, -1).flatten(), ignore_index=-1)
        loss = loss + phones
        right, labelled = logits[-1].argmax(-1) == targets, targets >= 0
        figures |= {
            "phones": phones.item(),
            "unmasked": right[labelled & ~masks].float().mean().item(),
            "masked": right[labelled & masks].float().mean().item(),
        }
    return torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True), figures


def huggingface_config() -> dict[str, object]:
    """Return the content of config.json for `ARCHITECTURE`."""
    channels, kernels, strides = zip(*ARCHITECTURE.conv_layers, strict=True)
    return {
        "architectures": ["HubertModel"],
        "model_type": "hubert",
        "dtype": "float16",
        "hidden_size": ARCHITECTURE.dim,
        "intermediate_size": ARCHITECTURE.ffn_dim,
        "num_hidden_layers": ARCHITECTURE.layers,
        "num_attention_heads": ARCHITECTURE.heads,
        "conv_dim": channels,
        "conv_kernel": kernels,
        "conv_stride": strides,
        "conv_bias": ARCHITECTURE.conv_bias,
        "num_feat_extract_layers": len(channels),
        "feat_extract_norm": "group",
        "do_stable_layer_norm": ARCHITECTURE.layer_norm_first,
        "num_conv_pos_embeddings": ARCHITECTURE.pos_kernel,
        "num_conv_pos_embedding_groups": ARCHITECTURE.pos_groups,
    }


def export(model: PhonePredictor, folder: Path) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors in half precision, as transformers does."""
    weights = {"masked_spec_embed": model.mask_embedding.detach()}
    for name, value in model.hubert.state_dict().items():
        name = name.removeprefix("encoder.").replace("transformer.", "encoder.", 1)
        weights[name.replace("pos_conv_embed.module.", "pos_conv_embed.")] = value
    folder.mkdir(parents=True, exist_ok=True)
    halves = {name: weights[name].half().contiguous() for name in sorted(weights)}
    (folder / "model.safetensors").write_bytes(save(halves, metadata={"format": "pt"}))
    extractor = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1, "sampling_rate": SAMPLE_RATE}
    for name, tree in (
        ("config.json", huggingface_config()),
        ("preprocessor_config.json", extractor | {"do_normalize": False, "return_attention_mask": True}),
    ):
        (folder / name).write_text(json.dumps(tree, indent=2) + "\n")


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of the teacher, in Hugging Face's layout.")],
    hours: Annotated[float, typer.Option(help="Hours of speech.")] = 6.0,
    steps: Annotated[int, typer.Option(help="Number of steps.")] = 1700,
    save_every: Annotated[int, typer.Option(help="Steps between exports and states of the training.")] = 100,
    resume: Annotated[
        Path | None,
        typer.Option(help="FOLDER/state.pt from before the end of another training; the result is the same."),
    ] = None,
) -> None:
    """Train and export the teacher."""
    torch.set_num_threads(1)
    torch.manual_seed(_SEED)
    started = time.monotonic()
    speech = synthesise(hours, _SEED)
    print(
        f"{len(speech.phones)} pieces, {len(speech.samples) / SAMPLE_RATE / 3600:.2f} h, {time.monotonic() - started:.0f} s"
    )
    model = PhonePredictor()
    print(f"{sum(p.numel() for p in model.hubert.parameters()) + ARCHITECTURE.dim:,} parameters")
    front = list(model.hubert.feature_extractor.parameters()) + list(model.bands.parameters())
    rest = [p for p in model.parameters() if all(p is not other for other in front)]
    groups = [{"params": front}, {"params": rest}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    pool = ThreadPoolExecutor(_THREADS, initializer=torch.set_num_threads, initargs=(1,))
    seen: list[dict[str, float]] = []
    first = 0
    if resume is not None:
        state = torch.load(resume, weights_only=True)
        first = state["step"]
        if first > steps - _DECAY:
            raise SystemExit(
                f"{resume} is at step {first}, where a training of {steps} steps has begun to end; give more steps"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for step in range(first, steps):
        end, after = min((steps - step) / _DECAY, 1.0), step - _SPECTRUM_STEPS
        optimizer.param_groups[0]["lr"] = end * (_SPECTRUM_RATE if after < 0 else _LEARNING_RATE)
        optimizer.param_groups[1]["lr"] = end * _LEARNING_RATE * min(max(after, 0) / _WARM_UP, 1.0)
        parts = range(step * _THREADS, (step + 1) * _THREADS)
        gradients, figures = zip(*pool.map(partial(part_gradients, model, speech), parts), strict=True)
        for parameter, *summands in zip(model.parameters(), *gradients, strict=True):
            parameter.grad = torch.stack(summands).mean(0)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen.extend(figures)
        if (step + 1) % 100 == 0:
            means = ", ".join(
                f"{name} {np.nanmean([row[name] for row in seen if name in row]):.3f}" for name in seen[-1]
            )
            print(f"step {step + 1}: {means}, {time.monotonic() - started:.0f} s", flush=True)
            seen.clear()
        if (step + 1) % save_every == 0:
            export(model, folder)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, folder / "state.pt")
    export(model, folder)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
