"""Streams over a WebSocket: features, errors, limits, cancellation, and what an operator sees."""

import asyncio
import base64
import io
import itertools
import json
import logging
import threading
import time
from typing import Any

import numpy as np
import pytest
import soundfile
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from ray_distill.serve import create_app
from ray_distill.serve.inference.engine import FeatureEngine
from ray_distill.serve.server import Server
from ray_distill.serve.settings import Limits
from ray_distill.serve.streams.session import MAX_MESSAGE_BYTES
from ray_distill.student import Student

LIMITS = {"max_seconds": 5, "long_audio": {"max_seconds": 60, "window_seconds": 2, "overlap_seconds": 0.6}}
PATH = "/v1/features/stream"


@pytest.fixture(scope="module")
def app(student: Student, other: Student) -> FastAPI:
    return create_app(student, name="tiny", more={"other": other}, limits=LIMITS)


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    return TestClient(app)  # Without lifespan, which would close the models after each test.


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(0, 0.1, count).clip(-1, 1).astype("<f4")


def stream(client: TestClient, query: str, chunks: list[bytes], **options: Any) -> tuple[list[Any], int]:
    """Send chunks and the end; return the messages of the service and the close code."""
    messages: list[Any] = []
    with client.websocket_connect(f"{PATH}?{query}", **options) as socket:
        for chunk in chunks:
            socket.send_bytes(chunk)
        socket.send_text("end")
        while True:
            message = socket.receive()
            if message["type"] == "websocket.close":
                return messages, message["code"]
            messages.append(json.loads(message["text"]) if message.get("text") else message["bytes"])


def error(client: TestClient, query: str = "", chunks: tuple[bytes, ...] = (), **options: Any) -> tuple[str, str]:
    """Return type and sentence of the error that ends a stream."""
    messages, code = stream(client, query, list(chunks), **options)
    assert messages[-1].keys() >= {"error", "error_type"}
    assert code == 4000 + {"bad_body": 400, "undecodable": 400, "bad_request": 400, "unauthorized": 401}.get(
        messages[-1]["error_type"], code - 4000
    )
    return messages[-1]["error_type"], messages[-1]["error"]


@pytest.mark.parametrize(
    ("query", "rate", "exact"),
    [
        ("encoding=f32le", 16_000, True),
        ("encoding=f32le&layer=all&space=teacher&format=binary&rate=44100", 44_100, False),
    ],
)
def test_a_stream_gives_the_features_of_the_whole_clip_in_windows(
    client: TestClient, query: str, rate: int, exact: bool
) -> None:
    samples = noise(int(7.3 * rate))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    parameters = "&".join(part for part in query.split("&") if part.startswith(("layer", "space")))
    answer = client.post(f"/v1/features?format=npy&{parameters}", content=file.getvalue())
    whole = np.load(io.BytesIO(answer.content))
    data, rng = samples.tobytes(), np.random.default_rng(1)
    ends = [0, *np.sort(rng.integers(0, len(data), 50)).tolist(), len(data)]
    messages, code = stream(client, query, [data[a:b] for a, b in itertools.pairwise(ends)])
    start, *parts, end = messages
    if "binary" in query:
        parts = [
            about | {"features": np.frombuffer(values, "<f4").reshape(about["shape"])}
            for about, values in zip(parts[::2], parts[1::2], strict=True)
        ]
    assert [part["first_frame"] for part in parts] == np.cumsum(
        [0, *(part["shape"][-2] for part in parts[:-1])]
    ).tolist()
    found = np.concatenate([np.array(part["features"], np.float32) for part in parts], -2)
    assert answer.headers["x-windows"] == str(len(parts)) and len(parts) > 3
    np.testing.assert_allclose(found, whole, atol=1e-6 if exact else 2e-5 * np.abs(whole).max())
    assert (start["model"], start["dim"], start["window_seconds"]) == ("tiny", whole.shape[-1], 2)
    assert start["revision"] == answer.headers["x-revision"]
    assert end == {
        "end": True,
        "num_frames": whole.shape[-2],
        "audio_seconds": end["audio_seconds"],
        "windows": len(parts),
    }
    assert end["audio_seconds"] == pytest.approx(7.3, abs=1e-3) and code == 1000


