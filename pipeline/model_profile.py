"""Parameters and multiply-accumulate operations of a student and its teacher, in total and by part.

One multiply-accumulate operation (MAC) is counted for each multiplication of a matrix product or convolution in one forward pass over
one utterance: in convolutions, in linear layers, and in attention (queries x keys, and attention map x values). Normalisation,
activations, softmax, biases and additions are not counted. A layer that reuses an attention map has no queries x keys, even where the
program computes them again to save memory. Multiplications with the padding of the position convolution are counted. The operations
are counted while PyTorch executes them rather than calculated by a formula, so a new option of the architecture needs no new rule.

With heads included, 10 s of audio give the published ratios of ARMHuBERT: 28 % of the parameters and 30 % of the MACs of HuBERT Base.
Inference needs no heads, so the last row of the table excludes them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ray_distill.pipeline.config import load_config
from ray_distill.pipeline.student_export import checkpoints, open_student
from ray_distill.student.model.attention import Attention
from ray_distill.student.model.student import Student
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.teachers import Teacher, is_path, load_teacher, split_options
from ray_distill.teacher_cache.teachers.hub.hub_name import parse_hub_name
from ray_distill.teacher_cache.teachers.wav2vec2 import Wav2Vec2Teacher

HUBERT_BASE = "random:12x768"
"""A teacher of the shape of HuBERT Base. Its weights do not affect the counts."""

OTHER = "other"


@dataclass
class Profile:
    """The counts of one model.

    Attributes:
        parameters: Number of parameters by part, including the mask embedding.
        macs: Number of MACs for one utterance by part.
        seconds: Length of the utterance in seconds.
        total_parameters: Number of parameters.
        total_macs: Number of MACs.
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
    """Profile a student on random audio.

    Args:
        student: Student; it is moved to the CPU and set to evaluation mode.
        seconds: Length of the audio in seconds. Default: 10.

    Returns:
        Counts of the parts convolutions, position, attention, feed-forward, heads and other (projection, normalisation, mask
        embedding, ...).
    """
    student = student.eval().cpu()
    layers: list[Any] = list(student.layers)
    parts: dict[str, list[nn.Module]] = {
        "convolutions": list(student.conv_blocks),
        "position": [student.position] if student.position is not None else [],
        "attention": [layer.attention for layer in layers if getattr(layer, "attention", None) is not None],
        "feed-forward": [
            module
            for layer in layers
            for name in ("up", "down", "first", "second")
            if (module := getattr(layer, name, None)) is not None
        ],
        "heads": [
            *student.upsamplers.values(),
            *([student.split] if student.split is not None else []),
            *student.inner_heads,
            *student.heads,
        ],
    }
    waveform = torch.randn(1, int(seconds * SAMPLE_RATE)) * 0.1
    lengths = torch.tensor([waveform.shape[1]])
    recomputed = 0

    def count_recomputed(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal recomputed
        queries = output[1].queries
        recomputed += queries.numel() * queries.shape[2]

    with ExitStack() as stack:
        for module in student.modules():
            if isinstance(module, Attention) and module.reuses:
                stack.callback(module.register_forward_hook(count_recomputed).remove)
        macs = _count(parts, lambda: student(waveform, lengths))
    macs["attention"] -= recomputed
    return Profile(_parameters(parts, student.parameters()), macs, seconds)


def profile_teacher(teacher: Teacher, seconds: float = 10.0) -> Profile:
    """Profile a teacher on random audio.

    Args:
        teacher: Teacher built like wav2vec 2.0.
        seconds: Length of the audio in seconds. Default: 10.

    Returns:
        Counts of the same parts as `profile_student`, without heads.

    Raises:
        ValueError: The teacher is not built like wav2vec 2.0.
    """
    if not isinstance(teacher, Wav2Vec2Teacher):
        raise ValueError(
            f"{teacher.name} can't be compared part by part with a student; give a teacher that is built like wav2vec 2.0"
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


def _parameters(parts: Mapping[str, list[nn.Module]], parameters: Iterable[nn.Parameter]) -> dict[str, int]:
    counts = {
        name: sum(p.numel() for module in modules for p in module.parameters()) for name, modules in parts.items()
    }
    return counts | {OTHER: sum(p.numel() for p in parameters) - sum(counts.values())}


def _addmm_flops(out: Any, first: Any, second: Any, out_shape: Any = None, **_: Any) -> int:
    """Return the FLOPs of ``addmm_``, which PyTorch's counter does not know, from the shapes of its arguments."""
    return int(2 * first[0] * first[1] * second[1])


def _count(parts: Mapping[str, list[nn.Module]], run: Callable[[], Any]) -> dict[str, int]:
    macs = dict.fromkeys(parts, 0)
    # The MATH backend computes attention as two matrix products, which the counter sees.
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        custom = {torch.ops.aten.addmm_: _addmm_flops}
        counter = stack.enter_context(FlopCounterMode(display=False, custom_mapping=custom))
        for name, modules in parts.items():
            for module in modules:
                stack.enter_context(_add_macs(module, name, macs, counter))
        run()
    macs[OTHER] = counter.get_total_flops() // 2 - sum(macs.values())
    return macs


@contextmanager
def _add_macs(module: nn.Module, part: str, macs: dict[str, int], counter: FlopCounterMode) -> Iterator[None]:
    """Add the MACs of the module's forward passes to those of a part."""
    flops_before: list[int] = []

    def begin(*_: Any) -> None:
        flops_before.append(counter.get_total_flops())

    def end(*_: Any) -> None:
        macs[part] += (counter.get_total_flops() - flops_before.pop()) // 2

    handles = module.register_forward_pre_hook(begin), module.register_forward_hook(end)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def profile_table(student: Profile, teacher: Profile, names: tuple[str, str]) -> Table:
    """Return a table of both profiles side by side, with the student's share of the teacher.

    Args:
        student: Profile of the student.
        teacher: Profile of the teacher, for the same length of audio.
        names: Names of the student and the teacher.
    """
    table = Table(title=f"parameters, and MACs for {student.seconds:g} s of audio")
    for column in ("part", f"{names[0]}: parameters", "MACs (G)", f"{names[1]}: parameters", "MACs (G)"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in dict.fromkeys([*student.parameters, *teacher.parameters]):
        cells = [part]
        for profile in (student, teacher):
            has_part = part in profile.parameters
            cells += [f"{profile.parameters[part]:,}", f"{profile.macs[part] / 1e9:.2f}"] if has_part else ["", ""]
        table.add_row(*cells)
    table.add_section()
    row = [cell for p in (student, teacher) for cell in (f"{p.total_parameters:,}", f"{p.total_macs / 1e9:.2f}")]
    table.add_row("total", *row)
    share = student.total_parameters / teacher.total_parameters, student.total_macs / teacher.total_macs
    table.add_row(f"share of {names[1]}", f"{share[0]:.1%}", f"{share[1]:.1%}", "", "")
    if heads := student.macs.get("heads"):
        share_of_macs = (student.total_macs - heads) / teacher.total_macs
        share_of_parameters = (student.total_parameters - student.parameters["heads"]) / teacher.total_parameters
        table.add_row("share without heads", f"{share_of_parameters:.1%}", f"{share_of_macs:.1%}", "", "")
    return table


def load_models(model: Path, teacher: str | None = None) -> tuple[Student, Teacher]:
    """Load a student and the teacher to compare it with.

    Args:
        model: YAML configuration, or folder of a run, of an export or of a checkpoint.
        teacher: Teacher to compare with, as in a configuration. Default: the run's, or the shape of HuBERT Base.

    Returns:
        The student, untrained if ``model`` is a configuration, and the teacher.

    Raises:
        ValueError: There is no such model or teacher, or it is damaged.
    """
    if model.suffix in (".yaml", ".yml"):
        config = load_config(model)
        section = config.parts[config.owner].teacher
        loaded = load_teacher(teacher or _shape_of(section.checkpoint))
        layers = len(section.layers or range(loaded.num_layers))
        dims = [loaded.dim]
        if config.train.aggregate == "concatenate":
            dims = [load_teacher(_shape_of(entry.checkpoint)).dim for entry in config.teachers]
        return Student(config.resolve_student(layers, config.target_dim(dims), loaded.patches)), loaded
    student, origin = open_student(model)
    run = origin.get("configuration")
    named = [] if run is None else checkpoints(run)
    return student, load_teacher(teacher or (_shape_of(named[0]) if named else HUBERT_BASE))


def _shape_of(checkpoint: str) -> str:
    """Return a specification of the teacher's shape: HuBERT Base's if the checkpoint is not on this machine or is on the hub."""
    name = split_options(checkpoint)[1]
    there = Path(name).exists() if is_path(name) else parse_hub_name(name) is None
    return checkpoint if there else HUBERT_BASE
