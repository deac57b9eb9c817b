"""A server under clients that leave, cancel and are cut off, and that is killed again and again: is anything lost?

    python benchmarks/soak.py --clients 64 --seconds 600 --kill-every 60

Every accepted run must be complete in the end, no picture drawn twice, and no answer a 5xx but 503 while the server
stops. Kills are SIGKILL and SIGTERM in turn. Needs the extra `serve` and httpx; draws with the embedded model.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import httpx

LINES = {"content-type": "application/x-ndjson"}


ROOT = Path(__file__).resolve().parent.parent


class Server:
    """A `genkit serve` that is started again after each kill."""

    def __init__(self, runs: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.runs, self.log = f"http://127.0.0.1:{self.port}", runs, log
        self.codes: list[int] = []
        self.resident: list[tuple[float, int]] = []  # (seconds, bytes)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 120.0) -> None:
        """Start, and wait until pictures are drawn."""
        options = ["--model", "emoji", "--port", str(self.port), "--runs", str(self.runs), "--drain", "3"]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "genkit", "serve", *options], stdout=log, stderr=log, cwd=ROOT
            )
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}: {self.log.read_text()[-500:]}")
            time.sleep(0.1)
        raise RuntimeError(f"the server is not ready after {seconds:g} s")

    def stop(self, number: int) -> int:
        """Send a signal; return the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        self.codes.append(self.process.wait(60))
        return self.codes[-1]

    def sample(self, began: float) -> None:
        """Record the memory of the process."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])  # type: ignore[union-attr]
            self.resident.append((time.monotonic() - began, pages * os.sysconf("SC_PAGE_SIZE")))
        except (OSError, IndexError):
            pass


class Client(threading.Thread):
    """Begins runs, cancels some, and calls for pictures that it does not wait for."""

    def __init__(self, number: int, server: Server, end: float, counts: collections.Counter[str]) -> None:
        super().__init__(daemon=True)
        self.dice, self.server, self.end, self.counts = random.Random(number), server, end, counts
        self.accepted: dict[str, int] = {}  # id: pictures
        self.cancelled: set[str] = set()

    def run(self) -> None:
        """Until the end."""
        while time.monotonic() < self.end:
            act = self.dice.choices((self.begin, self.cancel, self.leave, self.look), (4, 1, 3, 4))[0]
            try:
                act()
            except httpx.HTTPError:
                self.counts["cut off"] += 1
            time.sleep(self.dice.uniform(0.05, 0.6))

    def call(self, method: str, path: str, timeout: float = 30.0, **given: Any) -> httpx.Response:
        """Call, and count what is answered."""
        answer = httpx.request(method, f"{self.server.url}{path}", timeout=timeout, **given)
        self.counts[f"{answer.status_code}"] += 1
        if answer.status_code >= 500 and answer.status_code != 503:
            self.counts["wrong"] += 1
            print("wrong:", method, path, answer.status_code, answer.text[:300], file=sys.stderr)
        return answer

    def begin(self) -> None:
        """Begin a run; a call that is cut off is made again with its key, as often as it takes."""
        images = self.dice.randint(1, 3)
        row = {"prompt": self.dice.choice(("a red apple", "a dog", "a cat")), "num_images": images, "steps": 2}
        rows = "\n".join(json.dumps(row | {"steps": self.dice.randint(1, 8)}) for _ in range(self.dice.randint(1, 3)))
        key = {"Idempotency-Key": uuid.UUID(int=self.dice.getrandbits(128)).hex}
        while time.monotonic() < self.end + 60:
            try:
                answer = self.call("POST", "/v1/runs", content=rows, headers=LINES | key)
            except httpx.HTTPError:
                self.counts["cut off"] += 1
            else:
                if answer.status_code in (200, 202):
                    self.accepted[answer.json()["id"]] = images * (rows.count("\n") + 1)
                if answer.status_code != 503:
                    return
            time.sleep(0.5)

    def cancel(self) -> None:
        """Cancel a run of its own."""
        if self.accepted:
            run_id = self.dice.choice(list(self.accepted))
            self.cancelled.add(run_id)  # whether the answer comes or not
            self.call("POST", f"/v1/runs/{run_id}/cancel")

    def leave(self) -> None:
        """Ask for a picture, and leave before it is there, mostly."""
        body = {"prompt": "a dog", "steps": 20, "n": 2}
        self.call("POST", "/v1/images/generations", timeout=self.dice.choice((0.05, 0.3, 30.0)), json=body)

    def look(self) -> None:
        """Read something."""
        run_id = self.dice.choice([*self.accepted, "none"])
        end = self.dice.choice(("", "/results", "/gallery"))
        self.call("GET", f"/v1/runs/{run_id}{end}")


def check(server: Server, clients: list[Client]) -> dict[str, int]:
    """Return what is wrong of the accepted runs, read from the disk."""
    wrong = {"lost": 0, "lacking": 0, "twice": 0, "damaged": 0}
    for client in clients:
        for run_id, images in client.accepted.items():
            folder = server.runs / run_id
            if not folder.is_dir():
                wrong["lost"] += 1
                continue
            state = json.loads((folder / "served.json").read_text())["state"]
            records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
            done = collections.Counter((r["id"], r["index"]) for r in records if r["status"] == "done")
            wrong["twice"] += sum(times > 1 for times in done.values())
            complete = len(done) == images and state == "done"
            wrong["lacking"] += not complete and not (run_id in client.cancelled and state == "cancelled")
            for r in records:
                if r["status"] == "done":
                    data = (folder / r["file"]).read_bytes() if (folder / r["file"]).is_file() else b""
                    wrong["damaged"] += hashlib.sha256(data).hexdigest() != r["sha256"]
    return wrong


def finish(server: Server, seconds: float) -> float:
    """Wait until all runs are over; return how long that took."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        runs = httpx.get(f"{server.url}/v1/runs", timeout=60).json()["data"]
        if all(run["finished"] for run in runs):
            break
        time.sleep(0.5)
    return time.monotonic() - began


