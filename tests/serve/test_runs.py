"""Runs over HTTP: what is accepted is drawn, as `genkit generate` draws it, and may be read, filtered and deleted."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import itertools
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from genkit.errors import HostError
from genkit.job.plan import plan_job
from genkit.job.run import run_job
from genkit.options import Options
from genkit.rows.prompts import read_prompts
from genkit.runs.records import read_results
from genkit.sampling.codec import Codec
from genkit.serve import served, store
from genkit.serve.runs import followed
from genkit.serve.store import Served
from genkit.studies.filter import refilter

ROWS = """{"prompt": "a red apple", "num_images": 2, "keep": 1, "num_inference_steps": 2}
{"prompt": "a dog", "seed": 7, "num_inference_steps": 1}
{"id": "gated", "prompt": "a cat", "num_inference_steps": 2, "gate": "clip > 0.95", "keep": 1, "max_images": 3}
"""
JSONL = {"content-type": "application/x-ndjson"}


@pytest.fixture(scope="module")
def server(start: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    running = start(Options(device="cpu", batch_size=4), runs=tmp_path_factory.mktemp("served") / "runs")
    yield running
    running.server.drain()
    running.thread.join(20)
    running.serving.runs.close()
    running.server.listener.close()


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def ended(client: httpx.Client, run_id: str) -> dict[str, Any]:
    """Return a run once it is over."""
    end = time.monotonic() + 200
    while not (run := client.get(f"/v1/runs/{run_id}").json())["finished"]:
        assert time.monotonic() < end, run
        time.sleep(0.05)
    return run


@pytest.fixture(scope="module")
def run(client: httpx.Client) -> dict[str, Any]:
    answer = client.post("/v1/runs?seed=3&name=some.jsonl", content=ROWS, headers=JSONL)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/runs/{answer.json()['id']}"
    return ended(client, answer.json()["id"])


def test_a_run_is_what_generate_makes(server: Any, run: dict[str, Any], tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(ROWS)
    options = Options(device="cpu", batch_size=4, seed=3, quiet=True)
    parts = server.engine.generator, server.engine.panel

    class Crew:  # networks that are loaded
        def __new__(cls, job: Any) -> Any:
            from genkit.job.crew import Alone

            alone = Alone(job)
            from genkit.scoring.panel import Panel

            alone.parts = parts[0], Panel(parts[1].clip, [r.plain_prompt for r in job.rows])
            return alone

    job = plan_job(read_prompts(prompts), options, {})
    run_job(job, tmp_path / "run", Crew(job))
    folder = server.serving.runs.store.folder / run["id"]
    ours, theirs = ({(r.id, r.index): r for r in read_results(f)} for f in (folder, tmp_path / "run"))
    assert set(ours) == set(theirs) and len(ours) == 6
    for key, r in ours.items():
        other = theirs[key]
        assert (r.seed, r.fingerprint, r.prompt) == (other.seed, other.fingerprint, other.prompt)
        assert r.scores.keys() == other.scores.keys()
        assert r.scores["clip_z"] == pytest.approx(other.scores["clip_z"], abs=0.02)
        pictures = (np.asarray(_opened(f / str(x.file)), int) for f, x in ((folder, r), (tmp_path / "run", other)))
        assert np.abs(np.subtract(*pictures)).max() <= 1
    chosen = [json.loads((f / "selection.json").read_text()) for f in (folder, tmp_path / "run")]
    assert chosen[0]["hard"] == chosen[1]["hard"] and chosen[0]["kept"] == chosen[1]["kept"] == run["images"]["kept"]


def _opened(path: Path) -> Any:
    from PIL import Image

    return Image.open(path).convert("RGB")


def test_what_a_client_reads(client: httpx.Client, server: Any, run: dict[str, Any]) -> None:
    assert run["state"] == "done" and run["name"] == "some.jsonl"
    assert run["images"] == {"done": 6, "failed": 0, "kept": 2, "least": 4, "most": 6}
    assert run["id"] in [one["id"] for one in client.get("/v1/runs").json()["data"]]
    at = f"/v1/runs/{run['id']}"
    records = [json.loads(line) for line in client.get(f"{at}/results").text.splitlines()]
    assert len(records) == 6 and sum(r["kept"] for r in records) == 2
    picture = client.get(f"{at}/{records[0]['file']}")
    assert picture.headers["content-type"] == "image/png" and len(picture.content) == records[0]["bytes"]
    page = client.get(f"{at}/gallery")
    assert page.headers["content-type"].startswith("text/html") and "000000" in page.text
    for name in ("../run.json", "..%2Frun.json", "x.png", "%2e%2e/requests.jsonl"):
        assert client.get(f"{at}/images/{name}").status_code == 404
    for wrong in ("nothing", "..", ".new-x", "%2e%2e%2fx"):
        assert client.get(f"/v1/runs/{wrong}/results").status_code in (404, 307)


def test_events_go_on_behind_the_last_that_was_seen(client: httpx.Client, run: dict[str, Any]) -> None:
    at = f"/v1/runs/{run['id']}/events"
    whole = client.get(at).text
    ids = [line[4:] for line in whole.splitlines() if line.startswith("id: ")]
    assert ids == [str(n) for n in range(1, 7)] and whole.rstrip().split("\n\n")[-1].startswith("event: done")
    rest = client.get(at, headers={"Last-Event-ID": "4"}).text
    assert [line for line in rest.splitlines() if line.startswith("id: ")] == ["id: 5", "id: 6"]


def test_all_events_of_a_long_run_are_told(tmp_path: Path) -> None:
    lines = [json.dumps({"id": f"{n}", "prompt": "x" * 1000}) for n in range(1, 2001)]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + '\n{"id": "torn')
    run = Served("r", tmp_path, "", 0.0, "p.txt", "png", None, "", 1, 2000, 2000, state="done", finished=1.0)

    async def told() -> list[str]:
        return [event async for event in followed(run, 0, lambda: False)]

    events = asyncio.run(told())
    assert [event.splitlines()[2] for event in events[:-1]] == [f"data: {line}" for line in lines]
    assert events[-1].startswith("event: done")


def test_a_large_run_has_its_gallery(
    server: Any, client: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genkit.job.run.LARGE", 1)
    monkeypatch.setattr("genkit.pages.outcome.LARGE", 1)
    answer = client.post("/v1/runs?name=p.txt", content="a dog\na cat\n", headers={"content-type": "text/plain"})
    at = f"/v1/runs/{ended(client, answer.json()['id'])['id']}"
    folder = re.search(r'"folder": "(gallery/[^"]+)"', client.get(f"{at}/gallery").text)
    assert folder is not None
    states = client.get(f"{at}/{folder[1]}/states.js")
    assert states.text.startswith("genkit('states'") and states.headers["content-type"].startswith("text/javascript")
    for name in ("gallery/nothing.js", f"{folder[1]}/..%2f..%2f..%2frun.json", f"{folder[1]}/%2e%2e/x.js"):
        assert client.get(f"{at}/{name}").status_code == 404


def test_a_cancelled_run_whose_gallery_cannot_be_written_ends(
    server: Any, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise HostError("index.html: No space left on device")

    monkeypatch.setattr("genkit.serve.feeder.conclude", full)
    row = '{"prompt": "a dog", "num_images": 200, "steps": 50}'
    run_id = client.post("/v1/runs", content=row, headers=JSONL).json()["id"]
    while client.get(f"/v1/runs/{run_id}").json()["state"] == "waiting":
        time.sleep(0.02)
    client.post(f"/v1/runs/{run_id}/cancel")
    run = ended(client, run_id)
    assert run["state"] == "cancelled" and "No space left" in run["reason"]
    assert client.delete(f"/v1/runs/{run_id}").status_code == 204


def test_filter_chooses_again(client: httpx.Client, server: Any, run: dict[str, Any]) -> None:
    at = f"/v1/runs/{run['id']}/filter"
    found = client.post(at, json={"where": "clip > -1", "keep": 1}).json()
    assert found["kept"] == 3 and len(found["names"]) == 3
    assert client.get(f"/v1/runs/{run['id']}").json()["images"]["kept"] == 3
    assert refilter(server.serving.runs.store.folder / run["id"])["kept"] == 2  # genkit filter, as of any run
    wrong = client.post(at, json={"where": "clp > 0"})
    assert wrong.status_code == 400 and "did you mean" in wrong.json()["error"]["message"]
    assert client.post(at, json={"keep": 0}).status_code == 400


def test_the_page_is_told_of_runs(client: httpx.Client, run: dict[str, Any]) -> None:
    with client.stream("GET", "/app/events") as answer:
        events = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: "))
        told = next(event for event in events if event["type"] == "runs")
    assert told["runs"] == client.get("/v1/runs").json()["data"] and told["count"] == len(told["runs"])
    assert run["id"] in [one["id"] for one in told["runs"]] and told["live"] == 0


def test_the_gallery_of_a_drawn_run_is_written_when_records_came(
    server: Any, run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, written = server.serving.runs, []
    drawn = dataclasses.replace(runs.store.runs[run["id"]], state="drawing")
    monkeypatch.setattr(served, "write_gallery", lambda *given: written.append(given))
    monkeypatch.setattr(served, "REST", 0)
    monkeypatch.setattr(served, "EVERY", 3600.0)
    runs.page(drawn)
    runs.page(drawn)
    assert len(written) == 1
    os.utime(drawn.folder / "results.jsonl")
    runs.page(drawn)  # too soon
    assert len(written) == 1
    monkeypatch.setattr(served, "EVERY", 0.0)
    runs.page(drawn)
    runs.page(drawn)
    assert len(written) == 2


def test_a_gallery_that_takes_long_is_written_less_often(
    server: Any, run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def write(*given: Any) -> None:
        clock[0] += 10

    runs = server.serving.runs
    drawn = dataclasses.replace(runs.store.runs[run["id"]], state="drawing")
    monkeypatch.setattr(served, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(served, "write_gallery", write)
    runs.page(drawn)
    os.utime(drawn.folder / "results.jsonl")
    for now, after in ((20.0, 20.0), (43.5, 53.5)):
        clock[0] = now
        runs.page(drawn)
        assert clock[0] == after


REFUSED = [
    ('{"prompt": "x", "image": "/etc/passwd"}', "image"),
    ('{"prompt": "x", "mask": "/tmp/m.png", "image": "a.png"}', "image"),
    ('{"prompt": "x", "loras": [{"file": "/etc/passwd"}]}', "loras"),
    ('{"prompt": "x", "loras": ["style"]}', "loras"),
    ('{"prompt": "x", "scheduler": "/tmp/tuned_scheduler.json"}', "scheduler"),
    ('{"prompt": "<lora:../../etc/x:1>", "syntax": "a1111"}', "loras"),
    ('{"prompt": "__../../../etc/passwd__", "syntax": "a1111"}', "prompt"),
    ('{"prompt": "x", "expansions": 100000, "num_images": 9, "syntax": "a1111"}', "more than"),
    ('{"prompt": "x", "steps": 900}', "num_inference_steps"),
    ('{"prompt": "x", "width": 4096, "height": 4096}', "width"),
    ('{"prompt": "x", "num_images": 100000}\n{"prompt": "y"}', "more than"),
    ('{"prompt": "x"}\n{"prompt": "y", "gat": 1}', "some.jsonl:2: 'gat': unknown field"),
    ("", "empty"),
    ("\x00", "NUL"),
    ('{"prompt": "x"', "JSON"),
]


@pytest.mark.parametrize(("text", "said"), REFUSED, ids=range(len(REFUSED)))
def test_a_file_that_cannot_be_drawn_leaves_nothing(client: httpx.Client, server: Any, text: str, said: str) -> None:
    folder = server.serving.runs.store.folder
    before = sorted(folder.iterdir())
    answer = client.post("/v1/runs?name=some.jsonl", content=text, headers=JSONL)
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and said in message and "\n" not in message and "/genkit-upload-" not in message
    assert sorted(folder.iterdir()) == before


def test_forms_keys_cancel_and_delete(client: httpx.Client, server: Any) -> None:
    form = {"format": "webp", "quality": "80.0", "seed": "5"}
    files = {"file": ("a b.csv", "prompt,num_images,steps\na dog,200,50\n")}
    key = {"Idempotency-Key": "one"}
    answer = client.post("/v1/runs", files=files, data=form, headers=key)
    assert answer.status_code == 202 and answer.json()["name"] == "a b.csv"
    at = answer.headers["location"]
    again = client.post("/v1/runs", files=files, data=form, headers=key)
    assert again.status_code == 200 and again.json()["id"] == answer.json()["id"]
    assert client.post("/v1/runs", files=files, headers=key).status_code == 409
    assert client.delete(at).status_code == 409
    assert client.post(f"{at}/cancel").json()["state"] == "cancelled"
    run = ended(client, answer.json()["id"])
    assert run["state"] == "cancelled" and run["images"]["done"] < 200
    assert client.get(f"{at}/gallery").status_code == 200
    server.settled()
    folder = server.serving.runs.store.folder / run["id"]
    binding = json.loads((folder / "run.json").read_text())["binding"]
    assert binding["seed"] == 5 and binding["format"] == "webp, quality 80"
    assert client.delete(at).status_code == 204 and client.get(at).status_code == 404 and not folder.exists()
    assert client.post("/v1/runs", files={"file": ("x.exe", "a")}).status_code == 400
    assert client.post("/v1/runs", data={"seed": "1"}).status_code == 400
    for seed in ("0" * 5000, "0" * 12 + "9" * 12, "-1", "²"):
        assert client.post("/v1/runs", files={"file": ("x.txt", "a")}, data={"seed": seed}).status_code == 400
    for quality in ("0", "101", "high"):
        answer = client.post("/v1/runs", files={"file": ("x.txt", "a")}, data={"quality": quality})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "quality"
        assert client.post(f"/v1/runs?quality={quality}", content=ROWS, headers=JSONL).status_code == 400
    assert client.post("/v1/runs", content="a dog", headers={"content-type": "image/png"}).status_code == 400


def test_pictures_are_sent_inline_and_kept_with_the_run(client: httpx.Client, server: Any) -> None:
    import base64
    import io

    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(data, "PNG")
    row = {"prompt": "a dog", "steps": 2, "strength": 0.5, "seed": 1}
    row["image"] = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    answer = client.post("/v1/runs", content=json.dumps(row), headers=JSONL)
    assert answer.status_code == 202, answer.text
    run = ended(client, answer.json()["id"])
    assert run["images"]["done"] == 1
    inputs = server.serving.runs.store.inputs(run["id"])
    assert len(list(inputs.iterdir())) == 1
    assert client.delete(f"/v1/runs/{run['id']}").status_code == 204 and not inputs.exists()


@pytest.mark.slow
def test_a_run_that_another_process_left_goes_on(
    server: Any, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the disk and not over is drawn, of runs in which something is drawn already, too."""
    from genkit.serve.served import Runs

    runs, decode, calls = server.serving.runs, Codec.decode, itertools.count(1)

    def hold(self: Codec, latents: Any) -> Any:
        """Wait with the second pictures until no more are begun."""
        if next(calls) == 2:
            server.wait(lambda: server.engine.line.waiting()[0] == 0)
        return decode(self, latents)

    monkeypatch.setattr(Codec, "decode", hold)
    answer = client.post("/v1/runs", content='{"prompt": "a dog", "num_images": 40, "steps": 1}', headers=JSONL)
    run_id = answer.json()["id"]
    while not runs.store.runs[run_id].done:
        time.sleep(0.01)
    assert runs.feeder.settle(120)
    runs.close()
    monkeypatch.undo()
    drawn = len(read_results(runs.store.folder / run_id))
    assert 0 < drawn < 40 and not runs.store.runs[run_id].over
    torn = runs.store.folder / ".new-torn"
    torn.mkdir()
    with open(runs.store.folder / run_id / "results.jsonl", "a") as journal:
        journal.write('{"id": "torn')
    server.serving.runs = runs = Runs(runs.store.folder, server.serving.intake)
    assert not torn.exists() and client.get(f"/v1/runs/{run_id}").json()["images"]["done"] == drawn
    runs.feeder.start()
    run = ended(client, run_id)
    assert run["state"] == "done" and run["images"]["done"] == 40
    lines = client.get(f"/v1/runs/{run_id}/results").text.splitlines()
    assert len({json.loads(line)["index"] for line in lines}) == len(lines) == 40


