"""A folder of models and LoRAs: listed, served by name, one at a time in memory, each as if it were alone."""

from __future__ import annotations

import base64
import contextlib
import io
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from genkit import HostError, InputError, TextToImage, cli
from genkit.components.collection import collection
from genkit.options import Options
from genkit.serve.choice import Choice
from genkit.serve.turns import Turns
from tests.tiny import tiny_ddpm, tiny_stable_diffusion

if TYPE_CHECKING:
    from conftest import Served

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_stable_diffusion(root / "beta")
    tiny_stable_diffusion(root / "deep" / "alpha", {"_class_name": "EulerDiscreteScheduler"})
    tiny_ddpm(root / "ddpm")
    drawn = torch.Generator().manual_seed(0)
    up, down = torch.randn(16, 1, generator=drawn), torch.randn(1, 16, generator=drawn)
    save_file({f"{LAYER}.lora_up.weight": up, f"{LAYER}.lora_down.weight": down}, root / "style.safetensors")
    save_file({"<cat>": torch.zeros(1, 16)}, root / "cat.safetensors")
    (root / "broken.safetensors").write_bytes(b"no model")
    (root / "notes.txt").write_text("mine")
    (root / "loop").symlink_to(root)
    return root


def test_a_folder_is_listed(folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = {item.name: (item.kind, item.draws, bool(item.why)) for item in collection(folder)}
    assert found == {
        "alpha": ("text-to-image", True, False), "beta": ("text-to-image", True, False),
        "broken": (None, False, True), "cat": ("embedding", False, False), "ddpm": ("unconditional", True, False),
        "style": ("lora", False, False),
    }  # fmt: skip
    assert cli.run(["models", str(folder)]) == 0
    said = capfd.readouterr().out
    assert "alpha: text-to-image, 16x16, 0 million parameters\n" in said and "\nbroken: refused: is " in said
    assert cli.run(["models", str(tmp_path / "absent")]) == 2
    shutil.copytree(folder / "beta", tmp_path / "one" / "beta")
    shutil.copytree(folder / "beta", tmp_path / "two" / "beta")
    with pytest.raises(InputError, match=r"beta is the name of .*one/beta and of .*two/beta"):
        collection(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vae": "v.safetensors"}, "--vae: does not go with --models"),
        ({"prediction": "epsilon"}, "--prediction: does not go with --models"),
        ({"model": "betta"}, "--model: betta is not in .*did you mean .beta."),
    ],
)
def test_options_of_one_model_are_refused(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Choice(folder).of(Options(**options))


def test_a_folder_without_a_model_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "style.safetensors", tmp_path)
    with pytest.raises(InputError, match="has no model that draws"):
        Choice(tmp_path).of(Options())


@pytest.fixture(scope="module")
def several(folder: Path, start: Any) -> Iterator[Served]:
    running = start(Options(device="cpu", batch_size=4, model="beta"), choice=Choice(folder))
    yield running
    running.server.should_exit = True
    running.thread.join(20)
    for one in running.serving.models.values():
        one.engine.close()
    running.server.listener.close()


def pixels(sent: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(sent)))).astype(int)


def loaded(several: Served) -> list[str]:
    return [name for name, one in several.serving.models.items() if one.engine.loaded]


