"""`genkit label`: a page on this machine that shows a run's pictures and takes votes; it serves nothing else."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import hmac
import itertools
import json
import os
import re
import secrets
import stat
import sys
import threading
from collections import deque
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from genkit.durable import disk, sync_folder, write_whole
from genkit.errors import EXIT_SIGINT, HostError, InputError, shown
from genkit.pages import look
from genkit.rows.result import Result
from genkit.runs.lease import Lease
from genkit.runs.records import read_rows
from genkit.scoring.gates import passes
from genkit.selection.calibrate import check_asked, checked_gate, read_pictures
from genkit.selection.decide import image_name
from genkit.selection.votes import COLUMNS, MEANING, UNDO, VOTES, header, read_votes, standing
from genkit.storage import StoragePath

LONG = 2000  # characters of a prompt that are shown
KEYS = "Open the address above: y good, n bad, u undo, space later. Ctrl-C ends."
BODY, PICTURE = 4096, 2**28  # bytes: of a request, of a picture
_HOST = re.compile(r"(?:127\.0\.0\.1|localhost)(?::[0-9]{1,5})?")  # any port: somebody may have forwarded one
_WHOLE = re.compile(rb"[^,]*,[^,]*,(?:[0-9a-f]{64})?\s*")  # a line of genkit's own
_KINDS = {b"\x89PNG": "image/png", b"RIFF": "image/webp", b"\xff\xd8\xff": "image/jpeg", b"\xff\x0a": "image/jxl"}


class Ballots:
    """votes.csv of a run, held by one process; a vote is on the disk when `add` returns.

    Lines hold the picture's file, the vote and the picture's SHA-256: no text of the user's that a spreadsheet might
    take for a formula. Raises HostError when another process labels this run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / VOTES
        with disk(self.path):
            if not self.path.exists():
                write_whole(self.path, (",".join(COLUMNS) + "\n").encode())
                sync_folder(folder)
            self._handle = os.open(self.path, os.O_RDWR | os.O_APPEND)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._handle)
                raise HostError(f"{self.path}: another `genkit label` holds it; one at a time") from None
            self._mend()
        self.votes = read_votes(self.path)
        self._columns = header(self.path)

    def _mend(self) -> None:
        """Cut off a last line of genkit's own that a power cut tore; end any other that has no line break.

        In a file with other columns an editor left the line so: it is the user's.
        """
        data = self.path.read_bytes()
        if data.endswith(b"\n") or not data:
            return
        header, last = data.split(b"\n", 1)[0].strip(), data.rfind(b"\n") + 1
        if header == ",".join(COLUMNS).encode() and last and not _WHOLE.fullmatch(data, last):
            os.ftruncate(self._handle, last)
        else:
            os.write(self._handle, b"\n")

    def add(self, r: Result, vote: str) -> None:
        """Add a line. Raises HostError."""
        cells = {"image": str(r.file), "vote": vote, "sha256": r.sha256 or ""}
        line = ",".join(cells.get(column, "") for column in self._columns)
        with disk(self.path):
            self._append(f"{line}\n".encode())

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._handle).st_size
        try:
            if os.write(self._handle, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._handle)
        except OSError:
            os.ftruncate(self._handle, size)
            raise

    def close(self) -> None:
        """Let another process have the file."""
        os.close(self._handle)


class StoredBallots(Ballots):
    """The same for a run on storage: the whole file is put again with each vote."""

    def __init__(self, folder: StoragePath) -> None:
        self.path, self._lease = folder / VOTES, Lease(folder / "label")
        try:
            if not self.path.exists():
                write_whole(self.path, (",".join(COLUMNS) + "\n").encode())
            self._text = self.path.read_bytes()
            self.votes = read_votes(self.path)
            self._columns = header(self.path)
        except BaseException:
            self._lease.close()
            raise

    def _append(self, line: bytes) -> None:
        self._lease.check()
        self.path.write_bytes(self._text + (b"" if self._text.endswith(b"\n") else b"\n") + line)
        self._text = self.path.read_bytes()

    def close(self) -> None:
        self._lease.close()


