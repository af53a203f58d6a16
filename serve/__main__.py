"""``python -m serve --model FOLDER``: start the feature service."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from serve.app import MAX_BYTES, MAX_SECONDS, create_app

_DRAIN_SECONDS = 30


def serve(
    model: Annotated[Path, typer.Option(help="Folder of an exported student, such as runs/demo/export.")],
    name: Annotated[str | None, typer.Option(help="What answers call the model; the run's name by default.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    device: Annotated[str, typer.Option(help="Where inference runs: cpu, cuda, cuda:1.")] = "cpu",
    max_seconds: Annotated[float, typer.Option(help="Longest audio accepted, in seconds.")] = MAX_SECONDS,
    max_bytes: Annotated[int, typer.Option(help="Largest request body accepted, in bytes.")] = MAX_BYTES,
) -> None:
    """Serve the features of a distilled student over HTTP; the interface is described at /docs."""
    # Uvicorn drains, then raises the signal again: without this handler a requested stop would look like a crash.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        app = create_app(model, name=name, device=device, max_seconds=max_seconds, max_bytes=max_bytes)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=_DRAIN_SECONDS)


if __name__ == "__main__":
    typer.run(serve)