def test_a_window_is_answered_before_the_stream_ends(client: TestClient) -> None:
    with client.websocket_connect(f"{PATH}?window=1&overlap=0.5&encoding=f32le&dtype=float16&format=binary") as socket:
        assert socket.receive_json()["overlap_seconds"] == 0.5
        socket.send_bytes(noise(17_000).tobytes())
        about = socket.receive_json()
        values = np.frombuffer(socket.receive_bytes(), "<f2").reshape(about["shape"])
        assert about["first_frame"] == 0 and values.shape == (37, 16)
        socket.send_text("end")
        assert socket.receive_json()["first_frame"] == 37


@pytest.mark.parametrize(
    ("query", "chunks", "kind", "words"),
    [
        ("overlap=1.1", (), "bad_parameter", "at most half of the window, which is 1 seconds"),
        ("window=3", (), "bad_parameter", "use 1 to 2 seconds"),
        ("window=0.5", (), "bad_parameter", "use 1 to 2 seconds"),
        ("format=npy", (), "bad_parameter", "'format'"),
        ("speed=2", (), "bad_parameter", "'speed' is unknown"),
        ("layer=9", (), "bad_layer", "no layer '9'"),
        ("model=none", (), "model_not_found", "'none'"),
        ("rate=192001", (), "unsupported_media_type", "192000 Hz"),
        ("channels=9", (), "unsupported_media_type", "8 channels"),
        ("", (), "too_short", "400 samples"),
        ("", (bytes(700),), "too_short", "400 samples"),
        ("", (bytes(1001),), "undecodable", "1 bytes into a sample"),
        ("encoding=f32le", (b"\0\0\xc0\x7f",), "undecodable", "not finite"),
        ("", (bytes(MAX_MESSAGE_BYTES + 1),), "too_large", str(MAX_MESSAGE_BYTES)),
    ],
)
def test_errors_are_the_last_message(
    client: TestClient, query: str, chunks: tuple[bytes, ...], kind: str, words: str
) -> None:
    found, sentence = error(client, query, chunks)
    assert found == kind and words in sentence and sentence.endswith(".")


def test_other_messages_and_other_paths_are_refused(client: TestClient) -> None:
    for texts in (["start"], ["end", "end"]):
        with client.websocket_connect(PATH) as socket:
            socket.receive_json()
            for text in texts:
                socket.send_text(text)
            # The end of an empty stream may be answered before the second message arrives.
            assert socket.receive_json()["error_type"] in ("bad_body", "too_short")
    with client.websocket_connect("/v1/streams") as socket:
        assert socket.receive_json()["error_type"] == "not_found"
        assert socket.receive() == {"type": "websocket.close", "code": 4404, "reason": "not_found"}


def test_a_request_that_is_no_handshake_names_the_websocket(client: TestClient) -> None:
    """A proxy that drops the header Upgrade makes an ordinary request of a handshake."""
    answer = client.get(f"{PATH}?rate=16000")
    assert (answer.status_code, answer.json()["error_type"]) == (400, "bad_request")
    assert (
        "is a WebSocket" in answer.json()["error"] and "a proxy must pass the headers Upgrade" in answer.json()["error"]
    )


def test_an_idle_client_is_cut(client: TestClient) -> None:
    with client.websocket_connect(f"{PATH}?timeout=1.5") as socket:
        socket.receive_json()
        for _ in range(4):  # The deadline is that of each message.
            time.sleep(0.4)
            socket.send_bytes(bytes(800))
        began = time.monotonic()
        refusal = socket.receive_json()
        assert refusal["error_type"] == "deadline" and "No audio arrived for 1.5 seconds" in refusal["error"]
        assert socket.receive()["code"] == 4504
        assert time.monotonic() - began < 20  # The default is a minute.


