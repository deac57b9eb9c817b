"""The server as an application of Ray Serve, on a real Ray of this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from genkit.cluster.crew import Share
from genkit.errors import HostError, InputError
from genkit.options import Options
from genkit.serve import replicas
from genkit.serve.rows import Most
from genkit.serve.server import Listen
from genkit.training.launch import free_port

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
ROOT = Path(__file__).parents[2]


class Served:
    """`genkit serve --workers 2` in a process of its own."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "genkit", "serve", "--workers", "2", "--port", "0", "--batch-size", "2"]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, **pipes)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), self.process.communicate()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=8)
        self.seen: set[int] = set()  # processes that answered

    def draw(self, steps: int = 1, count: int = 1) -> None:
        """Ask for pictures, as OpenAI's own package does; again where it fails."""
        raw = self.client.images.with_raw_response.generate(prompt="a dog", n=count, extra_body={"steps": steps})
        assert len(raw.parse().data or ()) == count
        self.seen.add(int(raw.headers["x-genkit-replica"].rpartition(" ")[2]))


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    running = Served()
    yield running
    if running.process.poll() is None:
        running.process.send_signal(signal.SIGTERM)
        running.process.communicate(timeout=200)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_answer_and_a_killed_one_is_replaced(served: Served) -> None:
    end = time.monotonic() + 200
    while len(served.seen) < 2 and time.monotonic() < end:
        together = [threading.Thread(target=served.draw) for _ in range(4)]
        for call in together:
            call.start()
        for call in together:
            call.join()
    first = served.seen.copy()
    assert len(first) == 2
    failed: list[Exception] = []

    def caller() -> None:
        try:
            while time.monotonic() < end and not served.seen - first:
                served.draw(4)
        except Exception as error:
            failed.append(error)

    end = time.monotonic() + 400
    callers = [threading.Thread(target=caller) for _ in range(3)]
    for one in callers:
        one.start()
    time.sleep(0.5)
    os.kill(min(first), signal.SIGKILL)
    for one in callers:
        one.join()
    assert not failed and len(served.seen - first) == 1


@pytest.mark.slow
def test_what_one_process_keeps_is_refused_by_name(served: Served) -> None:
    with httpx.Client(base_url=served.url, timeout=60) as http:
        for path in ("/", "/app/about", "/metrics", "/v1/runs", "/v1/runs/x/events", "/sdapi/v1/progress"):
            answer = http.get(path)
            assert answer.status_code == 501 and "not served by many workers" in answer.text, path
        assert http.post("/v1/runs", content="a dog").status_code == http.post("/sdapi/v1/interrupt").status_code == 501
        body = {"prompt": "a dog", "response_format": "url"}
        answer = http.post("/v1/images/generations", json=body)
        assert answer.status_code == 501 and answer.json()["error"]["param"] == "response_format"
        assert http.get("/health").json()["status"] == "ok"
        assert http.post("/sdapi/v1/txt2img", json={"prompt": "a dog", "steps": 1}).status_code == 200
        assert (other := http.get("/v1/models", headers={"host": "other.example"})).status_code == 421
        assert "pid" in other.headers["x-genkit-replica"]


@pytest.mark.slow
def test_sigterm_lets_what_is_in_flight_be_drawn(served: Served) -> None:
    began, came = threading.Semaphore(0), list[str]()

    def draw() -> None:
        asked = {"steps": 20}
        for event in served.client.images.generate(prompt="a dog", stream=True, partial_images=3, extra_body=asked):
            came.append(event.type.rpartition(".")[2])
            began.release()

    calls = [threading.Thread(target=draw) for _ in range(2)]
    for call in calls:
        call.start()
        assert began.acquire(timeout=200)
    served.process.send_signal(signal.SIGTERM)
    for call in calls:
        call.join()
    said = served.process.communicate(timeout=200)[1]
    assert served.process.returncode == 143 and "Traceback" not in said, said
    assert came.count("completed") == 2


def listen(**given: Any) -> Listen:
    return Listen(port=0, **given)


