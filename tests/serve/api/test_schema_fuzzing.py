"""Valid and invalid requests made from the OpenAPI schema get only responses that the schema describes.

``python -m tests.serve.api.test_schema_fuzzing 500`` sends 500 requests to each route.
"""

import io
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from ray_distill.serve import create_app
from ray_distill.serve.settings import Limits
from ray_distill.student import Student

from ..conftest import TINY

schemathesis = pytest.importorskip("schemathesis", reason="needs the extra named dev")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

pytestmark = pytest.mark.slow

CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]


def wav(samples: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(samples) / 20), 16_000, format="WAV")
    return buffer.getvalue()


# Half of the bodies are audio.
AUDIO = st.one_of(st.binary(max_size=200), st.sampled_from([wav(samples) for samples in (0, 399, 400, 5_000)]))
for kind in ("audio/wav", "audio/flac", "audio/ogg", "audio/mpeg", "application/octet-stream"):
    schemathesis.openapi.media_type(kind, AUDIO)


def try_every_route(student: Student, examples: int) -> Counter[tuple[str, int]]:
    """Return the number of responses by route and status; AssertionError if a response fails a check."""
    app = create_app(student, name="tiny", limits=Limits(max_seconds=1, max_bytes=50_000))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    found: Counter[tuple[str, int]] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        strategies = [operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=st.one_of(strategies), served=st.booleans())
        def attempt(case: Any, served: bool) -> None:
            if served:  # Otherwise almost every request would name a missing model or time out.
                case.query = {name: value for name, value in case.query.items() if name not in ("model", "timeout")}
            response = case.call()
            found[case.operation.path, response.status_code] += 1
            assert response.status_code != 500, response.text
            case.validate_response(response, checks=CHECKS)

        attempt()
    return found


def test_answers_are_what_the_schema_says(student: Student) -> None:
    found = try_every_route(student, 60)
    assert {route for route, _ in found} >= {"/v1/features", "/v1/embeddings", "/v1/models", "/healthz"}
    assert any(status == 200 for route, status in found if route in ("/v1/features", "/v1/embeddings"))


if __name__ == "__main__":
    torch.manual_seed(0)
    print(sorted(try_every_route(Student(TINY).eval(), int(sys.argv[1])).items()))
