"""Memory: estimates against measured peaks, levels for given free bytes, and what is said and refused beforehand."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from genkit import HostError, InputError, Request, TextToImage, generate
from genkit.components import inspect_model, needs
from genkit.components.footprint import clip_row, unet_row, vae_decode, vae_encode, vae_strips
from genkit.components.needs import model_need, need
from genkit.device.devices import free_memory, host_memory
from genkit.device.memory import LAYERS, PARTS, RESIDENT, TURNS, Need, away, peak, plan_memory
from genkit.job.plan import plan_job
from genkit.options import Options
from genkit.sampling.strips import decode_in_strips, encode_in_strips
from tests.peak import peak_bytes
from tests.tiny import EMBEDDED, tiny_ddpm, tiny_sdxl

GIB = 2**30
SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL: dict[str, Any] = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
}  # fmt: skip
TINY: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4, "cross_attention_dim": 16,
}  # fmt: skip
SIMPLE: dict[str, Any] = {
    "sample_size": 64, "block_out_channels": (64, 128), "attention_head_dim": 32, "cross_attention_dim": 64,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
}  # fmt: skip
PIXELS: dict[str, Any] = {
    "sample_size": 64, "block_out_channels": (64, 128, 128), "down_block_types": ("DownBlock2D", "AttnDownBlock2D") * 1
    + ("DownBlock2D",), "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
SD_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2,
}  # fmt: skip
SMALL_VAE: dict[str, Any] = {
    "block_out_channels": (32, 64, 64), "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3, "layers_per_block": 1,
}  # fmt: skip


def embedded(part: str) -> dict[str, Any]:
    config = json.loads((EMBEDDED / "emoji" / part / "config.json").read_text())
    return {key: value for key, value in config.items() if not key.startswith("_")}


def close(estimate: float, measured: float) -> None:
    assert 0.9 <= estimate / measured <= 1.4, f"{estimate:.0f} for {measured:.0f}: {estimate / measured - 1:+.0%}"


@pytest.mark.parametrize(
    ("config", "height", "width"),
    [(SD15, 64, 64), (SD15, 96, 64), (SDXL, 128, 128), (TINY, 8, 8), (TINY, 64, 32), (SIMPLE, 64, 64)],
    ids=["SD1.5", "SD1.5 portrait", "SDXL", "tiny", "tiny, large picture", "other blocks"],
)
def test_a_row_of_a_unet(config: dict[str, Any], height: int, width: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).eval()
        x, t, text = torch.zeros(2, 4, height, width), torch.zeros(2), torch.zeros(2, 77, config["cross_attention_dim"])
    close(2 * 4 * unet_row(unet.config, height, width, workspace=False), peak_bytes(lambda: unet(x, t, text), unet))


def test_a_row_of_the_embedded_unet_and_of_one_on_pixels() -> None:
    unet = TextToImage.from_pretrained("emoji", device="cpu").unet
    x, t, text = torch.zeros(8, 8, 16, 16), torch.zeros(8), torch.zeros(8, 32, 256)
    measured = peak_bytes(lambda: unet(x, t, text), unet)
    close(8 * 4 * unet_row(unet.config, 16, 16, workspace=False), measured)
    with torch.device("meta"):
        pixels = UNet2DModel(**PIXELS).eval()
        picture = torch.zeros(1, 3, 64, 64)
    measured = peak_bytes(lambda: pixels(picture, 1), pixels)
    close(4 * unet_row(pixels.config, 64, 64, workspace=False), measured)


@pytest.mark.parametrize(
    ("config", "side", "device"),
    [
        (SD_VAE, 64, "meta"),
        pytest.param(SD_VAE, 128, "meta", marks=pytest.mark.slow),
        (SMALL_VAE, 64, "meta"),
        (embedded("vae"), 16, "cpu"),
    ],
    ids=["SD at 512", "SD at 1024", "small at 256", "embedded at 128"],
)
def test_a_vae_whole_and_in_strips(config: dict[str, Any], side: int, device: str) -> None:
    with torch.device(device):
        vae = AutoencoderKL(**config).eval()
        pixels = side * 2 ** (len(config["block_out_channels"]) - 1)
        z, picture = torch.zeros(1, vae.config.latent_channels, side, side), torch.zeros(1, 3, pixels, pixels)
    whole = peak_bytes(lambda: vae.decode(z), vae)
    strips = peak_bytes(lambda: decode_in_strips(vae, z), vae)
    close(4 * vae_decode(vae.config, side, side, workspace=False), whole)
    close(4 * vae_encode(vae.config, side, side, workspace=False), peak_bytes(lambda: vae.encode(picture), vae))
    close(4 * vae_strips(vae.config, side, side, workspace=False), strips)
    assert peak_bytes(lambda: encode_in_strips(vae, picture), vae) <= 1.1 * 4 * vae_strips(vae.config, side, side)
    assert strips < 0.5 * whole
    assert vae_decode(vae.config, side, side) > vae_decode(vae.config, side, side, workspace=False)


def test_weights_are_counted_from_headers() -> None:
    info, clip = inspect_model("emoji"), inspect_model("emoji-clip")
    half = model_need(info, clip, "float16", "cuda")
    parameters = {name: part.parameters for name, part in {**info.parts, **clip.parts}.items()}
    assert half.weights == {name: 2 * n for name, n in parameters.items()}
    assert model_need(info, None, "int8", "cuda").weights["unet"] == parameters["unet"]
    on_cpu = model_need(info, clip, "float32", "cpu").weights
    assert 4 * parameters["unet"] < on_cpu["unet"] < 8 * parameters["unet"], "linear layers are there packed as well"
    large = model_need(info, clip, "float16", "cuda", (512, 256))
    assert large.cost == 8 and peak(large, RESIDENT, 8, 1) > peak(half, RESIDENT, 8, 1)


def test_a_vae_that_has_to_compute_in_float32_is_counted_so(tmp_path: Path) -> None:
    info = inspect_model(tiny_sdxl(tmp_path))
    half, bfloat, small = (model_need(info, None, dtype, "cuda") for dtype in ("float16", "bfloat16", "int8"))
    assert half.weights["vae"] == small.weights["vae"] == 2 * bfloat.weights["vae"]
    assert half.decode == small.decode == 2 * bfloat.decode and half.image == bfloat.image
    assert {"text_encoder", "text_encoder_2"} <= away(PARTS, half.weights)


def stable_diffusion() -> Need:
    """Return what SD1.5 takes in half precision with a CLIP L/14 as scorer: 2.9 GiB of weights."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**SD15), AutoencoderKL(**SD_VAE)
    text = {"max_position_embeddings": 77, "hidden_size": 768, "intermediate_size": 3072}
    vision = {"image_size": 224, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096}
    configs = {"unet": unet.config, "vae": vae.config, "text_encoder": text,
               "clip": {"text_config": text, "vision_config": vision}}  # fmt: skip
    weights = {"unet": 1.72e9, "vae": 0.167e9, "text_encoder": 0.246e9, "clip": 0.855e9}
    return need(configs, weights, 2, largest=59e6)


