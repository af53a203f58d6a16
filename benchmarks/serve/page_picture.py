"""Draw the pictures of the service's page: ``python -m benchmarks.serve.page_picture runs/demo/export``.

The page is opened in headless Chromium with the model and its sample. ``--all FOLDER`` also writes the page empty, with the sample and
while recording, wide and on a phone, light and dark, to be looked at after a change.
"""

import itertools
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn
from fastapi import FastAPI
from PIL import Image

from benchmarks.result_file import REPOSITORY
from ray_distill.serve import create_app

BY_ID = "document.getElementById"
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve an application in this process; yield the address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def draw(browser: Any, address: str, state: str, scheme: str, size: dict[str, int], output: Path) -> None:
    """Write the page in a state (``empty``, ``sample`` or ``recording``) as a picture of its whole height."""
    context = browser.new_context(viewport=size, color_scheme=scheme, permissions=["microphone"])
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#model-line:not(:empty)")
    if state == "sample":
        page.click("#sample")
        page.wait_for_selector("#comparison:not([hidden])")
        page.wait_for_selector(".busy", state="hidden")
        # What differs from run to run: times of the service, and its port.
        page.evaluate("document.querySelectorAll('.status').forEach((line) => { line.hidden = true; })")
        page.evaluate(
            "$('command').textContent = $('command').textContent.replace(/:[0-9]+/, ':8000')".replace("$", BY_ID)
        )
    elif state == "recording":
        page.click("#clip-a .record")
        page.get_by_text("175 frames").wait_for()
    page.wait_for_timeout(300)  # Pictures are drawn before the next repaint.
    output.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=output, full_page=True)
    context.close()


def main(
    model: Annotated[Path, typer.Argument(help="Folder of an exported student.")],
    output: Annotated[Path, typer.Option(help="Picture of the documentation.")] = REPOSITORY / "docs/pictures/page.png",
    every: Annotated[
        Path | None, typer.Option("--all", help="Folder for the page in every state, size and colour scheme.")
    ] = None,
) -> None:
    """Draw the page."""
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    with served(create_app(model, name="demo")) as address, sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        draw(browser, address, "sample", "light", WIDE, output)
        # A palette of 256 colours is a third of the size.
        Image.open(output).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(output, optimize=True)
        if every is not None:
            states, sizes = ("empty", "sample", "recording"), {"wide": WIDE, "phone": PHONE}
            for state, name, scheme in itertools.product(states, sizes, ("light", "dark")):
                draw(browser, address, state, scheme, sizes[name], every / f"{state}-{name}-{scheme}.png")
        browser.close()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
