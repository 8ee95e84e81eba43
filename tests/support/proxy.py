"""An HTTP proxy in front of the S3 server that fails on request, and counts what passes."""

import http.client
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAILURE = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
REFUSAL = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>ServiceUnavailable</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
DENIAL = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
ANSWERS = {"500": FAILURE, "503": REFUSAL, "403": DENIAL}
# (number from 1, method, path) -> what happens to the request:
#   ""      it passes
#   "slow"  it passes after SLOW_S
#   "500"   the server fails
#   "503"   it is refused for now
#   "403"   it is refused for good
#   "lost"  it is dropped before the server sees it
#   "torn"  the server gets half of the request's body, then the line is dropped
#   "mute"  the server does it, and the answer is lost
#   "cut"   half of the answer's body comes back
Fault = Callable[[int, str, str], str]
SLOW_S = 2.0


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that were killed while being answered."""


class FaultyProxy:
    """A context manager; ``requests`` has (method, path) of all that came, ``read`` the bytes that went."""

    def __init__(self, target: str, fault: Fault = lambda *_: "") -> None:
        self.fault = fault
        self.requests: list[tuple[str, str]] = []
        self.read: list[tuple[str, int]] = []
        self.faults = 0
        self.after_mute: Callable[[], None] = lambda: None
        self.serving = threading.local()  # .port is the client's, in the thread that serves it
        self._lock = threading.Lock()
        address = urlsplit(target)
        self._target = (address.hostname, address.port)
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _decide(self, method: str, path: str) -> str:
        with self._lock:
            self.requests.append((method, path))
            number = len(self.requests)
        kind = self.fault(number, method, path)
        self.faults += bool(kind)
        return kind

    def _outcome(self, kind: str, method: str, path: str, headers: dict[str, str], body: bytes):
        """Return (response, its body), or None if the client is to get nothing."""
        if kind == "torn":
            self._tear(method, path, headers, body)
        if kind in ("torn", "lost"):
            return None
        if kind == "slow":
            time.sleep(SLOW_S)
        answer = self._forward(method, path, headers, body)
        if kind != "mute":
            return answer
        self.after_mute()
        return None

    def _forward(self, method: str, path: str, headers: dict[str, str], body: bytes):
        """Return (response, its body), or None if the server is down."""
        try:
            connection = http.client.HTTPConnection(*self._target, timeout=30)
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response, response.read()
        except (OSError, http.client.HTTPException):
            return None

    def _tear(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        try:
            connection = http.client.HTTPConnection(*self._target, timeout=30)
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body[: len(body) // 2])
            connection.close()
        except OSError:
            return

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.serving.port = self.client_address[1]
                kind = proxy._decide(self.command, self.path)
                if kind in ANSWERS:
                    return self._answer(int(kind), {"Content-Type": "application/xml"}, ANSWERS[kind])
                headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
                answer = proxy._outcome(kind, self.command, self.path, headers, body)
                if answer is None:
                    self.close_connection = True
                    return self.connection.shutdown(socket.SHUT_RDWR)
                response, data = answer
                if self.command == "GET":
                    proxy.read.append((urlsplit(self.path).path, len(data)))
                skip = ("transfer-encoding", "connection")
                passed = {k: v for k, v in response.getheaders() if k.lower() not in skip}
                return self._answer(response.status, passed, data, cut=kind == "cut")

            def _answer(self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False):
                self.send_response_only(status)
                headers = {k.lower(): v for k, v in headers.items()}
                if self.command != "HEAD" or "content-length" not in headers:
                    headers["content-length"] = str(len(data))
                for key, value in headers.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[: len(data) // 2] if cut else data)
                if cut:
                    self.close_connection = True

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _serve

            def log_message(self, *_: object) -> None:
                pass

        return Handler
