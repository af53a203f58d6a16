"""What is known of a teacher before its weights are read, and what a cache of it costs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ray_distill.pipeline.planning.cache_cost import typical_bytes_per_hour
from ray_distill.plugins import plugin_names
from ray_distill.teacher_cache.codecs import DEFAULT_CODEC
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, SAMPLE_RATE
from ray_distill.teacher_cache.teachers import NAMED, Teacher, open_folder, split_options, teacher_of_package
from ray_distill.teacher_cache.teachers.builtin import builtin_folder
from ray_distill.teacher_cache.teachers.bundles import bundle_names
from ray_distill.teacher_cache.teachers.header import hub_model_of, load_header
from ray_distill.teacher_cache.teachers.hub.hub_model import HubModel
from ray_distill.teacher_cache.teachers.huggingface_folder import HuggingFaceFolder
from ray_distill.teacher_cache.teachers.known import known_teachers

_FRAME_RATE = SAMPLE_RATE // FRAME_SAMPLES
SEE_CARD = "see the card"


@dataclass(frozen=True)
class TeacherFacts:
    """Facts of a teacher. None stands for what can't be known without its weights.

    Attributes:
        name: How to name it in ``teacher.checkpoint``.
        kind: Kind of the model, ``model_type`` in a Hugging Face configuration.
        layers: Number of Transformer layers.
        width: Width D of the layers.
        sampling_rate: Samples per second of its input.
        frame_rate: Frames per second; None for patches of a spectrogram.
        mask_embedding: Whether it has a mask embedding, which masked targets need.
        license: License as published, or ``see the card``.
        parameters: Number of weights of the encoder.
        to_download: Bytes of weights that are not on this machine yet.
        bytes_per_hour: Size of the cached features of one hour of audio in one pass over all layers, by codec; see
            `typical_bytes_per_hour`. Empty if layers, width or frame rate are unknown.
    """

    name: str
    kind: str
    layers: int | None
    width: int | None
    sampling_rate: int = SAMPLE_RATE
    frame_rate: float | None = _FRAME_RATE
    mask_embedding: bool | None = None
    license: str = SEE_CARD
    parameters: int | None = None
    to_download: int | None = None
    bytes_per_hour: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        known = self.layers and self.width and self.frame_rate
        cost = typical_bytes_per_hour(self.layers, self.width, self.frame_rate) if known else {}  # type: ignore[arg-type]
        object.__setattr__(self, "bytes_per_hour", cost)

    def as_json(self) -> dict[str, Any]:
        """Return the facts as a JSON object."""
        return asdict(self)


def published_facts() -> list[TeacherFacts]:
    """Return the facts of the well-known teachers on the hub, as published. Nothing is read from the hub."""
    return [TeacherFacts(**vars(teacher)) for teacher in known_teachers()]


def facts_of(spec: str) -> TeacherFacts:
    """Return the facts of any teacher that can be named, from its configuration and the header of its weights.

    Of a model on the hub, only its configuration and the headers of its safetensors are downloaded.

    Args:
        spec: Specification of a teacher as for `load_teacher`.

    Raises:
        ValueError: The teacher does not exist or can't be used.
    """
    header = load_header(spec)
    model = hub_model_of(spec)
    name = split_options(spec)[1]
    folder = _folder(name, model)
    kind = _kind(name) if folder is None else folder.model_type
    by_name = {known.name: known for known in known_teachers()}
    repository = "" if model is None else model.name.repository
    license = by_name[repository].license if repository in by_name else SEE_CARD
    to_download = sum(model.missing.values()) if model is not None else None if header is None else 0
    if header is None:
        layers, width = (None, None) if folder is None else folder.size
        return TeacherFacts(spec, kind, layers, width, license=license, to_download=to_download)
    return TeacherFacts(
        spec,
        kind,
        header.num_layers,
        header.dim,
        frame_rate=_frame_rate(header),
        mask_embedding=header.has_mask_embedding,
        license=license,
        parameters=header.num_parameters,
        to_download=to_download,
    )


def _folder(name: str, model: HubModel | None) -> HuggingFaceFolder | None:
    """Return the folder with the configuration of a teacher, or None if it has none."""
    if model is not None:
        return model.description
    if name.startswith("builtin:"):
        return HuggingFaceFolder(builtin_folder(name.removeprefix("builtin:")))
    path = Path(name).expanduser()
    return open_folder(path) if path.is_dir() else None


def _kind(name: str) -> str:
    if (other := teacher_of_package(name)) is not None:
        return f"teacher of the package {other.plugin.package} {other.plugin.version}"
    kinds = {"random:": "hubert with random weights", "torchaudio:": "torchaudio bundle"}
    return next((kind for prefix, kind in kinds.items() if name.startswith(prefix)), "checkpoint of fairseq or WavLM")


def _frame_rate(teacher: Teacher) -> float | None:
    if teacher.patches is not None:
        return None
    return int(teacher.frame_rate) if teacher.frame_rate.denominator == 1 else float(teacher.frame_rate)


def kinds_table() -> Table:
    """Return a table of the ways to name a teacher."""
    table = Table(title="how to name a teacher (teacher.checkpoint, --teacher)", title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("teacher")
    for row in (
        (escape("OWNER/NAME[@REVISION]"), "a model on the Hugging Face Hub; hf://OWNER/NAME is the same"),
        ("FOLDER", "a folder written by save_pretrained of transformers"),
        ("RUN, EXPORT", "the student of a run of this project, from the run's folder or from an export"),
        ("FILE.pt", "a pre-trained HuBERT or wav2vec 2.0 of fairseq, or a WavLM"),
        ("torchaudio:NAME", f"a bundle of torchaudio, without mask embedding: {', '.join(bundle_names())}"),
        ("builtin:phone-hubert", "a small HuBERT in this package, trained on synthetic speech"),
        ("random:LAYERSxDIM", "a HuBERT with random weights, to try things out"),
        *(
            (f"{name}:...", "a teacher of an installed package")
            for name in plugin_names("teacher")
            if name not in NAMED
        ),
        ("mean-mask:..., layer-norm:...", "options before any of these; see the documentation of teachers"),
    ):
        table.add_row(*row)
    return table


def facts_lines(teachers: Sequence[TeacherFacts]) -> list[str]:
    """Return the lines of a table of teachers by kind, with the size of an hour of cached features in the default codec."""
    lines = ["well-known teachers on the hub (facts as published)", f"  {'name':40}{'layers':11}{'license':17}GB/h"]
    kind = ""
    for teacher in teachers:
        if kind != teacher.kind:
            kind = teacher.kind
            rate = "patches of a spectrogram" if teacher.frame_rate is None else f"{teacher.frame_rate:g} frames/s"
            lines.append(f"{kind}: {rate}, {'a' if teacher.mask_embedding else 'no'} mask embedding")
        cost = f"{teacher.bytes_per_hour[DEFAULT_CODEC] / 1e9:.2f}" if teacher.bytes_per_hour else ""
        size = f"{teacher.layers} x {teacher.width}"
        lines.append(f"  {teacher.name:40}{size:11}{teacher.license:17}{cost}".rstrip())
    return lines


def show_table(teacher: TeacherFacts) -> Table:
    """Return a table of the facts of one teacher."""
    unknown = "unknown before its weights are read"
    table = Table(show_header=False, title=f"teacher {escape(teacher.name)}")
    rows = {
        "kind": escape(teacher.kind),
        "layers": f"{teacher.layers} of width {teacher.width}" if teacher.layers else unknown,
        "parameters": f"{teacher.parameters:,}" if teacher.parameters else unknown,
        "input": f"audio at {teacher.sampling_rate} Hz",
        "frames": "patches of a spectrogram" if teacher.frame_rate is None else f"{teacher.frame_rate:g} per second",
        "mask embedding": unknown if teacher.mask_embedding is None else "yes" if teacher.mask_embedding else "no",
        "license": escape(teacher.license),
    }
    if teacher.to_download != 0:
        rows["to download"] = unknown if teacher.to_download is None else f"{teacher.to_download / 1e6:,.1f} MB"
    for name, text in rows.items():
        table.add_row(name, text)
    for codec, size in teacher.bytes_per_hour.items():
        amount = f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
        table.add_row(f"cache, {codec}", f"{amount} per hour of audio and pass")
    return table