def test_keys_origins_and_open_requests_are_those_of_requests(student: Student) -> None:
    app = create_app(
        student, name="tiny", api_keys=["se/cr+et"], max_requests=1, cors_origins=["https://friend.example"]
    )
    client = TestClient(app)
    key = {"authorization": "Bearer se/cr+et"}
    encoded = base64.urlsafe_b64encode(b"se/cr+et").decode().rstrip("=")
    assert error(client)[0] == "unauthorized"
    assert error(client, subprotocols=["features", "key.wrong"])[0] == "unauthorized"
    assert error(client, subprotocols=["features", "key.%"])[0] == "unauthorized"
    for origin in ("https://evil.example", "null"):
        assert error(client, headers=key | {"origin": origin})[0] == "bad_request"
    for options in (
        {"headers": key | {"origin": "http://testserver"}},
        {"headers": key | {"origin": "https://friend.example"}},
        {"subprotocols": ["features", f"key.{encoded}"]},
    ):
        with client.websocket_connect(PATH, **options) as socket:
            assert socket.receive_json()["model"] == "tiny"
            assert socket.accepted_subprotocol == ("features" if "subprotocols" in options else None)
            busy = client.post("/v1/features", content=b"x", headers=key)
            assert (busy.status_code, busy.json()["error_type"]) == (429, "overloaded")
            again, code = stream(client, "", [], headers=key)
            assert again[0]["error_type"] == "overloaded" and again[0]["retry-after".replace("-", "_")] == "1"
            assert code == 4429
    assert app.state.admission.held_bytes == 0


def test_memory_is_reserved_once_and_refused_if_there_is_none(student: Student) -> None:
    app = create_app(student, open_bytes=8 * 2**20, max_bytes=2**20, window_seconds=5, max_seconds=5)
    client = TestClient(app)
    found = []
    with client.websocket_connect(f"{PATH}?window=1") as socket:
        socket.receive_json()
        for _ in range(20):
            found.append(app.state.admission.held_bytes)
            socket.send_bytes(bytes(16_000))
        socket.send_text("end")
        while "end" not in socket.receive_json():
            found.append(app.state.admission.held_bytes)
    assert 2**20 < found[0] < 8 * 2**20 and len(set(found)) == 1
    assert error(client, "rate=2000&layer=all")[0] == "too_large"


def wait_for_line(caplog: pytest.LogCaptureFixture) -> None:
    """Wait for the line of a request."""
    while not any(record.name == "ray_distill.serve.requests" for record in caplog.records):
        time.sleep(0.01)


def test_a_disconnected_client_costs_no_more_inference(
    student: Student, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(student, name="tiny")
    begun = threading.Event()
    cancelled = []

    async def never(*_: Any) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    monkeypatch.setattr(FeatureEngine, "features", never)
    client = TestClient(app)
    with (
        caplog.at_level(logging.INFO, "ray_distill.serve.requests"),
        client.websocket_connect(f"{PATH}?window=1") as socket,
    ):
        socket.receive_json()
        socket.send_bytes(bytes(40_000))
        assert begun.wait(60)
        socket.close()
        wait_for_line(caplog)  # Then the test's client cancels the application.
    assert cancelled == [True] and app.state.admission.held_bytes == 0
    engine = next(iter(app.state.models)).engine
    assert engine.expected_wait == 0
    line = json.loads(caplog.records[-1].message)
    assert (line["route"], line["status"], line["error_type"], line["method"]) == (
        PATH,
        499,
        "client_disconnected",
        "WEBSOCKET",
    )


def test_a_stream_that_the_stopping_server_closes_is_not_a_disconnect(
    app: FastAPI, client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "ray_distill.serve.requests"),
        client.websocket_connect(PATH) as socket,
    ):
        socket.receive_json()
        socket.close(1012)
        wait_for_line(caplog)
    line = json.loads(caplog.records[-1].message)
    assert (line["status"], line["error_type"]) == (503, "not_ready")
    # A ping would wait behind the audio of a stream that waits, and its missing answer would end the stream.
    config = Server(app, "127.0.0.1", 0).config
    assert config.ws_ping_interval is None and config.ws_max_size > MAX_MESSAGE_BYTES


