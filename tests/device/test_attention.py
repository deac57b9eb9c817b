"""Attention backends: each gives attention's numbers or is not taken, whatever it does; networks compute the same."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from genkit import InputError, Request, TextToImage, generate
from genkit.device import attention, probes
from genkit.device.attention import BACKENDS, sliced
from genkit.device.devices import ATTENTION
from genkit.device.probes import Probe, choose, probe, table, table_lines
from genkit.device.processor import AttentionChoice, Processor, fuse_projections
from tests.tiny import tiny_latent_unconditional, tiny_stable_diffusion

CPU = torch.device("cpu")
HERE = [name for name in BACKENDS if probe(BACKENDS[name], CPU, torch.float32, 16, False).reason is None]


def test_names_are_known_without_torch() -> None:
    assert ("auto", *BACKENDS) == ATTENTION
    assert {"sdpa", "flash", "sliced", "math"} <= set(HERE), "these work on every CPU"


def heads(batch: int, count: int, length: int, width: int) -> torch.Tensor:
    """Return (batch, count, length, width) as a view of (batch, length, channels), as networks make it."""
    return torch.randn(batch, length, count * width).unflatten(-1, (count, width)).transpose(1, 2)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v


@pytest.mark.parametrize("size", [(2, 32, 256, 256, 3), (3, 5, 70, 32, 6), (1, 3, 5, 77, 40), (1, 1, 64, 64, 512)])
@pytest.mark.parametrize("logits", [0.1, 1, 30, 3000], ids=lambda scale: f"logits x{scale}")
@pytest.mark.parametrize("name", HERE)
def test_every_backend_that_works_here_is_attention(name: str, logits: float, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    batch, count, length, others, width = size
    q, k, v = heads(batch, count, length, width), heads(batch, count, others, width), heads(batch, count, others, width)
    q = q * logits
    with torch.inference_mode():
        out = BACKENDS[name](q, k, v)
    assert out.shape == q.shape
    # Logits of some thousands have rounding errors of their own, which the exponential passes on
    assert (out - reference(q, k, v)).abs().max() < max(1e-5, 3e-6 * logits)


@pytest.mark.parametrize("most", [1, 40, 300, 10**6])
def test_slices_of_any_size_make_the_whole(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    q, k, v = heads(2, 3, 11, 5), heads(2, 3, 7, 5), heads(2, 3, 7, 5)
    monkeypatch.setattr(attention, "CACHED", most)
    monkeypatch.setattr(attention, "SLICE", most)
    with torch.inference_mode():
        assert (sliced(q, k, v) - reference(q, k, v)).abs().max() < 1e-5
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on a GPU: not in place
    out = sliced(q, k, v)
    assert (out - reference(q, k, v)).abs().max() < 1e-5


@pytest.mark.parametrize("most", [1, 40, 300, 10**6])
@pytest.mark.parametrize("logits", [1, 100])
def test_gradients_of_slices_are_those_of_the_whole(most: int, logits: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    inputs = [x * scale for x, scale in ((heads(2, 3, 11, 5), logits), (heads(2, 3, 7, 5), 1), (heads(2, 3, 7, 5), 1))]
    seen = torch.randn(2, 3, 11, 5)
    monkeypatch.setattr(attention, "CACHED", most)
    own = [x.detach().clone().requires_grad_(True) for x in inputs]
    wide = [x.detach().double().requires_grad_(True) for x in inputs]
    sliced(*own).backward(seen)
    torch.nn.functional.scaled_dot_product_attention(wide[0], wide[1], wide[2]).backward(seen.double())
    for ours, theirs in zip(own, wide, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert (ours.grad - theirs.grad).abs().max() < 3e-6 * logits * max(1, float(theirs.grad.abs().max()))


Case = tuple[Any, Callable[[Any], torch.Tensor]]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Networks with diffusers' own attention, and what they compute."""
    folder = tmp_path_factory.mktemp("networks")
    tiny_stable_diffusion(folder / "sd")
    tiny_latent_unconditional(folder / "ldm")
    torch.manual_seed(2)
    x, t, text, picture = (
        torch.randn(4, 4, 8, 8),
        torch.rand(4) * 900,
        torch.randn(4, 32, 16),
        torch.randn(2, 3, 16, 16),
    )
    return {
        "UNet2DConditionModel": (
            UNet2DConditionModel.from_pretrained(folder / "sd", subfolder="unet"),
            lambda unet: unet(x, t, text).sample,
        ),
        "UNet2DModel": (
            UNet2DModel.from_pretrained(folder / "ldm", subfolder="unet"),
            lambda unet: unet(x, t).sample,
        ),
        "AutoencoderKL": (
            AutoencoderKL.from_pretrained(folder / "sd", subfolder="vae"),
            lambda vae: torch.cat([vae.decode(x).sample.flatten(), vae.encode(picture).latent_dist.mean.flatten()]),
        ),
    }  # fmt: skip


