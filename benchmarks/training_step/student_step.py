"""Measure a training step of the student against a straightforward implementation of the same network.

``python -m benchmarks.training_step.student_step`` first checks that both give the same numbers. It then times them in turns
(medians of several rounds) and measures the peak memory of one step, each in a fresh process. Ours is `LayerDistiller`; the other is
`published_student.py` beside this file, with the same weights. It runs on a GPU in fp32 and bf16 if CUDA is available.
"""

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.memory import forget_peak, peak_resident_bytes, resident_bytes
from benchmarks.result_file import RESULTS, write_result
from benchmarks.training_step.published_student import PublishedStudent, published_loss
from ray_distill.student import Student, StudentConfig
from ray_distill.student.objectives.layer_prediction import LayerDistiller
from ray_distill.teacher_cache.frames import num_frames

NAMES = ("published", "ours")
SMALL = StudentConfig(
    conv_layers=((16, 10, 5), *((16, 3, 2),) * 4, *((24, 2, 2),) * 2),
    encoder_layers=4,
    encoder_embed_dim=24,
    encoder_ffn_embed_dim=48,
    encoder_attention_heads=4,
    conv_pos=16,
    conv_pos_groups=4,
    target_dim=32,
)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    device: str
    precision: str
    seconds: float
    batch: int
    threads: int
    small: bool


class Bench:
    """Both implementations, with one student and one batch."""

    def __init__(self, case: Case) -> None:
        torch.set_num_threads(case.threads)
        torch.manual_seed(0)
        self.case = case
        self.student = Student(SMALL if case.small else StudentConfig()).to(case.device)
        self.distiller, self.published = LayerDistiller(self.student), PublishedStudent(self.student)
        samples = int(16_000 * case.seconds)
        frames, config = num_frames(samples), self.student.config
        self.waveforms = torch.randn(case.batch, samples, device=case.device) * 0.1
        self.lengths = torch.full((case.batch,), samples, device=case.device)
        self.mask = torch.rand(case.batch, frames, device=case.device) < 0.4
        self.targets = torch.randn(case.batch, config.encoder_layers, frames, config.target_dim, device=case.device)

    def train(self, on: bool) -> None:
        self.distiller.train(on)
        self.published.train(on)

    def loss(self, name: str) -> Tensor:
        case = self.case
        with torch.autocast(case.device, torch.bfloat16) if case.precision == "bf16" else nullcontext():
            if name == "ours":
                total: Tensor = self.distiller(self.waveforms, self.lengths, self.mask, self.targets).total
                return total
            return published_loss(self.published(self.waveforms, self.mask), self.targets)

    def validation(self, name: str) -> None:
        with torch.no_grad():
            self.loss(name)

    def step(self, name: str) -> None:
        self.student.zero_grad(set_to_none=True)
        self.loss(name).backward()

    def seconds(self, function: Callable[[str], None], name: str) -> float:
        self.wait()
        began = time.perf_counter()
        function(name)
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        if self.case.device == "cuda":
            torch.cuda.synchronize()


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def gradient(student: Student) -> Tensor:
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def agreement(case: Case) -> dict[str, float]:
    """Return the relative differences of outputs, loss and gradients, without dropout.

    An unpadded batch is compared directly, and our padded batch with the published implementation on one utterance at a time."""
    bench = Bench(case)
    bench.train(False)
    student, waveforms, mask, targets = bench.student, bench.waveforms, bench.mask, bench.targets
    with torch.no_grad():
        ours = student(waveforms, bench.lengths, mask).projections
        found = {"outputs": relative(ours, bench.published(waveforms, mask))}
    losses, gradients = {}, {}
    for name in NAMES:
        bench.step(name)
        losses[name], gradients[name] = bench.loss(name).detach(), gradient(student)
    found["loss"] = relative(losses["ours"], losses["published"])
    found["gradients"] = relative(gradients["ours"], gradients["published"])
    lengths = torch.linspace(0.5 * waveforms.shape[1], waveforms.shape[1], case.batch).long()
    student.zero_grad()
    loss = bench.distiller(waveforms, lengths.to(waveforms.device), mask, targets).total
    loss.backward()
    padded = gradient(student)
    with torch.no_grad():
        together = student(waveforms, lengths.to(waveforms.device), mask).projections
    student.zero_grad()
    alone, outputs = torch.zeros_like(loss), []
    for row, samples in enumerate(lengths.tolist()):
        frames = num_frames(samples)
        projections = bench.published(waveforms[row : row + 1, :samples], mask[row : row + 1, :frames])
        part = published_loss(projections, targets[row : row + 1, :, :frames]) * frames / num_frames(lengths).sum()
        part.backward()
        alone += part.detach()
        outputs.append(relative(together[row, :, :frames], projections[0].detach()))
    found["padded outputs"] = max(outputs)
    found["padded loss"] = relative(loss.detach(), alone)
    found["padded gradients"] = relative(padded, gradient(student))
    return found


