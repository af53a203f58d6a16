"""The sections ``corpus``, ``teacher``, ``teachers`` and ``cache`` of a configuration."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic

from ray_distill.local_paths import Local
from ray_distill.pipeline.corpus.formats import check_format
from ray_distill.student.objectives.several_teachers import TeacherObjective
from ray_distill.student.training.field_effects import CHANGES_LOSS_MEANING, CHANGES_NO_RESULT, SAME_IN_ABLATION
from ray_distill.student.training.train_settings import ONE_OR_MORE
from ray_distill.teacher_cache.codecs import DEFAULT_CODEC, check_codec
from ray_distill.teacher_cache.precision import Precision
from ray_distill.teacher_cache.storage.cache_spec import DEFAULT_BATCH_SECONDS, Targets
from ray_distill.teacher_cache.storage.failed_utterances import DEFAULT_MAX_FAILED
from ray_distill.teacher_cache.targets.domains import Weight
from ray_distill.teacher_cache.targets.fitting_batch import BatchSeconds
from ray_distill.teacher_cache.targets.frame_rate import FrameRule


class Section(pydantic.BaseModel):
    """A section of the configuration, whose unknown keys are refused."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _check_format(name: str | None) -> str | None:
    return None if name is None else check_format(name)


def is_url(path: Any) -> bool:
    """Return whether a text or path is a URL such as ``s3://bucket``, maybe with one slash, as paths are written."""
    return re.match("[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) is not None


class CorpusSection(Section):
    """Location of the audio, and which of it is used."""

    path: Local[Path]
    """Folder in LibriSpeech's layout, any other folder of audio, a manifest (CSV, TSV, Parquet or JSON lines) with a column ``path``,
    or a corpus in another format; see ``format``. ``OWNER/NAME`` or ``OWNER/NAME@REVISION``, if there is no such path, and
    ``hf://datasets/OWNER/NAME`` are datasets on the Hugging Face Hub, which are downloaded."""
    format: Annotated[str | None, pydantic.AfterValidator(_check_format)] = None
    """Format of the corpus: ``folder``, ``manifest``, ``nemo``, ``fairseq``, ``kaldi``, ``lhotse``, ``lhotse_shar``, ``huggingface``,
    ``webdataset``, ``common_voice``, ``voxpopuli``, or one that an installed package adds. None looks at the files."""
    channel: int | Literal["mix"] | None = None
    """Channel to use of audio with several, counted from 0, or ``mix`` for their mean. None also takes the mean, and says how many
    utterances have several channels. A channel that the corpus itself names counts first."""
    train_splits: Annotated[list[str] | None, ONE_OR_MORE] = None
    """Splits or folders to train on; ``.`` means the files in no split's folder. None takes those with a word that begins with
    ``train``; see `ray_distill.pipeline.corpus.index`."""
    validation_splits: Annotated[list[str] | None, ONE_OR_MORE] = None
    """Splits or folders to validate on. None takes those with a word such as ``dev``, ``val``, ``valid``, ``validation`` or
    ``heldout``. Splits with a word that begins with ``test`` or ``eval`` are not used unless they are named."""
    validation_fraction: float = pydantic.Field(default=0.05, gt=0, lt=1)
    """Fraction of the utterances to hold out if the corpus has no validation split."""
    min_seconds: float = pydantic.Field(default=0.025, ge=0.025)
    """Shortest audio in seconds. Shorter files are skipped and listed. The default, also the minimum, is 400 samples (one frame)."""
    max_seconds: float = pydantic.Field(default=40.0, gt=0)
    """Longest utterance in seconds. Longer audio is skipped and listed, or cut; see ``long_audio``."""
    long_audio: Literal["skip", "cut"] = "skip"
    """What becomes of audio longer than ``max_seconds``: ``skip`` it, or ``cut`` it at pauses into windows that cover it."""

    @pydantic.field_validator("path", mode="before")
    @classmethod
    def _no_url(cls, path: Any) -> Any:
        if is_url(path) and not str(path).startswith("hf:"):
            raise ValueError(
                f"{path} is a URL, but a corpus is a local folder or file; list its files in a local manifest, whose column path "
                "may hold URLs"
            )
        return path

    @pydantic.field_serializer("path", when_used="json")
    def _with_two_slashes(self, path: Path) -> str:
        """Return the path as text; a ``Path`` keeps one of the slashes of ``hf://``."""
        return re.sub("^hf:/(?!/)", "hf://", str(path))

    @pydantic.field_validator("channel")
    @classmethod
    def _possible(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and not 0 <= value < 64:
            raise ValueError(f"there is no channel {value}; channels are counted from 0, up to 63")
        return value


class TeacherSection(Section):
    """The teacher."""

    checkpoint: Annotated[str, SAME_IN_ABLATION]
    """Checkpoint of the teacher: a ``.pt`` file, a Hugging Face folder, the name of a model on the Hugging Face Hub such as
    ``facebook/hubert-base-ls960`` or ``OWNER/NAME@REVISION`` (an existing path of that name comes first; ``hf://OWNER/NAME`` always
    means the hub), the folder of a run or an exported student, ``torchaudio:NAME``, ``builtin:phone-hubert`` for the small HuBERT
    in this package (see `ray_distill.teacher_cache.teachers.builtin`), or ``random:LxD`` for random weights.
    The prefix ``mean-mask:`` gives a teacher without a mask embedding a substitute, so that it has masked targets. The prefix
    ``layer-norm:`` normalises each frame of each layer, as teachers with layer norms before their blocks need."""
    layers: Annotated[list[int] | None, ONE_OR_MORE, CHANGES_LOSS_MEANING] = None
    """Layers to learn from, counted from 1. None takes all of them."""
    frames: Annotated[FrameRule | None, CHANGES_LOSS_MEANING] = None
    """How the frames of a teacher with another rate than 50 per second become the student's of 20 ms when the cache is read:
    ``average`` over the student's frame (100 per second are averaged over pairs, 25 are repeated), or the ``nearest`` frame. None
    takes ``average``, and ``nearest`` for discrete targets. Teachers with 50 frames per second or with patches need neither."""

    @pydantic.field_validator("layers")
    @classmethod
    def _each_once(cls, layers: list[int] | None) -> list[int] | None:
        if layers is not None and (not layers or len(set(layers)) < len(layers)):
            raise ValueError(f"{layers} must name one or more layers, each once, such as [4, 8, 12]")
        return layers


class CacheSection(Section):
    """The teacher cache, and how it is built."""

    path: Annotated[Local[str], SAME_IN_ABLATION]
    """Folder of the cache, or a URI such as ``s3://bucket/prefix``. A configuration that names none takes
    ``caches/TEACHER-CORPUS-SPLITS``, with the training splits that it names and, at the end, the name of a discrete codec."""
    codec: Annotated[str, pydantic.AfterValidator(check_codec), SAME_IN_ABLATION] = DEFAULT_CODEC
    """Storage format of the features: ``pca``, ``layer-pca``, ``int8``, ``fp16`` or ``fp32``. ``pca:STEP`` and
    ``layer-pca:STEP`` set the quantisation step. ``units:CLUSTERS`` and ``mvq:CODEBOOKS`` store discrete targets, for the objectives
    ``units`` and ``mvq``."""
    targets: Targets = "clean_and_masked"
    """Targets to store: ``clean_and_masked``, ``composite_only``, ``clean_only`` or ``masked_everywhere``; see `CacheSpec`."""
    precision: Annotated[Precision | None, SAME_IN_ABLATION] = None
    """Precision of the teacher's forward passes; ``fp16`` needs GPUs. None takes the precision of an existing cache, or else
    ``fp16`` on GPUs and ``fp32`` on CPUs."""
    audio: Annotated[Literal["flac", "pcm", "store", "source"], SAME_IN_ABLATION] = "flac"
    """Storage of the audio: ``flac`` (smaller) or ``pcm`` (faster to read) in the cache itself, or ``store``: once for any number of
    caches, in ``audio_path``. The cache then refers to it by its fingerprint. ``source`` stores none: every epoch decodes the files of
    the corpus and compares their hashes, which is fast enough for FLAC and WAV at 16 kHz."""
    audio_path: Annotated[Local[str | None], CHANGES_NO_RESULT, SAME_IN_ABLATION] = None
    """Folder or URI of the audio with ``audio`` ``store``: an audio store, which the cache stage builds if nothing is there, or a
    cache that holds the audio of the same corpus. A configuration that names none takes ``caches/audio-CORPUS-SPLITS``."""
    shard_minutes: Annotated[float | None, SAME_IN_ABLATION] = pydantic.Field(default=None, gt=0)
    """Minutes of audio per shard, the unit of work, retry and resume. None takes those of an existing cache, or else 10, and for more
    than 1,000 h of audio a minute per 100 h, but at most 60."""
    batch_seconds: Annotated[BatchSeconds, SAME_IN_ABLATION] = DEFAULT_BATCH_SECONDS
    """Seconds of audio per teacher batch, padding included. ``auto``: each worker of a new cache measures how many fit on its GPU, and
    an existing cache keeps its own setting. Needs gpus_per_actor."""
    actors: Annotated[int, CHANGES_NO_RESULT, SAME_IN_ABLATION] = pydantic.Field(default=1, ge=1)
    """Number of teachers that run in parallel."""
    gpus_per_actor: Annotated[float, CHANGES_NO_RESULT, SAME_IN_ABLATION] = pydantic.Field(default=0.0, ge=0)
    """GPUs per teacher. 0 runs the teacher on CPU."""
    cpus_per_actor: Annotated[int, CHANGES_NO_RESULT, SAME_IN_ABLATION] = pydantic.Field(default=1, ge=1)
    """CPU cores per teacher."""
    max_failed: Annotated[float, CHANGES_NO_RESULT, SAME_IN_ABLATION] = pydantic.Field(default=DEFAULT_MAX_FAILED, ge=0)
    """Number of utterances that may fail while the cache is built, because their audio can't be decoded or a hidden state is not
    finite; below 1 their share, at least 3 utterances; 0 allows none. They are left out and listed with reasons in
    ``corpus/failed.csv``. If more fail, the build stops."""
    local: Annotated[Local[str | None], CHANGES_NO_RESULT, SAME_IN_ABLATION] = None
    """Folder on a disk of each training node, such as ``/nvme/copies``, for copies of the cache's files. The workers of a node share
    it. None reads every utterance from ``path``. Give one if ``path`` is an object store or a slow network disk."""
    local_gb: Annotated[float | None, CHANGES_NO_RESULT, SAME_IN_ABLATION] = pydantic.Field(default=None, gt=0)
    """Maximum size of ``local`` in units of 1e9 bytes; the copies that were not used for the longest time make room. None takes 80 %
    of the disk's free space."""
    verify: Annotated[bool, CHANGES_NO_RESULT, SAME_IN_ABLATION] = True
    """Whether to read the whole cache and compare its checksums before training. What was sound before and has not changed since
    is not read again; ``ray-distill cache verify`` always reads everything."""

    @property
    def location(self) -> str:
        """Absolute path of the cache, or its URI."""
        return self.path if "://" in self.path else str(Path(self.path).absolute())

    @property
    def is_absolute(self) -> bool:
        """Whether the location does not depend on a process's working directory."""
        return "://" in self.path or Path(self.path).is_absolute()

    @property
    def audio_location(self) -> str | None:
        """Absolute path of the audio, or its URI; None if it is in the cache itself."""
        path = self.audio_path
        return path if path is None or "://" in path else str(Path(path).absolute())

    @pydantic.field_validator("max_failed")
    @classmethod
    def _whole(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"{value:g} is neither a share below 1 nor a whole number of utterances")
        return value

    @pydantic.field_validator("local")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        if path is not None and not Path(path).is_absolute():
            raise ValueError(f"{path} is not an absolute path; give the path of a folder that each node has for itself")
        return path

    @pydantic.model_validator(mode="after")
    def _place_of_audio(self) -> Self:
        if self.audio_path is not None and self.audio != "store":
            raise ValueError(
                f"cache.audio_path does nothing with cache.audio {self.audio}; set cache.audio=store, or remove it"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _limit_has_a_folder(self) -> Self:
        if self.local_gb is not None and self.local is None:
            raise ValueError(
                "cache.local_gb limits the size of cache.local, which is not set; set it, or remove the limit"
            )
        return self

    @pydantic.field_validator("path", "audio_path", mode="before")
    @classmethod
    def _text(cls, path: Any) -> Any:
        if is_url(path) and not re.match("[^:]+://[^/]", str(path)) and not str(path).startswith("file:///"):
            raise ValueError(
                f"{path} is neither a local path nor a URI; write {str(path).partition(':')[0]}://BUCKET/PREFIX"
            )
        return str(path) if isinstance(path, Path) else path


class TeacherEntry(TeacherSection):
    """One of several teachers."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Name of the teacher, by which metrics and reports call it."""
    cache: CacheSection
    """Cache of this teacher. Keys that are not given are those of the section ``cache``, and the path is
    ``caches/TEACHER-CORPUS-SPLITS``. A string is its path."""
    objective: TeacherObjective | None = None
    """Objective with this teacher: a table with ``objective`` (its name) and its keys as in ``train``, or the name alone. None takes
    the objective of ``train``."""
    weight: Annotated[Weight, CHANGES_LOSS_MEANING] = 1.0
    """Weight of this teacher's loss. 0 leaves the teacher out of the training. A table such as ``{speech: 1, audio: 0.1}`` has a
    weight for each domain that the corpus names (the column ``domain`` of a manifest); utterances of other domains are refused."""
    start_step: int = pydantic.Field(default=0, ge=0)
    """First optimiser step, counted from 0, at which the teacher takes part. Validation always counts all teachers."""
    stop_step: int | None = pydantic.Field(default=None, ge=1)
    """First optimiser step at which the teacher takes no more part. None for the end of the training."""
