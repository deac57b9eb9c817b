"""`genkit serve`: bind, load, listen, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from genkit.device.devices import reuse_memory, trim_memory
from genkit.errors import EXIT_OK, HostError, InputError
from genkit.options import Options
from genkit.serve.app import create_app
from genkit.serve.calls import Serving
from genkit.serve.choice import Choice
from genkit.serve.engine import ServingEngine
from genkit.serve.limits import KEYS, host_names, is_loopback, keys_of_environment, read_keys, sites
from genkit.serve.rows import Intake, Most, named_controls
from genkit.serve.served import Runs
from genkit.serve.turns import Turns
from genkit.signals import Signals

PATHS = "a page at /, OpenAI's API at /v1, AUTOMATIC1111's API at /sdapi/v1"
ANSWERED = 10  # seconds in which clients are told that the server ends
TRIM = 60.0  # seconds between two times that freed memory goes back to the system, which costs less than 1 % of drawing


@dataclasses.dataclass(frozen=True)
class Listen:
    """Where a server listens, to whom, and what it does when it stops: see `genkit serve --help`."""

    host: str = "127.0.0.1"
    port: int = 7860
    key_file: Path | None = None
    no_key: bool = False
    runs: Path | None = None
    drain: float = 30.0
    allow_hosts: Sequence[str] = ()
    framed_by: Sequence[str] = ()


def run(
    options: Options, defaults: dict[str, Any], listen: Listen, most: Most, max_queue: float,
    choice: Choice | None = None,
) -> int:  # fmt: skip
    """Serve until a signal ends it; return the exit code. Raises InputError and HostError before it is ready."""
    keys = keys_of(listen)
    reuse_memory()
    serving = prepare(options, defaults, listen, most, max_queue, keys, choice)
    with contextlib.closing(bound(listen)) as listener:
        server = Server(serving, listener)
        loader = threading.Thread(target=server.load, name="genkit-load", daemon=True)
        loader.start()
        ended = threading.Event()
        threading.Thread(target=_trim, args=(ended,), name="genkit-trim", daemon=True).start()
        try:
            server.run(sockets=[listener])
        finally:
            ended.set()
            serving.stopped = True
            for one in serving.models.values():
                one.engine.close()
            if serving.runs is not None:
                serving.runs.close()
    if server.error is not None:
        raise server.error
    return server.exit_code


def _trim(ended: threading.Event) -> None:
    """Return freed memory to the system now and then.

    Small blocks of many threads come to lie between the large ones of the network, whose places then grow in number: a
    process that lives long would keep all of them.
    """
    while not ended.wait(TRIM):
        trim_memory()


def prepare(
    options: Options, defaults: dict[str, Any], listen: Listen, most: Most, max_queue: float, keys: list[str],
    choice: Choice | None = None,
) -> Serving:  # fmt: skip
    """Return what a server shares, with nothing loaded. Raises InputError for options that do not go together."""
    about: dict[str, Any] = {
        "drain": listen.drain, "hosts": host_names(listen.allow_hosts), "framed_by": sites(listen.framed_by),
    }  # fmt: skip
    turns = Turns() if choice is None else Turns(choice.loaded)
    wanted = {None: (options, {}, {})} if choice is None else choice.of(options)
    others: dict[str, Serving] = {}
    for name, (own, loras, controls) in wanted.items():
        engine = ServingEngine(own, defaults, max_queue, turns)
        # Of several models' families a ControlNet fits one: a request with another is refused
        given = named_controls(own.control_dir, own.variant, engine.models.info if choice is None else None)
        intake = Intake(engine, most, loras, controls | given)
        named = name or served_name(engine)
        others[named] = Serving(engine, intake, most, named, keys, listen.host, others=others, **about)
    first = next(iter(others.values()))
    if listen.runs is not None:
        first.runs = Runs(listen.runs, first.intake)
    return first


def served_name(engine: ServingEngine) -> str:
    """Return the model's name for clients: no path of this machine."""
    info = engine.models.info
    if info.revision is not None or os.sep not in info.name:  # of the hub, or built in
        return info.name
    path = Path(info.name)
    return path.stem if path.suffix == ".safetensors" else path.name


