"""An HTTP server between client and store that does what networks and busy servers do."""

import http.client
import re
import socket
import ssl
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass
class Fault:
    """What befalls the next `times` requests whose `METHOD /path?query` matches."""

    match: str = ""
    times: int = 1
    status: int = 0
    """Answer so, with `body`, without asking the server."""
    body: bytes = SLOW_DOWN
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/xml"})
    reset: str = ""
    """Reset the connection `before` the server sees the request, or `after` it has done what it was asked."""
    truncate: int | None = None
    """Send only so many bytes of the body, then close."""
    delay: float = 0
    flip: bool = False
    """Change one bit of the body."""
    whole: bool = False
    """Hide from the server that only a range is wanted."""
    drop: tuple[str, ...] = ()
    """Headers of the answer, in small letters, that get lost."""


class Proxy:
    def __init__(self, upstream: str, tls: ssl.SSLContext | None = None) -> None:
        self.upstream = urlsplit(upstream)
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self._lock = threading.Lock()
        handler = type("BoundHandler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, match: str) -> int:
        return sum(1 for request in self.requests if re.search(match, request))

    def next_fault(self, request: str) -> Fault:
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times and re.search(fault.match, request):
                    fault.times -= 1
                    return fault
        return Fault()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_args: object) -> None:
        """A client that goes away is none of this server's business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: Proxy

    def handle(self) -> None:
        with suppress(ConnectionError, ssl.SSLError):
            super().handle()

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.next_fault(f"{self.command} {self.path}")
        if fault.delay:
            time.sleep(fault.delay)
        if fault.reset == "before":
            return self._reset()
        if fault.status:
            return self._answer(fault.status, fault.headers, fault.body, Fault())
        headers = {name: value for name, value in self.headers.items() if not (fault.whole and name.lower() == "range")}
        upstream = http.client.HTTPConnection(self.proxy.upstream.hostname, self.proxy.upstream.port, timeout=30)
        try:
            upstream.request(self.command, self.path, body, headers)
            response = upstream.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException):
            # The server is away: so is, to the client, what stands before it.
            return self._reset()
        finally:
            upstream.close()
        if fault.reset == "after":
            return self._reset()
        kept = {name: value for name, value in response.getheaders() if name.lower() not in fault.drop}
        return self._answer(response.status, kept, data, fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815

    def _answer(self, status: int, headers: dict[str, str], data: bytes, fault: Fault) -> None:
        if fault.flip:
            data = bytes([data[0] ^ 1]) + data[1:]
        self.send_response_only(status)
        length = next((value for name, value in headers.items() if name.lower() == "content-length"), str(len(data)))
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if fault.truncate is None else data[: fault.truncate])
        if fault.truncate is not None:
            self.wfile.flush()
            self.close_connection = True

    def _reset(self) -> None:
        # Closing with nothing lingering sends RST instead of FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.wfile = self.rfile
        self.connection.close()
        self.close_connection = True
        raise ConnectionError

    def log_message(self, *_args: object) -> None:
        pass
