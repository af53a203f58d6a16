"""The process around the application: what SIGTERM and SIGHUP do."""

import logging
import math
import signal
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

_SENDING_SECONDS = 10


class Server(uvicorn.Server):  # type: ignore[misc]
    """Uvicorn that leaves a balancer time to look elsewhere, and takes new models without a restart.

    SIGTERM: /readyz says 503 from then on; ``leave_seconds`` later no more connections are accepted, open requests are
    answered, and it ends. SIGINT, or a second SIGTERM: without those seconds; a second SIGINT: at once. SIGHUP:
    `ray_distill.serve.inference.models.Models.reload`.

    Args:
        app: of `serve.create_app`.
        host, port: where to listen.
        leave_seconds: how long requests are taken after SIGTERM. Default 0.
    """

    def __init__(self, app: FastAPI, host: str, port: int, leave_seconds: float = 0.0) -> None:
        # Every open request has its answer by then, and some time to be sent it.
        drain = math.ceil(app.state.admission.limits.deadline_seconds + _SENDING_SECONDS)
        super().__init__(uvicorn.Config(app, host=host, port=port, timeout_graceful_shutdown=drain, access_log=False))
        self._state = app.state
        self._leave_seconds = leave_seconds

    def run(self) -> None:
        """Serves until it is told to end."""
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=self._state.models.reload, daemon=True).start())
        super().run()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by Uvicorn on SIGINT and SIGTERM."""
        if sig == signal.SIGTERM and not self._state.leaving:
            self._state.leaving = True
            logging.getLogger("serve").info("leaving: answering for %g seconds more", self._leave_seconds)
            timer = threading.Timer(self._leave_seconds, super().handle_exit, (sig, frame))
            timer.daemon = True
            timer.start()
        else:
            super().handle_exit(sig, frame)
