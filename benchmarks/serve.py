"""`genkit serve` beside the same FastAPI wrapper around diffusers: pictures a second and waiting times under load.

    python benchmarks/serve.py                    # the embedded model, both goals; about ten minutes on two cores
    python benchmarks/serve.py --requests 64 --loads 0.7 2 4

Requests arrive at random (Poisson), from at most 64 clients, each for one picture of 8 to 40 steps, every other one
with guidance; a client that is still waiting does not ask again. The wrapper draws (a) one request at a time, or (b)
what waits in batches of equal settings. A load is a multiple of what (a) draws when it is never idle. Each server is a
process of its own on this machine; clients are in this one. "CPU s" is a server's CPU time for each picture, which
other work on the machine disturbs less than the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

MODEL = Path(__file__).parent.parent / "genkit" / "components" / "embedded" / "emoji"
PATH = "/v1/images/generations"
ARMS = {"one": "(a) diffusers, one at a time", "batch": "(b) diffusers, equal settings", "genkit": "genkit serve"}
BATCH = 16  # of (b), and slots of genkit
CLIENTS = 64


def bodies(count: int) -> list[dict[str, Any]]:
    """Return requests of mixed settings, the same for every server."""
    rng = random.Random(0)
    return [
        {
            "prompt": f"a {rng.choice(['red', 'blue', 'green'])} {rng.choice(['apple', 'cat', 'house', 'star'])}",
            "seed": number,
            "steps": rng.randint(8, 40),
            "guidance_scale": 5.0 if number % 2 else 1.0,
        }
        for number in range(count)
    ]


# The wrapper around diffusers


class Wrapper:
    """Draws what waits in a thread: one request at a time, or up to BATCH of equal settings, the oldest first."""

    def __init__(self, batch: int) -> None:
        import torch
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        self.torch, self.batch = torch, batch
        pipe = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe
        self.waiting: deque[tuple[dict[str, Any], Future[Any]]] = deque()
        self.came = threading.Condition()
        threading.Thread(target=self.run, daemon=True).start()

    def ask(self, body: dict[str, Any]) -> Future[Any]:
        done: Future[Any] = Future()
        with self.came:
            self.waiting.append((body, done))
            self.came.notify()
        return done

    def run(self) -> None:
        while True:
            with self.came:
                self.came.wait_for(lambda: self.waiting)
                key = self._key(self.waiting[0][0])
                chosen = [one for one in self.waiting if self._key(one[0]) == key][: self.batch]
                for one in chosen:
                    self.waiting.remove(one)
            try:
                pictures = self.drawn(chosen)
                for (_, done), picture in zip(chosen, pictures, strict=True):
                    done.set_result(picture)
            except Exception as error:
                for _, done in chosen:
                    done.set_exception(error)

    def drawn(self, chosen: list[tuple[dict[str, Any], Future[Any]]]) -> list[Any]:
        steps, guidance = self._key(chosen[0][0])
        return self.pipe(
            [body["prompt"] for body, _ in chosen], num_inference_steps=steps, guidance_scale=guidance,
            generator=[self.torch.Generator("cpu").manual_seed(body["seed"]) for body, _ in chosen],
        ).images  # fmt: skip

    @staticmethod
    def _key(body: dict[str, Any]) -> tuple[int, float]:
        return body["steps"], body["guidance_scale"]


def wrapped(batch: int, port: int) -> None:
    """Serve diffusers as a FastAPI application."""
    import uvicorn
    from fastapi import FastAPI

    app, wrapper = FastAPI(), Wrapper(batch)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post(PATH)
    async def draw(body: dict[str, Any]) -> dict[str, Any]:
        picture = await asyncio.wrap_future(wrapper.ask(body))
        buffer = io.BytesIO()
        await asyncio.to_thread(picture.save, buffer, "PNG")
        return {"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


# The load


@contextmanager
def server(arm: str) -> Iterator[tuple[str, int]]:
    """Run a server in a process of its own until it answers; yield its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = ["-m", "genkit", "serve", "--clip", "none", "--batch-size", str(BATCH), "--max-queue", "10000"]
    own = [*ours, "--scheduler", "ddim", "--port", str(port)]
    command = own if arm == "genkit" else [__file__, "--wrapper", arm, "--port", str(port)]
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            time.sleep(0.5)
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None, "the server ended"
        httpx.post(url + PATH, json=bodies(2)[1], timeout=600).raise_for_status()
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


async def loaded(url: str, asked: list[dict[str, Any]], rate: float) -> tuple[float, list[float]]:
    """Send requests as they arrive; return pictures a second, and the seconds of each from its arrival."""
    rng, seconds = random.Random(1), list[float]()
    room = asyncio.Semaphore(CLIENTS)
    async with httpx.AsyncClient(timeout=3600, limits=httpx.Limits(max_connections=None)) as client:

        async def one(body: dict[str, Any]) -> None:
            arrived = time.perf_counter()
            async with room:
                (await client.post(url + PATH, json=body)).raise_for_status()
            seconds.append(time.perf_counter() - arrived)

        began = time.perf_counter()
        tasks = []
        for body in asked:
            tasks.append(asyncio.create_task(one(body)))
            await asyncio.sleep(rng.expovariate(rate))
        await asyncio.gather(*tasks)
    return len(asked) / (time.perf_counter() - began), seconds


