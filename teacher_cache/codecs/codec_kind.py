"""Codecs of other packages: the interface of an entry point of the group ``ray_distill.codecs``."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ray_distill.plugins import Plugin, find_plugin
from ray_distill.teacher_cache.codecs.column_codec import ColumnCodec, DiscreteCodec, State


class CodecKind(Protocol):
    """A kind of codec, such as a module with these functions. In ``NAME:ARGUMENT`` the argument is whatever follows the colon.

    Attributes:
        joint: Whether one column holds all layers. Otherwise each layer has a column.
        discrete: Whether its codecs are `DiscreteCodec`s.
    """

    joint: bool
    discrete: bool

    def check(self, argument: str) -> None:
        """Raise ValueError, with one sentence, if an argument is impossible. It is empty if there is no colon."""

    def fit(self, sample: Tensor, argument: str) -> State:
        """Return what the codec learns from an (N, layers, D) float32 sample of its layers. Equal arguments give equal states.

        The dict may be empty. The key ``error`` is taken: the expected error, measured on other frames, is added under it.
        """
        ...

    def open(self, layers: tuple[int, ...], dim: int, argument: str, state: State) -> ColumnCodec:
        """Return the codec of a column.

        Args:
            layers: 1-based layers of the column.
            dim: Width D of each layer.
            argument: The argument.
            state: What `fit` returned, and ``error``, (len(layers),) float32, which is absent only while it is being measured.

        Raises:
            ValueError: The state is that of other layers, or damaged.
        """
        ...


@dataclass(frozen=True)
class CodecOfPackage:
    """A codec of another package with its argument. What it raises, other than ValueError, is said with the package's name."""

    plugin: Plugin
    kind: CodecKind
    argument: str

    @property
    def joint(self) -> bool:
        """See `CodecKind`."""
        return bool(self.kind.joint)

    @property
    def discrete(self) -> bool:
        """See `CodecKind`."""
        return bool(self.kind.discrete)

    def fit(self, sample: Tensor) -> State:
        """See `CodecKind.fit`."""
        state = self.plugin.run("fit", lambda: self.kind.fit(sample, self.argument))
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise self.plugin.lacks("returns no dict of tensors from fit")
        return dict(state)

    def open(self, layers: tuple[int, ...], dim: int, state: State) -> ColumnCodec:
        """See `CodecKind.open`."""
        codec = self.plugin.run("open", lambda: self.kind.open(layers, dim, self.argument, state))
        wanted = DiscreteCodec if self.discrete else ColumnCodec
        if not isinstance(codec, wanted):
            raise self.plugin.lacks(f"returns no {wanted.__name__} from open")
        if (tuple(codec.layers), codec.dim) != (layers, dim) or codec.compression not in ("none", "zstd"):
            raise self.plugin.lacks(
                "returns a codec of other layers, of another width or of an unknown compression from open"
            )
        return codec


def codec_of_package(name: str) -> CodecOfPackage | None:
    """Return the codec of another package that a name such as ``NAME:ARGUMENT`` means, or None if no package has it.

    Raises:
        PluginError: It can't be imported, or is no `CodecKind`.
        ValueError: The argument is impossible.
    """
    word, _, argument = name.partition(":")
    plugin = find_plugin("codec", word)
    if plugin is None:
        return None
    kind = plugin.load()
    for function in ("check", "fit", "open"):
        if not callable(getattr(kind, function, None)):
            raise plugin.lacks(f"has no function {function}")
    for flag in ("joint", "discrete"):
        if not isinstance(getattr(kind, flag, None), bool):
            raise plugin.lacks(f"has no {flag}, which is True or False")
    plugin.run("check", lambda: kind.check(argument))
    return CodecOfPackage(plugin, kind, argument)
