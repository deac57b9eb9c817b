"""A server under clients that leave, cancel and are cut off, and that is killed again and again: is anything lost?

    python benchmarks/soak.py --clients 64 --minutes 10 --kill-every 60

Every accepted run must be complete in the end, no picture in it twice, memory flat, and no answer a 5xx but 503 while
the server restarts. Kills are SIGKILL and SIGTERM in turn. Needs the extra `serve` and httpx; draws with the embedded
model.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from genkit.training.launch import free_port

LINES = {"content-type": "application/x-ndjson"}
FLAT = 1.1  # of memory, the later by the earlier

ROOT = Path(__file__).resolve().parent.parent


class Server:
    """A `genkit serve` that is started again after each kill. command: of genkit; drain: seconds after SIGTERM."""

    def __init__(self, runs: Path, log: Path) -> None:
        self.command: Sequence[str] = (sys.executable, "-m", "genkit")
        self.drain = 3
        self.held = contextlib.ExitStack()  # for no other program while it is not there
        self.port = self.held.enter_context(free_port())
        self.url, self.runs, self.log = f"http://127.0.0.1:{self.port}", runs, log
        self.codes: list[int] = []
        self.began = time.monotonic()
        self.lives = 0
        self.resident: list[tuple[int, float, int]] = []  # (number of the process, seconds, bytes)
        self.restarts: list[tuple[float, float]] = []  # from the signal until it is ready
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 300.0) -> None:
        """Start, and wait until pictures are drawn."""
        options = ["--model", "emoji", "--port", str(self.port), "--runs", str(self.runs), "--drain", str(self.drain)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([*self.command, "serve", *options], stdout=log, stderr=log, cwd=ROOT)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    self.lives += 1
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

    def restart(self, number: int) -> None:
        """Send a signal, and start it again."""
        self.restarts.append((time.monotonic(), math.inf))
        self.stop(number)
        self.start()
        self.restarts[-1] = self.restarts[-1][0], time.monotonic()

    def restarted(self, begin: float, end: float) -> bool:
        """Whether it was restarted within a span of time."""
        return any(begin <= after and end >= before for before, after in self.restarts)

    def sample(self) -> None:
        """Record the memory of the process."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])  # type: ignore[union-attr]
            self.resident.append((self.lives, time.monotonic() - self.began, pages * os.sysconf("SC_PAGE_SIZE")))
        except (OSError, IndexError):
            pass


class Client(threading.Thread):
    """Begins runs, cancels some, and calls for pictures that it does not wait for."""

    def __init__(self, number: int, server: Server, end: float, counts: collections.Counter[str]) -> None:
        super().__init__(daemon=True)
        self.dice, self.server, self.end, self.counts = random.Random(number), server, end, counts
        # One for all calls, without what TLS costs at each: the clients share the server's cores
        self.http = httpx.Client(base_url=server.url, verify=False)
        self.accepted: dict[str, int] = {}  # id: pictures
        self.cancelled: set[str] = set()
        self.unavailable: list[tuple[float, float]] = []  # when calls that got 503 began and ended

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
        began = time.monotonic()
        answer = self.http.request(method, path, timeout=timeout, **given)
        self.counts[f"{answer.status_code}"] += 1
        if answer.status_code == 503:
            self.unavailable.append((began, time.monotonic()))
        elif answer.status_code >= 500:
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
    """Return what is wrong of the accepted runs, read from the disk; and how many pictures there are."""
    wrong = {"lost": 0, "lacking": 0, "twice": 0, "damaged": 0, "pictures": 0, "again": 0}
    for client in clients:
        for run_id, images in client.accepted.items():
            folder = server.runs / run_id
            if not folder.is_dir():
                wrong["lost"] += 1
                continue
            state = json.loads((folder / "served.json").read_text())["state"]
            records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
            done = collections.Counter((r["id"], r["index"]) for r in records if r["status"] == "done")
            wrong["pictures"] += len(done)
            wrong["again"] += sum(1 for path in folder.glob("replaced/**/*") if path.is_file())
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


def ratio(samples: Sequence[tuple[float, int]], first: tuple[float, float], last: tuple[float, float]) -> float | None:
    """Return the median memory of the last span of seconds by that of the first; None where one has no samples."""
    found = [[size for at, size in samples if begin <= at < end] for begin, end in (first, last)]
    return statistics.median(found[1]) / statistics.median(found[0]) if all(found) else None