def keys_of(listen: Listen) -> list[str]:
    """Return the keys that calls need; none where none is asked for. Raises InputError."""
    keys = keys_of_environment()
    ways = {"--api-key-file": listen.key_file, KEYS: keys, "--no-key": listen.no_key}
    given = [name for name, there in ways.items() if there]
    if len(given) > 1:
        raise InputError(f"{given[1]}: does not go with {given[0]}")
    if listen.key_file is not None:
        return read_keys(listen.key_file)
    if keys:
        return keys
    if not is_loopback(listen.host) and not listen.no_key:
        raise InputError(
            f"--host: {listen.host} is reached by other machines: give --api-key-file, or keys in {KEYS}, "
            "or --no-key if anyone may draw"
        )
    return []


def bound(listen: Listen) -> socket.socket:
    """Return a socket that is bound, and does not listen yet. Raises HostError for a port in use."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise HostError(f"--host: {listen.host}: {error.strerror or error}") from None
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        raise HostError(f"--port: {listen.host}:{listen.port}: {error.strerror or error}") from None
    return found


def url_of(host: str, port: int) -> str:
    """Return the URL at which this machine reaches a server that listens there."""
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server, which loads while it listens and leaves with genkit's exit codes."""

    def __init__(self, serving: Serving, listener: socket.socket) -> None:
        self.serving, self.listener = serving, listener
        self.error: InputError | HostError | None = None
        self.exit_code = EXIT_OK
        config = uvicorn.Config(
            create_app(serving), log_level="warning", access_log=False, server_header=False, lifespan="off",
            timeout_graceful_shutdown=ANSWERED, timeout_keep_alive=30, limit_concurrency=1000,
            http="h11", loop="asyncio", h11_max_incomplete_event_size=2**16,  # whatever else is installed
        )  # fmt: skip
        super().__init__(config)

    @property
    def address(self) -> str:
        """Where it is reached."""
        return url_of(*self.listener.getsockname()[:2])

    def load(self) -> None:
        """Load the networks and draw a picture; end the server if that fails."""
        names = list(self.serving.models)
        try:
            print(f"loading {names[0]}", file=sys.stderr, flush=True)
            self.serving.engine.start()
            self.serving.engine.warm()
            for other in list(self.serving.models.values())[1:]:
                other.engine.start_later()
            if self.serving.runs is not None:
                self.serving.runs.feeder.start()
            print(self.address, flush=True)
            print(f"serving {', '.join(names)}: {PATHS}; Ctrl-C stops", file=sys.stderr, flush=True)
        except (InputError, HostError) as error:
            self.error = None if self.serving.draining else error  # a signal came first
            self._leave()
        except BaseException as error:
            self.error = HostError(f"loading failed: {type(error).__name__}: {error}")
            self._leave()
            raise

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends the server in order, a second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._signalled) for number in Signals.CODES}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    def _signalled(self, number: int, _frame: object) -> None:
        if self.exit_code:
            os._exit(self.exit_code)
        self.exit_code = Signals.CODES[signal.Signals(number)]
        print("stopping: drawing what is in flight", file=sys.stderr)
        threading.Thread(target=self.drain, name="genkit-drain", daemon=True).start()

    def drain(self) -> None:
        """Take no new work, draw what was submitted for at most `drain` seconds, then end; runs go on next time."""
        serving, end = self.serving, time.monotonic() + self.serving.drain
        serving.draining = True
        if serving.engine.ready:
            if serving.runs is not None:
                serving.runs.feeder.settle(self.serving.drain)
            for one in serving.models.values():
                one.engine.drain(max(0.0, end - time.monotonic()))
        serving.stopped = True
        for one in serving.models.values():
            one.engine.give_up()
        self._leave()

    def _leave(self) -> None:
        """Let streams, and then the server, end."""
        self.serving.draining = self.serving.stopped = self.should_exit = True