def run(case: Case, *changes: Callable[[Any], Any]) -> torch.Tensor:
    network = copy.deepcopy(case[0]).eval().requires_grad_(False)
    for change in changes:
        change(network)
    with torch.inference_mode():
        return case[1](network)


@pytest.mark.parametrize("kind", ["UNet2DConditionModel", "UNet2DModel", "AutoencoderKL"])
@pytest.mark.parametrize("name", ["auto", *HERE])
def test_networks_compute_the_same_on_every_backend(cases: dict[str, Case], kind: str, name: str) -> None:
    expected = run(cases[kind])
    choice = AttentionChoice(name)
    for changes in ([choice.apply], [fuse_projections, choice.apply]):
        assert (run(cases[kind], *changes) - expected).abs().max() < 1e-4
    assert choice.chosen and not choice.notes
    assert name == "auto" or set(choice.chosen.values()) == {name}
    assert (run(cases[kind], AttentionChoice(name).apply, spoil) - expected).abs().max() > 1e-3, "the backend is used"


def spoil(network: Any) -> None:
    for module in network.modules():
        if isinstance(module, Attention):
            assert isinstance(module.processor, Processor)
            module.processor.attend = lambda q, k, v: 2 * q


def test_a_mask_at_call_time_is_obeyed() -> None:
    torch.manual_seed(3)
    plain = Attention(query_dim=12, cross_attention_dim=16, heads=3, dim_head=4).eval().requires_grad_(False)
    ours = copy.deepcopy(plain)
    network = networklike(ours)
    fuse_projections(network)
    AttentionChoice("math").apply(network)
    x, context, mask = torch.randn(2, 5, 12), torch.randn(2, 7, 16), torch.zeros(2, 1, 7)
    mask[:, :, 3:] = -1e4
    with torch.inference_mode():
        expected = plain(x, context, attention_mask=mask)
        assert torch.allclose(ours(x, context, attention_mask=mask), expected, atol=1e-5)
        assert not torch.allclose(ours(x, context), expected, atol=1e-3)


def networklike(*modules: torch.nn.Module) -> Any:
    network: Any = torch.nn.ModuleList(modules)
    network.device, network.dtype = CPU, torch.float32
    return network


def test_attention_of_another_make_keeps_its_processor() -> None:
    normed = Attention(query_dim=8, heads=2, dim_head=4, qk_norm="layer_norm")
    before = normed.processor
    choice = AttentionChoice()
    choice.apply(networklike(normed))
    assert normed.processor is before and fuse_projections(networklike(normed)) == 0
    assert choice.text == "as diffusers has it"


@pytest.mark.parametrize("name", ["sdpa", "sliced"])
def test_a_compiler_finds_nothing_that_depends_on_data(name: str) -> None:
    network = networklike(Attention(query_dim=8, heads=2, dim_head=4).eval().requires_grad_(False))
    cross = Attention(query_dim=8, cross_attention_dim=8, heads=2, dim_head=4)  # then the first one is shared
    AttentionChoice(name).apply(networklike(network[0], cross))
    x = torch.randn(2, 5, 8)
    assert network[0].processor.share
    with torch.inference_mode():
        compiled = torch.compile(network[0], backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), network[0](x), atol=1e-6)


def missing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    raise ModuleNotFoundError("No module named 'xformers'")


def broken_build(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    raise ImportError("libcudart.so.11: cannot open shared object file")


def refusing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("head dimension must be at most 2\nException raised from mha_fwd at …")


def unscaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2)).softmax(dim=-1) @ v


def overflowing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.full_like(q, float("nan"))


FAULTS = {
    missing: "not installed",
    broken_build: "libcudart.so.11: cannot open shared object file",
    refusing: "head dimension must be at most 2",
    unscaled: "wrong numbers (off by",
    overflowing: "wrong numbers (off by nan)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_backend_that_does_not_work_gives_way_with_one_line(
    fault: Any, cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "cudnn", fault)
    choice = AttentionChoice("cudnn")
    for kind, instead in (("UNet2DConditionModel", "sliced"), ("AutoencoderKL", "sliced")):
        assert (run(cases[kind], choice.apply) - run(cases[kind])).abs().max() < 1e-4
        assert set(choice.chosen.values()) == {instead}
    (note,) = choice.notes
    assert note.startswith(f"--attention cudnn: {FAULTS[fault]}") and "sliced in its place" in note
    assert "\n" not in note and note in choice.text