def test_a_run_is_of_the_key_that_began_it(server: Any, run: dict[str, Any]) -> None:
    import dataclasses

    from starlette.testclient import TestClient

    from genkit.serve.app import create_app
    from genkit.serve.store import owner_of

    keys = ["the-key-of-the-first", "the-key-of-the-second"]
    other = TestClient(create_app(dataclasses.replace(server.serving, keys=keys)), base_url=server.url)
    first, second = ({"authorization": f"Bearer {key}"} for key in keys)
    served = server.serving.runs.store.runs[run["id"]]
    at = f"/v1/runs/{run['id']}"
    before, served.owner = served.owner, owner_of("key 1", keys)
    try:
        assert other.get(at).status_code == 401
        assert other.get(at, headers=first).status_code == 200
        for method, path in (
            ("GET", ""), ("GET", "/events"), ("GET", "/results"), ("GET", "/gallery"), ("GET", "/images/000000-0.png"),
            ("POST", "/cancel"), ("POST", "/filter"), ("DELETE", ""),
        ):  # fmt: skip
            json_ = {"keep": 1} if path == "/filter" else None
            assert other.request(method, at + path, headers=second, json=json_).status_code == 404, path
        listed = [[one["id"] for one in other.get("/v1/runs", headers=h).json()["data"]] for h in (first, second)]
        assert run["id"] in listed[0] and run["id"] not in listed[1]
    finally:
        served.owner = before


