"""Heatmaps of features, as PNG images inside a page."""

import base64
import io

import numpy as np
from PIL import Image

_LEVELS = 63
"""Number of colours. More would be invisible here, and noise with more levels compresses worse."""
_BLUE, _WHITE, _RED = np.array([30, 80, 160]), np.array([247, 247, 247]), np.array([178, 40, 30])


def heatmap(values: np.ndarray, limit: float) -> str:
    """Return a PNG image as a data URI, with time from left to right and channels from bottom to top.

    Args:
        values: (T, C) features.
        limit: Value of the last colour: -limit is blue, 0 is white, limit is red; values beyond are clipped.
    """
    middle = _LEVELS // 2
    share = np.abs(np.arange(_LEVELS) - middle)[:, None] / middle
    palette = np.where(np.arange(_LEVELS)[:, None] > middle, _RED, _BLUE) * share + _WHITE * (1 - share)
    pixels = np.rint(np.clip(values.T[::-1] / limit, -1, 1) * middle + middle).astype(np.uint8)
    image = Image.fromarray(pixels, "L")
    image.putpalette(np.rint(palette).astype(np.uint8).tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
