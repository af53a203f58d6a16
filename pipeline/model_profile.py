"""``python -m pipeline.profile_model MODEL``: parameters and multiply-accumulate operations of a student and its teacher, by part.

The counting rule. One multiply-accumulate (MAC) for each multiplication in a matrix product or convolution of one forward pass over
one utterance: convolutions, linear layers, and in attention queries x keys and map x values. Nothing is counted for normalisation,
activations, softmax, biases and sums. A layer that reuses an attention map has no queries x keys, even where the program computes
them again to save memory. Multiplications with the padding at the ends of the position convolution count. Operations are counted as
PyTorch carries them out, not from a formula, so an option of the architecture needs no rule of its own.

The published ratios of ARMHuBERT (28 % of HuBERT Base's parameters, 30 % of its MACs) come out, on 10 s of audio, with the heads that
distillation adds counted in both. Who only uses features computes no heads: the last row of the table.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ray_distill.pipeline.config import load_config
from ray_distill.pipeline.files import check_room
from ray_distill.pipeline.student_export import open_student
from ray_distill.student.model.attention import Attention
from ray_distill.student.model.student import Student
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.teachers import Teacher, load_teacher
from ray_distill.teacher_cache.teachers.wav2vec2 import Wav2Vec2Teacher

HUBERT_BASE = "random:12x768"
"""HuBERT Base's shape; weights don't matter here."""

OTHER = "other"


@dataclass
class Profile:
    """Counts of one model.

    Attributes:
        parameters: by part, mask embedding included.
        macs: by part, of one utterance.
        seconds: its length.
    """

    parameters: dict[str, int]
    macs: dict[str, int]
    seconds: float
    total_parameters: int = field(init=False)
    total_macs: int = field(init=False)

    def __post_init__(self) -> None:
        self.total_parameters = sum(self.parameters.values())
        self.total_macs = sum(self.macs.values())


def profile_student(student: Student, seconds: float = 10.0) -> Profile:
    """Parts: convolutions, position, attention, feed-forward, heads, other (projection, norms, mask embedding, ...)."""
    student = student.eval().cpu()
    layers: list[Any] = list(student.layers)
    parts: dict[str, list[nn.Module]] = {
        "convolutions": list(student.conv_blocks),
        "position": [student.position] if student.position is not None else [],
        "attention": [layer.attention for layer in layers if hasattr(layer, "attention")],
        "feed-forward": [
            module
            for layer in layers
            for name in ("up", "down", "first", "second")
            if (module := getattr(layer, name, None)) is not None
        ],
        "heads": [
            *student.upsamplers.values(),
            *([student.split] if student.split is not None else []),
            *student.heads,
        ],
    }
    waveform = torch.randn(1, int(seconds * SAMPLE_RATE)) * 0.1
    lengths = torch.tensor([waveform.shape[1]])
    again = 0

    def count_again(module: nn.Module, given: Any, output: Any) -> None:
        nonlocal again
        queries = output[1].queries
        again += queries.numel() * queries.shape[2]

    with ExitStack() as stack:
        for module in student.modules():
            if isinstance(module, Attention) and module.reuses:
                stack.callback(module.register_forward_hook(count_again).remove)
        macs = _count(parts, lambda: student(waveform, lengths))
    macs["attention"] -= again
    return Profile(_parameters(parts, student.parameters()), macs, seconds)


def profile_teacher(teacher: Teacher, seconds: float = 10.0) -> Profile:
    """The same parts, without heads. ValueError for a teacher that is not built like wav2vec 2.0."""
    if not isinstance(teacher, Wav2Vec2Teacher):
        raise ValueError(
            f"{teacher.name} has other parts than a student; give a teacher that is built like wav2vec 2.0"
        )
    model: Any = teacher.model
    transformer: Any = model.encoder.transformer
    parts: dict[str, list[nn.Module]] = {
        "convolutions": [layer.conv for layer in model.feature_extractor.conv_layers],
        "position": [transformer.pos_conv_embed],
        "attention": [layer.attention for layer in transformer.layers],
        "feed-forward": [layer.feed_forward for layer in transformer.layers],
    }
    waveform = torch.randn(1, int(seconds * SAMPLE_RATE)) * 0.1
    macs = _count(parts, lambda: teacher.hidden_states(waveform))
    parameters = _parameters(parts, model.parameters())
    parameters[OTHER] += teacher.num_parameters - sum(parameters.values())  # The mask embedding.
    return Profile(parameters, macs, seconds)


def _parameters(parts: Mapping[str, list[nn.Module]], every: Iterable[nn.Parameter]) -> dict[str, int]:
    found = {name: sum(p.numel() for module in modules for p in module.parameters()) for name, modules in parts.items()}
    return found | {OTHER: sum(p.numel() for p in every) - sum(found.values())}


def _addmm_flops(out: Any, first: Any, second: Any, out_shape: Any = None, **_: Any) -> int:
    """Of the in-place form, which the counter does not know, by shapes."""
    return int(2 * first[0] * first[1] * second[1])


def _count(parts: Mapping[str, list[nn.Module]], run: Callable[[], Any]) -> dict[str, int]:
    found = dict.fromkeys(parts, 0)
    # In this form attention is two matrix products, each seen by the counter.
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        custom = {torch.ops.aten.addmm_: _addmm_flops}
        counter = stack.enter_context(FlopCounterMode(display=False, custom_mapping=custom))
        for name, modules in parts.items():
            for module in modules:
                stack.enter_context(_booked(module, name, found, counter))
        run()
    found[OTHER] = counter.get_total_flops() // 2 - sum(found.values())
    return found


@contextmanager
def _booked(module: nn.Module, name: str, found: dict[str, int], counter: FlopCounterMode) -> Iterator[None]:
    """Adds what the module computes to a part."""
    begun: list[int] = []

    def begin(*_: Any) -> None:
        begun.append(counter.get_total_flops())

    def end(*_: Any) -> None:
        found[name] += (counter.get_total_flops() - begun.pop()) // 2

    handles = module.register_forward_pre_hook(begin), module.register_forward_hook(end)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def profile_table(student: Profile, teacher: Profile, names: tuple[str, str]) -> Table:
    """Both side by side, with shares."""
    table = Table(title=f"parameters and MACs of {student.seconds:g} s of audio")
    for column in ("part", f"{names[0]}: parameters", "MACs (G)", f"{names[1]}: parameters", "MACs (G)"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in dict.fromkeys([*student.parameters, *teacher.parameters]):
        cells = [part]
        for profile in (student, teacher):
            known = part in profile.parameters
            cells += [f"{profile.parameters[part]:,}", f"{profile.macs[part] / 1e9:.2f}"] if known else ["", ""]
        table.add_row(*cells)
    table.add_section()
    row = [cell for p in (student, teacher) for cell in (f"{p.total_parameters:,}", f"{p.total_macs / 1e9:.2f}")]
    table.add_row("whole", *row)
    share = student.total_parameters / teacher.total_parameters, student.total_macs / teacher.total_macs
    table.add_row(f"of {names[1]}", f"{share[0]:.1%}", f"{share[1]:.1%}", "", "")
    if heads := student.macs.get("heads"):
        bare = (student.total_macs - heads) / teacher.total_macs
        kept = (student.total_parameters - student.parameters["heads"]) / teacher.total_parameters
        table.add_row("without heads", f"{kept:.1%}", f"{bare:.1%}", "", "")
    return table


def command(
    model: Annotated[
        Path, typer.Argument(help="A run's configuration (YAML), a run's folder, or an exported student.")
    ],
    teacher: Annotated[
        str | None, typer.Option(help=f"Default the run's, or HuBERT Base's shape ({HUBERT_BASE}).")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Length of the utterance; attention grows with its square.")] = 10.0,
    output: Annotated[Path | None, typer.Option(help="Also write the counts to this JSON file.")] = None,
) -> None:
    """Count parameters and multiply-accumulate operations of a student and its teacher, whole and by part."""
    try:
        if seconds * SAMPLE_RATE < 400:
            raise ValueError(f"--seconds {seconds:g} is shorter than one frame (0.025)")
        if output is not None:
            check_room(output.parent)
            if output.is_dir():
                raise ValueError(f"--output {output} is a folder; give a file's name")
        if model.suffix in (".yaml", ".yml"):
            config = load_config(model)
            loaded = load_teacher(teacher or _shape_of(config.teacher.checkpoint))
            layers = len(config.teacher.layers or range(loaded.num_layers))
            student = Student(config.resolve_student(layers, loaded.dim, loaded.patches))
        else:
            student, origin = open_student(model)
            run = origin.get("configuration")
            loaded = load_teacher(teacher or (HUBERT_BASE if run is None else _shape_of(run["teacher"]["checkpoint"])))
        profiles = profile_student(student, seconds), profile_teacher(loaded, seconds)
        Console().print(profile_table(*profiles, ("student", loaded.name)))
        if output is not None:
            record = {"student": asdict(profiles[0]), "teacher": asdict(profiles[1]), "teacher_name": loaded.name}
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(record, indent=2) + "\n")
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _shape_of(checkpoint: str) -> str:
    """The teacher to count; one that is not here has a shape all the same, if it is of the size that the recipes name."""
    return checkpoint if Path(checkpoint).exists() or ":" in checkpoint else HUBERT_BASE


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()
