"""Limits of API keys and of all requests together, and access from other origins."""

import asyncio
import base64
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
import torch
from fastapi.testclient import TestClient

from ray_distill.serve import create_app
from ray_distill.serve.decoders import NUM_DECODERS
from ray_distill.serve.decoding import decode
from ray_distill.serve.inference.engine import FeatureEngine
from ray_distill.serve.server import Server
from ray_distill.serve.settings import BatchLimits, Limits
from ray_distill.student import Student, save_student


def audio(seconds: float) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(int(16_000 * seconds)) / 20), 16_000, format="WAV")
    return buffer.getvalue()


HALF = audio(0.5)
KEYS = ["one", "two"]


def key(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}"}


def refusal(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error_type"]


def hold(student: Student, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Make inference wait until the returned event is set."""
    gate, real = threading.Event(), student.layer_outputs
    monkeypatch.setattr(student, "layer_outputs", lambda *a, **k: gate.wait(20) and real(*a, **k))
    return gate


def is_overdue(engine: FeatureEngine, seconds: float) -> bool:
    """Return whether an engine's wait is so long and rises. While its batch may still be in time, the wait falls."""
    before = engine.expected_wait
    time.sleep(0.01)
    return seconds < before < engine.expected_wait


def test_open_requests_of_a_key_are_limited(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(student, limits=Limits(key_requests=1), api_keys=KEYS)
    with TestClient(app) as client, ThreadPoolExecutor(2) as pool:
        gate = hold(student, monkeypatch)

        def post(name: str) -> httpx.Response:
            return client.post("/v1/features", content=HALF, headers=key(name))

        first = pool.submit(post, "one")
        while "serve_open_requests 2.0" not in client.get("/metrics").text:
            time.sleep(0.02)
        refused = post("one")
        assert refusal(refused) == (429, "rate_limited") and refused.headers["retry-after"] == "1"
        other = pool.submit(post, "two")
        gate.set()
        assert first.result().status_code == other.result().status_code == 200
        assert post("one").status_code == 200


def test_request_rate_of_a_key_is_limited(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("ray_distill.serve.api.admission.monotonic", lambda: now)
    with TestClient(create_app(student, limits=Limits(key_rate=2), api_keys=KEYS)) as client:

        def post(name: str) -> httpx.Response:
            return client.post("/v1/features", content=HALF, headers=key(name))

        assert [post("one").status_code for _ in range(3)] == [200, 200, 429]
        assert refusal(post("one")) == (429, "rate_limited") and post("one").headers["retry-after"] == "1"
        assert post("two").status_code == 200
        now += 0.5
        assert [post("one").status_code for _ in range(2)] == [200, 429]
        now += 60
        assert [post("one").status_code for _ in range(3)] == [200, 200, 429]


def test_bodies_that_arrive_together_are_bounded(student: Student) -> None:
    """A body that is too large beside those of other requests is refused; alone it is accepted."""
    app = create_app(student, limits=Limits(max_bytes=100_000, open_bytes=150_000))
    big = audio(2)[:60_000].ljust(90_000, b"\0")
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
        admission = app.state.admission
        held = admission.held_bytes = 90_000  # As if another request held these bytes.
        refused = client.post("/v1/features", content=big)
        assert refusal(refused) == (429, "overloaded") and "retry-after" in refused.headers
        assert admission.held_bytes == held
        admission.held_bytes = 0
        assert client.post("/v1/features", content=HALF).status_code == 200
        assert admission.held_bytes == 0
        # Three seconds are small when sent; decoded and with the response they exceed the limit.
        flac = io.BytesIO()
        soundfile.write(flac, np.zeros(3 * 16_000), 16_000, format="FLAC")
        assert refusal(client.post("/v1/features", content=flac.getvalue())) == (413, "too_large")
        assert pool.submit(lambda: admission.held_bytes).result() == 0


def test_the_parts_of_a_form_count_until_they_are_read(student: Student) -> None:
    with TestClient(create_app(student, limits=Limits(max_bytes=100_000, open_bytes=150_000))) as client:
        padded = HALF.ljust(80_000, b"\0")
        assert refusal(client.post("/v1/features", files={"file": padded})) == (413, "too_large")
        assert client.post("/v1/features", content=padded).status_code == 200


def test_held_bytes_are_always_released(student: Student) -> None:
    app = create_app(student)
    with TestClient(app, raise_server_exceptions=False) as client:
        posts: list[dict[str, Any]] = [
            {"content": HALF},
            {"content": b"not audio"},
            {"files": [("file", HALF)] * 3},
            {"content": HALF, "params": {"layer": "9"}},
            {"content": HALF, "params": {"timeout": "1e-9"}},
            {"content": b"{", "headers": {"content-type": "application/json"}},
        ]
        for post in posts:
            client.post("/v1/features", **post)
        assert app.state.admission.held_bytes == 0


def test_models_and_info_need_a_key_and_health_does_not(student: Student) -> None:
    with TestClient(create_app(student, api_keys=KEYS)) as client:
        for path in ("/info", "/v1/models", "/v1/models/student"):
            assert refusal(client.get(path)) == (401, "unauthorized")
            assert client.get(path, headers=key("two")).status_code == 200
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/readyz").json() == {"status": "ready"}
        assert client.get("/metrics").status_code == 200


def test_only_named_origins_are_allowed(student: Student) -> None:
    origin = {"origin": "https://lab.example"}
    preflight = origin | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with TestClient(create_app(student)) as client:
        assert "access-control-allow-origin" not in client.post("/v1/features", content=HALF, headers=origin).headers
    with TestClient(create_app(student, cors_origins=["https://lab.example"])) as client:
        answer = client.post("/v1/features", content=HALF, headers=origin)
        assert answer.headers["access-control-allow-origin"] == "https://lab.example"
        assert client.options("/v1/features", headers=preflight).status_code == 200
        assert client.options("/v1/features", headers=preflight | {"origin": "https://else.example"}).status_code == 400


def test_a_client_that_reads_nothing_is_disconnected(student: Student) -> None:
    """If the client stops reading a long response, the request ends and releases its memory."""
    app = create_app(student, limits=Limits(deadline_seconds=3))
    body, sent = audio(30), []
    unread = [body]

    async def receive() -> dict[str, Any]:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        await asyncio.sleep(60)
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) > 2:
            await asyncio.sleep(60)

    scope = {
        "type": "http",
        "method": "POST",
        "http_version": "1.1",
        "scheme": "http",
        "path": "/v1/features",
        "raw_path": b"/v1/features",
        "root_path": "",
        "query_string": b"layer=all",
        "headers": [(b"content-length", str(len(body)).encode())],
    }

    async def main() -> None:
        try:
            await asyncio.wait_for(app(scope, receive, send), 20)
        finally:
            assert app.state.admission.held_bytes == 0

    asyncio.run(main())
    assert sent[0]["status"] == 200 and sent[1]["more_body"]


def test_decoders_of_cancelled_requests_still_count(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, counting = threading.Event(), threading.Lock()
    running = most = 0

    def slow(file: bytes, seconds: float, on_block: Any = None) -> np.ndarray:
        nonlocal running, most
        with counting:
            running += 1
            most = max(most, running)
        gate.wait(20)
        with counting:
            running -= 1
        return decode(file, seconds)

    monkeypatch.setattr("ray_distill.serve.decoders.decode", slow)
    with TestClient(create_app(student)) as client, ThreadPoolExecutor(12) as pool:
        cancelled = [pool.submit(client.post, "/v1/features?timeout=0.2", content=HALF) for _ in range(12)]
        assert {refusal(request.result()) for request in cancelled} == {(504, "deadline")}
        assert 1 <= most <= NUM_DECODERS
        gate.set()
        assert client.post("/v1/features", content=HALF).status_code == 200


def test_files_of_one_request_wait_for_room(student: Student) -> None:
    batch = BatchLimits(queue_seconds=1)
    with TestClient(create_app(student, limits=Limits(max_seconds=20), batch=batch)) as client:
        files = [("file", (f"{index}.wav", HALF)) for index in range(12)]
        assert len(client.post("/v1/features", files=files).json()["data"]) == 12


def test_a_full_queue_refuses_for_its_own_model_only(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    app = create_app(
        student, name="busy", more={"idle": Student(student.config).eval()}, batch=BatchLimits(queue_seconds=1)
    )
    with TestClient(app) as client, ThreadPoolExecutor(8) as pool:
        gate = hold(student, monkeypatch)
        engine = app.state.models.get("busy").engine
        running = [pool.submit(client.post, "/v1/features", content=HALF) for _ in range(3)]
        while engine.queued_seconds < 1:  # One or two are running.
            running.append(pool.submit(client.post, "/v1/features", content=HALF))
            time.sleep(0.1)

        def post(model: str) -> httpx.Response:
            body = {"input": base64.b64encode(HALF).decode(), "model": model}
            return client.post("/v1/embeddings", json=body)

        assert refusal(post("busy")) == refusal(client.post("/v1/features", content=HALF)) == (429, "overloaded")
        assert post("idle").status_code == 200
        gate.set()
        assert {request.result().status_code for request in running} <= {200, 429}


def test_a_request_that_would_wait_beyond_its_deadline_is_refused_before_it_is_decoded(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(student)
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
        gate, engine = hold(student, monkeypatch), app.state.models.get(None).engine
        running = pool.submit(client.post, "/v1/features", content=HALF)
        while not is_overdue(engine, 0.3):  # The batch takes longer than expected, and so may what follows.
            pass
        decoded: list[bytes] = []
        monkeypatch.setattr("ray_distill.serve.decoders.decode", lambda file, *_: decoded.append(file))
        body = {"input": base64.b64encode(HALF).decode(), "timeout": 0.35}
        refused = [
            client.post("/v1/features?timeout=0.35", content=HALF),
            client.post("/v1/features", json=body),
        ]
        gate.set()
        assert running.result().status_code == 200
    assert [refusal(response) for response in refused] == [(429, "overloaded")] * 2
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused) and not decoded


def test_loading_a_model_of_the_library_is_within_the_deadline(student: Student, tmp_path: Path) -> None:
    save_student(student, tmp_path / "run" / "export", None)
    app = create_app(student, library=tmp_path)
    load = app.state.models.load

    async def slow(name: str) -> None:
        await asyncio.sleep(20)
        await load(name)

    app.state.models.load = slow
    with TestClient(app) as client:
        body = {"input": base64.b64encode(HALF).decode(), "model": "run", "timeout": 0.3}
        began = time.monotonic()
        assert refusal(client.post("/v1/features?model=run&timeout=0.3", content=HALF)) == (504, "deadline")
        assert refusal(client.post("/v1/features", json=body)) == (504, "deadline")
        assert time.monotonic() - began < 15


def test_unloading_a_model_delays_no_request(student: Student, tmp_path: Path) -> None:
    for number in range(2):
        save_student(student, tmp_path / f"run-{number}" / "export", None)
    app = create_app(student, library=tmp_path, library_loaded=1)
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:

        def post(number: int) -> httpx.Response:
            return client.post(f"/v1/features?model=run-{number}", content=HALF)

        assert post(0).status_code == 200
        backend, gate = app.state.models.get("run-0").engine.backend, threading.Event()
        real, entered = backend.run, threading.Event()
        backend.run = lambda batch: entered.set() or (gate.wait(20) and real(batch))
        queued = pool.submit(post, 0)
        assert entered.wait(20)
        assert post(1).status_code == 200  # run-0 is unloaded but has not completed its queue.
        assert [model.name for model in app.state.models] == ["student", "run-1"]
        gate.set()
        assert queued.result().status_code == 200


def test_a_request_is_checked_again_if_its_model_is_replaced_while_it_is_decoded(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(student)
    headless = Student(student.config.model_copy(update={"heads": "none"})).eval()

    def swapping(file: bytes, seconds: float, on_block: Any = None) -> np.ndarray:
        app.state.models.put("student", headless)
        return decode(file, seconds)

    monkeypatch.setattr("ray_distill.serve.decoders.decode", swapping)
    with TestClient(app) as client:
        assert refusal(client.post("/v1/features?space=teacher", content=HALF)) == (422, "bad_parameter")


def test_shutdown_waits_longer_than_the_deadline(student: Student) -> None:
    app = create_app(student, limits=Limits(deadline_seconds=120))
    assert Server(app, "127.0.0.1", 0).config.timeout_graceful_shutdown == 130


def test_a_damaged_and_a_missing_model_of_the_library_differ(
    student: Student, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_student(student, tmp_path / "run" / "export", None)
    (tmp_path / "run" / "export" / "model.safetensors").write_bytes(b"cut short")
    with TestClient(create_app(student, library=tmp_path)) as client:
        assert refusal(client.post("/v1/features?model=run", content=HALF)) == (503, "not_ready")
        assert refusal(client.post("/v1/features?model=ran", content=HALF)) == (404, "model_not_found")
    assert len([record for record in caplog.records if "can't be loaded" in record.message]) == 1
