"""The one typed configuration of a run, read from YAML, changed by ``section.key=value``, checked before any work."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import pydantic
import yaml

from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.training.field_effects import CHANGES_LOSS_MEANING
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.codecs import DEFAULT_CODEC, check_codec
from ray_distill.teacher_cache.patch_geometry import PatchGeometry
from ray_distill.teacher_cache.storage.cache_spec import MaskDraws, Targets


class ConfigError(ValueError):
    """A configuration that can't be used; the message names the key and what is allowed."""


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class CorpusSection(_Section):
    """Where the audio is.

    Attributes:
        path: LibriSpeech's layout, any folder of audio, or a CSV/Parquet manifest.
        train_splits, validation_splits: split names; None takes what the names suggest (see `ray_distill.pipeline.corpus`).
        validation_fraction: share of the utterances held out where the corpus has no splits.
        min_seconds: shorter audio is skipped, and listed; at least the default, 400 samples (one frame).
        max_seconds: longer audio is skipped, and listed.
    """

    path: Path
    train_splits: list[str] | None = None
    validation_splits: list[str] | None = None
    validation_fraction: float = pydantic.Field(default=0.05, gt=0, lt=1)
    min_seconds: float = pydantic.Field(default=0.025, ge=0.025)
    max_seconds: float = pydantic.Field(default=40.0, gt=0)


class TeacherSection(_Section):
    """The teacher.

    Attributes:
        checkpoint: for `teacher_cache.load_teacher`: a .pt file, a Hugging Face folder, ``torchaudio:NAME``, ``random:LxD``;
            ``mean-mask:`` before it gives a teacher without a mask embedding a stand-in, so that it has masked targets;
            ``layer-norm:`` normalises each frame of each layer, as teachers with layer norms before their blocks need.
        layers: 1-based layers to learn from; None takes all.
    """

    checkpoint: str
    layers: Annotated[list[int] | None, CHANGES_LOSS_MEANING] = None


class CacheSection(_Section):
    """The cache.

    Attributes:
        path: its folder, or a URI such as ``s3://bucket/prefix``.
        codec: how features are stored: ``pca`` (default), ``layer-pca``, ``int8``, ``fp16``, ``fp32``; ``pca:STEP`` sets the
            quantisation step.
        targets: ``clean_and_masked`` (default), ``composite_only`` or ``clean_only``; see `cache_spec.CacheSpec`.
        precision: of the teacher: ``fp32``, ``fp16`` (on GPUs), ``bf16``; None takes that of the cache where there is one, else
            fp16 on GPUs and fp32 on CPUs.
        audio: ``flac`` (smaller) or ``pcm`` (faster to read).
        shard_minutes: audio per shard (the unit of work, retry and resume).
        batch_seconds: padded audio per teacher batch.
        actors: teachers that run side by side.
        gpus_per_actor: GPUs each takes; 0 runs on CPU.
        cpus_per_actor: cores each takes.
        verify: read every byte and compare checksums before training.
    """

    path: str
    codec: Annotated[str, pydantic.AfterValidator(check_codec)] = DEFAULT_CODEC
    targets: Targets = "clean_and_masked"
    precision: Literal["fp32", "fp16", "bf16"] | None = None
    audio: Literal["flac", "pcm"] = "flac"
    shard_minutes: float = pydantic.Field(default=10.0, gt=0)
    batch_seconds: float = pydantic.Field(default=120.0, gt=0)
    actors: int = pydantic.Field(default=1, ge=1)
    gpus_per_actor: float = pydantic.Field(default=0.0, ge=0)
    cpus_per_actor: int = pydantic.Field(default=1, ge=1)
    verify: bool = True

    @property
    def location(self) -> str:
        """Its absolute path, or its URI."""
        return self.path if "://" in self.path else str(Path(self.path).absolute())

    @property
    def is_absolute(self) -> bool:
        """Whether every process finds it under this name."""
        return "://" in self.path or Path(self.path).is_absolute()

    @pydantic.field_validator("path", mode="before")
    @classmethod
    def _text(cls, path: Any) -> Any:
        return str(path) if isinstance(path, Path) else path