@pytest.mark.parametrize(
    ("free", "mode", "level", "slots"),
    [
        (78, "auto", RESIDENT, 32), (8, "auto", RESIDENT, 26), (5, "auto", RESIDENT, 8), (4, "auto", PARTS, 7),
        (3.5, "auto", TURNS, 10), (2.8, "auto", TURNS, 5), (2.5, "auto", TURNS, 2), (1.9, "auto", LAYERS, 9),
        (78, "high", RESIDENT, 32), (78, "low", TURNS, 1), (2.5, "low", TURNS, 1), (2.1, "low", LAYERS, 1),
    ],
)  # fmt: skip
def test_the_level_for_what_is_free(free: float, mode: str, level: str, slots: int) -> None:
    n = stable_diffusion()
    plan = plan_memory(n, free * GIB, mode)
    assert (plan.level, plan.slots) == (level, slots)
    assert plan.peak <= free * GIB and f"of {free:.1f} GiB free on cuda:0" in plan.line("cuda:0")
    assert plan.peak <= peak(n, RESIDENT, plan.slots, 8)


def test_the_plan_follows_what_is_asked_for() -> None:
    n = stable_diffusion()
    assert plan_memory(n, 78 * GIB, slots=3).slots == 3
    assert plan_memory(n, 5 * GIB, slots=16).level != RESIDENT, "room for them is made"
    assert plan_memory(n, 78 * GIB, "low").peak < 2.2e9, "the goal is 2.5 GB"
    assert plan_memory(n, 3.3 * GIB, host=1.3 * GIB).level == PARTS, "the UNet has no room in RAM"
    large = dataclasses.replace(n, cost=16.0)  # 2048x2048
    tight, roomy = plan_memory(large, 9 * GIB), plan_memory(large, 78 * GIB)
    assert tight.area < 16 * n.area <= roomy.area, "in strips where it does not fit whole, never otherwise"
    assert away(RESIDENT, n.weights) == set() and away(PARTS, n.weights) == {"vae", "text_encoder", "clip"}
    assert away(TURNS, n.weights) == away(LAYERS, n.weights) == {"unet", "vae", "text_encoder", "clip"}


def test_too_little_is_refused_with_both_figures() -> None:
    n = stable_diffusion()
    with pytest.raises(HostError, match=r"one image takes 0\.\d+ GiB on cuda:0, and 0\.3 are free$"):
        plan_memory(n, 0.3 * GIB, "low", device="cuda:0")
    with pytest.raises(HostError, match=r"takes 3\.\d+ GiB on cuda, and 2\.5 are free; --memory low needs less"):
        plan_memory(n, 2.5 * GIB, "high")