def test_the_order_on_a_cpu_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(width: int, dtype: torch.dtype = torch.float32) -> str:
        return choose("auto", CPU, dtype, width, False)[0]

    assert [chosen(w) for w in (3, 16, 17, 64)] == ["sliced", "sliced", "sdpa", "sdpa"]
    assert chosen(3, torch.bfloat16) == "sdpa"
    monkeypatch.setitem(BACKENDS, "sliced", unscaled)
    assert chosen(3) == "sdpa"
    monkeypatch.setitem(BACKENDS, "sdpa", refusing)
    assert chosen(3) == chosen(64) == "math"
    monkeypatch.setitem(BACKENDS, "math", overflowing)
    assert chosen(3) == "sdpa", "the run will say what is wrong with it"


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"sdpa": 1.0, "flash": 0.8, "cudnn": 0.5, "efficient": 1.2, "sliced": 3.0}, "cudnn"),
        ({"sdpa": 1.0, "flash": 0.97, "cudnn": 1.1}, "sdpa"),  # as good as equal: torch's own choice stands
        ({"sdpa": 1.0, "flash": 0.8, "cudnn": 0.79}, "flash"),
        ({"efficient": 4.6, "sdpa": 4.6, "sliced": 1.0}, "sliced"),
        ({"sliced": 1.0}, "sliced"),
        ({}, "sdpa"),
    ],
)
def test_a_gpu_takes_the_fastest_that_works(
    times: dict[str, float], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {name: Probe(ms=ms) for name, ms in times.items()}
    monkeypatch.setattr(probes, "known", lambda name, *_: known.get(name, Probe("no kernel")))
    gpu = torch.device("cuda")
    assert choose("auto", gpu, torch.float16, 40, False) == (expected, None)
    assert choose("xformers", gpu, torch.float16, 40, False) == (expected, "no kernel")
    lines = table_lines(table(gpu, torch.float16))
    assert lines[1].split()[:2] == ["auto", expected]
    if times:
        assert lines[0].startswith("ms ")


def test_time_is_taken_between_calls_once_the_first_are_through(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    class Event:  # a stand-in for CUDA's: a call takes as long as it is the number of
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = sum(range(len(calls) + 1))

        def elapsed_time(self, later: Event) -> float:
            return float(later.at - self.at)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append((*q.shape[2:], *k.shape[2:]))
        return q

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    for cross, length in ((False, 4096), (True, 77)):
        calls.clear()
        assert probes._milliseconds(attend, CPU, torch.float32, 40, cross) == 6, "the middle one of calls 3 to 9"
        assert set(calls) == {(4096, 40, length, 40)}


def test_a_backend_that_fails_later_gives_way_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def long_only(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.shape[2] < 200:
            raise RuntimeError("sequences must be longer")
        return BACKENDS["sdpa"](q, k, v)

    monkeypatch.setitem(BACKENDS, "cudnn", long_only)
    modules = [Attention(query_dim=8, heads=2, dim_head=4).eval().requires_grad_(False) for _ in range(2)]
    x = torch.randn(2, 5, 8)
    choice = AttentionChoice("cudnn")
    with torch.inference_mode():
        expected = [module(x) for module in modules]
        choice.apply(networklike(*modules))
        assert choice.chosen == {"self 4": "cudnn"} and not choice.notes
        for module, out in zip(modules * 2, expected * 2, strict=True):
            assert torch.allclose(module(x), out, atol=1e-6)
    assert choice.notes == ["attention: cudnn failed (sequences must be longer); torch's own goes on in its place"]


def test_lack_of_memory_is_for_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Attention(query_dim=8, heads=2, dim_head=4).eval().requires_grad_(False)
    choice = AttentionChoice("flash")
    choice.apply(networklike(module))

    def full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    module.processor.attend = full  # type: ignore[attr-defined]
    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError):
        module(torch.randn(2, 5, 8))
    assert not choice.notes


def test_a_redo_in_float32_does_not_take_what_is_for_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.dtype] = []

    def half_only(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        used.append(q.dtype)
        assert q.dtype == torch.bfloat16
        return BACKENDS["sdpa"](q, k, v)

    monkeypatch.setitem(BACKENDS, "cudnn", half_only)
    module = Attention(query_dim=8, heads=2, dim_head=4).eval().requires_grad_(False).to(torch.bfloat16)
    network = networklike(module)
    network.dtype = torch.bfloat16
    choice = AttentionChoice("cudnn")
    choice.apply(network)
    used.clear()
    with torch.inference_mode():
        module(torch.randn(2, 5, 8, dtype=torch.bfloat16))
        module.float()(torch.randn(2, 5, 8))
        module.bfloat16()(torch.randn(2, 5, 8, dtype=torch.bfloat16))
    assert used == [torch.bfloat16] * 2 and not choice.notes


def test_fused_weights_are_the_only_ones_and_keep_their_names(cases: dict[str, Case], tmp_path: Path) -> None:
    unet, call = cases["UNet2DConditionModel"]
    plain, fused = (copy.deepcopy(unet).eval().requires_grad_(False) for _ in range(2))
    assert fuse_projections(fused) == 8
    assert sum(p.numel() for p in fused.parameters()) == sum(p.numel() for p in plain.parameters())
    assert not any(p.requires_grad for p in fused.parameters())
    before, after = unet.state_dict(), fused.state_dict()
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    twin = copy.deepcopy(fused)
    twin.load_state_dict({name: weight / 2 for name, weight in before.items()}, strict=True)
    plain.load_state_dict({name: weight / 2 for name, weight in before.items()})
    with torch.inference_mode():
        assert (call(twin) - call(plain)).abs().max() < 1e-5, "loads what was saved without fusing"
        assert torch.allclose(call(fused), call(unet.eval()), atol=1e-5), "and shares nothing with its copy"
    fused.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(before[name], again[name]) for name in before)


def test_a_network_that_someone_else_made_is_left_alone(cases: dict[str, Case], tmp_path: Path) -> None:
    parts = TextToImage.from_pretrained(tiny_stable_diffusion(tmp_path), device="cpu")
    unet = copy.deepcopy(cases["UNet2DConditionModel"][0])
    gen = TextToImage(
        unet=unet, vae=None, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer, scheduler=parts.scheduler
    )
    assert not any(isinstance(getattr(m, "processor", None), Processor) for m in unet.modules())
    assert gen.attention.text == "as diffusers has it"


def test_a_wrong_name_is_refused_before_anything_loads(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--attention: 'flahs' is not auto, sdpa, .* or math \(did you"):
        TextToImage.from_pretrained("no-such-model", attention="flahs")
    with pytest.raises(InputError, match=r"^--attention: 'flahs'"):
        generate([Request(prompt="a fox")], tmp_path / "run", model="no-such-model", attention="flahs")
    refused = genkit("generate", "--prompt", "a fox", "-o", str(tmp_path / "run"), "--attention", "flahs")
    assert refused.returncode == 2 and refused.stdout == "" and not (tmp_path / "run").exists()
    assert refused.stderr.startswith("genkit: --attention: 'flahs' is not auto, sdpa,")
    assert "(did you mean 'flash'?)" in refused.stderr and refused.stderr.count("\n") == 1


def genkit(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "genkit", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


def test_a_run_falls_back_and_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_stable_diffusion(tmp_path / "model")
    rows = tmp_path / "rows.txt"
    rows.write_text("a fox\n")
    done = generate(rows, tmp_path / "run", model=str(model), device="cpu", attention="efficient")
    assert done.images == 1
    said = [line for line in capfd.readouterr().err.splitlines() if "--attention" in line]
    info = json.loads((tmp_path / "run" / "run.json").read_text())["info"]["attention"]
    assert len(said) == 1 and said[0].startswith("--attention efficient: no kernel for this device, dtype or width; sl")
    assert info.startswith("sliced: self 2, cross 2") and info.endswith(said[0])
    assert generate(rows, tmp_path / "other", model=str(model), device="cpu", attention="math", quiet=True).images == 1
    info = json.loads((tmp_path / "other" / "run.json").read_text())["info"]["attention"]
    assert info == "math: self 2, cross 2, self 4, cross 4, self 16"


def test_env_prints_the_table() -> None:
    lines = genkit("env").stdout.splitlines()
    (start,) = (k for k, line in enumerate(lines) if line.startswith("attention "))
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[start + 1 :]}
    assert tuple(shown) == ATTENTION
    assert shown["auto"].split()[:2] == ["sliced", "sliced"] and set(shown["sdpa"].split()) == {"yes"}
    assert shown["cudnn"] == "- no kernel for this device, dtype or width"
    found = json.loads(genkit("env", "--json").stdout)["attention"]
    assert found["sliced"]["self 3"] is True and found["auto"]["self 512"] == "sdpa"
    assert isinstance(found["cudnn"]["cross 64"], str)
