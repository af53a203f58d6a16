"""Measure the cost of features: the student in every exported form, against HuBERT Base and a model of DistilHuBERT's shape.

``python -m benchmarks.student.inference`` times one utterance at a time, with all candidates in turns, on one and on two cores. It
also measures the memory of each candidate in a fresh process, and its size on disk. Weights are random by default, since speed does
not depend on them. Ratios are medians of the ratios within rounds. ``--device cuda`` runs the PyTorch candidates on a GPU.

With ``--model`` it also measures the error of ONNX and ONNX int8 against PyTorch, for a trained student on real speech.
"""

import gc
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from benchmarks.memory import forget_peak, peak_resident_bytes, resident_bytes
from benchmarks.result_file import REPOSITORY, RESULTS, write_result
from benchmarks.small_speech import HELD_OUT, utterances
from ray_distill.pipeline.config import load_config
from ray_distill.pipeline.student_export import open_student
from ray_distill.student import Student, StudentConfig
from ray_distill.student.exporters.onnx import export_onnx
from ray_distill.student.exporters.portable import portable_student
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.teachers.architecture import HUBERT_CONVOLUTIONS

BASE, DISTIL = 12, 2
"""Number of layers of HuBERT Base and of DistilHuBERT, which has the same convolutions."""

Run = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Case:
    """How a candidate is built.

    Attributes:
        student: The student's configuration as JSON.
        device: Device of the PyTorch candidates.
        threads: Threads of each runtime.
        folder: Folder with the exported files.
        small: Whether the models to compare with are tiny, to try the script.
    """

    student: str
    device: str
    threads: int
    folder: str
    small: bool

    def make_student(self) -> Student:
        torch.manual_seed(0)
        return Student(StudentConfig.model_validate_json(self.student)).eval()


def parameters_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def ours(case: Case) -> tuple[Run, int]:
    """Build the student as the service runs it."""
    student = case.make_student().to(case.device)
    size = parameters_bytes(portable_student(case.make_student()))
    return lambda x: student.encode(x, torch.full((len(x),), x.shape[1], device=x.device)), size


def portable(case: Case) -> tuple[Run, int]:
    """Build the portable form that S3PRL and transformers run."""
    model = portable_student(case.make_student()).to(case.device)
    return model, parameters_bytes(model)


def compiled(case: Case) -> tuple[Run, int]:
    """Build the portable form with torch.compile, recompiled for each length."""
    model = portable_student(case.make_student()).to(case.device)
    model.hold_maps = True
    run: Run = torch.compile(model, dynamic=False)
    return run, parameters_bytes(model)


