"""Time and memory saved by each hand-written autograd function of the student, against plain PyTorch under autograd.

``python -m benchmarks.training_step.autograd_functions`` runs each function and its plain form in turns on the same input, at the
sizes of ARMHuBERT-S: two utterances of 8 s in training. It first shows that both give equal gradients (without dropout,
whose random numbers differ), then takes medians, over several rounds, of the CPU time of forward and backward and of the
ratio of both, and counts the bytes that autograd saves between them, apart from inputs and parameters.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.result_file import RESULTS, write_result
from ray_distill.student.model.attention import attend
from ray_distill.student.model.convolution import gelu_convolution
from ray_distill.student.model.dropout import Dropout
from ray_distill.student.model.scaled_gradient import scale_gradient
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.teacher_cache.frames import num_frames

OURS, PLAIN = "ours", "plain"


@dataclass(frozen=True)
class Pair:
    """A function and its plain form, called without arguments, and their inputs and parameters.

    Attributes:
        ours, plain: Functions that return the output.
        leaves: Inputs and parameters that receive gradients.
        given: Other inputs.
        exact: Whether both must give equal gradients; not with dropout.
    """

    ours: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    leaves: list[Tensor]
    given: tuple[Tensor, ...] = ()
    exact: bool = True


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def convolutions(config: StudentConfig, batch: int, samples: int) -> Pair:
    """All convolutions of the front end, with the GELU before each but the first."""
    weights, channels = [], 1
    for outputs, kernel, _ in config.conv_layers:
        weights.append((torch.randn(outputs, channels, kernel) / (channels * kernel) ** 0.5).requires_grad_())
        channels = outputs
    strides = [stride for _, _, stride in config.conv_layers]
    waveforms = torch.randn(batch, samples)

    def ours() -> Tensor:
        x = waveforms[..., None]
        for number, (weight, stride) in enumerate(zip(weights, strides, strict=True)):
            x = gelu_convolution(x, weight, None, stride, gelu=number > 0)
        return x

    def plain() -> Tensor:
        x = waveforms[:, None]
        for number, (weight, stride) in enumerate(zip(weights, strides, strict=True)):
            x = F.conv1d(F.gelu(x) if number else x, weight, stride=stride)
        return x.transpose(1, 2)

    return Pair(ours, plain, weights, (waveforms,))


def dropout(config: StudentConfig, batch: int, samples: int) -> Pair:
    """Dropout inside a feed-forward layer."""
    x, layer = leaf(batch, num_frames(samples), config.encoder_ffn_embed_dim), Dropout(config.activation_dropout)
    return Pair(lambda: layer(x), lambda: F.dropout(x, config.activation_dropout), [x], exact=False)


def attention(config: StudentConfig, batch: int, samples: int) -> Pair:
    """Attention of a layer, with dropout."""
    heads, frames = config.encoder_attention_heads, num_frames(samples)
    inputs = [leaf(batch, heads, frames, config.encoder_embed_dim // heads) for _ in range(3)]
    rate = config.attention_dropout
    return Pair(
        lambda: attend(*inputs, None, rate),
        lambda: F.scaled_dot_product_attention(*inputs, None, rate),
        inputs,
        exact=False,
    )


def gradient_scaling(config: StudentConfig, batch: int, samples: int) -> Pair:
    """Layer gradient scaling of one layer."""
    x = leaf(batch, num_frames(samples), config.encoder_embed_dim)
    return Pair(lambda: scale_gradient(x, 0.5), lambda: 0.5 * x + 0.5 * x.detach(), [x])


PAIRS = {
    "convolution": convolutions,
    "dropout": dropout,
    "attention": attention,
    "scale_gradient": gradient_scaling,
}


def gradients(function: Callable[[], Tensor], pair: Pair) -> Tensor:
    for tensor in pair.leaves:
        tensor.grad = None
    function().sum().backward()
    return torch.cat([tensor.grad.flatten() for tensor in pair.leaves if tensor.grad is not None])


def saved_bytes(function: Callable[[], Tensor], pair: Pair) -> int:
    """Return the bytes of all storages that autograd saves for backward, apart from inputs and parameters."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*pair.leaves, *pair.given)}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
        total = sum(sizes.values())
    del output
    return total


def cpu_seconds(function: Callable[[], Tensor]) -> tuple[float, float]:
    """Return the CPU time of forward and of backward."""
    began = time.process_time()
    total = function().sum()
    middle = time.process_time()
    total.backward()
    return middle - began, time.process_time() - middle


def measure(name: str, config: StudentConfig, batch: int, samples: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    pair = PAIRS[name](config, batch, samples)
    functions = {OURS: pair.ours, PLAIN: pair.plain}
    row: dict[str, Any] = {"function": name}
    found, expected = (gradients(functions[which], pair) for which in (OURS, PLAIN))
    if pair.exact:
        row["relative_difference"] = float((found - expected).norm() / expected.norm())
        assert row["relative_difference"] < 1e-5, f"{name}: the gradients differ by {row['relative_difference']:.1e}"
    times: dict[str, list[tuple[float, float]]] = {OURS: [], PLAIN: []}
    for number in range(rounds):
        for which in (OURS, PLAIN) if number % 2 else (PLAIN, OURS):
            times[which].append(cpu_seconds(functions[which]))
    totals = {which: [sum(pieces) for pieces in times[which]] for which in times}
    for which in (OURS, PLAIN):
        row[f"forward_seconds_{which}"] = statistics.median(forward for forward, _ in times[which])
        row[f"backward_seconds_{which}"] = statistics.median(backward for _, backward in times[which])
        row[f"saved_bytes_{which}"] = saved_bytes(functions[which], pair)
    speedups = sorted(plain / ours for ours, plain in zip(totals[OURS], totals[PLAIN], strict=True))
    row["speedup"] = statistics.median(speedups)
    row["speedup_quartiles"] = [speedups[len(speedups) // 4], speedups[-1 - len(speedups) // 4]]
    return row


def main(
    seconds: Annotated[float, typer.Option(help="Length of the utterances in seconds.")] = 8.0,
    batch: Annotated[int, typer.Option(help="Number of utterances.")] = 2,
    rounds: Annotated[int, typer.Option(help="Number of rounds, of which medians are taken.")] = 15,
    quick: Annotated[bool, typer.Option("--quick", help="Short audio and two rounds, to try the script.")] = False,
    output: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "training_step" / "autograd_functions.json",
) -> None:
    """Measure what each hand-written autograd function of the student saves, on one thread of the CPU."""
    torch.set_num_threads(1)
    if quick:
        seconds, batch, rounds = 0.5, 1, 2
    config, samples = StudentConfig(), int(16_000 * seconds)
    print("function         speedup (quartiles)   seconds (ours, plain)   saved MB (ours, plain)")
    rows = []
    for name in PAIRS:
        row = measure(name, config, batch, samples, rounds)
        rows.append(row)
        low, high = row["speedup_quartiles"]
        totals = [row[f"forward_seconds_{which}"] + row[f"backward_seconds_{which}"] for which in (OURS, PLAIN)]
        saved = [row[f"saved_bytes_{which}"] / 1e6 for which in (OURS, PLAIN)]
        print(
            f"{name:16} {row['speedup']:.2f}x ({low:.2f}, {high:.2f})    {totals[0]:8.4f} {totals[1]:8.4f}       "
            f"{saved[0]:8.2f} {saved[1]:8.2f}"
        )
    write_result(output, student="ARMHuBERT-S", seconds=seconds, batch=batch, rounds=rounds, threads=1, rows=rows)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
