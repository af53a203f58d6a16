"""Requests of unusual forms: no input is a failure of the service, and every refusal is JSON of the documented form."""

import base64
import io
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from fastapi.testclient import TestClient

from ray_distill.serve import create_app
from ray_distill.serve.api.errors import STATUS
from ray_distill.serve.settings import Limits
from ray_distill.student import Student


def audio() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.random.default_rng(0).normal(0, 0.1, 4000), 16_000, format="WAV")
    return buffer.getvalue()


AUDIO = audio()
BASE64 = base64.b64encode(AUDIO).decode()
JSON = {"content-type": "application/json"}


def refusal(response: httpx.Response) -> tuple[int, str]:
    assert response.headers["content-type"] == "application/json", response.text
    body = response.json()
    assert set(body) == {"error", "error_type"} and STATUS[body["error_type"]] == response.status_code
    return response.status_code, body["error_type"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"input": "AAAA", "\\ud800": 1}', (400, "bad_body")),
        ('{"input": "AAAA", "model": "\\ud800"}', (400, "bad_body")),
        ('{"input": "\\udfff"}', (400, "bad_body")),
        ('{"input": "AAAA", "layer": true}', (422, "bad_layer")),
        ('{"input": "AAAA", "timeout": true}', (422, "bad_parameter")),
        ('{"input": "AAAA", "layer": [[]]}', (422, "bad_layer")),
        ('{"input": "AAAA", "": 1}', (422, "bad_parameter")),
        ('{"input": "AAAA", "timeout": NaN}', (400, "bad_body")),
        ('{"input": ["AAAA", null]}', (400, "bad_body")),
    ],
)
@pytest.mark.parametrize("route", ["features", "embeddings"])
def test_odd_json_is_refused(app_client: TestClient, route: str, body: str, expected: tuple[int, str]) -> None:
    assert refusal(app_client.post(f"/v1/{route}", content=body, headers=JSON)) == expected


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"file": ("a.wav", AUDIO), "layer": (None, "2")},
            "The field 'layer' of the form is no file: parameters go into",
        ),
        ({"audio": ("a.wav", AUDIO)}, "The field 'audio' of the form has a file: name the field of each file 'file'."),
        ({"file": (None, "a.wav")}, "The field 'file' of the form has text and no file: with curl, write -F file=@"),
        (
            {f"x{number}": (None, "2") for number in range(100)},
            "A multipart/form-data body must be valid and contain 1 to",
        ),
    ],
)
def test_the_refusal_of_a_form_names_the_field(app_client: TestClient, parts: Any, message: str) -> None:
    answer = app_client.post("/v1/features", files=parts)
    assert refusal(answer) == (400, "bad_body") and answer.json()["error"].startswith(message)


def test_mutations_of_every_form_never_fail(app_client: TestClient) -> None:
    pick = random.Random(0)
    values: list[Any] = [
        None,
        True,
        -1,
        10**30,
        1e-300,
        "",
        "\x00",
        "é",
        [],
        {},
        [{}],
        "last",
        "9" * 500,
        -0.0,
        "1e5",
        " 1 ",
    ]
    names = [
        "model",
        "space",
        "timeout",
        "layer",
        "format",
        "dtype",
        "pooling",
        "encoding_format",
        "user",
        "input",
        "x",
        "",
    ]
    statuses = set()
    for number in range(300):
        body = {"input": "AAAA", **{pick.choice(names): pick.choice(values) for _ in range(pick.randint(0, 3))}}
        data = bytearray(json.dumps(body).encode())
        if number % 3 == 0:
            data[pick.randrange(len(data))] = pick.randrange(256)
        route = pick.choice(("/v1/features", "/v1/embeddings"))
        response = app_client.post(route, content=bytes(data), headers=JSON)
        query = {pick.choice(names): str(pick.choice(values)) for _ in range(2)}
        form = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nAAAA\r\n--x--\r\n'
        cut = bytearray(form)
        cut[pick.randrange(len(cut))] = pick.randrange(256)
        kind = {
            "content-type": pick.choice(
                ("multipart/form-data; boundary=x", "multipart/form-data; boundary=", "multipart/form-data")
            )
        }
        other = app_client.post(route, content=bytes(cut), headers=kind, params=query)
        statuses |= {refusal(response)[0], refusal(other)[0]}
    assert statuses <= {400, 404, 422, 504}, statuses


