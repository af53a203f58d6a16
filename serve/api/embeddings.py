"""Features pooled over frames, in the shape of OpenAI's embeddings."""

import numpy as np
from fastapi import Response
from fastapi.responses import JSONResponse

from ray_distill.serve.api.formats import base64_pieces
from ray_distill.serve.api.parameters import EmbeddingsQuery, Pooling
from ray_distill.serve.api.request_handler import Answered
from ray_distill.serve.inference.backends import Array
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, SAMPLE_RATE


def pool(features: Array, how: Pooling) -> Array:
    """(T, d) → (d,), or (2 d,) for ``mean_std``; the standard deviation divides by T."""
    if how == "max":
        return np.asarray(features.max(0))
    mean = features.mean(0)
    return np.concatenate([mean, features.std(0)]) if how == "mean_std" else np.asarray(mean)


def embeddings_answer(query: EmbeddingsQuery, answered: Answered) -> Response:
    """The answer to ``/v1/embeddings``; ``usage`` counts frames as tokens."""
    data = []
    for index, item in enumerate(answered.features):
        vector = pool(item.array, query.pooling)
        value = b"".join(base64_pieces(vector)).decode() if query.encoding_format == "base64" else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": value})
    frames = sum(len(item.array) for item in answered.features)
    body = {
        "object": "list",
        "model": answered.model.name,
        "revision": answered.model.revision,
        "layer": answered.layer,
        "space": query.space,
        "pooling": query.pooling,
        "dtype": "float32",
        "shape": [len(data), len(vector)],
        "frame_rate": SAMPLE_RATE / FRAME_SAMPLES,
        "data": data,
        "usage": {"prompt_tokens": frames, "total_tokens": frames},
    }
    return JSONResponse(body, headers=answered.headers())
