"""One server for all tests of this folder, in this process, on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from genkit.options import Options
from genkit.serve.choice import Choice
from genkit.serve.rows import Most
from genkit.serve.server import Listen, Server, bound, prepare


class Served:
    """A running server. url: without a slash at the end."""

    def __init__(self, server: Server, thread: threading.Thread) -> None:
        self.server, self.thread = server, thread
        self.serving, self.engine, self.url = server.serving, server.serving.engine, server.address

    def wait(self, there: Callable[[], object], seconds: float = 240.0) -> None:
        """Wait until something is the case."""
        end = time.monotonic() + seconds
        while not there():
            assert time.monotonic() < end, f"not within {seconds:g} s"
            time.sleep(0.02)

    def settled(self) -> dict[str, Any]:
        """Return the engine's facts once nothing is left in it."""
        self.wait(lambda: not self.engine.line.tickets)
        return self.engine.snapshot()

    def close(self) -> None:
        """End it."""
        self.server.should_exit = True
        self.thread.join(20)
        self.engine.close()
        self.server.listener.close()


def serve(
    options: Options, most: Most | None = None, keys: Sequence[str] = (), choice: Choice | None = None, **listen: Any
) -> Served:  # fmt: skip
    """Start a server on a free port; return it once it is ready."""
    where, most = Listen(port=0, **listen), most or Most(pixels=128 * 128, steps=60, images=8)
    server = Server(prepare(options, {}, where, most, 64.0, [*keys], choice), bound(where))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [server.listener]}, daemon=True)
    thread.start()
    server.load()
    assert server.error is None
    return Served(server, thread)


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    running = serve(Options(device="cpu", batch_size=8))
    yield running
    running.close()


@pytest.fixture(scope="session")
def start() -> Any:
    """Return `serve`, for tests that need a server of their own."""
    return serve