def onnx(case: Case, file: str = "student.onnx") -> tuple[Run, int]:
    """Build the ONNX form for ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
    # Otherwise its threads keep spinning while other candidates are timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    path = Path(case.folder) / file
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return (
        lambda x: session.run(None, {"waveforms": x.numpy(), "lengths": np.full(len(x), x.shape[1])}),
        path.stat().st_size,
    )


def onnx_int8(case: Case) -> tuple[Run, int]:
    """Build the ONNX form with the weights of matrix products in int8."""
    return onnx(case, "student-int8.onnx")


def transformers_hubert(case: Case, layers: int) -> tuple[Run, int]:
    from transformers import HubertConfig, HubertModel

    shape = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "conv_dim": (48,) * 7}
    config = HubertConfig(num_hidden_layers=layers, **(shape if case.small else {}))
    model = HubertModel(config).eval().to(case.device)
    return lambda x: model(x, output_hidden_states=True), parameters_bytes(model)


def torchaudio_hubert(case: Case, layers: int) -> tuple[Run, int]:
    import torchaudio

    width = 48 if case.small else 768
    model = torchaudio.models.wav2vec2_model(
        extractor_mode="group_norm",
        extractor_conv_layer_config=[
            (channels if not case.small else 48, k, s) for channels, k, s in HUBERT_CONVOLUTIONS
        ],
        extractor_conv_bias=False,
        encoder_embed_dim=width,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=128,
        encoder_pos_conv_groups=16,
        encoder_num_layers=layers,
        encoder_num_heads=width // 64 or 4,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=4 * width,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=False,
        encoder_layer_drop=0.0,
        aux_num_out=None,
    )
    model = model.eval().to(case.device)
    return lambda x: model.extract_features(x), parameters_bytes(model)


CANDIDATES: dict[str, Callable[[Case], tuple[Run, int]]] = {
    "HuBERT Base, transformers": lambda case: transformers_hubert(case, BASE),
    "HuBERT Base, torchaudio": lambda case: torchaudio_hubert(case, BASE),
    "DistilHuBERT's shape, transformers": lambda case: transformers_hubert(case, DISTIL),
    "DistilHuBERT's shape, torchaudio": lambda case: torchaudio_hubert(case, DISTIL),
    "student": ours,
    "student, portable": portable,
    "student, compiled": compiled,
    "student, ONNX": onnx,
    "student, ONNX int8": onnx_int8,
}
REFERENCE = "HuBERT Base, transformers"


def names_for(case: Case) -> list[str]:
    """Return the candidates that can run on this machine."""
    left_out = set()
    if case.device != "cpu":
        left_out |= {"student, ONNX", "student, ONNX int8"}
    elif case.small or (shutil.which("g++") is None and shutil.which("clang") is None):
        left_out |= {"student, compiled"}  # It needs a compiler, and takes a minute.
    return [name for name in CANDIDATES if name not in left_out]


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def time_all(case: Case, lengths: list[float], rounds: int) -> list[dict[str, Any]]:
    """Return a row per candidate and length: median seconds, real-time factor, throughput against HuBERT Base."""
    torch.set_num_threads(case.threads)
    names = names_for(case)
    built = {name: CANDIDATES[name](case) for name in names}
    rows = []
    for seconds in lengths:
        waveform = torch.randn(1, int(16_000 * seconds)).mul_(0.1).to(case.device)
        times: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds + 1):
            for name in names if number % 2 else reversed(names):
                wait(case.device)
                began = time.perf_counter()
                built[name][0](waveform)
                wait(case.device)
                if number:  # The first round warms up and compiles.
                    times[name].append(time.perf_counter() - began)
        for name in names:
            median = statistics.median(times[name])
            ratios = [a / b for a, b in zip(times[REFERENCE], times[name], strict=True)]
            rows.append(
                {
                    "candidate": name,
                    "device": case.device,
                    "threads": case.threads,
                    "seconds_of_audio": seconds,
                    "latency_seconds": median,
                    "real_time_factor": median / seconds,
                    "throughput_over_hubert_base": statistics.median(ratios),
                    "bytes_of_weights": built[name][1],
                }
            )
    return rows


@torch.inference_mode()
def memory(case: Case, name: str, seconds: float) -> int:
    """Return the peak memory of loading a candidate and running it once. Call it in a fresh process."""
    torch.set_num_threads(case.threads)
    waveform = torch.randn(1, int(16_000 * seconds)).mul_(0.1)
    gc.collect()
    forget_peak()
    before = resident_bytes()
    run, _ = CANDIDATES[name](case)
    run(waveform)
    return peak_resident_bytes() - before


@torch.no_grad()
def errors(model: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """Return the relative errors of ONNX and ONNX int8 against PyTorch, per layer, on real held-out speech."""
    student, origin = open_student(model)
    found: dict[str, Any] = {"student": origin.get("run")}
    waves = [torch.from_numpy(load_audio(u.path))[None] for u in utterances(HELD_OUT, seconds)]
    expected = [student.encode(wave, torch.tensor([wave.shape[1]]))[0][0] for wave in waves]
    for name, int8 in (("onnx", False), ("onnx_int8", True)):
        file = folder / f"trained-{name}.onnx"
        export_onnx(student, file, origin, int8=int8)
        run, _ = onnx(Case("", "cpu", 1, str(folder), False), file.name)
        states = [torch.from_numpy(run(wave)[0][0, 1:]) for wave in waves]
        ratio = [
            float(torch.cat([(a[k] - b[k]).flatten() for a, b in zip(states, expected, strict=True)]).norm())
            / float(torch.cat([b[k].flatten() for b in expected]).norm())
            for k in range(len(expected[0]))
        ]
        found[f"relative_error_{name}_by_layer"] = ratio
        print(f"{name}: relative error {', '.join(f'{value:.1e}' for value in ratio)} (layer 1 to {len(ratio)})")
    return found


def main(
    config: Annotated[Path, typer.Option(help="Recipe that gives the student's shape.")] = REPOSITORY
    / "configs/armhubert-s-960.yaml",
    model: Annotated[
        Path | None, typer.Option(help="Trained student, to measure the errors of ONNX on real speech.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[str, typer.Option(help="Numbers of cores, separated by commas.")] = "1,2",
    seconds: Annotated[str, typer.Option(help="Lengths of the utterance in seconds, separated by commas.")] = "1,10",
    rounds: Annotated[int, typer.Option(help="Number of rounds; medians over them are reported.")] = 7,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run tiny models for a moment, only to try the script.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "student/inference.json",
) -> None:
    """Time the student in every form against HuBERT Base and a model of DistilHuBERT's shape."""
    lengths, numbers = [float(length) for length in seconds.split(",")], [int(number) for number in threads.split(",")]
    shape = load_config(config).resolve_student(12, 768)
    if quick:
        lengths, numbers, rounds = [0.5], [1], 2
        small = {
            "encoder_layers": 2,
            "encoder_embed_dim": 48,
            "encoder_ffn_embed_dim": 48,
            "encoder_attention_heads": 4,
        }
        convolutions = ((16, 10, 5), *((16, 3, 2),) * 4, *((48, 2, 2),) * 2)
        shape = shape.model_copy(update=small | {"conv_layers": convolutions, "attention_reuse": "alternate"})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        case = Case(shape.model_dump_json(), device, 1, folder, quick)
        if device == "cpu":
            export_onnx(case.make_student(), Path(folder) / "student.onnx", {})
            export_onnx(case.make_student(), Path(folder) / "student-int8.onnx", {}, int8=True)
        # One process per number of threads, since PyTorch's thread pool can't be resized.
        for number in numbers:
            case = Case(shape.model_dump_json(), device, number, folder, quick)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                found = process.submit(time_all, case, lengths, rounds).result()
            if number == numbers[0] and device == "cpu":
                for row in found[-2:] if quick else found:
                    if row["seconds_of_audio"] == lengths[-1]:
                        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                            row["peak_bytes"] = process.submit(memory, case, row["candidate"], lengths[-1]).result()
            rows += found
            for row in found:
                peak = f"{row['peak_bytes'] / 2**20:6.0f} MiB" if "peak_bytes" in row else ""
                print(
                    f"{number} cores {row['seconds_of_audio']:4g} s  {row['candidate']:36}"
                    f"{row['latency_seconds'] * 1e3:8.0f} ms  {row['real_time_factor']:.4f} of real time  "
                    f"{row['throughput_over_hubert_base']:5.2f}x  {row['bytes_of_weights'] / 1e6:6.1f} MB {peak}",
                    flush=True,
                )
        errors_found = errors(model, Path(folder), 30.0 if quick else 200.0) if model is not None else None
    missing = [name for name in CANDIDATES if name not in names_for(case)]
    write_result(
        output,
        student="small" if quick else config.stem,
        rounds=rounds,
        rows=rows,
        not_run=missing,
        errors=errors_found,
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
