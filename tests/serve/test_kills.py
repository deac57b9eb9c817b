"""Real servers that are killed: what was accepted is drawn by the next; SIGTERM lets what is in flight finish."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.soak import Server, finish
from tests.children import holding

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LINES = {"content-type": "application/x-ndjson"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path / "runs", tmp_path / "log")
    running.command, running.drain = holding(6, 7), 120
    running.start()
    yield running
    if running.process is not None and running.process.poll() is None:
        running.stop(signal.SIGKILL)


def lines(server: Server, run_id: str) -> list[dict[str, Any]]:
    text = (server.runs / run_id / "results.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def test_a_killed_server_goes_on_and_sigterm_drains(server: Server) -> None:
    rows = "\n".join(json.dumps({"prompt": "a dog", "num_images": 4, "steps": 6}) for _ in range(6))
    run = httpx.post(f"{server.url}/v1/runs", content=rows, headers=LINES, timeout=60).json()
    while not lines(server, run["id"]):
        time.sleep(0.02)
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    first = lines(server, run["id"])
    assert 0 < len(first) <= 6
    server.start()
    while len(lines(server, run["id"])) == len(first):
        time.sleep(0.02)
    answers: list[Any] = []
    body = {"prompt": "a dog", "steps": 10}
    caller = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60))
    )
    caller.start()
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    while httpx.post(f"{server.url}/v1/runs", content="", headers=LINES, timeout=60).status_code != 503:
        time.sleep(0.02)  # it has not heard of it yet
    refused = httpx.post(f"{server.url}/v1/runs", content=rows, headers=LINES, timeout=60)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
    caller.join()
    server.process.send_signal(signal.SIGUSR1)  # the rest of what is in flight
    server.codes.append(server.process.wait(200))
    assert server.codes[-1] == 143 and answers[0].status_code in (200, 503)
    second = lines(server, run["id"])
    assert second[: len(first)] == first and len(second) <= 24
    server.command = (sys.executable, "-m", "genkit")
    server.start()
    finish(server, 300)
    done = [(r["id"], r["index"]) for r in lines(server, run["id"])]
    assert len(done) == len(set(done)) == 24
    assert not list(server.runs.glob(".new-*"))
