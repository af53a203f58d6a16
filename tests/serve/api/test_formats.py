"""Every format of bodies and responses, embeddings, several models, keys, limits, metrics and logs."""

import base64
import io
import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
import soundfile
import torch
from fastapi.testclient import TestClient

from ray_distill.serve import create_app
from ray_distill.serve.api.formats import base64_chunks
from ray_distill.serve.decoding import decode
from ray_distill.serve.inference.backends import LayerRequest, TorchBackend
from ray_distill.serve.settings import BatchLimits, Limits
from ray_distill.student import Student, load_student, save_student

from ..conftest import MAX_SECONDS


def audio(seconds: float = 0.5, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).normal(0, 0.1, int(16_000 * seconds))
    soundfile.write(buffer, noise, 16_000, format="WAV")
    return buffer.getvalue()


FILES = [audio(0.5, 1), audio(0.8, 2)]
FORM = [("file", ("a.wav", file)) for file in FILES]


@pytest.fixture(scope="module")
def expected(client: httpx.Client) -> list[np.ndarray]:
    answers = [client.post("/v1/features?format=npy", content=file) for file in FILES]
    return [np.load(io.BytesIO(answer.content)) for answer in answers]


def assert_refused(response: httpx.Response, status: int, error_type: str) -> None:
    assert (response.status_code, response.json()["error_type"]) == (status, error_type)


def same(left: Any, right: np.ndarray, relative: float = 1e-5) -> None:
    assert np.shape(left) == right.shape
    assert np.abs(np.asarray(left, np.float64) - right).max() <= relative * np.abs(right).max()


def test_many_files_in_each_binary_form(client: httpx.Client, expected: list[np.ndarray]) -> None:
    def post(accept: str) -> bytes:
        response = client.post("/v1/features", files=FORM, headers={"accept": accept})
        assert (response.status_code, response.headers["content-type"]) == (200, accept)
        assert response.headers["x-shape"] == "24,16;39,16"
        assert (response.headers["x-model"], response.headers["x-frame-rate"]) == ("tiny", "50.0")
        assert len(response.headers["x-revision"]) == 12 and "0.02 i" in response.headers["x-timestamps"]
        return response.content

    npz = np.load(io.BytesIO(post("application/x-npz")))
    tensors = safetensors.numpy.load(post("application/vnd.safetensors"))
    table = pa.ipc.open_file(post("application/vnd.apache.arrow.file")).read_all()
    assert table.schema.metadata[b"model"] == b"tiny"
    for index, array in enumerate(expected):
        same(npz[str(index)], array)
        same(tensors[str(index)], array)
        row = table.slice(index, 1).to_pylist()[0]
        same(np.reshape(row["features"], row["shape"]), array)
    assert_refused(client.post("/v1/features?format=npy", files=FORM), 422, "bad_parameter")


def test_many_files_and_base64_in_json(client: httpx.Client, expected: list[np.ndarray]) -> None:
    texts = [base64.b64encode(file).decode() for file in FILES]
    plain = client.post("/v1/features", json={"input": texts}).json()
    packed = client.post("/v1/features?dtype=float16", json={"input": texts, "format": "base64"}).json()
    assert packed["dtype"] == "float16"
    for index, array in enumerate(expected):
        same(plain["data"][index]["features"], array)
        item = packed["data"][index]
        values = np.frombuffer(base64.b64decode(item["features"]), "<f2").reshape(item["shape"])
        same(values, array, 1e-3)
    one = client.post("/v1/features", json={"input": texts[0], "layer": 2}).json()
    assert one["layer"] == 2 and one["shape"] == [24, 16]


@pytest.mark.parametrize("form", ["npy", "npz", "safetensors", "arrow"])
def test_float16_in_binary_forms(client: httpx.Client, form: str) -> None:
    response = client.post(
        "/v1/features", params={"format": form, "dtype": "float16", "layer": "all"}, content=FILES[0]
    )
    assert (response.status_code, response.headers["x-dtype"], response.headers["x-shape"]) == (
        200,
        "float16",
        "3,24,16",
    )


