"""The report of a run in a browser, as it is at each look: a run that is under way is followed."""

import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ns.core import log
from ns.core.errors import ConfigError, NsError
from ns.reporting.context import gather_context
from ns.reporting.page import render_report
from ns.storage import Store

ADDRESS = "127.0.0.1"
"""This machine alone: the report shows private images. Others reach it by `ssh -L`."""
REFRESH_SECONDS = 30
"""How often the browser looks again while the run is under way."""


class ReportServer(ThreadingHTTPServer):
    """Serves the page at `/`. Each look renders it; looks at the same time wait for each other."""

    def __init__(self, root: Store, run: str, port: int) -> None:
        """`port`: 0 for any free one. Raises ConfigError if it cannot be used."""
        self.root, self.run, self.lock = root, run, threading.Lock()
        try:
            super().__init__((ADDRESS, port), _ReportHandler)
        except OSError as error:
            raise ConfigError(f"--port {port}: {error.strerror}; choose another port") from error

    def handle_error(self, *_: Any) -> None:
        """One line for what failed; nothing for a browser that went away while it was answered."""
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            log.get_logger().warning("the report could not be shown", reason=f"{type(error).__name__}: {error}")

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}"


class _ReportHandler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        # A page from elsewhere whose name was pointed at this machine would read the report.
        host = (self.headers["Host"] or "").rpartition(":")[0]
        if self.path != "/" or host not in (ADDRESS, "localhost"):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            with self.server.lock:
                context = gather_context(self.server.root, self.server.run)
                page = render_report(context).encode()
        except NsError as error:
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=str(error))
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        if context.summary.state == "running":
            self.send_header("Refresh", str(REFRESH_SECONDS))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *values: object) -> None:  # noqa: A002
        log.get_logger().debug(format % values)
