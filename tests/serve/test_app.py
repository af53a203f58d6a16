"""The HTTP interface, with a student of a tiny configuration and random weights."""

import asyncio
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
import torch
from fastapi.testclient import TestClient

from ray_distill.serve import create_app
from ray_distill.serve.settings import BackendOptions, BatchLimits, Limits
from ray_distill.student import Student
from ray_distill.teacher_cache.audio import load_audio

from .conftest import MAX_BYTES, MAX_SECONDS

NPY = "application/x-npy"
FORM_HEAD = b'--cut\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'


def sound(seconds: float, rate: int = 16_000, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Return a few harmonics of a gliding tone with noise, (S, channels)."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(120 + 40 * np.sin(3 * time + seed)) / rate
    mono = sum(np.sin(k * phase) / k for k in range(1, 8)) * 0.1
    return np.stack([mono + 0.01 * generator.standard_normal(len(time)) for _ in range(channels)], 1)


def encode(samples: np.ndarray, rate: int = 16_000, format: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def read_npy(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == NPY
    return np.load(io.BytesIO(response.content), allow_pickle=False)


def assert_close(left: np.ndarray, right: np.ndarray, relative: float = 1e-4) -> None:
    assert left.shape == right.shape
    assert np.abs(left - right).max() <= relative * np.abs(right).max()


def assert_refused(response: httpx.Response, status: int, reason: str) -> str:
    """Check that a response has the common error shape; return its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body: dict[str, Any] = response.json()
    assert set(body) == {"error", "error_type"}
    assert body["error_type"] == reason
    message: str = body["error"]
    assert message.endswith(".")
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("rate", "channels", "format"),
    [
        (16_000, 1, "WAV"),
        (16_000, 1, "FLAC"),
        (16_000, 1, "OGG"),
        (16_000, 1, "MP3"),
        (44_100, 2, "WAV"),
        (44_100, 2, "MP3"),
        (8_000, 1, "WAV"),
    ],
)
def test_every_kind_of_audio_gives_the_students_features(
    client: httpx.Client, student: Student, rate: int, channels: int, format: str
) -> None:
    audio = encode(sound(1.0, rate, channels), rate, format)
    features = read_npy(client.post("/v1/features", content=audio, headers={"accept": NPY}))
    waveform = torch.from_numpy(load_audio(io.BytesIO(audio)))[None]
    with torch.inference_mode():
        hidden_states, num_frames = student.encode(waveform, torch.tensor([waveform.shape[1]]))
    assert len(features) == int(num_frames[0]) == (waveform.shape[1] - 400) // 320 + 1
    assert features.dtype == np.float32
    assert_close(features, hidden_states[0, -1].numpy())
    assert np.ptp(features) > 0


@pytest.mark.parametrize("layer", ["1", "2", "3", "last", "all", None])
def test_json_and_npy_are_equal_for_every_layer(client: httpx.Client, layer: str | None) -> None:
    audio = encode(sound(7.0))  # More frames than one chunk of a JSON response.
    query = {} if layer is None else {"layer": layer}
    array = read_npy(client.post("/v1/features", content=audio, params=query | {"format": "npy"}))
    answer = client.post("/v1/features", content=audio, params=query | {"format": "json"}).json()
    about = ["model", "revision", "layer", "space", "dtype", "frame_seconds", "frame_rate", "timestamps"]
    assert list(answer) == [*about, "num_frames", "dim", "shape", "features"]
    features = np.array(answer["features"], np.float32)
    np.testing.assert_array_equal(features, array)
    frames = (7 * 16_000 - 400) // 320 + 1
    assert answer["shape"] == list(array.shape) == ([3, frames, 16] if layer == "all" else [frames, 16])
    assert (answer["model"], answer["num_frames"], answer["dim"], answer["frame_seconds"]) == ("tiny", frames, 16, 0.02)
    assert answer["layer"] == {"1": 1, "2": 2, "3": 3, "last": 3, None: 3, "all": "all"}[layer]


def test_layers_are_counted_from_one_and_differ(client: httpx.Client) -> None:
    audio = encode(sound(0.5))
    every = read_npy(client.post("/v1/features?layer=all&format=npy", content=audio))
    for number in (1, 2, 3):
        one = read_npy(client.post(f"/v1/features?layer={number}&format=npy", content=audio))
        np.testing.assert_array_equal(one, every[number - 1])
    assert not np.allclose(every[0], every[1])
    assert not np.allclose(every[1], every[2])


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        (NPY, NPY),
        ("application/octet-stream", NPY),
        ("application/json", "application/json"),
        ("*/*", "application/json"),
        ("application/json;q=0.5, application/x-npy", NPY),
        ("application/json, application/x-npy;q=0.5", "application/json"),
        ("application/x-npy;q=nonsense", "application/json"),
        ("", "application/json"),
    ],
)
def test_the_accept_header_chooses_the_form(client: httpx.Client, accept: str, content_type: str) -> None:
    response = client.post("/v1/features", content=encode(sound(0.1)), headers={"accept": accept})
    assert (response.status_code, response.headers["content-type"]) == (200, content_type)


def test_the_format_parameter_beats_the_accept_header(client: httpx.Client) -> None:
    response = client.post("/v1/features?format=json", content=encode(sound(0.1)), headers={"accept": NPY})
    assert response.headers["content-type"] == "application/json"


def test_multipart_and_raw_bodies_of_any_content_type_are_equal(client: httpx.Client) -> None:
    audio = encode(sound(0.5))
    form = read_npy(client.post("/v1/features?format=npy", files={"file": ("../../etc/passwd", audio)}))
    for content_type in ("audio/wav", "application/x-www-form-urlencoded", "video/ogg", ""):
        raw = client.post("/v1/features?format=npy", content=audio, headers={"content-type": content_type})
        np.testing.assert_array_equal(read_npy(raw), form)


def test_one_frame_is_enough(client: httpx.Client) -> None:
    assert client.post("/v1/features", content=encode(sound(400 / 16_000))).json()["shape"] == [1, 16]


def test_the_answer_is_the_students_in_a_padded_batch(client: httpx.Client, student: Student) -> None:
    files = [encode(sound(seconds, seed=seed)) for seed, seconds in enumerate((0.1, 3.0, 0.77, 12.0))]
    waveforms = [torch.from_numpy(load_audio(io.BytesIO(file))) for file in files]
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    with torch.inference_mode():
        batch, num_frames = student.encode(torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True), lengths)
    for file, hidden_states, frames in zip(files, batch, num_frames, strict=True):
        served = read_npy(client.post("/v1/features?layer=all&format=npy", content=file))
        assert_close(served, hidden_states[:, : int(frames)].numpy())


def test_concurrent_requests_get_the_same_as_alone(client: httpx.Client) -> None:
    files = [encode(sound(0.2 + 0.31 * seed, seed=seed)) for seed in range(8)]
    files[3] = b"not audio"  # One user's mistake must not affect the others.

    def post(file: bytes) -> httpx.Response:
        return client.post("/v1/features?layer=all&format=npy", content=file)

    alone = [post(file) for file in files]
    assert len({response.content for response in alone}) == len(files)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for number, (response, before) in enumerate(zip(pool.map(post, files), alone, strict=True)):
                if number == 3:
                    assert_refused(response, 400, "undecodable")
                else:
                    assert_close(read_npy(response), read_npy(before), 1e-5)


def test_an_empty_body_is_refused(client: httpx.Client) -> None:
    assert_refused(client.post("/v1/features"), 400, "empty")
    assert_refused(client.post("/v1/features", files={"file": ("a.wav", b"")}), 400, "empty")
    two = [("file", ("a.wav", encode(sound(0.1)))), ("file", ("b.wav", b""))]
    assert "contains an empty file" in assert_refused(client.post("/v1/features", files=two), 400, "empty")
    assert_refused(client.post("/v1/features", content=encode(np.zeros((0, 1)))), 400, "empty")


@pytest.mark.parametrize(
    "audio",
    [b"x", b"RIFF", b"<html></html>" * 100, encode(sound(0.5))[:20], b"\x80\x04cos\nsystem\n", b"\0" * 5000],
    ids=["x", "riff", "html", "cut header", "pickle", "zeros"],
)
def test_undecodable_bytes_are_refused(client: httpx.Client, audio: bytes) -> None:
    assert_refused(client.post("/v1/features", content=audio), 400, "undecodable")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(client: httpx.Client, value: float) -> None:
    samples = sound(0.5)
    samples[100] = value
    assert_refused(client.post("/v1/features", content=encode(samples, subtype="FLOAT")), 400, "undecodable")


def test_samples_above_full_scale_are_clipped_and_enormous_ones_refused(client: httpx.Client) -> None:
    loud = encode(sound(0.5) * 4, subtype="FLOAT")
    assert np.isfinite(read_npy(client.post("/v1/features?format=npy", content=loud))).all()
    enormous = encode(sound(0.5) * 1e30, subtype="FLOAT")
    assert_refused(client.post("/v1/features", content=enormous), 400, "undecodable")


def test_too_short_audio_is_refused(client: httpx.Client) -> None:
    assert_refused(client.post("/v1/features", content=encode(sound(399 / 16_000))), 422, "too_short")


def test_too_long_audio_is_refused(client: httpx.Client) -> None:
    hour = encode(np.zeros((8000 * 3600, 1)), 8000, "FLAC")  # An hour of silence in a small file.
    assert len(hour) < MAX_BYTES
    assert "20" in assert_refused(client.post("/v1/features", content=hour), 413, "too_long")
    assert client.post("/v1/features?format=npy", content=encode(sound(MAX_SECONDS))).status_code == 200


def test_files_longer_than_the_queue_together_are_refused(student: Student) -> None:
    files = [("file", encode(sound(1.5))) for _ in range(2)]
    with TestClient(create_app(student, limits=Limits(max_seconds=2), batch=BatchLimits(queue_seconds=2.5))) as client:
        assert "2.5" in assert_refused(client.post("/v1/features", files=files), 413, "too_long")
        assert client.post("/v1/features", files=files[:1]).status_code == 200


def test_a_body_over_the_limit_is_refused(client: httpx.Client) -> None:
    message = assert_refused(client.post("/v1/features", content=b"x" * (MAX_BYTES + 1)), 413, "too_large")
    assert str(MAX_BYTES) in message
    assert_refused(client.post("/v1/features", content=b"x" * MAX_BYTES), 400, "undecodable")
    assert_refused(client.post("/v1/features", files={"file": b"x" * MAX_BYTES}), 413, "too_large")


@pytest.mark.parametrize("declared", [None, b"5"], ids=["chunked", "false length"])
@pytest.mark.parametrize(
    ("content_type", "head"),
    [
        (b"audio/wav", b""),
        (b"multipart/form-data; boundary=cut", FORM_HEAD),
    ],
    ids=["raw", "multipart"],
)
def test_an_endless_body_is_refused_as_soon_as_it_is_over_the_limit(
    app_client: TestClient, content_type: bytes, head: bytes, declared: bytes | None
) -> None:
    chunk, received, sent = 2**16, 0, []

    async def receive() -> dict[str, Any]:
        nonlocal received
        received += chunk
        body = head.ljust(chunk, b"x") if received == chunk else b"x" * chunk
        return {"type": "http.request", "body": body, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [
        (b"content-type", content_type),
        (b"content-length", declared) if declared else (b"transfer-encoding", b"chunked"),
    ]
    path = {"path": "/v1/features", "raw_path": b"/v1/features", "root_path": "", "query_string": b""}
    scope = {"type": "http", "method": "POST", "http_version": "1.1", "scheme": "http", "headers": headers, **path}
    asyncio.run(app_client.app(scope, receive, send))
    assert sent[0]["status"] == 413
    assert json.loads(sent[1]["body"])["error_type"] == "too_large"
    assert received <= MAX_BYTES + chunk


@pytest.mark.parametrize("layer", ["0", "-1", "4", "1.5", "first", "", "9" * 400])
def test_a_layer_the_model_lacks_is_refused(client: httpx.Client, layer: str) -> None:
    response = client.post("/v1/features", content=encode(sound(0.1)), params={"layer": layer})
    message = assert_refused(response, 422, "bad_layer")
    assert ("a number from 1 to 3" if layer in ("0", "-1", "4") else "a number") in message


@pytest.mark.parametrize("query", ["format=xml", "layers=1", "layer=1&debug=true"])
def test_other_mistakes_in_the_query_are_refused(client: httpx.Client, query: str) -> None:
    message = assert_refused(client.post(f"/v1/features?{query}", content=encode(sound(0.1))), 422, "bad_parameter")
    assert query.split("&")[-1].split("=")[0] in message
    assert ("is unknown; use model, space, timeout, layer" in message) == (query != "format=xml")


def test_broken_forms_are_refused(client: httpx.Client) -> None:
    audio = encode(sound(0.1))
    url = "/v1/features"
    assert_refused(client.post(url, files={"audio": audio}), 400, "bad_body")
    assert_refused(client.post(url, files=[("file", audio)] * 65), 400, "bad_body")
    assert_refused(client.post(url, files={"file": audio}, data={"layer": "1"}), 400, "bad_body")
    form = {"content-type": "multipart/form-data"}
    assert_refused(client.post(url, content=audio, headers=form), 400, "bad_body")
    form = {"content-type": "multipart/form-data; boundary=cut"}
    assert_refused(client.post(url, content=audio, headers=form), 400, "bad_body")


def test_other_paths_and_methods_get_the_same_shape_of_error(client: httpx.Client) -> None:
    assert_refused(client.get("/v1/nothing"), 404, "not_found")
    response = client.get("/v1/features")
    assert_refused(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_a_failure_of_the_service_shows_no_trace(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    with TestClient(create_app(student), raise_server_exceptions=False) as client:
        monkeypatch.setattr(student, "layer_outputs", lambda *_, **__: 1 / 0)
        response = client.post("/v1/features", content=encode(sound(0.1)), headers={"x-request-id": "abc"})
        metrics = client.get("/metrics").text
    assert "division" not in assert_refused(response, 500, "internal")
    assert response.headers["x-request-id"] == "abc"
    assert 'serve_requests_total{route="/v1/features",status="500"} 1.0' in metrics
    assert 'serve_errors_total{error_type="internal"} 1.0' in metrics


def test_healthz_says_no_more_than_that_it_is_alive(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}


def test_info_says_what_is_served(client: httpx.Client, student: Student) -> None:
    info = client.get("/info").json()
    model, other, *_ = info["models"]  # Further models are those of the library that other tests have loaded.
    assert other["id"] == "other"
    assert (model["id"], model["layers"], model["dim"], model["device"]) == ("tiny", 3, 16, "cpu")
    assert model["parameters"] == sum(parameter.numel() for parameter in student.parameters())
    assert (info["limits"]["max_seconds"], info["limits"]["max_bytes"]) == (MAX_SECONDS, MAX_BYTES)


def test_openapi_describes_the_interface(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        "/v1/features",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/{name}",
        "/healthz",
        "/readyz",
        "/info",
        "/metrics",
    }
    post = schema["paths"]["/v1/features"]["post"]
    assert {"audio/wav", "multipart/form-data"} < set(post["requestBody"]["content"])
    assert {parameter["name"] for parameter in post["parameters"]} == {
        "layer",
        "format",
        "dtype",
        "space",
        "model",
        "timeout",
    }
    assert set(post["responses"]) == {
        "200",
        "400",
        "401",
        "404",
        "411",
        "413",
        "415",
        "422",
        "429",
        "500",
        "503",
        "504",
    }
    assert {"application/json", NPY, "application/x-npz"} < set(post["responses"]["200"]["content"])
    for status in ("400", "413", "422"):
        reference = post["responses"][status]["content"]["application/json"]["schema"]["$ref"]
        assert reference == "#/components/schemas/ErrorResponse"
    assert "retry-after" in post["responses"]["429"]["headers"] and "x-shape" in post["responses"]["200"]["headers"]
    answers = client.post("/v1/features", content=encode(sound(0.1)))
    assert set(post["responses"]["200"]["headers"]) <= set(answers.headers)
    for path in ("features", "embeddings"):
        for example in schema["paths"][f"/v1/{path}"]["post"]["requestBody"]["content"]["application/json"][
            "examples"
        ].values():
            assert client.post(f"/v1/{path}", json=example["value"]).status_code == 200


def test_the_reference_needs_no_network(client: httpx.Client, student: Student) -> None:
    page = client.get("/docs")
    assert page.status_code == 200 and "connect-src 'self'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http-equiv", "")
    files = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert files and not any(name.startswith("/") for name in files), "it also works under a path of another site"
    for name in files:
        assert client.get(f"/{name}").status_code == 200 and client.get(f"/{name}").content
    assert '"/openapi' not in client.get("/docs/start.js").text
    assert "SmartBear" in client.get("/docs/NOTICE.txt").text
    assert_refused(client.get("/docs/none.js"), 404, "not_found")
    schema = create_app(student, api_keys=["secret"]).openapi()
    assert schema["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert schema["paths"]["/v1/features"]["post"]["security"] == [{"HTTPBearer": []}]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_seconds": 0}, "max_seconds"),
        ({"max_seconds": float("nan")}, "max_seconds"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"open_bytes": 2**20}, "open_bytes"),
        ({"key_requests": 0}, "key_requests"),
        ({"key_rate": 1.0}, "no API keys"),
    ],
)
def test_impossible_limits_are_refused(student: Student, limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_app(student, limits=Limits(**limits))


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(student: Student, device: str) -> None:
    with pytest.raises(ValueError, match=device):
        create_app(student, backend=BackendOptions(device=device))
