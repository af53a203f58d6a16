"""The process around the application: starting it, and what SIGTERM and SIGHUP do."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from ray_distill.serve.app import create_app
from ray_distill.serve.connections import protocol_class
from ray_distill.serve.decoding import silence_decoders
from ray_distill.serve.settings import ServeSettings
from ray_distill.serve.streams.session import MAX_MESSAGE_BYTES

_LOG = logging.getLogger(__name__)


def run(settings: ServeSettings, on_ready: Callable[[], object] | None = None) -> None:
    """Serve until a signal stops the process.

    Args:
        settings: Models, application and server.
        on_ready: Called when the service accepts requests. Default: nothing is called.

    Raises:
        ValueError: a setting is impossible, or a model can't be read.
    """
    silence_decoders()
    app = create_app(settings.model, settings, more=settings.more)
    connection = protocol_class(settings.head_seconds, settings.max_connections)
    Server(app, settings.host, settings.port, settings.leave_seconds, connection, on_ready).run()


class Server(uvicorn.Server):  # type: ignore[misc]
    """A Uvicorn server that gives load balancers time to react, and reloads models without a restart.

    On SIGTERM, /readyz starts to answer 503; after ``leave_seconds`` the server accepts no new connections, finishes the open
    requests and stops. SIGINT or a second SIGTERM skips the wait; a second SIGINT stops at once. SIGHUP reads the models and the API
    keys again, or stops like SIGTERM where it comes from the closed terminal of a service that was not started with nohup.

    Args:
        app: Application made by `create_app`.
        host, port: Address to listen on.
        leave_seconds: Time after SIGTERM in which requests are still accepted. Default 0.
        connection: Class of connections, made by `protocol_class`. Default: Uvicorn's own.
        on_ready: Called when the server accepts requests. Default: nothing is called.
    """

    def __init__(
        self,
        app: FastAPI,
        host: str,
        port: int,
        leave_seconds: float = 0.0,
        connection: type[Any] | None = None,
        on_ready: Callable[[], object] | None = None,
    ) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=connection or "auto",
            ws="auto",
            ws_max_size=2 * MAX_MESSAGE_BYTES,  # The application answers messages that are a little too large.
            # While a stream waits for the model, answers to pings wait behind its audio; idle clients have a deadline anyway.
            ws_ping_interval=None,
            ws_per_message_deflate=False,  # Audio and features hardly compress.
            timeout_graceful_shutdown=app.state.admission.limits.drain_seconds,
            access_log=False,
            server_header=False,
        )
        super().__init__(config)
        self._state = app.state
        self._leave_seconds, self._on_ready = leave_seconds, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen; called by Uvicorn."""
        await super().startup(sockets)
        if self._on_ready is not None and self.started:
            self._on_ready()

    def run(self) -> None:
        """Serve until a signal stops the server."""
        before = signal.getsignal(signal.SIGHUP)
        ends_with_terminal = before is not signal.SIG_IGN and _has_terminal()

        def hang_up(*_: object) -> None:
            if ends_with_terminal and not _has_terminal():
                self.handle_exit(signal.SIGTERM, None)
            else:
                threading.Thread(target=self._state.reload, daemon=True).start()

        signal.signal(signal.SIGHUP, hang_up)
        super().run()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGINT and SIGTERM; called by Uvicorn."""
        if sig == signal.SIGTERM and not self._state.draining:
            self._state.draining = True
            _LOG.info("Stopping; requests are accepted for %g seconds", self._leave_seconds)
            timer = threading.Timer(self._leave_seconds, super().handle_exit, (sig, frame))
            timer.daemon = True
            timer.start()
        else:
            super().handle_exit(sig, frame)


def _has_terminal() -> bool:
    """Return whether the process has a terminal that is open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