class Desk:
    """The pictures in the order in which they are asked about, and the votes so far. Threads share it.

    seed: of a random order; None: that of `pictures`.
    """

    def __init__(self, pictures: Mapping[str, Result], ballots: Ballots, seed: int | None) -> None:
        def place(name: str) -> bytes:  # of its own, so that pictures drawn later go in between
            return hashlib.sha256(f"{seed}/{name}".encode()).digest()

        names = list(pictures) if seed is None else sorted(pictures, key=place)
        self.pictures = [pictures[name] for name in names]
        numbers = {name: k for k, name in enumerate(names)}
        found, _ = standing(ballots.votes, pictures, str(ballots.path), strict=False)
        self.votes = {numbers[name]: votes[-1] for name, votes in found.items()}
        self._ballots, self._lock = ballots, threading.Lock()
        self._history: list[int] = [*self.votes]
        self._waiting = deque(k for k in range(len(self.pictures)) if k not in self.votes)

    def vote(self, number: int, word: str) -> dict[str, Any]:
        """Take "yes" or "no" for a picture, put it at the end of the queue ("later"), or take the last back ("undo").

        A second vote on the same picture, as of a key held down, changes nothing. Returns the state.
        """
        with self._lock:
            if word == UNDO and self._history:
                last = self._history[-1]
                self._ballots.add(self.pictures[last], UNDO)
                self._history.pop()
                del self.votes[last]
                self._waiting.appendleft(last)
            elif word == "later" and number in self._waiting:
                self._waiting.remove(number)
                self._waiting.append(number)
            elif word in ("yes", "no") and number in self._waiting:
                self._ballots.add(self.pictures[number], word)
                self._waiting.remove(number)
                self.votes[number] = bool(MEANING[word])
                self._history.append(number)
            return self._state()

    def state(self) -> dict[str, Any]:
        """Return what the page shows."""
        with self._lock:
            return self._state()

    def _state(self) -> dict[str, Any]:
        good, waiting = sum(self.votes.values()), list(itertools.islice(self._waiting, 2))
        counts = {"good": good, "bad": len(self.votes) - good, "left": len(self._waiting)}
        image = None
        if waiting:
            r = self.pictures[waiting[0]]
            prompt = r.prompt if len(r.prompt) <= LONG else r.prompt[:LONG] + "…"
            image = {"number": waiting[0], "name": image_name(r), "prompt": prompt}
        return {**counts, "undo": bool(self._history), "image": image, "next": waiting[1] if waiting[1:] else None}


class Server(ThreadingHTTPServer):
    """Serves one run to whoever knows the token, on the loopback interface."""

    def __init__(self, folder: Path, desk: Desk, port: int) -> None:
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise HostError(f"--port: {port}: {error.strerror or error}") from None
        self.folder, self.desk, self.token = folder, desk, secrets.token_urlsafe(32)
        self.page = look.template("label").encode()
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
        if int(number) >= len(self.server.desk.pictures):
            raise Refused(404, "not found")
        return _picture(self.server.folder, self.server.desk.pictures[int(number)])

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
            vote = json.loads(self.rfile.read(int(length)))
            number, word = vote["image"], vote["vote"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Refused(400, "not a vote") from None
        if word not in ("yes", "no", "later", UNDO) or type(number) is not int:
            raise Refused(400, "not a vote")
        return "application/json", json.dumps(self.server.desk.vote(number, word)).encode()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a malformed request without repeating any of it."""
        self.close_connection = True
        self._send(code, "text/plain; charset=utf-8", b"not a request for this page\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the lines would hold the token."""


def _picture(folder: Path, r: Result) -> tuple[str, bytes]:
    """Return the type and bytes of a record's picture: a regular file that begins as a picture does."""
    try:
        if isinstance(folder, StoragePath):
            data = (folder / str(r.file)).read_bytes()
        else:
            handle = os.open(folder / str(r.file), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(handle, "rb") as file:
                found = os.fstat(handle)
                data = file.read() if stat.S_ISREG(found.st_mode) and found.st_size <= PICTURE else b""
    except OSError:
        raise Refused(404, "the picture is gone") from None
    kind = next((kind for magic, kind in _KINDS.items() if data.startswith(magic)), None)
    if kind is None:
        raise Refused(404, "this is no picture")
    return kind, data


def label(folder: Path, where: str | None = None, seed: int | None = 0, port: int = 0) -> int:
    """Serve the page until Ctrl-C; returns 130. The address is printed on standard output.

    where: show only pictures that pass. seed: of the order, which is random so that the labels stand for the run; None:
    row by row. port: 0 takes a free one. Raises InputError, HostError.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port: {port} is not within 0 to 65535")
    pictures, known, texts = read_pictures(folder)
    if where is not None:
        gate = checked_gate(where, known, texts)
        check_asked(folder, "--where", where, pictures)
        pictures = {name: r for name, r in pictures.items() if passes(gate, r.scores)}
        if not pictures:
            raise InputError(f"--where: {shown(where)}: no picture passes")
    if seed is None:
        rows = {str(row.id): n for n, row in enumerate(read_rows(folder))}
        pictures = dict(sorted(pictures.items(), key=lambda item: (rows[item[1].id], item[1].index)))
    ballots = StoredBallots(folder) if isinstance(folder, StoragePath) else Ballots(folder)
    try:
        desk = Desk(pictures, ballots, seed)
        with Server(folder, desk, port) as server:
            print(server.url, flush=True)
            print(f"{len(desk.votes)} of {len(pictures)} have a vote. {KEYS}", file=sys.stderr, flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()
        state = desk.state()
        votes = f"{len(desk.votes)} votes in {ballots.path} ({state['good']} good, {state['bad']} bad)"
        print(f"\n{votes}, {state['left']} pictures left; run the same command again to continue", file=sys.stderr)
        print(f"to keep the good ones: genkit filter {folder} --votes {ballots.path}", file=sys.stderr)
        return EXIT_SIGINT
    finally:
        ballots.close()