def test_an_overloaded_model_makes_the_stream_wait_then_fail(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_distill.serve.inference.schedule import overloaded

    app = create_app(student, name="tiny")
    admit, refusals = FeatureEngine.admit, [0]

    def refuse_twice(self: FeatureEngine, *arguments: Any) -> Any:
        refusals[0] += 1
        if refusals[0] < 3:
            raise overloaded("much work waits", 0.0)
        return admit(self, *arguments)

    monkeypatch.setattr("ray_distill.serve.streams.session._LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(FeatureEngine, "admit", refuse_twice)
    client = TestClient(app)
    messages, code = stream(client, "", [bytes(2000)])
    assert code == 1000 and messages[-1]["num_frames"] == 2 and refusals == [3]
    refusals[0] = -100
    began = time.monotonic()
    assert error(client, "timeout=0.3", (bytes(2000),))[0] == "overloaded"
    assert 0.1 < time.monotonic() - began < 20


def test_one_stream_has_one_revision(student: Student, other: Student) -> None:
    app = create_app(student, name="tiny")
    client = TestClient(app)
    with client.websocket_connect(f"{PATH}?window=1") as socket:
        revision = socket.receive_json()["revision"]
        app.state.models.put("tiny", other)
        socket.send_bytes(bytes(40_000))
        refusal = socket.receive_json()
    assert refusal["error_type"] == "not_ready" and "open a new stream" in refusal["error"]
    with client.websocket_connect(PATH) as socket:
        assert socket.receive_json()["revision"] != revision


def test_a_failure_shows_no_trace(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(student, name="tiny")
    monkeypatch.setattr(student, "layer_outputs", lambda *_, **__: 1 / 0)
    kind, sentence = error(TestClient(app), "", (bytes(2000),))
    assert kind == "internal" and "division" not in sentence


def test_a_stream_is_a_log_line_and_is_counted(
    app: FastAPI, client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ray_distill.serve.requests"):
        stream(client, "model=other", [bytes(32_000)], headers={"x-request-id": "mine"})
    line = json.loads(caplog.records[-1].message)
    assert (line["request_id"], line["status"], line["model"], line["bytes"], line["audio_seconds"]) == (
        "mine",
        200,
        "other",
        32_000,
        1.0,
    )
    text = client.get("/metrics").text
    assert f'serve_requests_total{{route="{PATH}",status="200"}}' in text
    assert f'serve_request_seconds_count{{model="other",route="{PATH}",status="200"}}' in text
    assert "serve_open_requests 1.0" in text  # The request for metrics itself.


def test_a_client_that_reads_nothing_is_disconnected(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(student, name="tiny", limits=Limits(deadline_seconds=0.2))
    received = [{"type": "websocket.connect"}]

    async def main() -> None:
        async def receive() -> Any:
            if not received:
                await asyncio.Event().wait()
            return received.pop()

        async def send(message: Any) -> None:
            if message["type"] != "websocket.accept":
                await asyncio.Event().wait()

        scope = {"type": "websocket", "path": PATH, "raw_path": PATH.encode(), "root_path": "", "query_string": b""}
        scope |= {"headers": [], "subprotocols": [], "scheme": "ws", "asgi": {"version": "3.0"}}
        await asyncio.wait_for(app(scope, receive, send), 60)

    asyncio.run(main())
    assert app.state.admission.held_bytes == 0


def test_close_codes_are_the_statuses(client: TestClient) -> None:
    with client.websocket_connect(f"{PATH}?layer=9") as socket:
        socket.receive_json()
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_json()
    assert (closed.value.code, closed.value.reason) == (4422, "bad_layer")