def test_models_draw_by_turns_what_each_draws_alone(several: Served, folder: Path) -> None:
    client = openai.OpenAI(base_url=f"{several.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["beta", "alpha", "ddpm"]
    more = {"seed": 5, "steps": 3}
    got: dict[str, Any] = {}
    for name in ("alpha", "beta", "gpt-image-1", "alpha"):
        answer = client.images.generate(prompt="a fox", model=name, extra_body=more)
        assert answer.data is not None
        got.setdefault(name, []).append(pixels(answer.data[0].b64_json))
        assert loaded(several) == ["beta" if name == "gpt-image-1" else name]
    assert (got["alpha"][0] == got["alpha"][1]).all(), "as it was before it left memory"
    assert (got["beta"][0] == got["gpt-image-1"][0]).all(), "the first model stands for names that clients have"
    for name, path in (("alpha", folder / "deep" / "alpha"), ("beta", folder / "beta")):
        own = TextToImage.from_pretrained(path, device="cpu")("a fox", seed=5, num_inference_steps=3).images[0]
        assert np.abs(got[name][0] - np.asarray(own).astype(int)).max() <= 1
    with pytest.raises(
        openai.NotFoundError, match=r"'alfa' is not served here.*did you mean 'alpha'.*beta, alpha, ddpm"
    ):
        client.images.generate(prompt="a fox", model="alfa")
    styled = client.images.generate(prompt="a fox", model="alpha", extra_body={**more, "loras": ["style"]})
    assert styled.data is not None and (pixels(styled.data[0].b64_json) != got["alpha"][0]).any()


@pytest.mark.slow
def test_many_requests_of_all_models_are_answered(several: Served) -> None:
    first = several.serving.engine
    first.turns.patience, before = 0.05, first.turns.patience
    answers: list[Any] = []

    def ask(number: int) -> None:
        name = ("alpha", "beta", "ddpm")[number % 3]
        body = {"prompt": "a fox", "model": name, "seed": number, "steps": 8, "n": 3}
        answers.append(httpx.post(f"{several.url}/v1/images/generations", json=body, timeout=120).status_code)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first.turns.patience = before
    assert sorted(answers) == [200] * 8 + [400] * 4, "an unconditional model takes no prompt"
    assert len(loaded(several)) == 1


@pytest.mark.slow
def test_clients_of_automatic1111_choose_theirs(several: Served) -> None:
    with httpx.Client(base_url=f"{several.url}/sdapi/v1", timeout=60) as client:
        assert [model["model_name"] for model in client.get("/sd-models").json()] == ["beta", "alpha", "ddpm"]
        assert client.get("/options").json()["sd_model_checkpoint"] == "beta"
        assert [lora["name"] for lora in client.get("/loras").json()] == ["style"]
        body = {"prompt": "a fox <lora:style:0.5>", "steps": 2, "seed": 1}
        over = {**body, "override_settings": {"sd_model_checkpoint": "alpha.safetensors"}}
        assert '"sd_model_name": "alpha"' in client.post("/txt2img", json=over).json()["info"]
        assert '"sd_model_name": "beta"' in client.post("/txt2img", json=body).json()["info"]
        assert client.post("/options", json={"sd_model_checkpoint": "alpha"}).status_code == 200
        assert client.get("/options").json()["sd_model_checkpoint"] == "alpha"
        told = client.post("/txt2img", json=body).json()["info"]
        assert '"sd_model_name": "alpha"' in told and "Model: alpha" in told
        wrong = client.post("/options", json={"sd_model_checkpoint": "gamma"})
        assert wrong.status_code == 422 and "is not served here" in wrong.text
        client.post("/options", json={"sd_model_checkpoint": "beta"})


@pytest.mark.slow
def test_the_page_draws_with_the_model_that_is_chosen(several: Served, tmp_path: Path) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    api.expect.set_options(timeout=60_000)  # milliseconds
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        page.goto(several.url)
        api.expect(page.locator("body[data-ready]")).to_have_count(1)
        assert page.locator("#choice option").all_inner_texts() == ["beta", "alpha", "ddpm"]
        page.fill("#prompt", "a fox")
        page.select_option("#choice", "ddpm")
        api.expect(page.locator("#words")).to_be_hidden()
        page.select_option("#choice", "alpha")
        api.expect(page.locator("#model")).to_have_text("alpha")
        page.fill("#num_inference_steps", "2")
        page.fill("#num_images", "1")
        page.click("#draw")
        card = page.locator(".card[data-drawn]")
        api.expect(card).to_have_count(1)
        assert loaded(several) == ["alpha"]
        data = httpx.get(several.url + str(card.locator("img").first.get_attribute("src")), timeout=60).content
        (tmp_path / "drawn.png").write_bytes(data)
        page.select_option("#choice", "beta")
        page.set_input_files("#settings-file", tmp_path / "drawn.png")
        api.expect(page.locator("#choice")).to_have_value("alpha")


class Named:
    """As much of an engine as turns need."""

    def __init__(self, name: str, left: list[str]) -> None:
        self.name, self.left, self.line, self.loaded = name, left, self, True

    def nudge(self) -> None:
        self.left.append(f"nudged {self.name}")

    def unload(self) -> None:
        self.left.append(self.name)


def test_the_least_recently_used_leaves() -> None:
    left: list[str] = []
    turns = Turns(loaded=2, patience=1000)
    a, b, c = (Named(name, left) for name in "abc")

    def draw(one: Any) -> None:
        turns.ask(one)
        with turns.turn(one) as mine:
            assert mine

    for one in (a, b, a, c, b):
        draw(one)
    assert left == ["b", "a"]
    turns.ask(c)
    with turns.turn(c):
        assert not turns.gives_way(c, busy=False), "nobody waits"
        turns.ask(a)
        assert left[-1] == "nudged c"
        assert turns.gives_way(c, busy=False) and not turns.gives_way(c, busy=True)
        turns.patience = 0.0
        assert turns.gives_way(c, busy=True)


def test_one_that_failed_to_load_takes_no_room() -> None:
    left: list[str] = []
    turns = Turns(loaded=2)
    a, b, c = (Named(name, left) for name in "abc")
    b.loaded = False
    for one in (a, b, c):
        turns.ask(one)
        with contextlib.suppress(HostError), turns.turn(one):
            if not one.loaded:
                raise HostError("out of memory")
    assert left == [], "there is room for two, and only a and c are in memory"
