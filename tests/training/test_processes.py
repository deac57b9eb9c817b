"""Several processes are one process with so many times the accumulation: the same pictures, noise and bits."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from genkit.components import load_components
from genkit.components.compose import compose_model
from genkit.datasets.config import Data
from genkit.datasets.sources import read_examples
from genkit.errors import HostError, InputError
from genkit.training import processes
from genkit.training.checkpoint import read_log
from genkit.training.data import Feed, Pictures
from genkit.training.gradients import contrast
from genkit.training.launch import launch
from genkit.training.loop import train
from genkit.training.processes import Silent, as_one, check_alike, make_accelerator, passes_of
from genkit.training.recipe import make_recipe
from genkit.training.setup import Setup
from genkit.training.tasks import make_task
from tests.colours import colour_folder
from tests.tiny import tiny_clip, tiny_ddpm, tiny_stable_diffusion
from tests.training.processes import pair

torch.set_num_threads(1)  # a forked child would wait for threads that it does not have
ROOT = Path(__file__).parents[2]
STEPS = 6
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "unconditional": ("unconditional", "ddpm", {"data": {"flip": 0.5, "crop": "random"}}),
    "clip": ("clip", "clip", {}),
    "with its text encoder": (
        "text-to-image", "sd", {"data": {"caption_dropout": 0.3}, "train": {"text_encoder": True}},
    ),
    "lora, cached": (
        "lora", "sd", {"data": {"caption_dropout": 0.3, "cache": 2}, "lora": {"rank": 2, "text_encoder": True}},
    ),
    "controlnet": ("controlnet", "sd", {"data": {"conditioning": "invert", "flip": 0.5}}),
    "autoencoder": ("autoencoder", "sd", {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    for name, make in (("ddpm", tiny_ddpm), ("sd", tiny_stable_diffusion), ("clip", tiny_clip)):
        make(folder / name)
    colour_folder(folder / "pictures", 20)
    return folder


def recipe_of(places: Path, kind: str = "unconditional", **train: Any) -> Any:
    return make_recipe(values_of(places, kind, **train))


def values_of(places: Path, kind: str = "unconditional", **train: Any) -> dict[str, Any]:
    """Of 19 pictures, four at a time, the last batch of an epoch is short: some shares of a step are unequal."""
    task, model, changes = KINDS[kind]
    return {
        "task": task, "model": str(places / model), **changes,
        "data": {"path": str(places / "pictures"), "validation": 0.1, **changes.get("data", {})},
        "train": {"steps": STEPS, "batch_size": 4, "ema": 0.9, **changes.get("train", {}), **train},
        "evaluate": {"every": 3, "pictures": 4, "num_inference_steps": 2}, "save": {"every": 2, "keep_last": 3},
    }  # fmt: skip


def alone(recipe: Any, out: Path) -> Path:
    train(recipe, out, device="cpu", quiet=True)
    return out


def differences(a: Path, b: Path) -> dict[str, float]:
    """The largest difference between two runs' weights, averages, moments and losses, and of the last evaluation."""
    found = {}
    for name in ("weights", "ema", "optimizer"):
        one, two = (load_file(out / "checkpoints" / f"{STEPS:06d}" / f"{name}.safetensors") for out in (a, b))
        assert one.keys() == two.keys() and one
        found[name] = max(float((one[key] - two[key]).abs().max()) for key in one)
    logs = [read_log(out / "log.jsonl") for out in (a, b)]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] == list(range(1, STEPS + 1))
    found["loss"] = max(abs(x["loss"] - y["loss"]) for x, y in zip(*logs, strict=True))
    told = [json.loads((o / "checkpoints" / f"{STEPS:06d}" / "checkpoint.json").read_text())["scores"] for o in (a, b)]
    assert told[0].keys() <= told[1].keys()  # a run that has ended in between was evaluated then too
    found["validation"] = max(abs(told[0][step]["loss"] - told[1][step]["loss"]) for step in told[0])
    return found


# -- the arithmetic of shares, in one process --


