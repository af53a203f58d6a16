"""The settings of the service: options of the command, environment variables and keywords of `create_app`.

Each setting is defined here once. `ray_distill.serve.command` makes the options of the command line from these classes, and
docs/in-depth/serving.md has a table that is made from them. An option that is not given is read from the environment variable
``RAY_DISTILL_SERVE_NAME``; without that, its default holds.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENVIRONMENT_PREFIX = "RAY_DISTILL_SERVE_"
_PORT = f"{ENVIRONMENT_PREFIX}PORT"
_OF_KUBERNETES = re.compile(r"_SERVICE_(HOST|PORT)|_PORT(_\d+_(TCP|UDP)(_\w+)?)?$")
Runtime = Literal["torch", "onnx"]
Precision = Literal["fp32", "bf16"]
_SENDING_SECONDS = 10
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:]+\]|[^\s/?#@:A-Z]+)(:\d+)?")


class _Group(BaseModel):
    """Settings that belong together; a wrong value is a ValueError of one sentence."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, validate_by_name=True
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_sentence(error)) from error


class BackendOptions(_Group):
    """How models run."""

    runtime: Runtime | None = Field(default=None, validation_alias=f"{ENVIRONMENT_PREFIX}BACKEND")
    """Library that runs the models. Default: onnx for a file that ends in .onnx, otherwise torch."""
    device: str = "cpu"
    """PyTorch device: cpu, cuda, cuda:1. ONNX Runtime runs on the CPU only."""
    precision: Precision = "fp32"
    """Precision of PyTorch's matrix products and convolutions. The features are float32 in both cases."""
    compile: bool = False
    """Compile the model with torch.compile before the service is ready. Audio shorter than 2 seconds may run uncompiled."""