def test_projections_are_the_heads(client: httpx.Client, student: Student) -> None:
    hidden = client.post("/v1/features?layer=2", content=FILES[0]).json()["features"]
    projected = client.post("/v1/features?layer=2&space=teacher", content=FILES[0]).json()
    with torch.inference_mode():
        same(projected["features"], student.heads[1](torch.tensor(hidden)).numpy())
    assert projected["space"] == "teacher" and projected["dim"] == 32


@pytest.mark.parametrize("pooling", ["mean", "max", "mean_std"])
def test_embeddings_pool_features(client: httpx.Client, expected: list[np.ndarray], pooling: str) -> None:
    body = client.post(f"/v1/embeddings?pooling={pooling}", files=FORM).json()
    packed = client.post(f"/v1/embeddings?pooling={pooling}&encoding_format=base64", files=FORM).json()
    assert body["object"] == "list" and body["usage"]["total_tokens"] == 63
    for index, array in enumerate(expected):
        want = {"mean": array.mean(0), "max": array.max(0), "mean_std": np.r_[array.mean(0), array.std(0)]}[pooling]
        same(body["data"][index]["embedding"], want)
        same(np.frombuffer(base64.b64decode(packed["data"][index]["embedding"]), "<f4"), want)
    assert_refused(client.post("/v1/embeddings?layer=all", content=FILES[0]), 422, "bad_layer")


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_codecs(client: httpx.Client, subtype: str) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(48_000) / 30), 48_000, format="OGG", subtype=subtype)
    assert client.post("/v1/features", content=buffer.getvalue()).json()["num_frames"] in (49, 50)


def test_json_that_would_fill_the_memory_is_refused(client: httpx.Client) -> None:
    many_members = b'{"input":"AAAA",' + b",".join(b'"a%d":0' % number for number in range(2000)) + b"}"
    many_lists = b'{"input":"AAAA","x":[' + b"[]," * 100_000 + b"[]]}"
    for body in (many_members, many_lists):
        response = client.post("/v1/features", content=body, headers={"content-type": "application/json"})
        assert_refused(response, 400, "bad_body")
        assert "commas" in response.json()["error"]


def test_a_form_in_no_charset_is_refused(client: httpx.Client) -> None:
    body = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + FILES[0] + b"\r\n--x--\r\n"
    for charset, status in (("utf-8", 200), ("undefined", 400)):
        headers = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
        response = client.post("/v1/features", content=body, headers=headers)
        assert response.status_code == status, response.text
    assert_refused(response, 400, "bad_body")


def test_several_files_as_one_npy_are_refused_before_any_is_decoded(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr("ray_distill.serve.decoders.decode", lambda file, *_: decoded.append(file))
    with TestClient(create_app(student)) as client:
        for options in ({"params": {"format": "npy"}}, {"headers": {"accept": "application/octet-stream"}}):
            assert_refused(client.post("/v1/features", files=FORM, **options), 422, "bad_parameter")
    assert not decoded


def test_long_base64_comes_in_pieces_that_fit_together() -> None:
    array = np.random.default_rng(0).normal(size=(3, 1000, 77)).astype(np.float16)
    pieces = list(base64_chunks(array))
    assert len(pieces) > 2 and max(map(len, pieces)) <= 2**18
    assert (np.frombuffer(base64.b64decode(b"".join(pieces)), "<f2").reshape(array.shape) == array).all()


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"input": 3}',
        b'{"input": []}',
        b'{"input": "\xc3\xa9"}',
        b'{"input": "a"}',
        b"[" * 10**5,
        b"null",
    ],
)
def test_broken_json_is_refused(client: httpx.Client, body: bytes) -> None:
    response = client.post("/v1/features", content=body, headers={"content-type": "application/json"})
    assert_refused(response, 400, "bad_body")


