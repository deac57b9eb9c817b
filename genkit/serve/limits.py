"""Who may call: keys, the Host and Origin of a call, the size of its body. One ASGI layer around the whole app."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

from genkit.errors import InputError, shown
from genkit.files import place

OPEN = ("/health", "/v1/images/files/")  # beginnings of paths that need no key: the names of files are secrets
# By status, of a description of the interfaces
STATUSES: dict[int, dict[str, Any]] = {
    code: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
    for code, text in {
        400: "Something in the request is wrong: the error names it", 401: "No key, or a wrong one",
        403: "Called by a page of another site", 404: "There is no such thing here", 413: "The body is too large",
        421: "The Host header names another machine", 422: "No picture passes the gate",
        429: "The queue is full: see Retry-After", 500: "A picture failed", 501: "Not with several workers",
        503: "The server does not draw, and why",
    }.items()
}  # fmt: skip
ANYWHERE = (401, 403, 413, 421)
LEAST_KEY = 16  # characters
KEYS = "GENKIT_API_KEY"  # the environment variable that holds keys where no file does
_LABEL = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_SITE = re.compile(rf"https?://{_NAME.pattern}(?::\d{{1,5}})?")
App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


class Refused(HTTPException):
    """A call that is answered with an error. code: of the OpenAI API, or a word like it."""

    def __init__(
        self, status: int, message: str, code: str = "invalid_request", param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message, headers)
        self.code, self.param = code, param


def alone(what: str, field: str | None = None) -> Refused:
    """Return the error of what a server of one process has, and one of many workers has not."""
    said = f"{what} not served by many workers, as one process keeps them: start genkit serve without --workers, --ray"
    return Refused(501, said, "one_process_only", field, {"x-should-retry": "false"})  # openai's client reads that


def read_keys(path: Path) -> list[str]:
    """Return the keys in a file, one a line, without empty lines and comments, which begin with #.

    Raises InputError for a file without keys, one that others may read, and a key that is easy to guess. Of a file that
    another user owns, as of a Secret in Kubernetes, the group may: that is how this process reads it.
    """
    try:
        text = path.read_text("utf-8")
        about = path.stat()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--api-key-file: {place(path)}: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_IMODE(about.st_mode) & (stat.S_IROTH | (stat.S_IRGRP if about.st_uid == os.geteuid() else 0)):
        raise InputError(f"--api-key-file: {place(path)} can be read by others: chmod 600")
    keys = [key for line in text.splitlines() if (key := line.strip()) and not key.startswith("#")]
    if not keys:
        raise InputError(f"--api-key-file: {place(path)} holds no key")
    return _hard_to_guess(keys, f"--api-key-file: {place(path)}")


def keys_of_environment() -> list[str]:
    """Return the keys in GENKIT_API_KEY, parted by white space. Raises InputError for one that is easy to guess."""
    return _hard_to_guess(os.environ.get(KEYS, "").split(), KEYS)


def _hard_to_guess(keys: list[str], where: str) -> list[str]:
    short = next((n for n, key in enumerate(keys, 1) if len(key) < LEAST_KEY or not key.isascii()), None)
    if short is not None:
        raise InputError(f"{where}: key {short} is not {LEAST_KEY} or more ASCII characters")
    return keys


def host_names(given: Sequence[str]) -> tuple[str, ...]:
    """Return names by which a proxy's clients call the server. Raises InputError for what is no host name."""
    for name in given:
        if not _NAME.fullmatch(name.lower()):
            raise InputError(f"--allow-host: {shown(name)} is no host name, as in pictures.example.org, without a port")
    return tuple(name.lower() for name in given)