class Limits(_Group):
    """How much one request, one API key and all requests together may use."""

    max_seconds: float = Field(default=60.0, gt=0)
    """Longest audio file that runs as a whole, in seconds."""
    long_audio: Literal["refuse", "windows"] = "refuse"
    """What happens to longer files: refuse answers 413, windows runs them in overlapping windows."""
    long_seconds: float = Field(default=600.0, gt=0)
    """Longest audio file that runs in windows, in seconds."""
    window_seconds: float = Field(default=30.0, ge=1)
    """Length of a window, in seconds."""
    overlap_seconds: float = Field(default=4.0, ge=0)
    """Minimum overlap of neighbouring windows, in seconds. Each frame comes from the window whose centre is nearer."""
    request_seconds: float = Field(default=300.0, gt=0)
    """Audio in all files of one request, in seconds; at most queue_seconds, but one file of the longest length is always accepted."""
    max_sample_rate: int = Field(default=192_000, ge=16_000)
    """Highest sampling rate of an audio file, in Hz."""
    max_channels: int = Field(default=8, ge=1)
    """Largest number of channels of an audio file."""
    decode_seconds: float = Field(default=5.0, gt=0)
    """Decoding that may wait, in seconds of expected work. Idle decoders accept any file."""
    max_bytes: int = Field(default=32 * 2**20, ge=1)
    """Largest request body, in bytes."""
    open_bytes: int = Field(default=2**30, ge=1)
    """Memory that all open requests may hold together, in bytes: bodies, decoded audio and responses."""
    deadline_seconds: float = Field(default=30.0, gt=0)
    """Longest time until the response, in seconds. A request may set a shorter timeout."""
    max_requests: int = Field(default=256, ge=1)
    """Number of requests that may be open at once."""
    key_requests: int | None = Field(default=None, ge=1)
    """Number of requests of one API key that may be open at once. Default: no limit."""
    key_rate: float | None = Field(default=None, gt=0)
    """Requests per second of one API key, on average; one second's worth may arrive at once. Default: no limit."""

    @model_validator(mode="before")
    @classmethod
    def _read_long_audio_table(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Accept ``long_audio`` as a table of ``max_seconds``, ``window_seconds`` and ``overlap_seconds``, or as None."""
        table = values.get("long_audio", "")
        if table is None:
            return values | {"long_audio": "refuse"}
        if not isinstance(table, Mapping):
            return values
        names = {
            "max_seconds": "long_seconds",
            "window_seconds": "window_seconds",
            "overlap_seconds": "overlap_seconds",
        }
        if unknown := table.keys() - names:
            raise ValueError(f"long_audio has no setting {min(unknown)!r}: use {', '.join(names)}.")
        return values | {"long_audio": "windows"} | {names[name]: value for name, value in table.items()}

    @model_validator(mode="after")
    def _check_together(self) -> "Limits":
        if self.open_bytes < self.max_bytes:
            raise ValueError(f"open_bytes ({self.open_bytes}) must be at least max_bytes ({self.max_bytes}).")
        if self.long_audio == "windows":
            if self.overlap_seconds > self.window_seconds / 2:
                raise ValueError(
                    f"overlap_seconds ({self.overlap_seconds:g}) must be at most half of window_seconds "
                    f"({self.window_seconds:g})."
                )
            if not self.window_seconds <= self.max_seconds < self.long_seconds:
                raise ValueError(
                    f"window_seconds ({self.window_seconds:g}) must be at most max_seconds ({self.max_seconds:g}), and "
                    f"max_seconds must be less than long_seconds ({self.long_seconds:g})."
                )
        return self

    @property
    def longest_seconds(self) -> float:
        """Longest audio file that is accepted, whole or in windows, in seconds."""
        return self.long_seconds if self.long_audio == "windows" else self.max_seconds

    @property
    def drain_seconds(self) -> int:
        """Seconds after which every open request has its response, and some time to send it."""
        return math.ceil(self.deadline_seconds + _SENDING_SECONDS)

    def record(self) -> dict[str, Any]:
        """Return the limits as ``/info`` reports them."""
        record = self.model_dump(include=set(Limits.model_fields))
        windows = {name: record.pop(f"{name}_seconds") for name in ("long", "window", "overlap")}
        table = {
            "max_seconds": windows["long"],
            "window_seconds": windows["window"],
            "overlap_seconds": windows["overlap"],
        }
        return record | {"long_audio": table if self.long_audio == "windows" else None}


class BatchLimits(_Group):
    """Bounds of batches and of the queue."""

    batch_seconds: float | None = Field(default=None, gt=0)
    """Audio in a batch, padding included, in seconds. Default: 8 on a CPU, where larger batches are not faster, otherwise 30."""
    wait_seconds: float = Field(default=0.002, ge=0)
    """Longest time that the oldest utterance waits for others to fill its batch while the model is idle, in seconds."""
    queue_seconds: float = Field(default=300.0, gt=0)
    """Audio that may wait in the queue of a model, in seconds. A request needs room for its first utterance there."""


def _split(value: Any) -> Any:
    """Return the words of a string, as environment variables hold lists; anything else unchanged."""
    return value.split() if isinstance(value, str) else value


def _named_folders(value: Any) -> Any:
    """Return ``NAME=FOLDER`` entries, in a list or a string, as a mapping; anything else unchanged."""
    entries = _split(value)
    if not isinstance(entries, list):
        return value
    folders = dict(entry.split("=", 1) for entry in entries if "=" in entry)
    if len(folders) < len(entries):
        raise ValueError("more must have entries NAME=FOLDER, each with a different name.")
    return folders


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the API keys in a file, one per line; empty lines are left out.

    Raises:
        ValueError: the file is missing, empty, not UTF-8, or has a line that is no key. A comment must not become a key.
    """
    try:
        text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""  # Some editors begin a file with a mark.
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8 text: write one API key per line.") from error
    lines = [line.strip() for line in text.splitlines()]
    for number, line in enumerate(lines, 1):
        if len(line.split()) > 1 or line.startswith("#"):
            raise ValueError(
                f"Line {number} of '{path}' is no API key: write one key per line, without spaces or comments."
            )
    keys = tuple(line for line in lines if line)
    if not keys:
        raise ValueError(f"'{path}' holds no API keys: write one key per line.")
    return keys


def _origins(value: Any) -> Any:
    """Return origins in a list or a string as a list, each as browsers send it: without a path, in lower case."""
    origins = _split(value)
    if isinstance(origins, (list, tuple)):
        for origin in origins:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(str(origin)):
                raise ValueError(
                    f"cors_origins has {origin!r}, which no browser sends: use SCHEME://HOST or SCHEME://HOST:PORT in lower "
                    "case and without a path, such as https://app.example."
                )
    return origins


class AppSettings(BackendOptions, BatchLimits, Limits, BaseSettings):
    """Settings of the application, whatever runs it.

    The groups may also be given as tables ``backend``, ``batch`` and ``limits``:
    ``AppSettings(limits={"max_seconds": 30})`` is ``AppSettings(max_seconds=30)``. What is not given is read from the environment.

    Raises:
        ValueError: a setting is unknown, out of range or contradicts another.
    """

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX)

    name: str | None = None
    """Name of the model in responses. Default: the name of its run, so demo for runs/demo/export."""
    library: Path | None = None
    """Folder of further models, each loaded when a request first names it."""
    library_loaded: int = Field(default=4, ge=1)
    """Number of models of the library that stay loaded; loading another one unloads the least recently used."""
    api_keys: Annotated[Path | tuple[str, ...] | None, NoDecode] = None
    """File of API keys, one per line. Clients must send one of them. Default: no key is needed."""
    cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_origins)] = Field(
        (), validation_alias=f"{ENVIRONMENT_PREFIX}CORS_ORIGIN"
    )
    """Origin whose pages may send requests from a browser, or *; may be repeated. Default: only the service's own page."""

    traces: bool = False
    """Send OpenTelemetry traces by OTLP over HTTP, set up by the variables OTEL_...; needs the extra named otel."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**_without_tables(values))

    def read_api_keys(self) -> tuple[str, ...]:
        """Return the API keys; none if no key is needed.

        Raises:
            ValueError: the file of keys is missing, empty, not UTF-8, or has a line that is no key.
        """
        return read_keys(self.api_keys) if isinstance(self.api_keys, Path) else self.api_keys or ()


class ServeSettings(AppSettings):
    """Settings of a service: its models, the application and the server around it."""

    model: Path
    """Folder of a run or of an exported student, such as runs/demo, or an .onnx file."""
    more: Annotated[dict[str, Path], NoDecode, BeforeValidator(_named_folders)] = Field(default_factory=dict)
    """Further model, as NAME=FOLDER; may be repeated."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 for any free port."""
    head_seconds: float = Field(default=10.0, gt=0)
    """Time that a client has to send the request line and the headers, in seconds; then its connection is closed."""
    max_connections: int = Field(default=1024, ge=1)
    """Number of connections that may be open at once."""
    leave_seconds: float = Field(default=0.0, ge=0)
    """Time after SIGTERM in which the service still accepts requests while /readyz answers 503, in seconds."""