def cpu_seconds(process: int) -> float:
    """Return the CPU time of a process so far; NaN where the system does not tell."""
    stat = Path(f"/proc/{process}/stat")
    if not stat.exists():
        return float("nan")
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def capacity(url: str, asked: list[dict[str, Any]]) -> float:
    """Return pictures a second of one client that asks again at once."""
    began = time.perf_counter()
    for body in asked:
        httpx.post(url + PATH, json=body, timeout=600).raise_for_status()
    return len(asked) / (time.perf_counter() - began)


def lone(times: int) -> None:
    """Print what a request costs that is alone, beside a call of the generator in the same process, by turns."""
    from genkit.options import Options
    from genkit.sampling.generators import TextToImage
    from genkit.serve.rows import Most
    from genkit.serve.server import Listen, Server, bound, prepare

    where = Listen(port=0)
    running = Server(prepare(Options(clip="none"), {"scheduler": "ddim"}, where, Most(), 1e4, []), bound(where))
    threading.Thread(target=running.run, kwargs={"sockets": [running.listener]}, daemon=True).start()
    running.load()
    engine = running.serving.engine
    assert engine.generator is not None
    generator = TextToImage.from_generator(engine.generator).with_scheduler("ddim")
    found: dict[str, list[float]] = {"generator(...)": [], "a request": []}
    with httpx.Client(timeout=600) as client:
        for number in range(times + 1):
            body = {"prompt": "a red apple", "seed": number, "steps": 8, "guidance_scale": 5.0}
            began, used = time.perf_counter(), time.process_time()
            generator("a red apple", seed=number, num_inference_steps=8, guidance_scale=5.0)
            middle, half = time.perf_counter(), time.process_time()
            client.post(running.address + PATH, json=body).raise_for_status()
            if number:  # the first is not counted
                found["generator(...)"].append((middle - began, half - used))
                found["a request"].append((time.perf_counter() - middle, time.process_time() - half))
    best = {}
    for name, pairs in found.items():
        wall, used_cpu = ([pair[k] for pair in pairs] for k in (0, 1))
        best[name] = statistics.median(wall), min(wall), statistics.median(used_cpu), min(used_cpu)
        print("{:<16} wall {:.3f} s, least {:.3f}; CPU, which other work disturbs less, {:.3f} s, least {:.3f}".format(
            name, *best[name]
        ))  # fmt: skip
    shares = [ours / own for ours, own in zip(best["a request"], best["generator(...)"], strict=True)]
    print("a lone request costs, of the call: wall {:.3f}, least {:.3f}; CPU {:.3f}, least {:.3f}\n".format(*shares))
    running.should_exit = True
    engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.7, 2.0])
    parser.add_argument("--lone", type=int, default=11, help="times a lone request is timed")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--wrapper", choices=["one", "batch"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.wrapper:
        wrapped(1 if given.wrapper == "one" else BATCH, given.port)
        return
    cores, busy = os.cpu_count() or 1, os.getloadavg()[0]
    print(f"{cpu()}, {cores} cores, load {busy:.1f} at the start, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}")
    if busy > cores / 2:
        print("the machine is busy with other work: times below are longer than on an idle one, and vary")
    if given.lone:
        lone(given.lone)
    asked, whole = bodies(given.requests), 0.0
    print(f"{'server':<32} {'load':>5} {'a second':>9} {'median s':>9} {'p95 s':>7} {'CPU s':>7}")
    rows: dict[tuple[str, float], tuple[float, float, float]] = {}
    for arm in given.arms:
        with server(arm) as (url, process):
            if arm == given.arms[0]:
                whole = capacity(url, asked[: max(4, len(asked) // 4)])
                print(f"{ARMS[arm] + ', never idle':<32} {'':>5} {whole:>9.3f}", flush=True)
            for load in given.loads:
                used = cpu_seconds(process)
                rate, seconds = asyncio.run(loaded(url, asked, load * whole))
                p95 = sorted(seconds)[max(0, round(0.95 * len(seconds)) - 1)]
                used = (cpu_seconds(process) - used) / len(asked)
                rows[arm, load] = rate, p95, used
                middle = statistics.median(seconds)
                print(f"{ARMS[arm]:<32} {load:>5g} {rate:>9.3f} {middle:>9.2f} {p95:>7.2f} {used:>7.2f}", flush=True)
    for load in given.loads:
        for other in ("one", "batch"):
            if ("genkit", load) in rows and (other, load) in rows:
                (ours, wait, own), (theirs, longer, more) = rows["genkit", load], rows[other, load]
                said = f"{ours / theirs:.2f} times the pictures a second of {ARMS[other][:3]}, p95 {wait / longer:.2f}"
                print(f"load {load:g}: genkit has {said}; pictures a CPU second {more / own:.2f}")


def cpu() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
