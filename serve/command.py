"""The command ``serve``: its options are made from the settings.

Nothing heavy is imported before the options are read, so that ``--help`` answers at once and mistakes are reported early.
"""

import inspect
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ray_distill.serve.inference.model_files import check_model_path
from ray_distill.serve.settings import ServeSettings, options, unknown_variables

_LOG = logging.getLogger(__name__)
_COMMAND_LINE_TYPES: dict[str, Any] = {
    "api_keys": Path | None,
    "cors_origins": list[str] | None,
    "more": list[str] | None,
}
"""Command-line types of settings whose types Typer does not support."""


def serve(**values: Any) -> None:
    """Serve the features of a distilled student over HTTP.

    The running service describes its interface at /docs. Each option can also be set by an environment variable, such as
    RAY_DISTILL_SERVE_MAX_SECONDS for --max-seconds; the command line has precedence.
    """
    given = {option.field_name: values[option.name] for option in options() if values[option.name] is not None}
    settings = ServeSettings(**given)
    for path in (settings.model, *settings.more.values()):
        check_model_path(path, settings.runtime)
    check_address(settings.host, settings.port)
    # Uvicorn shuts down, then raises the signal again; without this handler a requested stop would look like a crash.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _configure_logging()
    for sentence in unknown_variables(os.environ):
        _LOG.warning(sentence)
    with reporting_seconds() as ready:
        _LOG.info("Importing PyTorch and the service")

        from ray_distill.serve.server import run

        run(settings, ready)


def check_address(host: str, port: int) -> None:
    """Check that the service can listen at an address, before the seconds that the models take to load.

    Raises:
        ValueError: The port is in use or reserved, or the address is none of this machine.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        raise ValueError(
            f"The service can't listen on port {port} of {host} ({error.strerror}): give another --port or --host."
        ) from error


@contextmanager
def reporting_seconds(interval: float = 1.0) -> Iterator[Callable[[], None]]:
    """Log a line for each second that the start takes.

    Args:
        interval: Seconds between two lines. Default 1.

    Yields:
        A function that ends the lines; it says how long the start took.
    """
    started, done, writing = time.monotonic(), threading.Event(), threading.Lock()

    def report() -> None:
        while not done.wait(interval):
            with writing:
                if not done.is_set():
                    _LOG.info("Starting for %.0f s", time.monotonic() - started)

    def ready() -> None:
        with writing:
            done.set()
            _LOG.info("Ready after %.1f s", time.monotonic() - started)

    threading.Thread(target=report, daemon=True).start()
    try:
        yield ready
    finally:
        done.set()


def _configure_logging() -> None:
    """Write one JSON line per request to standard output, and all other messages to standard error in Uvicorn's format."""
    for name, stream, text in (
        ("ray_distill.serve", sys.stderr, "%(levelname)s:     %(message)s"),
        ("ray_distill.serve.requests", sys.stdout, "%(message)s"),
    ):
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter(text))
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _parameters() -> list[inspect.Parameter]:
    """Return the options of the command as Typer reads them from a signature."""
    parameters = []
    for option in options():
        field = option.field
        flag = f"{option.flag}/--no-{option.flag[2:]}" if field.annotation is bool else option.flag
        bounds = {name: getattr(item, name) for item in field.metadata for name in ("ge", "le") if hasattr(item, name)}
        settings = typer.Option(
            flag,
            envvar=option.environment_variable,
            show_envvar=False,
            help=field.description,
            min=bounds.get("ge"),
            max=bounds.get("le"),
            rich_help_panel=option.group,
        )
        kind = _COMMAND_LINE_TYPES.get(option.field_name, field.annotation)
        default = None if option.field_name in _COMMAND_LINE_TYPES else field.default
        parameters.append(
            inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.is_required() else default,
                annotation=Annotated[kind, settings],
            )
        )
    return parameters


_SIGNATURE = inspect.Signature(_parameters())
serve.__signature__ = _SIGNATURE  # type: ignore[attr-defined]
serve.__annotations__ = {parameter.name: parameter.annotation for parameter in _SIGNATURE.parameters.values()}
