"""Real S3 servers on loopback (moto): one behind a proxy that answers 503, 403 or not at all when a test says so, and
one in a process of its own that can be killed, and has what it had acknowledged when it is started again.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import pytest

from genkit import storage
from genkit.storage import StoragePath
from genkit.training.launch import free_port

BUCKET = "pictures"
ANSWERS = {503: "SlowDown", 403: "AccessDenied"}


class Proxy(ThreadingHTTPServer):
    """Passes requests on; `answer`: 503 or 403 in place of that, 0 closes the connection; requests: how many so far.

    after: pictures that it lets through before it answers something else, and that answer; None for any number.

    kept: what the server has acknowledged of the requests that change something, in its order; None keeps nothing.
    """

    answer: int | None = None
    requests = 0
    after: tuple[int, int] | None = None
    kept: list[tuple[str, str, bytes, dict[str, str]]] | None = None

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind, self.turn = port, Lock()
        Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that was killed."""


class Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def _any(self) -> None:
        self.server.requests += 1
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(self._chunks())
        answer = self.server.answer
        if answer == 0:
            self.close_connection = True
            return
        if answer is not None:
            self._send(answer, [], f"<Error><Code>{ANSWERS[answer]}</Code><Message>no</Message></Error>".encode())
            return
        dropped = ("transfer-encoding", "content-length", "expect")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        asked = self.command, self.path, body, headers
        if self.server.kept is None or self.command in ("GET", "HEAD"):
            found = pass_on(self.server.behind, *asked)
        else:
            with self.server.turn:
                found = pass_on(self.server.behind, *asked)
                self.server.kept.append(asked)
        if self.server.after is not None and self.command == "PUT" and "/images/" in self.path:
            with self.server.turn:
                many, answer = self.server.after
                self.server.after = many - 1, answer
                if many == 1:
                    self.server.answer, self.server.after = answer, None
        self._send(*found)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _any

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        names = {name.lower() for name, _ in headers}
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                self.send_header(name, value)
        if "content-length" not in names:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def pass_on(
    port: int, method: str, path: str, body: bytes, headers: dict[str, str]
) -> tuple[int, list[tuple[str, str]], bytes]:
    """Send a request; return status, headers and content of the answer."""
    onward = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        onward.request(method, path, body, headers)
        found = onward.getresponse()
        return found.status, found.getheaders(), found.read()
    finally:
        onward.close()


@contextlib.contextmanager
def bucket(patch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Serve an empty bucket, by the environment, to this process and its children."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
    proxy = Proxy(server.get_host_and_port()[1])
    _tell(patch, proxy.server_port)
    try:
        onward = http.client.HTTPConnection("127.0.0.1", server.get_host_and_port()[1])
        onward.request("POST", "/moto-api/reset")
        onward.getresponse().read()
        onward.request("PUT", f"/{BUCKET}")
        assert onward.getresponse().status == 200
        yield proxy
    finally:
        storage._systems.clear()
        proxy.shutdown()
        proxy.server_close()
        server.stop()


def _tell(patch: pytest.MonkeyPatch, port: int) -> None:
    """Let the environment name a server."""
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        patch.setenv(name, value)
    storage._systems.clear()


class Server:
    """A server in a process of its own, with a bucket, behind a proxy.

    It keeps objects in memory, so the proxy keeps the requests that it has acknowledged, and one that starts again is
    sent them all again before anybody else reaches it.
    """

    def __init__(self) -> None:
        self.proxy = Proxy(0)
        self.proxy.kept = [("PUT", f"/{BUCKET}", b"", {})]
        self.start()

    def start(self) -> None:
        """Start it, with what it had acknowledged before it was killed."""
        with free_port() as port:
            self.proxy.behind = port
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            until = time.monotonic() + 200
            while time.monotonic() < until:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                time.sleep(0.05)
        for asked in self.proxy.kept or ():
            pass_on(port, *asked)
        self.proxy.answer = None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.proxy.answer = 0

    def close(self) -> None:
        self.kill()
        self.proxy.shutdown()
        self.proxy.server_close()


@contextlib.contextmanager
def lasting_bucket(patch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serve an empty bucket from a process that a test may kill and start."""
    server = Server()
    _tell(patch, server.proxy.server_port)
    try:
        yield server
    finally:
        storage._systems.clear()
        server.close()


def download(folder: StoragePath, to: Path) -> Path:
    """Copy a run to a local folder, where `check_run` reads it."""
    for name in folder.sizes():
        if not name.startswith(".lock"):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes((folder / name).read_bytes())
    return to
