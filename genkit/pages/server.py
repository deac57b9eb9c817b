"""The server of `genkit label`: one page, its state and its pictures, on this machine only; it serves nothing else."""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import re
import secrets
import stat
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from genkit.errors import HostError, InputError
from genkit.pages import look
from genkit.pages.desk import Desk
from genkit.storage import StoragePath

BODY, PICTURE = 2**18, 2**28  # bytes: of a request, of a picture
_HOST = re.compile(r"(?:127\.0\.0\.1|localhost)(?::[0-9]{1,5})?")  # any port: somebody may have forwarded one
_KINDS = {b"\x89PNG": "image/png", b"RIFF": "image/webp", b"\xff\xd8\xff": "image/jpeg", b"\xff\x0a": "image/jxl"}


class Server(ThreadingHTTPServer):
    """Serves one desk to whoever knows the token, on the loopback interface."""

    def __init__(self, desk: Desk, port: int) -> None:
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise HostError(f"--port: {port}: {error.strerror or error}") from None
        self.desk, self.token = desk, secrets.token_urlsafe(32)
        self.page = look.template(desk.page).encode()
        own = look.policy(self.page.decode(), "img-src 'self'", "connect-src 'self'")
        self.always = {
            "Content-Security-Policy": f"{own}; frame-ancestors 'none'",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cache-Control": "no-store",
        }

    @property
    def url(self) -> str:
        """The address to open, token included."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over a browser that went away in the middle; say in one line what else went wrong."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            print(f"genkit: {error}", file=sys.stderr)


class Refused(Exception):
    """A request that gets an error: (status, text)."""


class Handler(BaseHTTPRequestHandler):
    """One request: GET page, state or image/NUMBER, POST vote; each under /TOKEN/."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "genkit", ""
    timeout = 60  # seconds for a browser that says nothing

    def do_GET(self) -> None:
        """Answer with the page, the state, or a picture."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Take a vote and answer with the state."""
        self._answer(self._post)

    def _answer(self, work: Any) -> None:
        try:
            kind, body = work(self._asked())
            status = 200
        except Refused as refused:
            status, text = refused.args
            kind, body = "text/plain; charset=utf-8", f"{text}\n".encode()
            self.close_connection = True  # its body may not have been read
        except (HostError, InputError) as error:
            print(f"genkit: {error}", file=sys.stderr)
            status, kind, body = 500, "text/plain; charset=utf-8", f"{error}\n".encode("utf-8", "backslashreplace")
        self._send(status, kind, body)

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in self.server.always.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _asked(self) -> str:
        """Return the path behind the token. Raises Refused for another host or token."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0].lower()):
            raise Refused(403, "this host name is not mine")  # a page elsewhere that had its name point here
        _, token, *rest = [*self.path.split("?")[0].split("/", 2), ""]
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            raise Refused(404, "not found")
        if len(rest) < 2:
            raise Refused(404, "the address ends with a /")
        return rest[0]

    def _get(self, asked: str) -> tuple[str, bytes]:
        if asked == "":
            return "text/html; charset=utf-8", self.server.page
        if asked == "state":
            return "application/json", json.dumps(self.server.desk.state()).encode()
        number = asked.removeprefix("image/")
        if asked == number or not (number.isascii() and number.isdigit() and len(number) < 10):
            raise Refused(404, "not found")
        if int(number) >= len(self.server.desk.files):
            raise Refused(404, "not found")
        return _picture(self.server.desk.files[int(number)])

    def _post(self, asked: str) -> tuple[str, bytes]:
        if asked != "vote":
            raise Refused(404, "not found")
        own, site = f"http://{self.headers.get('Host')}", self.headers.get("Sec-Fetch-Site", "same-origin")
        if self.headers.get("Origin") != own or site != "same-origin":
            raise Refused(403, "votes come from the page itself")
        if self.headers.get("Content-Type") != "application/json":
            raise Refused(415, "a vote is JSON")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 10 and int(length) <= BODY):
            raise Refused(413, "a vote is short")
        try:
            state = self.server.desk.take(json.loads(self.rfile.read(int(length))))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Refused(400, "not a vote") from None
        return "application/json", json.dumps(state).encode()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a malformed request without repeating any of it."""
        self.close_connection = True
        self._send(code, "text/plain; charset=utf-8", b"not a request for this page\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the lines would hold the token."""


def _picture(path: Path) -> tuple[str, bytes]:
    """Return the type and bytes of a picture: a regular file that begins as a picture does."""
    try:
        if isinstance(path, StoragePath):
            data = path.read_bytes()
        else:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(handle, "rb") as file:
                found = os.fstat(handle)
                data = file.read() if stat.S_ISREG(found.st_mode) and found.st_size <= PICTURE else b""
    except OSError:
        raise Refused(404, "the picture is gone") from None
    kind = next((kind for magic, kind in _KINDS.items() if data.startswith(magic)), None)
    if kind is None:
        raise Refused(404, "this is no picture")
    return kind, data


def check_port(port: int) -> None:
    """Raise InputError for a number that is no port; 0 takes a free one."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port: {port} is not within 0 to 65535")


def serve(desk: Desk, port: int, so_far: str) -> None:
    """Serve a desk until Ctrl-C; print the address on standard output, and `so_far` and the keys beside it.

    Raises HostError.
    """
    with Server(desk, port) as server:
        print(server.url, flush=True)
        print(f"{so_far} Open the address above: {desk.keys}. Ctrl-C ends.", file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