def feed_of(folder: Path, rank: int = 0, world: int = 1) -> Feed:
    data = Data(path=str(folder), captions=["{caption}"])
    return Feed(Pictures(read_examples(data), data, (16, 16), 1, 0), 4, 0, rank, world)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_a_step_has_the_same_pictures_with_the_same_say_however_it_is_shared(tmp_path: Path, world: int) -> None:
    folder, passes = colour_folder(tmp_path / "set", 10), 6  # batches of 4, 4 and 2
    whole = feed_of(folder)
    stream = whole.places(3 * passes)
    wanted = [(next(stream), whole.weight_of(3 * passes + i, passes)) for i in range(passes)]
    shares = [feed_of(folder, rank, world) for rank in range(world)]
    streams = [share.places(3 * passes // world) for share in shares]
    for i, (place, weight) in enumerate(wanted):
        part, rank = divmod(i, world)
        assert next(streams[rank]) == place
        number = 3 * passes // world + part
        assert shares[rank].weight_of(number, passes // world) / world == pytest.approx(weight, rel=1e-12)
    assert sum(weight for _, weight in wanted) == pytest.approx(1)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_noise_is_drawn_by_place_and_not_by_process(world: int) -> None:
    drawn = {}
    for rank in range(world):
        accelerator = SimpleNamespace(process_index=rank, num_processes=world)
        s: Any = SimpleNamespace(recipe=SimpleNamespace(seed=5), accelerator=accelerator, device=torch.device("cpu"))
        s.place_of = lambda part, s=s: Setup.place_of(s, part)
        for part in range(4 // world):
            noise = torch.randn(2, generator=Setup.seeded(s, 7, part)).tolist()
            drawn[s.place_of(part)] = noise, torch.rand(1).item()  # and dropout
    assert sorted(drawn) == [0, 1, 2, 3] and len({str(one) for one in drawn.values()}) == 4
    if world > 1:
        alone: Any = SimpleNamespace(process_index=0, num_processes=1)
        s = SimpleNamespace(recipe=SimpleNamespace(seed=5), accelerator=alone, device=torch.device("cpu"))
        s.place_of = lambda part: part
        assert torch.randn(2, generator=Setup.seeded(s, 7, 3)).tolist() == drawn[3][0]


@pytest.mark.parametrize(
    ("begun", "now", "wanted"),
    [
        (None, (2, 3), 6),
        ((2, 4), (2, 1), 4),  # accumulation, passes of a step -> accumulation, processes: the same command
        ((2, 4), (2, 4), 4),
        ((2, 4), (4, 1), 4),
        ((2, 4), (1, 4), 4),
        ((2, 4), (2, 3), r"3 processes: a step of this run is 4 passes of 8, .* take 1, 2, 4"),
        ((2, 4), (3, 1), r"accumulation_steps: was 2, is now 3: a step of this run is 4 passes of 8; take 4"),
        ((2, 4), (3, 2), r"accumulation_steps: was 2, is now 3: .*; take 2"),
    ],
)
def test_a_step_stays_what_it_was_on_another_number_of_processes(begun: Any, now: Any, wanted: Any) -> None:
    recipe: Any = SimpleNamespace(train=SimpleNamespace(gradient_accumulation_steps=now[0], batch_size=8))
    before = None
    if begun is not None:
        before = {"recipe": {"train": {"gradient_accumulation_steps": begun[0]}}, "passes": begun[1]}
    if isinstance(wanted, int):
        assert passes_of(before, recipe, now[1], "x") == wanted
    else:
        with pytest.raises(InputError, match=wanted):
            passes_of(before, recipe, now[1], "x")


def test_the_contrast_is_of_all_pictures_of_a_step(places: Path) -> None:
    """Two passes, one of them short, have the loss and the gradients of both batches at once."""
    recipe = recipe_of(places, "clip", gradient_accumulation_steps=2)
    info = compose_model("clip", recipe.model, recipe.networks, recipe.scheduler)
    task = make_task(recipe, load_components(info, device=torch.device("cpu"), dtype=torch.float32), torch.float32)
    pictures = Pictures(read_examples(recipe.data), recipe.data, task.resolution, task.multiple, 0)
    batches = [{**task.encode(b), "weights": b.weights} for b in (pictures.batch(i, 0) for i in ([0, 3, 4, 7], [5, 2]))]
    accelerator = SimpleNamespace(
        num_processes=1, process_index=0, gather=lambda x: x, backward=lambda x: x.backward(),
        autocast=contextlib.nullcontext, no_sync=contextlib.nullcontext,
    )  # fmt: skip
    s: Any = SimpleNamespace(
        accelerator=accelerator, task=task, recipe=recipe, passes=2, sharded=False, device=torch.device("cpu"),
        state=SimpleNamespace(step=0), seeded=lambda step, part: None, place_of=lambda part: part,
    )  # fmt: skip
    feed: Iterator[Any] = iter([(batches[0], ["a"] * 4, 4 / 6), (batches[1], ["b"] * 2, 2 / 6)])
    loss, keys = contrast(s, feed)
    own = {name: p.grad.clone() for name, p in task.parts.clip.named_parameters()}
    task.parts.clip.zero_grad()
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    whole = task.loss(joined, None).mean()
    whole.backward()
    assert float(loss) == pytest.approx(whole.item(), rel=1e-6) and keys == ["a"] * 4 + ["b"] * 2
    for name, p in task.parts.clip.named_parameters():
        torch.testing.assert_close(own[name], p.grad, rtol=1e-5, atol=1e-7, msg=name)
    assert own["logit_scale"] != 0


# -- what is refused, and who says so --


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("unconditional", {"sharding": "ful"}, r"train\.sharding: 'ful': input should be 'none' or 'full'"),
        ("unconditional", {"sharding": "full", "mixed_precision": "fp16"}, "not with fp16; take bf16"),
        ("unconditional", {"sharding": "full", "compile": True}, r"train\.compile: not with train\.sharding full"),
        ("clip", {"sharding": "full"}, "full is not for task clip"),
    ],
)
def test_sharding_that_does_not_go_is_refused(places: Path, kind: str, changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe_of(places, kind, **changes)


@pytest.mark.parametrize(
    ("told", "gpus", "target", "message"),
    [
        ({}, 0, "cpu", "full is for several processes"),
        ({"ACCELERATE_USE_FSDP": "true"}, 0, "cpu", "accelerate launch: FSDP is asked for in the recipe"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, 2, "cuda", "4 processes: this machine has 2 GPUs"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 2, "cuda:1", "2 processes take a GPU each: --device cuda"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "::1"}, 0, "cpu", "starts one process on a CPU, whatever"),
    ],
)
def test_what_a_launcher_asks_for_is_checked(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Any, gpus: int, target: str, message: str
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=message):
        make_accelerator(recipe_of(places, sharding="full"), torch.device(target), tmp_path)


def test_processes_with_another_torch_or_data_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "gathered", lambda _, facts: [facts, facts, {**facts, "torch": "2.0"}])
    check_alike(None, {})
    with pytest.raises(InputError, match=r"process 2 of 3: torch is '2.0', that of process 0 '2.9'"):
        check_alike(None, {"data": "1", "torch": "2.9"})


@pytest.mark.parametrize(
    ("error", "store", "raised"),
    [
        (InputError("no"), {}, InputError),
        (InputError("no"), {"failed": 1, "code": 2}, Silent),
        (RuntimeError("gloo: Connection closed by peer"), {}, HostError),
        (RuntimeError("gloo: Connection closed by peer"), {"failed": 1, "code": 2}, Silent),
        (RuntimeError("shapes differ"), {}, RuntimeError),
    ],
)
def test_the_first_to_fail_speaks(monkeypatch: pytest.MonkeyPatch, error: Any, store: Any, raised: Any) -> None:
    class Store:
        def add(self, key: str, more: int) -> int:
            store["failed"] = store.get("failed", 0) + more
            return int(store["failed"])

        def set(self, key: str, value: str) -> None:
            store["code"] = value

        def get(self, key: str) -> Any:
            return store["code"]

        def wait(self, *_: Any) -> None: ...

    monkeypatch.setattr(processes, "_store", Store)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(raised) as found, as_one():
        raise error
    if raised is Silent:
        assert found.value.code == 2


def test_a_launched_command_fails_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(2, ["train", "absent.yaml"]) == 2
    assert capfd.readouterr().err.count("\n") == 1


# -- two real processes --


def test_two_processes_are_one_with_twice_the_accumulation(places: Path, tmp_path: Path) -> None:
    """Bit for bit, also going on on another number of them after one was killed."""
    whole = alone(recipe_of(places, gradient_accumulation_steps=2), tmp_path / "whole")
    out = tmp_path / "shared"
    assert pair(recipe_of(places), out, kill=(1, 3)) == [3, -signal.SIGKILL]
    assert [p.name for p in (out / "checkpoints").iterdir() if p.name.isdecimal()] == ["000002"]
    assert pair(recipe_of(places, steps=4), out) == [0, 0]
    alone(recipe_of(places), out)  # one process takes both shares
    assert differences(whole, out) == dict.fromkeys(("weights", "ema", "optimizer", "loss", "validation"), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unconditional"])
def test_every_task_is_the_same_in_two_processes(places: Path, tmp_path: Path, kind: str) -> None:
    whole = alone(recipe_of(places, kind, gradient_accumulation_steps=2), tmp_path / "whole")
    alone(recipe_of(places, kind, gradient_accumulation_steps=2, steps=3), tmp_path / "shared")
    assert pair(recipe_of(places, kind, gradient_accumulation_steps=2), tmp_path / "shared") == [0, 0]
    assert set(differences(whole, tmp_path / "shared").values()) == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["cpu", "--multi_gpu"])
def test_accelerate_launch_is_one_process_with_twice_the_accumulation(
    places: Path, tmp_path: Path, launcher: str
) -> None:
    """Bit for bit. With --cpu it starts one process, whatever --num_processes says, which is refused."""
    (tmp_path / "r.yaml").write_text(json.dumps(values_of(places)))
    asked = ["--cpu"] if launcher == "cpu" else [launcher]
    command = [sys.executable, "-m", "accelerate.commands.launch", *asked, "--num_processes", "2"]
    command += ["--main_process_port", "0", "-m", "genkit", "train", str(tmp_path / "r.yaml")]
    command += ["-o", str(tmp_path / "shared"), "--device", "cpu"]
    told = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}  # where no config of accelerate's is
    found = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, timeout=280)
    if launcher == "cpu":
        assert found.returncode and "genkit: accelerate launch: starts one process on a CPU" in found.stderr
        assert not (tmp_path / "shared").exists()
        return
    assert found.returncode == 0, found.stderr
    whole = alone(recipe_of(places, gradient_accumulation_steps=2), tmp_path / "whole")
    assert json.loads((tmp_path / "shared" / "run.json").read_text())["passes"] == 2
    assert set(differences(whole, tmp_path / "shared").values()) == {0.0}