def test_sdxl_comes_to_what_is_known_of_it() -> None:
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**SDXL), AutoencoderKL(**SD_VAE)
    weights = {"unet": 2.0 * sum(p.numel() for p in unet.parameters()), "vae": 0.167e9}
    assert 5.0e9 < weights["unet"] < 5.2e9
    n = need({"unet": unet.config, "vae": vae.config}, weights, 2, largest=60e6)
    assert 0.25e9 < n.image < 0.5e9 and 1.5e9 < n.decode < 2.6e9 and n.strips < 0.4 * n.decode
    assert plan_memory(n, 12 * GIB).level == RESIDENT and plan_memory(n, 4 * GIB).level == LAYERS


def test_slots_on_a_cpu_shrink_when_ram_is_short() -> None:
    n = model_need(inspect_model("emoji"), None, "float32", "cpu")
    roomy = plan_memory(n, 20 * GIB, device="cpu")
    assert roomy.slots == 16 and roomy.area > 100 * n.area, "large pictures are decoded whole where there is room"
    short = plan_memory(n, 0.5 * GIB, device="cpu")
    assert 1 <= short.slots < 16 and "images at once" in short.line("cpu")
    assert plan_memory(n, 20 * GIB, device="cpu").line("cpu") == "", "nothing to say"
    with pytest.raises(HostError, match="on cpu"):
        plan_memory(n, 0.1 * GIB, device="cpu")


def test_a_generator_takes_its_slots_from_free_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(needs, "free_memory", lambda device: 0.41 * GIB)
    gen = TextToImage.from_pretrained("emoji", device="cpu")
    parts = {name: getattr(gen, name) for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")}
    monkeypatch.setattr(needs, "free_memory", lambda device: 0.35 * GIB)
    for g in (gen, TextToImage(**parts)):  # the second without the weights: they are there already
        list(g.stream([Request(prompt="a fox", num_inference_steps=1)]))
        assert g.budget is not None and 1 <= g.budget.slots < 16
    monkeypatch.setattr(needs, "free_memory", lambda device: 0.01 * GIB)
    with pytest.raises(HostError, match="one image takes"):
        TextToImage.from_pretrained("emoji", device="cpu")
    with pytest.raises(HostError, match="one image takes"):
        generate([Request(prompt="a fox")], tmp_path / "run", device="cpu", quiet=True)
    assert not (tmp_path / "run").exists()


def test_free_memory_is_what_the_system_says() -> None:
    total = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert total is not None and 0 < host_memory() < int(total[1]) * 1024
    assert abs(free_memory(torch.device("cpu")) - host_memory()) < GIB


def test_a_wrong_word_is_refused() -> None:
    for call in (
        lambda: TextToImage.from_pretrained("emoji", memory="lo"),
        lambda: generate([Request(prompt="a fox")], "never", memory="lo"),
    ):
        with pytest.raises(InputError, match=r"--memory: 'lo' is not auto, high or low \(did you mean 'low'\?\)"):
            call()


def printed(code: str) -> str:
    """What a process of its own prints."""
    root = EMBEDDED.parents[2]
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout


def test_the_dry_run_says_what_it_takes_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = ['genkit', 'generate', '--prompt', 'a fox', '-o', 'x', '--dry-run', '--json',"
        " '--width', '512', '--height', '512', '--memory', 'low']\n"
        "try: runpy.run_module('genkit', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    found = json.loads(printed(code))
    gib = found["memory_gib"]
    assert found["memory"] == "low" and set(gib) == {"cpu", "cuda"}
    assert gib["cuda"]["low"] < gib["cuda"]["high"] < gib["cpu"]["high"] < gib["cpu"]["free"]
    assert gib["cpu"]["a_decode"] == 2 * gib["cuda"]["a_decode"]


def test_other_models_have_estimates_too(tmp_path: Path) -> None:
    job = plan_job([Request(num_inference_steps=2)], Options(model=str(tiny_ddpm(tmp_path)), clip="none"), {})
    assert job.describe()["memory_gib"]["cuda"]["a_decode"] == 0
    vision = {"image_size": 224, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096}
    assert 3e6 < clip_row(vision) < 6e6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_freed_blocks_between_those_in_use_go_back() -> None:
    code = (
        "from genkit.device.devices import reuse_memory, trim_memory\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096 >> 20\n"
        "reuse_memory()\n"
        "pairs = [(b'a' * 2**20, b'b' * 1000 + str(i).encode()) for i in range(100)]\n"
        "kept = [small for _, small in pairs]\n"
        "del pairs\n"
        "held = resident(); trim_memory(); print(held, resident())"
    )
    held, left = map(int, printed(code).split())
    assert held > 100 and left < held - 80, "MiB"