@pytest.mark.parametrize(
    "text",
    [
        BASE64,
        "\n".join(BASE64[start : start + 76] for start in range(0, len(BASE64), 76)),
        f"data:audio/wav;base64,{BASE64}",
    ],
)
def test_base64_may_have_lines_or_be_a_data_url(app_client: TestClient, text: str) -> None:
    assert app_client.post("/v1/features", json={"input": text}).json()["shape"] == [12, 16]


def test_a_parameter_given_twice_is_refused(app_client: TestClient) -> None:
    for query, body, named in (
        ("", f'{{"input": "{BASE64}", "layer": 1, "layer": 2}}', "'layer' several times"),
        ("", f'{{"input": "AA", "layer": 1, "input": "{BASE64}"}}', "'input' several times"),
        ("?layer=1", f'{{"input": "{BASE64}", "layer": 2}}', "'layer' is given several times"),
    ):
        response = app_client.post(f"/v1/features{query}", content=body.encode(), headers=JSON)
        assert refusal(response)[0] in (400, 422) and named in response.json()["error"]
    # Names in strings and in other places are no members.
    fine = {"input": [BASE64], "user": '"layer": 1, "user": 2', "layer": 1}
    assert app_client.post("/v1/embeddings", json=fine).status_code == 200
    assert app_client.post("/v1/features?layer=1", json={"input": BASE64, "format": "base64"}).json()["layer"] == 1


def test_compressed_bodies_redirects_and_head_requests(app_client: TestClient) -> None:
    squeezed = app_client.post("/v1/features", content=AUDIO, headers={"content-encoding": "gzip"})
    assert refusal(squeezed) == (415, "unsupported_media_type")
    assert app_client.post("/v1/features", content=AUDIO, headers={"content-encoding": "identity"}).status_code == 200
    moved = app_client.get("/v1/models/", headers={"host": "evil.example"}, follow_redirects=False)
    assert refusal(moved) == (404, "not_found") and "evil" not in str(moved.headers) + moved.text
    for path in ("/", "/healthz", "/readyz", "/page/page.js"):
        assert app_client.head(path).status_code == 200


def test_refused_preflights_have_the_form_of_errors(student: Student) -> None:
    with TestClient(create_app(student, cors_origins=["https://lab.example"])) as client:
        headers = {"origin": "https://else.example", "access-control-request-method": "POST"}
        refused = client.options("/v1/features", headers=headers)
        headers = {"origin": "https://lab.example", "access-control-request-method": "POST"}
        names = {"access-control-request-headers": "authorization, content-type, traceparent, x-request-id"}
        allowed = client.options("/v1/features", headers=headers | names)
        other = client.options("/v1/features", headers=headers | {"access-control-request-headers": "x-other"})
    assert refusal(refused) == (400, "bad_request") and "its origin is not allowed" in refused.text
    assert allowed.status_code == 200
    assert refusal(other) == (400, "bad_request") and "one of its headers is not allowed" in other.text


def test_forms_are_not_written_to_the_disk(app_client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", full)
    big = AUDIO.ljust(2**20 - 2000, b"\0")
    monkeypatch.setattr("starlette.formparsers.MultiPartParser.spool_max_size", 1000)
    assert app_client.post("/v1/features", files={"file": big}).status_code == 200


def test_keys_are_read_again(student: Student, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("old\n")
    app = create_app(student, api_keys=file, limits=Limits())
    with TestClient(app) as client:

        def statuses() -> list[int]:
            return [
                client.get("/info", headers={"authorization": f"Bearer {key}"}).status_code for key in ("old", "new")
            ]

        assert statuses() == [200, 401]
        file.write_text("new\n")
        app.state.reload()
        assert statuses() == [401, 200]
        file.write_text("")
        app.state.reload()
        assert statuses() == [401, 200] and "API keys stay as they were" in caplog.text