@pytest.mark.slow
def test_with_more_passes_sums_are_of_another_order(places: Path, tmp_path: Path) -> None:
    """((a + b) + c) + d in one process is (a + c) + (b + d) in two: the last bit of a gradient may differ, and Adam
    divides gradients that are almost nothing by their own size.
    """
    whole = alone(recipe_of(places, gradient_accumulation_steps=4), tmp_path / "whole")
    assert pair(recipe_of(places, gradient_accumulation_steps=2), tmp_path / "shared") == [0, 0]
    found = differences(whole, tmp_path / "shared")
    assert found["optimizer"] < 1e-6 and found["loss"] < 1e-6 and found["weights"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["with its text encoder", "lora, cached", "controlnet"])
def test_sharded_weights_are_the_same_and_go_on_without_shards(places: Path, tmp_path: Path, kind: str) -> None:
    """Within 1e-6: the norm of the gradients is a sum over the shares."""
    whole = alone(recipe_of(places, kind, gradient_accumulation_steps=2), tmp_path / "whole")
    out = tmp_path / "shared"
    if kind == "with its text encoder":
        assert pair(recipe_of(places, kind, sharding="full", steps=2), out) == [0, 0]
        alone(recipe_of(places, kind, steps=4), out)
    assert pair(recipe_of(places, kind, sharding="full"), out) == [0, 0]
    assert max(differences(whole, out).values()) < 2e-6
    written = [
        sorted(p.relative_to(o) for p in o.rglob("*.safetensors") if "cache" not in p.parts) for o in (whole, out)
    ]
    assert written[0] == written[1]
    for path in (p for p in written[0] if "checkpoints" not in p.parts):
        one, two = load_file(whole / path), load_file(out / path)
        assert all(torch.allclose(one[k].float(), two[k].float(), atol=1e-5) for k in one), path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"),
    [("torchrun", signal.SIGKILL), ("--processes", signal.SIGKILL), ("--processes", signal.SIGTERM)],
)
def test_launched_processes_end_together(places: Path, tmp_path: Path, launcher: str, number: signal.Signals) -> None:
    """SIGKILL to one of them, SIGTERM to the launcher."""
    values = {"task": "unconditional", "model": str(places / "ddpm"), "data": {"path": str(places / "pictures")}}
    values |= {"train": {"steps": 100_000, "batch_size": 4}, "save": {"every": 1}, "evaluate": {"every": 0}}
    (tmp_path / "r.yaml").write_text(json.dumps(values))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if launcher == "torchrun" else []
    command = [sys.executable, *start, "-m", "genkit", "train", str(tmp_path / "r.yaml")]
    command += ["-o", str(tmp_path / "run"), "--device", "cpu", *(() if start else ("--processes", "2"))]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    while not len(read_log(tmp_path / "run" / "log.jsonl")) > 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid if number == signal.SIGTERM else ranked(str(tmp_path), 1), number)
    said = process.communicate(timeout=200)[1].splitlines()  # gloo alone would wait for half an hour
    assert process.returncode == (1 if start else 3 if number == signal.SIGKILL else 143)  # torchrun knows 1 alone
    own = [line for line in said if line.startswith("genkit: ")]
    assert len(own) == (number == signal.SIGKILL), said
    newest = max(p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdecimal())
    assert (tmp_path / "run" / "checkpoints" / newest / "checkpoint.json").exists()


def ranked(where: str, rank: int) -> int:
    """The process of that rank whose command names `where`."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            told, command = (path / "environ").read_text().split("\0"), (path / "cmdline").read_text()
        except OSError:
            continue
        if f"RANK={rank}" in told and where in command:
            return int(path.name)
    raise AssertionError
