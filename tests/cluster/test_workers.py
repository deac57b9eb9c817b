"""Runs of many workers, here in threads of one process: the pictures of one worker, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genkit import HostError, InputError, Request, generate
from genkit.cluster import raypool
from genkit.cluster.crew import Workers, check_address, parse_workers
from genkit.cluster.feed import Feed
from genkit.cluster.generate import check_workers
from genkit.cluster.units import Drawn, Unit
from genkit.cluster.worker import Worker
from genkit.job.plan import plan_job
from genkit.job.run import Summary, run_job
from genkit.options import Options
from genkit.rows.result import Result
from genkit.runs.records import parts_of, read_results
from genkit.version import __version__
from tests.check_run import check, lines_of
from tests.cluster.pools import ThreadPool
from tests.tiny import tiny_stable_diffusion

STEPS = {"num_inference_steps": 1}
MODEL: dict[str, Any] = {}  # a tiny one, and one slot: the last bit of a picture may depend on those beside it


@pytest.fixture(autouse=True, scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_stable_diffusion(tmp_path_factory.mktemp("model") / "tiny")
    MODEL.update(model=str(folder), clip="emoji-clip", batch_size=1)


def alone(rows: Sequence[Request], out: Path) -> Summary:
    return generate([row.filled(STEPS) for row in rows], out, quiet=True, **MODEL)


def run_with(
    rows: Sequence[Request], out: Path, workers: int, change: Callable[[Any], None] = lambda pool: None, **options: Any
) -> Summary:
    """Draw with workers in threads. change: what to alter of the pool."""
    job = plan_job([row.filled(STEPS) for row in rows], Options(quiet=True, **{**MODEL, **options}), {})

    def make(gpu: bool | None) -> tuple[Any, int, int]:
        pool = ThreadPool(job, out)
        change(pool)
        return pool, workers, workers

    return run_job(job, out, Workers(job, out, make))


def assert_same_images(one: Path, two: Path) -> None:
    """Files hold scores to the last bit, which depends on the captions that CLIP embeds in one call."""
    found = [{(r.id, r.index, r.seed, r.status): r for r in read_results(folder)} for folder in (one, two)]
    assert found[0].keys() == found[1].keys()
    for key, result in found[0].items():
        pixels = [np.asarray(Image.open(folder / str(r.file)), dtype=int)
                  for folder, r in ((one, result), (two, found[1][key]))]  # fmt: skip
        assert (pixels[0] == pixels[1]).all(), key


PLAIN = [
    Request(id="fox", prompt="a red fox", num_images=5),
    Request(id="cat", prompt="a cat", seed=7, num_images=3),
]


def test_the_union_is_what_one_process_draws_and_resumes_either_way(tmp_path: Path) -> None:
    wanted = alone(PLAIN, tmp_path / "one")
    found = run_with(PLAIN, tmp_path / "two", 2)
    assert (found.exit_code, found.new, found.kept) == (0, wanted.new, wanted.kept)
    assert_same_images(tmp_path / "one", tmp_path / "two")
    assert check(tmp_path / "two") == []
    assert parts_of(tmp_path / "two") == [] and (tmp_path / "two/index.html").is_file()
    config = [json.loads((tmp_path / name / "run.json").read_text())["binding"] for name in ("one", "two")]
    assert config[0] == config[1]
    more = [*PLAIN, Request(id="dog", prompt="a dog", num_images=2)]
    assert run_with(more, tmp_path / "one", 2).new == 2, "what one began, two go on with"
    assert alone(more, tmp_path / "two").new == 2
    assert_same_images(tmp_path / "one", tmp_path / "two")
    scores = [{(r.id, r.index): r.scores["clip_z"] for r in read_results(tmp_path / name)} for name in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-2), "old pictures are scored again for the new prompt"


@pytest.mark.slow
def test_gated_and_pruned_rows_keep_what_one_process_keeps(tmp_path: Path) -> None:
    rows = [
        Request(id="gate", prompt="a red fox", num_images=1, keep=2, gate="sharpness > 0", max_images=6, seed=1),
        Request(id="prune", prompt="a cat", num_images=4, keep=1, prune={"after": 0.5, "keep": 0.5}, seed=5),
    ]
    rows = [row.filled({"num_inference_steps": 2}) for row in rows]
    alone(rows, tmp_path / "one")
    summary = run_with(rows, tmp_path / "two", 2)
    kept = [json.loads((tmp_path / name / "selection.json").read_text())["images"] for name in ("one", "two")]
    assert [{k for k, v in found.items() if v["kept"]} for found in kept] == 2 * [
        {k for k, v in kept[0].items() if v["kept"]}
    ]
    assert summary.kept == 3 and check(tmp_path / "two", finished=False) == []


@pytest.mark.slow
def test_limits_hold_for_all_together(tmp_path: Path) -> None:
    some = run_with(PLAIN, tmp_path, 2, max_total_images=4)
    assert (some.exit_code, some.images, some.stopped) == (1, 4, True)
    assert run_with(PLAIN, tmp_path, 2, max_seconds=1e-6).new == 0
    assert run_with(PLAIN, tmp_path, 1, max_total_images=8).exit_code == 0
    assert check(tmp_path) == []


@pytest.mark.slow
def test_a_worker_whose_device_fails_is_replaced(tmp_path: Path) -> None:
    def faulty(pool: ThreadPool) -> None:
        send = pool.send

        def first_fails(worker: str, units: list[Unit]) -> None:
            if worker == "w0000" and (one := pool.workers.get(worker)) is not None:
                one.feed.take = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
            send(worker, units)

        pool.send = first_fails  # type: ignore[method-assign]

    alone(PLAIN, tmp_path / "one")
    assert run_with(PLAIN, tmp_path / "two", 2, faulty).exit_code == 0
    assert_same_images(tmp_path / "one", tmp_path / "two")
    assert check(tmp_path / "two") == []


def test_a_full_disk_of_a_worker_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(pool: ThreadPool) -> None:
        def draw(*_: object) -> None:
            raise HostError("/disk: No space left on device")

        monkeypatch.setattr("genkit.cluster.worker.Worker.draw", draw)

    with pytest.raises(HostError, match="No space left"):
        run_with(PLAIN, tmp_path, 2, full)
    monkeypatch.undo()
    assert run_with(PLAIN, tmp_path, 1).exit_code == 0


def test_sigterm_writes_what_is_finished_and_the_same_goes_on(tmp_path: Path) -> None:
    def stop_soon(pool: ThreadPool) -> None:
        poll, told = pool.poll, list[int]()

        def once(seconds: float) -> list[Any]:
            found = poll(seconds)
            if not told and any(event.kind == "drawn" for event in found):
                told.append(1)  # a second one would leave at once
                signal.raise_signal(signal.SIGTERM)
            return found

        pool.poll = once  # type: ignore[method-assign]

    rows = [Request(id=f"r{n}", prompt=f"fox {n}", num_images=8) for n in range(6)]
    stopped = run_with(rows, tmp_path, 1, stop_soon, batch_size=2)
    assert stopped.exit_code == 143 and stopped.stopped and 0 < stopped.images < 48
    assert check(tmp_path, finished=False) == [] and parts_of(tmp_path) == []


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("genkit", "0.0.1", r"node n7: genkit is '0.0.1', and "),
        ("torch", "1.13", r"node n7: torch is '1.13', and "),
        ("weights", {"model": {}}, r"node n7: model: \S+ has SHA-256 absent…, and [0-9a-f]{12}… here"),
    ],
)
def test_a_node_that_differs_is_named(
    key: str, value: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: Any, recorded: Any, masks: bool = False) -> dict[str, Any]:
        from importlib.metadata import version

        from genkit.job.load import hashes
        from genkit.version import __version__

        binding = {"device": "cpu", "dtype": "float32"}
        facts = {
            "host": "n7", "genkit": __version__, "torch": version("torch"), "weights": hashes(self.job),
            "config": {"binding": binding}, "slots": 4, "notes": [], "masks": {},
        }  # fmt: skip
        return {**facts, key: value}

    monkeypatch.setattr("genkit.cluster.worker.Worker.load", load)
    with pytest.raises(HostError, match=text):
        run_with(PLAIN, tmp_path / "run", 1)
    assert not (tmp_path / "run").exists()


def test_a_feed_gives_back_what_is_not_begun() -> None:
    rows = {
        "a": Request(id="a", prompt="a", num_images=6),
        "g": Request(id="g", keep=1, gate="clip > 0.9", max_images=9),
    }
    over: list[Drawn] = []
    feed = Feed(rows, lambda result: result.status == "done", over.append)
    feed.add([Unit(0, "a", list(range(6))), Unit(1, "g", None, earlier=[Result("g", 0, 0)])])
    taken = [feed.take() for _ in range(3)]
    assert [(str(row.id), k) for row, k in filter(None, taken)] == [("g", 1), ("a", 0), ("a", 1)]
    assert [(one.number, one.indexes) for one in feed.give_back()] == [(0, [4, 5])]
    assert [(one.number, one.indexes) for one in feed.give_back()] == [(0, [3])]
    feed.halt()
    assert feed.take() is None and over == []
    for row_id, index in (("a", 0), ("g", 1), ("a", 1)):
        result = Result(row_id, index, 0, "failed" if row_id == "g" else "done")
        feed.report(result)
        feed.written(result)
    assert over == [Drawn(1, [(1, "failed", False)]), Drawn(0, [(0, "done", True), (1, "done", True)])]


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ("0", "not within 1"),
        ("many", "not a number"),
        ("8:4", "smaller number first"),
        ("-1", "not a number"),
        ("", "not"),
    ],
)
def test_a_wrong_number_of_workers_is_refused(asked: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^--workers: .*{text}"):
        generate([Request(prompt="a")], tmp_path / "run", workers=asked, **MODEL)
    assert not (tmp_path / "run").exists()


def test_bounds_and_addresses() -> None:
    assert parse_workers(None) is None and parse_workers(3) == (3, 3) and parse_workers("4:64") == (4, 64)
    for good in (None, "auto", "10.0.0.1:6379"):
        check_address(good)
    with pytest.raises(InputError, match="ray job submit"):
        check_address("ray://head:10001")
    with pytest.raises(InputError, match="--ray: 'head' is not auto or HOST:PORT"):
        check_address("head")


@pytest.mark.parametrize(
    ("workers", "device", "text"),
    [
        (4096, "cpu", "--workers: 4096 is more than the"),
        (2, "cuda:1", "--device: cuda:1 is one device"),
        (2, "mps", "mps is one device"),
    ],
)
def test_more_workers_than_devices_are_refused(workers: int, device: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        check_workers(workers, None, device)


def test_a_ray_has_its_token_where_the_home_takes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in raypool._TOKENS:
        monkeypatch.setenv(name, "")
    raypool._give_token()
    assert not os.environ["RAY_AUTH_TOKEN"]  # Ray writes its own
    monkeypatch.setenv("HOME", "/dev/null")
    raypool._give_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


@pytest.mark.parametrize(("started", "taken"), [("127.0.0.1:2", 2), ("127.0.0.1:9", 1), (None, 1)])
def test_auto_is_the_cluster_that_was_started(monkeypatch: pytest.MonkeyPatch, started: str | None, taken: int) -> None:
    """And not the Ray of another run on this machine, whose address is not recorded."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    services = SimpleNamespace(find_gcs_addresses=lambda: {"127.0.0.1:1", "127.0.0.1:2"})
    ray = SimpleNamespace(
        _private=SimpleNamespace(services=services, utils=SimpleNamespace(read_ray_address=lambda: started))
    )
    with pytest.raises(HostError, match=f"no cluster answers at 127.0.0.1:{taken}:"):
        raypool._answering(ray, "auto")


