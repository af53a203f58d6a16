"""The settings: precedence, tables, mistakes, and their table in docs/in-depth/serving.md.

``python -m tests.serve.test_settings`` rewrites that table.
"""

import logging
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ray_distill.command_line import application
from ray_distill.serve.command import reporting_seconds, serve
from ray_distill.serve.settings import (
    AppSettings,
    Limits,
    ServeSettings,
    forget_service_link,
    options,
    unknown_variables,
)

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENT = REPOSITORY / "docs" / "in-depth" / "serving.md"
HEADING = "## Settings\n\n"


def settings_table() -> str:
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for option in options():
        default = "required" if option.field.is_required() else option.field.get_default(call_default_factory=True)
        shown = "" if default in (None, (), {}) else f"`{default}`".lower() if default != "required" else default
        lines.append(f"| `{option.flag}` | {shown} | {option.field.description} |")
    return "\n".join(lines) + "\n"


def read_options(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> ServeSettings:
    """Return the settings that the command would serve with."""
    found: list[ServeSettings] = []
    monkeypatch.setattr("ray_distill.serve.command.check_model_path", lambda *_: None)
    monkeypatch.setattr("ray_distill.serve.command.check_address", lambda *_: None)
    monkeypatch.setattr("ray_distill.serve.command._configure_logging", lambda: None)
    monkeypatch.setattr("ray_distill.serve.command.signal.signal", lambda *_: None)
    monkeypatch.setattr("ray_distill.serve.server.run", lambda settings, ready: found.append(settings))
    app = typer.Typer()
    app.command()(serve)
    result = CliRunner().invoke(app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return found[0]


def test_a_start_says_each_second_that_it_has_not_ended(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ray_distill.serve"), reporting_seconds(0.01) as ready:
        while len(caplog.messages) < 3:
            time.sleep(0.005)
        ready()
        count = len(caplog.messages)
        time.sleep(0.05)
    assert len(caplog.messages) == count and re.fullmatch(r"Ready after \d+\.\d s", caplog.messages[-1])
    assert re.fullmatch(r"Starting for \d+ s", caplog.messages[0])


def test_the_document_has_the_table_of_settings() -> None:
    assert DOCUMENT.read_text().partition(HEADING)[2] == settings_table(), f"run python -m {__spec__.name}"


def test_every_setting_is_described_once() -> None:
    described = list(options())
    assert {option.field_name for option in described} == set(ServeSettings.model_fields)
    assert len({option.name for option in described}) == len(described)
    for option in described:
        assert option.field.description and option.field.description.endswith(".")


def test_command_line_then_environment_then_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("MODEL", "/runs/a"),
        ("MAX_SECONDS", "20"),
        ("PORT", "9000"),
        ("BACKEND", "onnx"),
        ("MORE", "b=/runs/b c=/runs/c"),
        ("CORS_ORIGIN", "https://a.example https://b.example"),
        ("COMPILE", "1"),
        ("API_KEYS", "/keys"),
    ):
        monkeypatch.setenv(f"RAY_DISTILL_SERVE_{name}", value)
    settings = read_options(monkeypatch, "--port", "9001", "--no-compile")
    assert settings == ServeSettings(
        model=Path("/runs/a"),
        max_seconds=20,
        port=9001,
        runtime="onnx",
        more={"b": Path("/runs/b"), "c": Path("/runs/c")},
        cors_origins=("https://a.example", "https://b.example"),
        compile=False,
        api_keys=Path("/keys"),
    )
    assert (settings.port, settings.max_seconds, settings.max_bytes) == (9001, 20, 32 * 2**20)
    assert settings.more["c"] == Path("/runs/c") and settings.runtime == "onnx" and not settings.compile
    # The application reads the same environment; arguments have precedence.
    app = AppSettings(limits={"max_bytes": 5}, backend={"runtime": "torch"})
    assert (app.max_seconds, app.max_bytes, app.runtime) == (20, 5, "torch")
    assert Limits().max_seconds == 60


def test_options_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (
        "--model m --name n --host h --port 1 --backend torch --device cuda --precision bf16 --compile --max-seconds 40 "
        "--long-audio windows --long-seconds 100 --window-seconds 20 --overlap-seconds 2 --max-bytes 5 --open-bytes 6 "
        "--deadline-seconds 7 --max-requests 8 --batch-seconds 9 --queue-seconds 10 --more a=b --more c=d --library l "
        "--library-loaded 2 --api-keys k --key-requests 3 --key-rate 4 --cors-origin https://x --cors-origin * --leave-seconds 11"
    )
    settings = read_options(monkeypatch, *arguments.split())
    assert settings.model_fields_set >= {option.field_name for option in options()} - {
        "request_seconds",
        "wait_seconds",
    }
    assert settings.more == {"a": Path("b"), "c": Path("d")} and settings.cors_origins == ("https://x", "*")
    assert settings.record()["long_audio"] == {"max_seconds": 100, "window_seconds": 20, "overlap_seconds": 2}
    assert pickle.loads(pickle.dumps(settings)) == settings  # Ray Serve pickles them for replicas.


def test_tables_are_the_settings_in_them() -> None:
    settings = ServeSettings(
        model="runs/a",
        api_keys=["one", "two"],
        limits={"max_seconds": 40, "long_audio": {"max_seconds": 100}},
        batch={"queue_seconds": 5},
        backend={"runtime": "onnx"},
    )
    assert (settings.longest_seconds, settings.queue_seconds, settings.runtime) == (100, 5, "onnx")
    assert settings.read_api_keys() == ("one", "two")
    assert AppSettings(limits=None, batch=None).record() == Limits(long_audio="refuse").record()
    assert Limits(long_audio=None).record()["long_audio"] is None


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"max_seconds": 0}, "max_seconds must be greater than 0, not 0."),
        ({"max_seconds": "long"}, "max_seconds must be a valid number, not 'long'."),
        ({"limits": {"max_bytes": 0}}, "limits.max_bytes must be greater than or equal to 1, not 0."),
        ({"limits": {"max_second": 3}}, "limits.max_second is not a setting of the service"),
        ({"limits": {"long_audio": {"overlap": 3}}}, "limits.long_audio has no setting 'overlap'"),
        ({"backend": "onnx"}, "backend must be a table of settings, not 'onnx'."),
        ({"backend": {"runtime": "jax"}}, "backend.runtime must be 'torch' or 'onnx', not 'jax'."),
        ({"open_bytes": 5}, r"open_bytes \(5\) must be at least max_bytes"),
        (
            {"long_audio": "windows", "overlap_seconds": 20},
            r"overlap_seconds \(20\) must be at most half of window_seconds",
        ),
        ({"more": ["a"]}, "more must have entries NAME=FOLDER, each with a different name."),
        ({"more": ["a=b", "a=c"]}, "more must have entries NAME=FOLDER, each with a different name."),
        ({"model": None}, "model must be a path, not None."),
    ],
)
def test_a_mistake_is_one_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as refused:
        ServeSettings(**{"model": "runs/a"} | values)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


