"""Features pooled over frames, in the shape of OpenAI's embeddings."""

import numpy as np
from fastapi import Response
from fastapi.responses import JSONResponse

from ray_distill.serve.api.formats import base64_chunks
from ray_distill.serve.api.parameters import EmbeddingsQuery, Pooling
from ray_distill.serve.api.request_handler import RequestResult
from ray_distill.serve.inference.backends import Array
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, SAMPLE_RATE


def pool(features: Array, pooling: Pooling) -> Array:
    """Pool (T, d) features over frames to (d,), or to (2 d,) for ``mean_std``; the standard deviation divides by T."""
    if pooling == "max":
        return np.asarray(features.max(0))
    mean = features.mean(0)
    return np.concatenate([mean, features.std(0)]) if pooling == "mean_std" else np.asarray(mean)


def embeddings_response(query: EmbeddingsQuery, result: RequestResult) -> Response:
    """Return the response of ``/v1/embeddings``; ``usage`` counts frames as tokens."""
    data = []
    for index, item in enumerate(result.features):
        vector = pool(item.array, query.pooling)
        value = b"".join(base64_chunks(vector)).decode() if query.encoding_format == "base64" else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": value})
    frames = sum(len(item.array) for item in result.features)
    body = {
        "object": "list",
        "model": result.model.name,
        "revision": result.model.revision,
        "layer": result.layer,
        "space": query.space,
        "pooling": query.pooling,
        "dtype": "float32",
        "shape": [len(data), len(vector)],
        "frame_rate": SAMPLE_RATE / FRAME_SAMPLES,
        "data": data,
        "usage": {"prompt_tokens": frames, "total_tokens": frames},
    }
    return JSONResponse(body, headers=result.headers())
