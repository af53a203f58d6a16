"""The page at ``/`` in headless Chromium, and the headers of its files."""

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from fastapi import FastAPI
from fastapi.testclient import TestClient

from benchmarks.serve.page_picture import served
from ray_distill.serve import create_app
from ray_distill.serve.settings import Limits
from ray_distill.student import Student

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FOLDER = Path(__file__).resolve().parents[2] / "serve" / "page"
# Fraction of a canvas that does not have its most common colour; 0 for an empty canvas.
VARIED = """canvas => {
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data, counts = new Map();
    const pixels = new Uint32Array(data.buffer);
    for (const pixel of pixels) counts.set(pixel, (counts.get(pixel) ?? 0) + 1);
    return 1 - Math.max(...counts.values()) / pixels.length;
}"""
DROP = """(element, {name, content}) => {
    const data = new DataTransfer(), bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
    data.items.add(new File([bytes], name));
    const options = {dataTransfer: data, bubbles: true, cancelable: true};
    for (const kind of ["dragover", "drop"]) element.dispatchEvent(new DragEvent(kind, options));
}"""


@pytest.fixture
def app(student: Student) -> FastAPI:
    return create_app(student, name="tiny", limits=Limits(max_seconds=5))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium, which is not installed (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    with playwright.sync_playwright() as running:
        arguments = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
        playwright.expect.set_options(timeout=20_000)
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Return a function that opens the page; the test fails if the console has errors, such as violations of the page's policy."""
    errors: list[str] = []
    contexts = []

    def opened(address: str, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        # Chromium logs error responses as well; all other messages are errors of the page.
        page.on("console", lambda line: None if "Failed to load" in line.text else errors.append(line.text))
        page.goto(address)
        shows(page, "#clip-a .limits", "wav, flac, ogg")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two sweeps of rising volume, 1.2 s at 16 kHz and 0.8 s at 44.1 kHz in stereo."""
    folder = tmp_path_factory.mktemp("clips")
    for name, rate, length in (("rising.wav", 16_000, 1.2), ("falling.flac", 44_100, 0.8)):
        t = np.arange(int(rate * length)) / rate
        wave = np.sin(2 * np.pi * (300 + 900 * (t if name == "rising.wav" else length - t)) * t) * (t / length) / 2
        soundfile.write(folder / name, wave if rate == 16_000 else np.stack([wave, wave], 1), rate)
    return folder / "rising.wav", folder / "falling.flac"


def shows(page: Any, selector: str, text: str) -> None:
    """Wait until an element is visible and contains the text. The page's policy does not allow `wait_for_function`."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_contain_text(text)
    expect(page.locator(selector)).to_be_visible()


def load(page: Any, letter: str, path: Path) -> None:
    page.set_input_files(f"#clip-{letter} input[type=file]", path)
    shows(page, f"#clip-{letter} .clip-title", path.name)


def varied(page: Any, selector: str) -> float:
    return float(page.locator(selector).evaluate(VARIED))


def test_files_are_sent_with_a_strict_policy(app: FastAPI) -> None:
    with TestClient(app) as client:
        page = client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        named = re.findall(r'(?:src|href)="(page/[^"]+)"', page.text)
        named += [
            f"page/{name}"
            for path in FOLDER.glob("*.js")
            for name in re.findall(r'(?:from "\./|addModule\("page/)(.+?)"', path.read_text())
        ]
        assert {path.name for path in FOLDER.iterdir() if path.suffix in (".js", ".css", ".svg")} == {
            name.removeprefix("page/") for name in named
        }
        for name in ("", *named):
            answer = client.get(f"/{name}")
            assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["content-security-policy"] == policy
            assert client.get(f"/{name}", headers={"if-none-match": answer.headers["etag"]}).status_code == 304
        for name in ("__init__.py", "..%2fapp.py", "nothing.js"):
            assert client.get(f"/page/{name}").json()["error_type"] == "not_found"


def test_nothing_is_inline_and_nothing_is_from_elsewhere() -> None:
    html = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son[a-z]+=", html)
    for path in FOLDER.iterdir():
        if path.suffix in (".html", ".css", ".js"):
            assert not re.search(r"https?:|innerHTML|eval\(|url\(", path.read_text()), path


def test_two_clips_from_drop_to_download(
    app: FastAPI, open_page: Any, clips: tuple[Path, Path], student: Student, tmp_path: Path
) -> None:
    with served(app) as address:
        page = open_page(address)
        content = base64.b64encode(clips[0].read_bytes()).decode()
        page.locator("#clip-a").evaluate(DROP, {"name": clips[0].name, "content": content})
        shows(page, "#layer-value", "3 / 3")
        shows(page, "#clip-a .features-title", "Layer 3")
        assert "59 frames × 16 values, 3 layers" in page.inner_text("#clip-a .status")
        assert page.inner_text("#clip-a .pictures .ticks").split("\n") == [
            "0.00 s",
            "0.30 s",
            "0.60 s",
            "0.90 s",
            "1.20 s",
        ]
        for picture in ("waveform", "spectrogram", "layers", "features"):
            assert varied(page, f"#clip-a canvas.{picture}") > 0.1, picture
        assert not page.is_visible("#comparison")
        page.click("#clip-a .play")
        page.wait_for_selector("#clip-a .play[aria-label=Pause]")
        page.wait_for_selector("#clip-a .play[aria-label=Play]")  # At the end, after 1.2 s.
        assert float(page.input_value("#clip-a .time")) == pytest.approx(1.2, abs=0.05)

        # First by keyboard, then by a click on the picture of layers.
        before = page.locator("#clip-a canvas.features").evaluate("canvas => canvas.toDataURL()")
        page.focus("#layer")
        page.keyboard.press("ArrowLeft")
        shows(page, "#clip-a .features-title", "Layer 2")
        assert page.locator("#clip-a canvas.features").evaluate("canvas => canvas.toDataURL()") != before
        height = page.locator("#clip-a canvas.layers").bounding_box()["height"]
        page.click("#clip-a canvas.layers", position={"x": 300, "y": height / 6})
        shows(page, "#clip-a .features-title", "Layer 1")

        load(page, "b", clips[1])
        shows(page, "#by-layer li:nth-child(3)", "Layer 3")
        a, b = (
            np.array(httpx.post(f"{address}/v1/features?layer=1", content=path.read_bytes()).json()["features"])
            for path in clips
        )
        centre = np.concatenate([a, b]).mean(0)
        rows = [(clip - centre) / np.linalg.norm(clip - centre, axis=1, keepdims=True) for clip in (a, b)]
        similar = rows[0] @ rows[1].T
        expected = (similar.max(0).mean() + similar.max(1).mean()) / 2
        assert float(page.inner_text("#match").replace("−", "-")) == pytest.approx(expected, abs=3e-3)
        assert page.inner_text("#by-layer li:first-child").endswith(page.inner_text("#match"))
        assert varied(page, "#matrix") > 0.1
        page.focus("#matrix")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        cosine = similar[3, 1]
        read = page.inner_text("#matrix-readout")
        assert read.startswith("A 0.06 s · B 0.02 s: ")
        assert float(read.split(": ")[1].replace("−", "-")) == pytest.approx(cosine, abs=3e-3)
        page.uncheck("#centred")
        raw = [clip / np.linalg.norm(clip, axis=1, keepdims=True) for clip in (a, b)]
        similar = raw[0] @ raw[1].T
        expected = (similar.max(0).mean() + similar.max(1).mean()) / 2
        page.wait_for_timeout(200)  # Drawn before the next repaint.
        assert float(page.inner_text("#match").replace("−", "-")) == pytest.approx(expected, abs=3e-3)
        page.check("#centred")

        with page.expect_download() as download:
            page.click("#clip-a .save")
        assert download.value.suggested_filename == "rising.layer-1.npy"
        download.value.save_as(tmp_path / "features.npy")
        saved = np.load(tmp_path / "features.npy")
        assert saved.dtype == np.float32
        np.testing.assert_allclose(saved, a, atol=1e-5 * np.abs(a).max())

        page.select_option("#space", "teacher")
        for letter in "ab":
            shows(page, f"#clip-{letter} .last-dim", "31")
        assert "space=teacher" in page.inner_text("#command")


def test_a_sample_shows_two_clips(app: FastAPI, open_page: Any) -> None:
    with served(app) as address:
        page = open_page(address)
        page.click("#sample")
        for letter in "ab":
            shows(page, f"#clip-{letter} .clip-title", f"sample-{letter}.flac")
        shows(page, "#comparison", "Similarity of the two clips")
        assert not page.is_visible("#sample") and varied(page, "#clip-b canvas.waveform") > 0.01


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_a_pending_file_is_kept_when_the_space_changes(app: FastAPI, open_page: Any, clips: tuple[Path, Path]) -> None:
    with served(app) as address:
        page = open_page(address)
        load(page, "a", clips[0])
        held: list[Any] = []
        page.route("**/v1/features*", lambda route: held.append(route))
        page.set_input_files("#clip-a input[type=file]", clips[1])
        shows(page, "#clip-a .status", "Computing features")
        page.wait_for_timeout(200)
        assert len(held) == 1
        page.unroute("**/v1/features*")
        page.select_option("#space", "teacher")
        shows(page, "#clip-a .clip-title", clips[1].name)
        shows(page, "#clip-a .last-dim", "31")
        assert "space=teacher" in page.inner_text("#command") and clips[1].name in page.inner_text("#command")


def test_a_space_that_is_refused_for_one_clip_changes_nothing(
    app: FastAPI, open_page: Any, clips: tuple[Path, Path]
) -> None:
    with served(app) as address:
        page = open_page(address)
        load(page, "a", clips[0])
        load(page, "b", clips[1])
        before = page.inner_text("#command"), page.inner_text("#clip-a .status")

        def refuse_the_flac(route: Any) -> None:
            if route.request.post_data_buffer.startswith(b"fLaC"):
                page.wait_for_timeout(300)  # The response for the other clip has arrived.
                body = json.dumps({"error": "There is no room.", "error_type": "overloaded"})
                route.fulfill(status=503, content_type="application/json", body=body)
            else:
                route.continue_()

        page.route("**/v1/features*", refuse_the_flac)
        page.select_option("#space", "teacher")
        shows(page, "#alert", "There is no room.")
        assert page.input_value("#space") == "student"
        page.focus("#layer")
        page.keyboard.press("ArrowLeft")  # Redraws everything.
        for letter in "ab":
            shows(page, f"#clip-{letter} .features-title", "Layer 2")
            assert page.inner_text(f"#clip-{letter} .last-dim") == "15"
        assert page.is_visible("#comparison")
        assert (page.inner_text("#command").replace("layer=2", "layer=3"), page.inner_text("#clip-a .status")) == before
        page.unroute("**/v1/features*")
        page.select_option("#space", "teacher")
        shows(page, "#clip-b .last-dim", "31")


def test_a_clip_with_fewer_layers_shows_its_last(app: FastAPI, open_page: Any, clips: tuple[Path, Path]) -> None:
    """The service loaded new weights between two clips."""
    shallow = npy(np.random.default_rng(0).normal(size=(2, 39, 16)).astype(np.float16))
    headers = {"x-model": "tiny", "x-revision": "other", "x-space": "student"}
    with served(app) as address:
        page = open_page(address)
        load(page, "a", clips[0])
        page.route("**/v1/features*", lambda route: route.fulfill(body=shallow, headers=headers))
        load(page, "b", clips[1])
        shows(page, "#clip-a .features-title", "Layer 3")
        shows(page, "#clip-b .features-title", "Layer 2")
        assert varied(page, "#clip-b canvas.features") > 0.1 and not page.is_visible("#comparison")


def test_errors_of_the_service_are_shown(
    app: FastAPI, open_page: Any, clips: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "letter.txt").write_text("Dear Sir or Madam")
    soundfile.write(tmp_path / "long.wav", np.sin(np.arange(16_000 * 6) / 20), 16_000)
    with served(app) as address:
        page = open_page(address)
        load(page, "a", clips[0])
        for name, words, kind in (
            ("letter.txt", "can't be decoded as audio", "undecodable"),
            ("long.wav", "longer than the limit of 5 seconds", "too_long"),
        ):
            page.set_input_files("#clip-b input[type=file]", tmp_path / name)
            shows(page, "#alert-kind", kind)
            shows(page, "#alert[role=alert]", words)
            shows(page, "#alert-text", f"Clip B, {name}: ")
        assert not page.is_visible("#comparison") and page.is_visible("#clip-a canvas.features")
        page.click("#alert-close")
        assert not page.is_visible("#alert")
        load(page, "b", clips[1])
        shows(page, "#comparison", "Similarity of the two clips")
    page.set_input_files("#clip-b input[type=file]", clips[0])
    shows(page, "#alert-kind", "unreachable")


def test_a_key_is_requested_only_if_the_service_needs_one(
    app: FastAPI, student: Student, open_page: Any, clips: tuple[Path, Path]
) -> None:
    with served(app) as address:
        assert not open_page(address).is_visible("#key-form")
    with served(create_app(student, name="tiny", api_keys=["secret"])) as address:
        page = open_page(address)
        page.wait_for_selector("#key:focus")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        shows(page, "#alert", "Send a valid API key")
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-form", state="hidden")
        load(page, "a", clips[0])
        assert "$KEY" in page.inner_text("#command") and "secret" not in page.content()


def test_the_microphone_is_shown_live_and_becomes_a_clip(student: Student, open_page: Any) -> None:
    """Chromium has a fake microphone, which beeps."""
    with served(create_app(student, name="tiny", api_keys=["s/e+c ret"])) as address:
        page = open_page(address, permissions=["microphone"])
        page.fill("#key", "s/e+c ret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-form", state="hidden")
        assert "needs https or localhost" in page.inner_text("#clip-a .drop")
        page.click("#clip-a .record")
        shows(page, "#clip-a .of-live", "125 frames")  # Of two windows of two seconds each.
        shows(page, "#clip-a .live-title", "Layer 3 while recording")
        assert varied(page, "#clip-a .live-features") > 0.05
        assert page.is_visible("#clip-a meter")
        page.click("#clip-a .record")
        shows(page, "#clip-a .clip-title", "recording-")
        assert not page.is_visible("#clip-a .live")
        metrics = httpx.get(f"{address}/metrics").text
        assert 'serve_requests_total{route="/v1/features/stream",status="499"} 1.0' in metrics
        assert varied(page, "#clip-a canvas.waveform") > 0.005
        assert page.inner_text("#clip-a .record") == "Record"


def test_a_recording_goes_on_when_the_live_view_fails(app: FastAPI, open_page: Any) -> None:
    def refuse(socket: Any) -> None:
        socket.send(json.dumps({"error": "There is no room.", "error_type": "overloaded"}))
        socket.close(code=4429)

    with served(app) as address:
        page = open_page(address, permissions=["microphone"])
        page.route_web_socket(re.compile("/v1/features/stream"), refuse)
        page.click("#clip-a .record")
        shows(page, "#clip-a .of-live", "The live view ended: There is no room.")
        shows(page, "#clip-a .record", "Stop (1.")
        page.click("#clip-a .record")
        shows(page, "#clip-a .clip-title", "recording-")


STREAMS = """() => {
    const devices = navigator.mediaDevices, ask = devices.getUserMedia.bind(devices);
    window.streams = [];
    devices.getUserMedia = async (wanted) => {
        await new Promise((resolve) => setTimeout(resolve, 500)); // Time in which a user grants permission.
        streams.push(await ask(wanted));
        return streams.at(-1);
    };
}"""
TRACKS = "streams.map((stream) => stream.getTracks()[0].readyState)"


def test_a_double_click_opens_one_microphone(app: FastAPI, open_page: Any) -> None:
    with served(app) as address:
        page = open_page(address, permissions=["microphone"])
        page.evaluate(STREAMS)
        page.dblclick("#clip-a .record")
        shows(page, "#clip-a .record", "Stop (0.")
        page.wait_for_timeout(700)
        page.click("#clip-a .record")
        shows(page, "#clip-a .clip-title", "recording-")
        assert page.evaluate(TRACKS) == ["ended"]


def test_the_microphone_is_always_released(app: FastAPI, open_page: Any) -> None:
    with served(app) as address:
        page = open_page(address, permissions=["microphone"])
        page.evaluate(STREAMS)
        unplugged = """async () => {
            const { Recording } = await import("/page/sound.js"), recording = await Recording.start(() => {});
            await new Promise((resolve) => setTimeout(resolve, 500));
            streams[0].getTracks()[0].stop();
            await new Promise((resolve) => setTimeout(resolve, 500));
            const late = new Promise((_, reject) => setTimeout(() => reject(new Error("stop never ends")), 5000));
            return [(await Promise.race([recording.stop(), late])).size, recording.context.state];
        }"""
        size, context = page.evaluate(unplugged)
        assert size > 1000 and context == "closed"
        no_context = """async () => {
            const { Recording } = await import("/page/sound.js");
            window.AudioContext = class { constructor() { throw new Error("no more contexts"); } };
            return Recording.start(() => {}).catch((error) => error.message);
        }"""
        assert page.evaluate(no_context) == "no more contexts"
        assert page.evaluate(TRACKS) == ["ended", "ended"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(app: FastAPI, open_page: Any, clips: tuple[Path, Path], scheme: str) -> None:
    with served(app) as address:
        page = open_page(address, viewport={"width": 360, "height": 740}, color_scheme=scheme)
        load(page, "a", clips[0])
        load(page, "b", clips[1])
        shows(page, "#comparison", "Similarity of the two clips")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        lightness = sum(json.loads("[" + colour[4:-1] + "]"))
        assert lightness > 600 if scheme == "light" else lightness < 150
