"""Short audio for corpora in other formats."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile


@pytest.fixture
def write_audio() -> Callable[..., Path]:
    """Return a function that writes noise that depends on the file's stem, and returns the path."""

    def write(path: Path, seconds: float = 0.3, rate: int = 16_000, channels: int = 1, **kind: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(list(path.stem.encode()))
        soundfile.write(path, (0.2 * rng.standard_normal((round(seconds * rate), channels))).clip(-1, 1), rate, **kind)
        return path

    return write