def soak(clients: int, seconds: float, kill_every: float, folder: Path, patience: float = 1800.0) -> dict[str, Any]:
    """Return the figures; `wrong` among them is what must be 0."""
    server = Server(folder / "runs", folder / "log")
    server.start()
    began = time.monotonic()
    counts: collections.Counter[str] = collections.Counter()
    crowd = [Client(n, server, began + seconds, counts) for n in range(clients)]
    for client in crowd:
        client.start()
    following, kills = began + kill_every, 0
    while time.monotonic() < began + seconds:
        if time.monotonic() >= following:
            server.stop(signal.SIGTERM if kills % 2 else signal.SIGKILL)
            server.start()
            following, kills = time.monotonic() + kill_every, kills + 1
        server.sample(began)
        time.sleep(0.25)
    for client in crowd:
        client.join(120)
    waited = finish(server, patience)
    wrong = check(server, crowd)
    code = server.stop(signal.SIGTERM)
    minutes = {int(at // 60): [b for t, b in server.resident if t // 60 == at // 60] for at, _ in server.resident}
    memory = {f"minute {n + 1}": round(statistics.median(found) / 2**20) for n, found in sorted(minutes.items())}
    return {
        "clients": clients, "seconds": seconds, "kills": kills, "accepted": sum(len(c.accepted) for c in crowd),
        "cancelled": sum(len(c.cancelled) for c in crowd), "seconds to finish": round(waited, 1), "exit code": code,
        "answers": dict(sorted(counts.items())), "wrong": wrong | {"answers": counts["wrong"]}, "MiB": memory,
    }  # fmt: skip


def main() -> int:
    """Print the figures; 1 if something is wrong."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--seconds", type=float, default=600.0)
    options.add_argument("--kill-every", type=float, default=60.0)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="genkit-soak-") as folder:
        found = soak(given.clients, given.seconds, given.kill_every, Path(folder))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end")
    for name, value in found.items():
        print(f"{name:18} {value}")
    return int(any(found["wrong"].values()))


if __name__ == "__main__":
    sys.exit(main())