def test_a_model_is_required() -> None:
    with pytest.raises(ValueError, match="model is not set"):
        ServeSettings()


def test_a_deployment_takes_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = pytest.importorskip("ray_distill.serve.deployment")
    bound: list[ServeSettings] = []
    monkeypatch.setattr(deployment, "_deployment", lambda settings: SimpleNamespace(bind=bound.append))
    deployment.build({"model": "runs/a", "more": {"b": "runs/b"}, "limits": {"max_seconds": 40}, "library_loaded": 2})
    assert bound == [ServeSettings(model=Path("runs/a"), more={"b": Path("runs/b")}, max_seconds=40, library_loaded=2)]
    with pytest.raises(ValueError, match="model is not set"):
        deployment.build({})
    with pytest.raises(ValueError, match="limits.max_seconds must be greater than 0, not 0."):
        deployment.build({"model": "runs/a", "limits": {"max_seconds": 0}})


def test_ray_serve_leaves_the_limits_to_the_application() -> None:
    deployment = pytest.importorskip("ray_distill.serve.deployment")
    for limits, ongoing, grace in (({}, 320, 40), ({"max_requests": 1000, "deadline_seconds": 120}, 1064, 130)):
        service = deployment._deployment(ServeSettings(model=Path("runs/a"), limits=limits))
        assert service.max_ongoing_requests == ongoing > Limits(**limits).max_requests
        assert service._deployment_config.graceful_shutdown_timeout_s == grace


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    assert AppSettings(api_keys=tmp_path / "keys").read_api_keys() == ("one", "two")
    (tmp_path / "keys").write_text("\n")
    for path in (tmp_path / "keys", tmp_path / "none"):
        with pytest.raises(ValueError, match="holds no API keys"):
            AppSettings(api_keys=path).read_api_keys()
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbfone\r\n\r\n two \r\n")  # As editors of Windows write it.
    assert AppSettings(api_keys=tmp_path / "keys").read_api_keys() == ("one", "two")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"one\n# team a\n", "Line 2 of '.*keys' is no API key: write one key per line, without spaces or comments."),
        (b"#team\n", "Line 1 of '.*keys' is no API key"),
        (b"one  alice\n", "Line 1 of '.*keys' is no API key"),
        (b"\xff\xfeo\0n\0e\0", "'.*keys' is not UTF-8 text: write one API key per line."),
    ],
)
def test_words_of_a_comment_are_no_keys(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        AppSettings(api_keys=tmp_path / "keys").read_api_keys()


@pytest.mark.parametrize(
    "origin", ["app.example", "https://app.example/", "https://App.example", "https://a/b", "https://"]
)
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match=rf"cors_origins has '{origin}', which no browser sends: use SCHEME://HOST"):
        AppSettings(cors_origins=["https://b.example", origin])
    fine = ("*", "null", "http://localhost:3000", "https://[::1]:8443", "chrome-extension://abc")
    assert AppSettings(cors_origins=fine).cors_origins == fine


