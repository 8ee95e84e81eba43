"""An HTTP proxy in front of the S3 server that fails on request, and counts what passes."""

import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

REFUSAL = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>ServiceUnavailable</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
DENIAL = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
# (number from 1, method, path) -> what happens to the request:
#   ""      it passes
#   "503"   it is refused for now
#   "403"   it is refused for good
#   "lost"  it is dropped before the server sees it
#   "mute"  the server does it, and the answer is lost
#   "cut"   half of the answer's body comes back
Fault = Callable[[int, str, str], str]


class FaultyProxy:
    """A context manager; ``requests`` holds (method, path) of all that came."""

    def __init__(self, target: str, fault: Fault = lambda *_: "") -> None:
        self.fault = fault
        self.requests: list[tuple[str, str]] = []
        self.faults = 0
        self.after_mute: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        address = urlsplit(target)
        self._target = (address.hostname, address.port)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
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

    def _forward(self, method: str, path: str, headers: dict[str, str], body: bytes):
        connection = http.client.HTTPConnection(*self._target, timeout=30)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response, response.read()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                kind = proxy._decide(self.command, self.path)
                if kind in ("503", "403"):
                    data = REFUSAL if kind == "503" else DENIAL
                    return self._answer(int(kind), {"Content-Type": "application/xml"}, data)
                headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
                if kind != "lost":
                    response, data = proxy._forward(self.command, self.path, headers, body)
                if kind == "mute":
                    proxy.after_mute()
                if kind in ("lost", "mute"):
                    self.close_connection = True
                    return self.connection.close()
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
