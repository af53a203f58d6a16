"""``python -m serve --model FOLDER``: start the feature service."""

import logging
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ray_distill.serve.api.admission import Limits
from ray_distill.serve.app import create_app
from ray_distill.serve.decoding import silence_decoders
from ray_distill.serve.inference.backends import BackendOptions, Precision, Runtime
from ray_distill.serve.inference.engine import BatchLimits
from ray_distill.serve.inference.windows import LongAudio
from ray_distill.serve.server import Server


def serve(
    model: Annotated[
        Path, typer.Option(help="Folder of an exported student, such as runs/demo/export; or a .onnx file.")
    ],
    name: Annotated[str | None, typer.Option(help="What answers call the model; the run's name by default.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    backend: Annotated[
        Runtime | None, typer.Option(help="What runs models. Default: onnx for .onnx files, else torch.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where PyTorch runs: cpu, cuda, cuda:1.")] = BackendOptions.device,
    precision: Annotated[Precision, typer.Option(help="Of PyTorch's products.")] = BackendOptions.precision,
    compile: Annotated[bool, typer.Option("--compile", help="Compile PyTorch's model before it is ready.")] = False,
    max_seconds: Annotated[float, typer.Option(help="Longest audio run whole, in seconds.")] = Limits.max_seconds,
    long_audio: Annotated[
        Literal["refuse", "windows"], typer.Option(help="Longer audio: 413, or overlapping windows.")
    ] = "refuse",
    long_seconds: Annotated[float, typer.Option(help="Longest audio run in windows.")] = LongAudio.max_seconds,
    window_seconds: Annotated[float, typer.Option(help="Audio of a window.")] = LongAudio.window_seconds,
    overlap_seconds: Annotated[float, typer.Option(help="Audio that windows share.")] = LongAudio.overlap_seconds,
    max_bytes: Annotated[int, typer.Option(help="Largest request body accepted, in bytes.")] = Limits.max_bytes,
    open_bytes: Annotated[
        int, typer.Option(help="Bytes that all open requests hold: bodies, audio, answers; more get 429.")
    ] = Limits.open_bytes,
    deadline_seconds: Annotated[float, typer.Option(help="Longest time for an answer.")] = Limits.deadline_seconds,
    max_requests: Annotated[int, typer.Option(help="Requests open at once; more get 429.")] = Limits.max_requests,
    batch_seconds: Annotated[
        float | None, typer.Option(help="Audio of a batch, in seconds. Default: 8 on a CPU, else 30.")
    ] = None,
    queue_seconds: Annotated[float, typer.Option(help="Audio that may wait, in seconds.")] = BatchLimits.queue_seconds,
    more: Annotated[list[str] | None, typer.Option(help="A further model, NAME=FOLDER; may be repeated.")] = None,
    library: Annotated[Path | None, typer.Option(help="Folder of models that are loaded when asked for.")] = None,
    library_loaded: Annotated[int, typer.Option(help="How many of them are loaded at once.")] = 4,
    api_keys: Annotated[Path | None, typer.Option(help="File of API keys, one a line; clients must send one.")] = None,
    key_requests: Annotated[int | None, typer.Option(help="Requests of one key open at once; more get 429.")] = None,
    key_rate: Annotated[float | None, typer.Option(help="Requests a second of one key; more get 429.")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may ask, or *; may be repeated. Default: none.")
    ] = None,
    leave_seconds: Annotated[
        float, typer.Option(help="How long after SIGTERM requests are taken, while /readyz says 503.", min=0)
    ] = 0.0,
) -> None:
    """Serve the features of a distilled student over HTTP; the interface is described at /docs."""
    # Uvicorn drains, then raises the signal again: without this handler a requested stop would look like a crash.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("serve").setLevel(logging.INFO)
    silence_decoders()
    try:
        app = create_app(
            model,
            name=name,
            more=_named_folders(more or []),
            library=library,
            library_loaded=library_loaded,
            backend=BackendOptions(backend, device, precision, compile),
            limits=Limits(
                max_seconds=max_seconds,
                max_bytes=max_bytes,
                deadline_seconds=deadline_seconds,
                max_requests=max_requests,
                open_bytes=open_bytes,
                long_audio=LongAudio(long_seconds, window_seconds, overlap_seconds)
                if long_audio == "windows"
                else None,
                key_requests=key_requests,
                key_rate=key_rate,
            ),
            batch=BatchLimits(batch_seconds=batch_seconds, queue_seconds=queue_seconds),
            api_keys=_keys(api_keys),
            cors_origins=cors_origin or [],
        )
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    Server(app, host, port, leave_seconds).run()


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