def test_other_refusals(client: httpx.Client) -> None:
    assert_refused(
        client.post("/v1/features", content=b"x", headers={"content-type": "text/html"}), 415, "unsupported_media_type"
    )
    assert_refused(client.post("/v1/features?timeout=1e-9", content=FILES[0]), 504, "deadline")
    assert_refused(client.post("/v1/features?timeout=nan", content=FILES[0]), 422, "bad_parameter")
    assert_refused(client.post("/v1/features?model=none", content=FILES[0]), 404, "model_not_found")
    assert_refused(client.post("/v1/features?space=moon", content=FILES[0]), 422, "bad_parameter")
    assert_refused(client.post("/v1/features?layer=1&layer=2", content=FILES[0]), 422, "bad_parameter")


def test_models_are_listed_and_chosen(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed][:2] == ["tiny", "other"]
    assert listed[0]["revision"] != listed[1]["revision"]
    first, second = (client.post(f"/v1/features?model={m['id']}", content=FILES[0]).json() for m in listed[:2])
    assert first["features"] != second["features"] and second["revision"] == listed[1]["revision"]
    exact = client.post(f"/v1/features?model=other@{listed[1]['revision']}", content=FILES[0])
    assert exact.status_code == 200
    assert_refused(client.post("/v1/features?model=other@0", content=FILES[0]), 404, "model_not_found")
    for model in listed:  # As OpenAI's clients retrieve a model.
        assert client.get(f"/v1/models/{model['id']}").json() == model
    assert_refused(client.get("/v1/models/none"), 404, "model_not_found")


def test_models_have_names_that_requests_can_give(
    student: Student, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="Two models are named 'a': give one of them another name"):
        create_app(student, name="a", more={"b": student, "a": student})
    for name in ("a@1", ""):
        with pytest.raises(ValueError, match=f"A model can't be named '{name}': requests name models as NAME or"):
            create_app(student, name="a", more={name: student})
    for name in ("run", "run@2024"):
        save_student(student, tmp_path / name / "export")
    with TestClient(create_app(student, name="a", library=tmp_path)) as client:
        assert client.get("/v1/models").json()["library"] == ["run"]
    assert "'run@2024' is not served" in caplog.text


@pytest.mark.parametrize("with_header", [False, True], ids=["parameter", "multiplexed"])
def test_models_of_a_library_are_loaded_on_demand(client: httpx.Client, library: Path, with_header: bool) -> None:
    def post(name: str) -> httpx.Response:
        # Ray Serve routes by this header; without Ray it has no effect.
        headers = {"serve_multiplexed_model_id": name} if with_header else {}
        return client.post("/v1/features", params={"model": name, "layer": "all"}, content=FILES[0], headers=headers)

    assert set(client.get("/v1/models").json()["library"]) <= {"run-0", "run-1", "run-2"}
    # `other` is always loaded; the least recently used model of the library is unloaded, and later loaded again.
    answers = [post(name).json() for name in ("run-0", "run-1", "run-0", "other", "run-2", "run-1")]
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["tiny", "other", "run-2", "run-1"]
    assert listed["library"] == ["run-0"]
    for answer, number in zip(answers, (0, 1, 0, None, 2, 1), strict=True):
        if number is not None:
            alone = TorchBackend(load_student(library / f"run-{number}" / "export"))
            (expected,) = alone.run([LayerRequest(decode(FILES[0], MAX_SECONDS), None, "student")])
            assert answer["revision"] == alone.revision
            assert np.abs(np.array(answer["features"]) - expected).max() <= 1e-5 * np.abs(expected).max()
    for name in ("..", "run-3", "../../etc", "run-0@000000000000"):
        assert_refused(post(name), 404, "model_not_found")


def test_a_swap_loses_no_request(student: Student) -> None:
    torch.manual_seed(2)
    other = Student(student.config).eval()
    app = create_app(student, name="tiny")
    with TestClient(app) as client:
        before = app.state.models.get("tiny").revision
        stop = threading.Event()

        def swap() -> None:
            while not stop.is_set():
                app.state.models.put("tiny", other)
                app.state.models.put("tiny", student)

        swapping = threading.Thread(target=swap)
        swapping.start()
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: client.post("/v1/features", content=FILES[0]), range(60)))
        stop.set()
        swapping.join()
    assert {answer.status_code for answer in answers} == {200}
    by_revision: dict[str, Any] = {}
    for answer in answers:
        body = answer.json()
        same(body["features"], np.array(by_revision.setdefault(body["revision"], body["features"])))
    assert before in by_revision and len(by_revision) == 2