def test_a_full_disk_takes_no_run_and_loses_none(
    server: Any, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    from genkit.serve import feeder

    store, real, full = server.serving.runs.store, os.fsync, ["calls", "drawing"]

    def fsync(handle: int) -> None:
        calls = threading.current_thread().name.startswith("AnyIO")  # the thread in which a call is answered
        if ("calls" if calls else "drawing") in full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(feeder, "AGAIN", 0.2)
    monkeypatch.setattr(os, "fsync", fsync)
    before = sorted(path.name for path in store.folder.iterdir())
    row = '{"prompt": "a dog", "num_images": 3, "steps": 1}'
    answer = client.post("/v1/runs", content=row, headers=JSONL)
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    message = answer.json()["error"]["message"]
    assert "No space left" in message and "\n" not in message and str(store.folder) not in message
    assert sorted(path.name for path in store.folder.iterdir()) == before

    full.remove("calls")
    run_id = client.post("/v1/runs", content=row, headers=JSONL).json()["id"]
    end = time.monotonic() + 120
    while (now := client.get(f"/v1/runs/{run_id}").json())["state"] != "waiting" or now["reason"] is None:
        assert time.monotonic() < end and not now["finished"], now
        time.sleep(0.02)
    assert "No space left" in now["reason"] and str(store.folder) not in now["reason"]
    full.clear()
    run = ended(client, run_id)
    assert run["state"] == "done" and run["images"]["done"] == 3 and run["reason"] is None


def fail_one_sync(of: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next sync of a folder fail at the disk."""
    real, failing = store.sync_folder, [OSError(errno.EIO, os.strerror(errno.EIO))]

    def sync_folder(folder: Path) -> None:
        if folder == of and failing:
            raise failing.pop()
        real(folder)

    monkeypatch.setattr(store, "sync_folder", sync_folder)


def test_a_run_whose_name_is_not_synced_is_not_accepted(
    server: Any, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = server.serving.runs.store
    fail_one_sync(runs.folder, monkeypatch)
    before = sorted(path.name for path in runs.folder.iterdir())
    asked: dict[str, Any] = {
        "content": '{"prompt": "a dog", "steps": 1}',
        "headers": {**JSONL, "Idempotency-Key": "unsynced"},
    }
    assert client.post("/v1/runs", **asked).status_code == 503
    assert sorted(path.name for path in runs.folder.iterdir()) == before, "the next start must not draw it"
    answer = client.post("/v1/runs", **asked)
    assert answer.status_code == 202 and ended(client, answer.json()["id"])["images"]["done"] == 1


def test_a_run_whose_end_is_not_synced_is_not_deleted(
    server: Any, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = server.serving.runs.store
    run = ended(client, client.post("/v1/runs", content='{"prompt": "a dog", "steps": 1}', headers=JSONL).json()["id"])
    at = f"/v1/runs/{run['id']}"
    before = sorted(path.name for path in runs.folder.iterdir())
    fail_one_sync(runs.folder, monkeypatch)
    assert client.delete(at).status_code == 503
    assert sorted(path.name for path in runs.folder.iterdir()) == before
    assert client.get(at).json() == run and client.get(f"{at}/results").status_code == 200
    assert client.delete(at).status_code == 204 and client.get(at).status_code == 404
    assert sorted(path.name for path in runs.folder.iterdir()) == [name for name in before if name != run["id"]]