def test_what_is_wrong_is_said_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def said(workers: str | None, address: str | None = None, device: str = "cpu", **given: Any) -> str:
        with pytest.raises((InputError, HostError)) as found:
            replicas.run(Options(device=device), {}, listen(**given), Most(), 64.0, workers, address)
        return str(found.value)

    assert said("x").startswith("--workers: 'x' is not a number")
    assert said("2", runs=tmp_path / "runs").startswith("--runs: one process draws")
    assert said("1000").startswith("--workers: 1000 is more than")
    assert said("2", "ray://x:1").startswith("--ray: ray://")
    assert said("2", device="cuda:1").startswith("--device: cuda:1 is one device")
    assert said("1", host="0.0.0.0").startswith("--host: 0.0.0.0 is reached by other machines")
    assert said("1", "127.0.0.1:1").startswith("--port: 0: the nodes")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def port() -> Iterator[int]:
    with free_port() as port:
        yield port


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a cluster of this machine, with two cores."""
    with contextlib.ExitStack() as held:
        yield from _cluster([held.enter_context(free_port()) for _ in range(3)])


def _cluster(ports: list[int]) -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="gk-", dir="/tmp")  # names of sockets are short
    command = f"ray start --head --block --num-cpus 2 --include-dashboard=false --temp-dir {folder} --port {ports[0]}"
    command += f" --ray-client-server-port {ports[1]} --dashboard-agent-listen-port {ports[2]}"
    command += " --object-store-memory 80000000"
    silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    bare = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", *command.split()[1:]]
    process = subprocess.Popen(bare, env=os.environ | {"RAY_AUTH_MODE": "disabled"}, **silent)
    try:
        yield f"127.0.0.1:{ports[0]}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # at SIGTERM it takes its time
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cluster_serves_for_one_command_and_for_the_next_of_a_killed_one(cluster: str, port: int) -> None:
    host, _, at = cluster.rpartition(":")
    end = time.monotonic() + 200
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            socket.create_connection((host, int(at)), 1).close()
            break
        time.sleep(0.2)

    def start(workers: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "genkit", "serve", "--ray", cluster, "--workers", workers, "--port", str(port)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"RAY_AUTH_MODE": "disabled"}, **pipes)

    first = start("1")  # which has both cores
    assert first.stdout is not None and first.stdout.readline(), first.communicate()
    first.kill()
    second = start("2")
    assert second.stdout is not None and second.stdout.readline(), second.communicate()
    assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200
    third = start("1")
    said = third.communicate(timeout=300)[1]
    assert third.returncode == 2 and f"process {second.pid} of" in said, said
    second.terminate()
    said = second.communicate(timeout=300)[1]
    assert second.returncode == 143 and "replacing what a genkit serve that was killed left" in said, said
    first.communicate()


class Answers:
    """A handle of Ray Serve: what its replicas answer, one after another."""

    def __init__(self, *answers: list[int] | Exception) -> None:
        self.answers, self.asked = list(answers), list[str]()

    def broadcast(self, name: str) -> Answers:
        self.asked.append(name)
        return self

    def results(self, timeout_s: float) -> list[int]:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_replica_that_dies_while_others_draw_does_not_end_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "BEAT", 0.001)
    answers = Answers([1, 2], RuntimeError("the actor died"), [1], [0], [0])
    replicas._drain(answers, 30.0)
    assert answers.asked == ["drain"] * 4 + ["give_up"]


def test_the_last_error_of_a_trace_is_told() -> None:
    trace = "ray::Replica.__init__()\n  File x\nValueError: inner\n\nray.exceptions.RayTaskError: y\n"
    assert replicas._last(trace + "genkit.errors.InputError: a.safetensors: no weights\n") == (
        "InputError",
        "a.safetensors: no weights",
    )
    assert replicas._last("waiting for a device") == ("", "")


@pytest.mark.slow
def test_bounds_are_passed_through(monkeypatch: pytest.MonkeyPatch) -> None:
    what = replicas.What(Options(device="cpu", batch_size=3), {}, listen(drain=25.0), Most(), 64.0, [], 1)

    def config(least: int, most: int) -> Any:
        return replicas.application(what, Share(False, 1, least, most))._bound_deployment._deployment_config

    scaled = config(2, 5).autoscaling_config
    assert (scaled.min_replicas, scaled.max_replicas, scaled.target_ongoing_requests) == (2, 5, 3)
    fixed = config(2, 2)
    assert fixed.autoscaling_config is None and fixed.num_replicas == 2 and fixed.graceful_shutdown_timeout_s == 25.0