def sites(given: Sequence[str]) -> tuple[str, ...]:
    """Return origins of pages that may show the server's page in a frame. Raises InputError for what is none."""
    for site in given:
        if not _SITE.fullmatch(site.lower()):
            raise InputError(f"--framed-by: {shown(site)} is no origin of a page, as in https://example.org")
    return tuple(site.lower() for site in given)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Gate:
    """ASGI middleware: refuses calls without a key, from other sites, for other hosts, and bodies that are too large.

    keys: that are accepted, as `Authorization: Bearer KEY`, or as the password of Basic; none: no key is asked for, and
    the Host must be an address, localhost, or a name of this machine, which no page of another site can have. hosts:
    names that are this server's too, behind a proxy. answer: (scope, Refused) -> an ASGI app. replica: the process,
    told in each answer. `scope["client_name"]` is who calls, for turns and limits.
    """

    def __init__(
        self, app: App, keys: Sequence[str], body: int, answer: Callable[[dict[str, Any], Refused], App],
        host: str = "", hosts: Sequence[str] = (), replica: str = "",
    ) -> None:  # fmt: skip
        self.app, self.body, self.answer = app, body, answer
        self.headers = [(b"x-content-type-options", b"nosniff")]
        self.headers += [(b"x-genkit-replica", replica.encode())] if replica else []
        self.hashes = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.hosts = frozenset(hosts)
        self.names = {"localhost", host.lower(), socket.gethostname().lower(), *hosts} - {""}

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            if not (scope["method"] == "GET" and scope["path"].startswith(OPEN)):
                self._check_site(headers, scope["method"])
            self._check_host(headers)
            scope["client_name"] = self._caller(scope, headers)
            length = headers.get("content-length", "0")
            if not length.isdigit() or int(length[:18]) > self.body:
                raise _large(self.body)
        except Refused as refused:
            await self.answer(scope, refused)(scope, receive, self._named(send))
            return
        await self._limited(scope, receive, send)

    def _named(self, send: Any) -> Any:
        """Return `send` with the headers of every answer."""

        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self.headers]
            await send(message)

        return named

    async def _limited(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        seen, begun = 0, False

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.body:
                raise _large(self.body)
            return message

        send = self._named(send)

        async def watched(message: Any) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, counted, watched)
        except Refused as refused:
            if not begun:
                await self.answer(scope, refused)(scope, receive, send)

    def _check_host(self, headers: dict[str, str]) -> None:
        name = _host(f"//{headers.get('host', '')}")
        if not self.hashes and name not in self.names and not _is_address(name):
            raise Refused(
                421,
                "the Host header names another machine; call this server by its address, or start it "
                "with --allow-host and that name",
                "wrong_host",
            )

    def _check_site(self, headers: dict[str, str], method: str) -> None:
        visits = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
        origin = headers.get("origin")
        other = headers.get("sec-fetch-site") in ("cross-site", "same-site") and not visits
        own = origin is None or origin.partition("://")[2] == headers.get("host") or _host(origin) in self.hosts
        if other or not own:
            raise Refused(403, "pages of other sites may not call this server", "cross_site")

    def _caller(self, scope: dict[str, Any], headers: dict[str, str]) -> str:
        address = (scope.get("client") or ("local",))[0]
        if not self.hashes:
            return str(address)
        given = hashlib.sha256(_key(headers.get("authorization", "")).encode()).digest()
        matches = [hmac.compare_digest(given, known) for known in self.hashes]  # all of them, in constant time
        if any(matches):
            return f"key {matches.index(True) + 1}"
        if scope["path"].startswith(OPEN):
            return str(address)
        ask = {"WWW-Authenticate": 'Basic realm="genkit", charset="UTF-8"'}
        raise Refused(401, "a key of this server is missing: Authorization: Bearer KEY", "invalid_api_key", None, ask)


def _key(authorization: str) -> str:
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "basic":  # of browsers, and of clients of AUTOMATIC1111: any name, the key as password
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return value.strip() if kind.lower() == "bearer" else ""


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _large(most: int) -> Refused:
    return Refused(413, f"the body has more than the {most} bytes of this server", "body_too_large")
