"""The interface of the codec of a shard's column."""

from typing import Protocol, runtime_checkable

from torch import Tensor

State = dict[str, Tensor]
"""What a codec learned from a sample."""


@runtime_checkable
class ColumnCodec(Protocol):
    """Codec of one column of a shard, which holds one or more layers. It is deterministic and runs on any device.

    Attributes:
        layers: 1-based layers in the column.
        dim: Width D of each layer.
        bytes_per_frame: Number of bytes per frame of all layers, before compression.
        compression: Parquet compression of the column: ``none`` or ``zstd``.
        planar: Whether a value has the first bytes of all frames, then the second bytes, and so on, which compresses
            better. Otherwise it has one frame after the other.
        error: (len(layers),) expected relative RMS error of each layer, as defined by `relative_error`.
    """

    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def dim(self) -> int: ...
    @property
    def bytes_per_frame(self) -> int: ...
    @property
    def compression(self) -> str: ...
    @property
    def planar(self) -> bool: ...
    @property
    def error(self) -> Tensor: ...

    def encode(self, frames: Tensor) -> Tensor:
        """Encode (T, layers, D) float32 to (T, bytes_per_frame) uint8 on the same device.

        Raises:
            ValueError: If a value can't be represented.
        """
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Decode (..., bytes_per_frame) uint8 to (..., layers, D) float32 on the same device.

        A codec with several layers in its column also takes the layers to decode, as `PcaCodec.decode` does.
        """
        ...


@runtime_checkable
class DiscreteCodec(ColumnCodec, Protocol):
    """Codec of one layer whose codes are symbols, which objectives such as ``units`` and ``mvq`` predict.

    Attributes:
        symbols_per_frame: Number S of symbols of a frame: 1 for ``units``, the number of codebooks for ``mvq``.
        alphabet: Number of different symbols.
    """

    @property
    def symbols_per_frame(self) -> int: ...
    @property
    def alphabet(self) -> int: ...

    def symbols(self, codes: Tensor) -> Tensor:
        """Return the symbols (..., 1, S) int64, from 0 to alphabet - 1, of codes (..., bytes_per_frame) uint8."""
        ...