def test_keys(student: Student) -> None:
    with TestClient(create_app(student, api_keys=["secret-1", "secret-2"])) as client:
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret-1"}):
            assert_refused(client.post("/v1/features", content=FILES[0], headers=header), 401, "unauthorized")
            assert_refused(client.get("/v1/models", headers=header), 401, "unauthorized")
        good = {"authorization": "Bearer secret-2"}
        assert client.post("/v1/features", content=FILES[0], headers=good).status_code == 200
        assert client.get("/readyz").json() == {"status": "ready"}


def test_overload_is_429_and_a_stopped_service_503(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = student.layer_outputs
    app = create_app(student, limits=Limits(max_requests=2), batch=BatchLimits(queue_seconds=60))
    with TestClient(app) as client, ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(student, "layer_outputs", lambda *a, **k: gate.wait(20) and real(*a, **k))
        held = [pool.submit(client.post, "/v1/features", content=FILES[0]) for _ in range(2)]
        while "serve_open_requests 3.0" not in client.get("/metrics").text:  # The request for metrics is one of them.
            time.sleep(0.02)
        refused = client.post("/v1/features", content=FILES[0])
        assert_refused(refused, 429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        gate.set()
        assert [request.result().status_code for request in held] == [200, 200]
        app.state.models.close()
        assert_refused(client.get("/readyz"), 503, "not_ready")
        assert_refused(client.post("/v1/features", content=FILES[0]), 503, "not_ready")


def test_headers_logs_and_metrics(app_client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ray_distill.serve.requests"):
        parent = f"00-{'a' * 32}-{'b' * 16}-01"
        headers = {"x-request-id": "abc-1", "traceparent": parent}
        answer = app_client.post("/v1/features", content=FILES[0], headers=headers)
        app_client.post("/v1/features", content=b"x", headers={"x-request-id": "bad id\t"})
    assert answer.headers["x-request-id"] == "abc-1"
    assert float(answer.headers["x-queue-time"]) >= 0 and float(answer.headers["x-inference-time"]) > 0
    first, second = (
        json.loads(record.message) for record in caplog.records if record.name == "ray_distill.serve.requests"
    )
    assert (first["request_id"], first["status"], first["route"]) == ("abc-1", 200, "/v1/features")
    assert (first["trace_id"], first["model"], first["bytes"]) == ("a" * 32, "tiny", len(FILES[0]))
    assert (first["audio_seconds"], first["error_type"]) == (0.5, None) and first["time"].endswith("+00:00")
    version, trace, span, flags = answer.headers["traceparent"].split("-")
    assert (version, trace, flags) == ("00", "a" * 32, "01") and span != "b" * 16
    assert len(second["request_id"]) == 32 and second["status"] == 400 and second["error_type"] == "undecodable"
    assert len(second["trace_id"]) == 32 and second["trace_id"] != "a" * 32
    text = app_client.get("/metrics").text
    for name in (
        'serve_requests_total{route="/v1/features",status="200"}',
        'serve_errors_total{error_type="undecodable"}',
        "serve_queue_seconds_count",
        "serve_inference_seconds_count",
        "serve_batch_audio_seconds_bucket",
        "serve_padding_seconds_total",
        'serve_request_seconds_bucket{le="0.5",model="tiny",route="/v1/features",status="200"}',
        "serve_request_audio_seconds_sum",
        "serve_batch_utterances_count",
        "serve_decode_seconds_count",
        'serve_model_loads_total{outcome="loaded"}',
        'serve_queued_utterances{model="other"} 0.0',
        'serve_queued_audio_seconds{model="tiny"} 0.0',
        'serve_expected_wait_seconds{model="tiny"} 0.0',
        "serve_held_bytes 0.0",
        "serve_decoding_waiting_seconds 0.0",
        "process_resident_memory_bytes",
    ):
        assert name in text
    assert app_client.get("/info").json()["limits"]["max_seconds"] == 20
