"""Trains in two forked processes that share the work, as a launcher would start them."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from genkit.errors import HostError, InputError
from genkit.training.launch import free_port
from genkit.training.loop import train
from genkit.training.state import State


def pair(recipe: Any, out: Path, *, kill: tuple[int, int] | None = None, seconds: float = 250.0) -> list[int]:
    """Train in two processes and return how they ended: -9 for SIGKILL, 2 for an InputError, 3 for a HostError.

    kill: (rank, steps): that process kills itself once so many steps are done. seconds: after which both are killed.
    """
    with free_port() as port:
        return _pair(recipe, out, port, kill, seconds)


def _pair(recipe: Any, out: Path, port: int, kill: tuple[int, int] | None, seconds: float) -> list[int]:
    children = {}
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 99
            try:
                code = _one(recipe, out, rank, port, kill)
            finally:
                os._exit(code)
        children[child] = 0
    ended: dict[int, int] = {}
    until = time.monotonic() + seconds
    try:
        while len(ended) < len(children):
            for child in children.keys() - ended.keys():
                if time.monotonic() > until:
                    os.kill(child, signal.SIGKILL)
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    ended[child] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
    finally:
        for child in children.keys() - ended.keys():  # a test that is cut off leaves none
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return [ended[child] for child in children]


def _one(recipe: Any, out: Path, rank: int, port: int, kill: tuple[int, int] | None) -> int:
    from accelerate.state import PartialState

    PartialState._reset_state()
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in told.items()} | {"MASTER_ADDR": "127.0.0.1"}
    count, average = itertools.count(1), State.average

    def die(state: State) -> None:
        average(state)
        if kill is not None and rank == kill[0] and next(count) == kill[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    State.average = die  # type: ignore[assignment, method-assign]
    try:
        return train(recipe, out, device="cpu", quiet=True).exit_code
    except (InputError, HostError) as error:
        print(f"genkit: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, InputError) else 3
    except SystemExit as error:
        return int(str(error.code))