class Config(_Section):
    """A run.

    Attributes:
        name: of the run; its folder is ``runs/name``.
        runs: folder of all runs.
        corpus, teacher, masks, cache, train: see their classes.
        student: fields of `student.StudentConfig`. ``encoder_layers`` (with split heads, ``split_heads``) and ``target_dim`` left
            out, or ``teacher``, take the number of layers learnt from and the teacher's width.
    """

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs: Path = Path("runs")
    corpus: CorpusSection
    teacher: TeacherSection
    masks: MaskDraws = MaskDraws()
    cache: CacheSection
    student: dict[str, Any] = {}
    train: TrainSettings

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.runs / self.name

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Self:
        pattern = self.student.get("attention_reuse")
        placeholder = len(pattern) if isinstance(pattern, (list, tuple)) else len(self.teacher.layers or range(12))
        student = self.resolve_student(placeholder, StudentConfig.model_fields["target_dim"].default)
        self.train.check_student(student)
        if self.train.mask_embedding == "teacher" and not self.masks.draws:
            raise ValueError("train.mask_embedding teacher needs masks.draws; without masks no embedding is used")
        return self

    def resolve_student(self, num_layers: int, dim: int, patches: PatchGeometry | None = None) -> StudentConfig:
        """The student for a teacher with this many layers to learn from, this width and these patches, if it has any."""
        values = dict(self.student)
        predictions = "split_heads" if values.get("heads") == "split" else "encoder_layers"
        for key, value in ((predictions, num_layers), ("target_dim", dim), ("patches", patches)):
            if values.get(key, "teacher") == "teacher":
                values[key] = value
        try:
            return StudentConfig.model_validate(values)
        except pydantic.ValidationError as error:
            raise ConfigError(explain(error, StudentConfig, "student.")) from error


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML configuration and applies ``section.key=value`` overrides (values are YAML).

    Raises:
        ConfigError: unreadable file, malformed override, unknown key, wrong type, impossible combination.
    """
    tree = read_tree(path)
    for key, value in map(parse_override, overrides):
        set_key(tree, key, value)
    return check_config(tree)


def read_tree(path: Path) -> dict[str, Any]:
    """A YAML file's sections, unchecked. ConfigError where it can't be read, or holds anything else."""
    if not path.is_file():
        raise ConfigError(f"there is no configuration file at {path}; configs/ has the published recipes and the demo")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections (corpus, teacher, ...), not {type(tree).__name__}")
    return tree


def parse_override(text: str) -> tuple[str, Any]:
    """``section.key=value`` as key and value. ConfigError where it is malformed."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{text!r} is not an override; write section.key=value, as in train.epochs=3")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {key!r} is not valid YAML: {value!r}") from error


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in place. ConfigError where a section on its way is a value."""
    *sections, name = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{key!r} can't be set: {section!r} is a value, not a section")
    node[name] = value


def check_config(tree: dict[str, Any]) -> Config:
    """The typed configuration of a tree. ConfigError where it can't be one."""
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error, Config, "")) from error


def explain(error: pydantic.ValidationError, model: type[pydantic.BaseModel], prefix: str) -> str:
    """One sentence for each error: the key, what is wrong, and for an unknown key the allowed ones."""
    sentences = []
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        key = prefix + ".".join(location)
        if item["type"] == "extra_forbidden":
            owner: Any = model
            for part in item["loc"][:-1]:
                if isinstance(part, int):  # Of a list; its items are of the kind that was found.
                    continue
                kind = owner.model_fields[part].annotation
                owner = next(k for k in (kind, *get_args(kind)) if hasattr(k, "model_fields"))
            sentences.append(f"{key}: unknown key; allowed here: {', '.join(sorted(owner.model_fields))}")
        elif item["type"] == "missing":
            sentences.append(f"{key}: missing; it must be given")
        elif item["type"] == "value_error":
            reason = str(item["ctx"]["error"])
            sentences.append(
                f"{key}: {reason}" if location else f"{prefix.rstrip('.')}: {reason}" if prefix else reason
            )
        else:
            sentences.append(f"{key}: {item['msg']} (got {item['input']!r})")
    return "; ".join(sentences)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, as kept in a run's folder."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