def memory(server: Server, seconds: float) -> dict[str, float | None]:
    """Return how memory grew: of the server that lived longest, from its second quarter to its last; and over all.

    Memory begins anew with each server: over all, the last minute by the second is what runs on the disk cost it.
    """
    lives: dict[int, list[tuple[float, int]]] = collections.defaultdict(list)
    for life, at, size in server.resident:
        lives[life].append((at, size))
    longest = max(lives.values(), key=lambda samples: samples[-1][0] - samples[0][0])
    begin, end = longest[0][0], longest[-1][0] + 1e-3
    quarter = (end - begin) / 4
    minute = min(60.0, seconds / 4)
    every = [(at, size) for _, at, size in server.resident]
    return {
        "seconds": end - begin,
        "MiB": statistics.median(size for _, size in longest) / 2**20,
        "longest": ratio(longest, (begin + quarter, begin + 2 * quarter), (end - quarter, end)),
        "all": ratio(every, (minute, 2 * minute), (seconds - minute, seconds)),
    }


def soak(clients: int, seconds: float, kill_every: float, folder: Path, patience: float = 1800.0) -> dict[str, Any]:
    """Return the figures of a soak. kill_every: seconds of a server, 0 for one that is not killed."""
    server = Server(folder / "runs", folder / "log")
    try:
        return _soak(server, clients, seconds, kill_every, patience)
    finally:
        if server.process is not None and server.process.poll() is None:
            server.stop(signal.SIGKILL)


def _soak(server: Server, clients: int, seconds: float, kill_every: float, patience: float) -> dict[str, Any]:
    server.start()
    began = server.began = time.monotonic()
    counts: collections.Counter[str] = collections.Counter()
    crowd = [Client(n, server, began + seconds, counts) for n in range(clients)]
    for client in crowd:
        client.start()
    following, kills = began + (kill_every or math.inf), 0
    while time.monotonic() < began + seconds:
        if time.monotonic() >= following:
            server.restart(signal.SIGTERM if kills % 2 else signal.SIGKILL)
            following, kills = time.monotonic() + kill_every, kills + 1
        server.sample()
        time.sleep(0.25)
    for client in crowd:
        client.join(120)
    waited = finish(server, patience)
    found = check(server, crowd)
    server.stop(signal.SIGTERM)
    outside = sum(not server.restarted(*span) for client in crowd for span in client.unavailable)
    return {
        **found, "kills": kills, "accepted": sum(len(c.accepted) for c in crowd), "finish": waited, "answers": counts,
        "cancelled": sum(len(c.cancelled) for c in crowd), "outside": outside, "memory": memory(server, seconds),
        "codes": server.codes,
    }  # fmt: skip


def table(found: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """Return (what must hold, whether it does, figures)."""
    answers, grown = found["answers"], found["memory"]
    shown = {name: "n/a" if grown[name] is None else f"{grown[name]:.2f}" for name in ("longest", "all")}
    rise = [grown[name] for name in ("longest", "all") if grown[name] is not None]
    bad = sum(n for code, n in answers.items() if code.startswith("5") and code != "503")
    codes = [code for code in found["codes"] if code != -signal.SIGKILL]
    return [
        ("every accepted run is complete", not (found["lost"] or found["lacking"] or found["damaged"]),
         f"{found['accepted']} accepted, {found['cancelled']} of them cancelled by their client; {found['lost']} lost, "
         f"{found['lacking']} not complete, {found['damaged']} pictures damaged"),
        ("no picture is there twice", not found["twice"], f"{found['pictures']} pictures, {found['twice']} twice"),
        ("memory is flat", max(rise, default=math.inf) <= FLAT,
         f"of the server that lived longest ({grown['seconds']:.0f} s, {grown['MiB']:.0f} MiB), its last quarter by "
         f"its second: {shown['longest']}; over all servers, the last minute by the second: {shown['all']}"),
        ("no 5xx but 503 while it restarts", not bad and not found["outside"],
         f"{bad} other 5xx, {found['outside']} x 503 at other times, {answers['503']} while it restarted"),
        ("SIGTERM ends it with 143", set(codes) <= {143}, f"{len(codes)} times"),
    ]  # fmt: skip


def main() -> int:
    """Print the table; 1 if something does not hold."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--minutes", type=float, default=10.0)
    options.add_argument("--kill-every", type=float, default=60.0, help="seconds; 0: never")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="genkit-soak-") as folder:
        found = soak(given.clients, 60 * given.minutes, given.kill_every, Path(folder))
    rows = table(found)
    print(f"{given.clients} clients, {given.minutes:g} minutes, {found['kills']} kills, SIGKILL and SIGTERM in turn")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end")
    for what, holds, figures in rows:
        print(f"{what:33} {'holds' if holds else 'FAILS'}  {figures}")
    print(f"{'answers':33}        {', '.join(f'{n} x {code}' for code, n in sorted(found['answers'].items()))}")
    print(f"{'drawn again, as a kill came first':33}        {found['again']} pictures that had no record yet")
    print(f"{'what was left, drawn within':33}        {found['finish']:.1f} s")
    return int(not all(holds for _, holds, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