def test_the_package_and_the_options_import_nothing_heavy() -> None:
    code = (
        "import sys, ray_distill.serve, ray_distill.serve.command;"
        "assert {'create_app', 'Client', 'ServeSettings'} <= set(dir(ray_distill.serve));"
        "assert not {'torch', 'fastapi', 'numpy', 'uvicorn', 'ray'} & set(sys.modules);"
        "ray_distill.serve.Client; assert 'torch' not in sys.modules and 'fastapi' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(text.partition(HEADING)[0] + HEADING + settings_table())


def test_variables_of_the_environment_that_name_no_setting_are_said() -> None:
    environment = {
        "RAY_DISTILL_SERVE_PORT": "8000",
        "RAY_DISTILL_SERVE_PROT": "8000",
        "RAY_DISTILL_SERVE_TLS": "yes",
        "RAY_DISTILL_CACHE": "x",
        # What Kubernetes sets for a service named ray-distill-serve-svc.
        "RAY_DISTILL_SERVE_SVC_SERVICE_HOST": "10.0.0.1",
        "RAY_DISTILL_SERVE_SVC_SERVICE_PORT_HTTP": "8000",
        "RAY_DISTILL_SERVE_SVC_PORT": "tcp://10.0.0.1:8000",
        "RAY_DISTILL_SERVE_SVC_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "RAY_DISTILL_SERVE_SVC_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    port, tls = unknown_variables(environment)
    assert port.startswith("The environment variable RAY_DISTILL_SERVE_PROT has no effect")
    assert port.endswith("did you mean RAY_DISTILL_SERVE_PORT?")
    assert "RAY_DISTILL_SERVE_TLS" in tls and tls.endswith("ray-distill serve --help lists the settings.")


def test_the_port_of_a_kubernetes_service_is_no_port_to_listen_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_DISTILL_SERVE_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(SystemExit):
        application(["serve", "--model", str(tmp_path / "missing")])
    message = capsys.readouterr().err
    assert "There is no model folder" in message and "tcp" not in message
    environment = {"RAY_DISTILL_SERVE_PORT": "8080"}
    forget_service_link(environment)
    assert environment == {"RAY_DISTILL_SERVE_PORT": "8080"}