def peak_bytes(case: Case, name: str) -> int:
    """Return the peak memory of a training step, beyond weights and batch. Call it in a fresh process."""
    bench = Bench(case)
    bench.train(True)
    if case.device == "cuda":
        bench.step(name)  # Allocate the libraries' workspaces first.
        bench.student.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        bench.step(name)
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    forget_peak()
    before = resident_bytes()
    bench.step(name)
    return peak_resident_bytes() - before


def measure(case: Case, rounds: int) -> dict[str, Any]:
    bench = Bench(case)
    row: dict[str, Any] = {"device": case.device, "precision": case.precision}
    row |= {"seconds": case.seconds, "batch": case.batch}
    for what, function, training in (("forward", bench.validation, False), ("step", bench.step, True)):
        bench.train(training)
        for name in NAMES:
            function(name)
        times: dict[str, list[float]] = {name: [] for name in NAMES}
        for number in range(rounds):
            for name in NAMES if number % 2 else reversed(NAMES):
                times[name].append(bench.seconds(function, name))
        for name in NAMES:
            row[f"{what}_seconds_{name}"] = statistics.median(times[name])
        row[f"{what}_speedup"] = statistics.median(
            a / b for a, b in zip(times["published"], times["ours"], strict=True)
        )
    del bench
    for name in NAMES:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            row[f"peak_bytes_{name}"] = process.submit(peak_bytes, case, name).result()
    row["memory_ratio"] = row["peak_bytes_ours"] / row["peak_bytes_published"]
    return row


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    seconds: Annotated[str, typer.Option(help="Lengths of the utterances in seconds, separated by commas.")] = "4,8,15",
    batch: Annotated[int | None, typer.Option(help="Utterances per batch. Default: 2 on a CPU, 16 on a GPU.")] = None,
    rounds: Annotated[int, typer.Option(help="Number of rounds; medians over them are reported.")] = 7,
    threads: Annotated[int, typer.Option(help="PyTorch threads on the CPU.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run a tiny student for a moment, only to try the script.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "training_step/student_step.json",
) -> None:
    """Measure time and memory of a training step of the student against the published way of computing it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = [float(length) for length in seconds.split(",")]
    if quick:
        lengths, rounds = [0.5], 2
    batch = batch or (16 if device == "cuda" else 2)
    same = agreement(Case(device, "fp32", lengths[0], batch, threads, quick))
    print("relative differences:", ", ".join(f"{name} {value:.1e}" for name, value in same.items()))
    worst = max(same.values())
    assert worst < 1e-3, f"the two implementations differ by {worst:.1e}"
    rows = []
    print("device precision length   forward s (published, ours)  step s (published, ours)  peak MiB (published, ours)")
    for precision in ("fp32", "bf16") if device == "cuda" else ("fp32",):
        for length in lengths:
            row = measure(Case(device, precision, length, batch, threads, quick), rounds)
            rows.append(row)
            cells = [
                "{:8.3f} {:8.3f} {:5.2f}x".format(
                    *(row[f"{what}_{key}"] for key in ("seconds_published", "seconds_ours", "speedup"))
                )
                for what in ("forward", "step")
            ]
            memory = [row[f"peak_bytes_{name}"] / 2**20 for name in NAMES]
            print(
                f"{device:6} {precision:9} {length:5g} s ",
                *cells,
                f"{memory[0]:8.0f} {memory[1]:8.0f} {row['memory_ratio']:5.2f}",
            )
    write_result(
        output,
        student="small" if quick else "ARMHuBERT-S",
        threads=threads,
        rounds=rounds,
        relative_differences=same,
        rows=rows,
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
