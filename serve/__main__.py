"""``python -m serve --model FOLDER``: start the feature service."""

import logging
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from serve.app import create_app
from serve.ask import Limits
from serve.engine import BatchLimits

_DRAIN_SECONDS = 30


def serve(
    model: Annotated[Path, typer.Option(help="Folder of an exported student, such as runs/demo/export.")],
    name: Annotated[str | None, typer.Option(help="What answers call the model; the run's name by default.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    device: Annotated[str, typer.Option(help="Where inference runs: cpu, cuda, cuda:1.")] = "cpu",
    max_seconds: Annotated[float, typer.Option(help="Longest audio accepted, in seconds.")] = Limits.max_seconds,
    max_bytes: Annotated[int, typer.Option(help="Largest request body accepted, in bytes.")] = Limits.max_bytes,
    deadline_seconds: Annotated[float, typer.Option(help="Longest time for an answer.")] = Limits.deadline_seconds,
    max_requests: Annotated[int, typer.Option(help="Requests answered at once; more get 429.")] = Limits.max_requests,
    batch_seconds: Annotated[float, typer.Option(help="Audio of a batch, in seconds.")] = BatchLimits.batch_seconds,
    queue_seconds: Annotated[float, typer.Option(help="Audio that may wait, in seconds.")] = BatchLimits.queue_seconds,
    more: Annotated[list[str] | None, typer.Option(help="A further model, NAME=FOLDER; may be repeated.")] = None,
    api_keys: Annotated[Path | None, typer.Option(help="File of API keys, one a line; clients must send one.")] = None,
) -> None:
    """Serve the features of a distilled student over HTTP; the interface is described at /docs."""
    # Uvicorn drains, then raises the signal again: without this handler a requested stop would look like a crash.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("serve").setLevel(logging.INFO)
    try:
        app = create_app(
            model,
            name=name,
            more=_named_folders(more or []),
            device=device,
            max_seconds=max_seconds,
            max_bytes=max_bytes,
            deadline_seconds=deadline_seconds,
            max_requests=max_requests,
            batch=BatchLimits(batch_seconds=batch_seconds, queue_seconds=queue_seconds),
            api_keys=_keys(api_keys),
        )
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=_DRAIN_SECONDS, access_log=False)


def _named_folders(given: list[str]) -> dict[str, str]:
    folders = dict(item.split("=", 1) for item in given if "=" in item)
    if len(folders) < len(given):
        raise ValueError("Each --more must be NAME=FOLDER, with a name of its own.")
    return folders


def _keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    keys = path.read_text().split() if path.is_file() else []
    if not keys:
        raise ValueError(f"There are no API keys in '{path}': write one a line.")
    return keys


if __name__ == "__main__":
    typer.run(serve)