def test_workers_that_differ_in_free_memory_say_it_once(tmp_path: Path) -> None:
    facts = {"genkit": __version__, "torch": version("torch"), "host": "a", "masks": {}}
    both = Workers(None, tmp_path, None)  # type: ignore[arg-type]
    for n, note in enumerate(["4 images at once, 1.5 of 2.25 GiB", "4 images at once, 1.5 of 2.5 GiB", "8 images"]):
        both._check(f"w{n}", {**facts, "notes": [note]})
    assert both.notes == ["4 images at once, 1.5 of 2.25 GiB", "8 images"]


def test_without_ray_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'genkit-diffusion\[ray\]'"):
        generate([Request(prompt="a")], tmp_path / "run", workers=2)
    assert not (tmp_path / "run").exists() and lines_of(tmp_path / "run" / "results.jsonl") == []


def test_a_worker_that_died_takes_no_more_orders() -> None:
    """Its death may come in one batch of news with what the driver answers by an order."""
    pool = object.__new__(raypool.RayPool)
    pool.actors, pool.finishing = {}, set()
    pool.open("w0000")
    pool.send("w0000", [])
    pool.recall("w0000")
    pool.halt("w0000")
    pool.finish("w0000")


def test_units_of_a_chunk_that_end_at_once_return_it_once(tmp_path: Path) -> None:
    class Meeting:
        """A lock after whose release both threads go on together."""

        lock, both = threading.Lock(), threading.Barrier(2)

        def __enter__(self) -> None:
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()
            self.both.wait(60)

    worker, done = Worker(plan_job([Request(prompt="a")], Options(**MODEL), {}), tmp_path, "w0000"), Future[Any]()
    worker._chunks = dict.fromkeys((0, 1), ({0, 1}, [], done))
    worker._lock = Meeting()  # type: ignore[assignment]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(worker._finished, (Drawn(0, []), Drawn(1, []))))
    assert len(done.result(timeout=0)) == 2
