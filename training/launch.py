"""Start several processes of a command on this machine, as torchrun does, and return their exit code."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from genkit.errors import EXIT_HOST, EXIT_OK, InputError
from genkit.training.processes import LAUNCHED

GRACE = 10.0  # seconds for the other processes to exit after one has failed


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `genkit ARGUMENTS` in `count` processes; return the exit code of the first to fail.

    SIGINT and SIGTERM are passed on to all; when one fails, the others are killed. Raises InputError under torchrun.
    """
    if "WORLD_SIZE" in os.environ:
        raise InputError("--processes: torchrun and accelerate launch start the processes already")
    with free_port() as port:
        return _launched(count, arguments, port)


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """Yield a port of this machine that no other program is given meanwhile; a server with SO_REUSEADDR may take it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def _launched(count: int, arguments: Sequence[str], port: int) -> int:
    command = [sys.executable, "-m", "genkit", *arguments]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    threads = max(1, (os.cpu_count() or 1) // count)
    told = {"OMP_NUM_THREADS": str(threads), **os.environ, LAUNCHED: str(count)}
    told |= {name: str(value) for name, value in shared.items()}
    children = [
        # In sessions of their own: else Ctrl-C would reach them twice, and the second signal ends them at once.
        subprocess.Popen(command, env=told | {"RANK": str(i), "LOCAL_RANK": str(i)}, start_new_session=True)
        for i in range(count)
    ]

    def pass_on(number: int, _: Any) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _ended(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, old in before.items():
            signal.signal(number, old)


def end_with_launcher() -> None:
    """Have the kernel send SIGTERM to this process when its launcher is killed; on Linux only."""
    if LAUNCHED in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _ended(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all processes, or at most GRACE seconds after the first failure; return the exit code."""
    code, until = EXIT_OK, float("inf")
    while True:
        failed = [(i, child.returncode) for i, child in enumerate(children) if child.poll()]
        if failed and not code:
            number, code = min(
                failed, key=lambda one: one[1] > 0
            )  # one killed by a signal, before those that lost their connection to it
            until = time.monotonic() + GRACE
            if code in (-signal.SIGINT, -signal.SIGTERM):  # before its handler was installed
                code = 128 - code
            elif code < 0:
                name = signal.Signals(-code).name
                print(f"genkit: process {number} of {len(children)} was ended by {name}", file=sys.stderr)
                code = EXIT_HOST
        if time.monotonic() > until or all(child.poll() is not None for child in children):
            return code or next((EXIT_HOST for child in children if child.returncode), EXIT_OK)
        time.sleep(0.05)