class Option(NamedTuple):
    """A setting as an option of the command.

    Attributes:
        group: Title of the group that it belongs to.
        name: Name of the option without dashes, such as ``max_seconds``.
        field_name: Name of the field of `ServeSettings`.
        field: Type, default, range and description.
    """

    group: str
    name: str
    field_name: str
    field: FieldInfo

    @property
    def flag(self) -> str:
        """Flag on the command line, such as ``--max-seconds``."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def environment_variable(self) -> str:
        """Environment variable, such as ``RAY_DISTILL_SERVE_MAX_SECONDS``."""
        return f"{ENVIRONMENT_PREFIX}{self.name.upper()}"


def options() -> Iterator[Option]:
    """Yield every setting as an option, the models and the server first."""
    groups = {
        "Models and server": (ServeSettings, AppSettings),
        "Backend": (BackendOptions,),
        "Limits": (Limits,),
        "Batches and queue": (BatchLimits,),
    }
    for title, classes in groups.items():
        for kind in classes:
            for field_name in kind.__annotations__:
                if field_name in kind.model_fields:
                    field = ServeSettings.model_fields[field_name]
                    yield Option(title, _option_name(field.validation_alias or field_name), field_name, field)


def forget_service_link(environment: MutableMapping[str, str]) -> None:
    """Remove ``RAY_DISTILL_SERVE_PORT`` from an environment if it is a link, such as ``tcp://10.0.0.1:8000``.

    Kubernetes sets it in the pods beside a Service that is named ``ray-distill-serve``; it is no port to listen on.
    """
    if re.fullmatch(r"(tcp|udp|sctp)://.*", environment.get(_PORT, "")):
        del environment[_PORT]


def unknown_variables(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each variable that begins like those of the settings, but names none.

    Variables that Kubernetes sets for services, such as ``RAY_DISTILL_SERVE_SVC_PORT_8000_TCP``, are not meant for this one.
    """
    known = [option.name.upper() for option in options()]
    for name in sorted(environment):
        setting = name.removeprefix(ENVIRONMENT_PREFIX)
        if setting not in (name, *known) and not _OF_KUBERNETES.search(name):
            near = difflib.get_close_matches(setting, known, n=1)
            hint = (
                f"did you mean {ENVIRONMENT_PREFIX}{near[0]}?"
                if near
                else "ray-distill serve --help lists the settings."
            )
            yield f"The environment variable {name} has no effect, because no setting has that name; {hint}"


def _option_name(name: object) -> str:
    return str(name).removeprefix(ENVIRONMENT_PREFIX).lower()


def _without_tables(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings without tables: those of ``backend``, ``batch`` and ``limits`` beside the others."""
    flat = dict(values)
    tables: dict[str, type[_Group]] = {"backend": BackendOptions, "batch": BatchLimits, "limits": Limits}
    for name, group in tables.items():
        table = flat.pop(name, None)
        if isinstance(table, Mapping):
            try:
                table = group(**table)
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from error
        if isinstance(table, group):
            flat |= table.model_dump(exclude_unset=True)
        elif table is not None:
            raise ValueError(f"{name} must be a table of settings, not {table!r}.")
    return flat


def _sentence(error: ValidationError) -> str:
    """Return the first mistake as one sentence."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    name = _option_name(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"{name} is not a setting of the service; docs/in-depth/serving.md lists the settings."
    if first["type"] == "missing":
        return f"{name} is not set; it has no default."
    expected = first["msg"].replace("Input should be", "must be").partition(", unable")[0]
    if first["type"] == "path_type":
        expected = "must be a path"
    return f"{name} {expected}, not {first['input']!r}."
