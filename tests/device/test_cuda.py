"""On a GPU: half precision by default, decoding beside denoising, the pictures of the CPU. Skipped elsewhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from genkit import ClipScorer, ImageToImage, Request, TextToImage, Unconditional, generate
from genkit.components import inspect_model, load_components
from genkit.device.attention import BACKENDS
from genkit.device.memory import LAYERS, LEVELS, Budget
from genkit.device.probes import probe
from genkit.sampling import generators
from genkit.sampling.codec import Codec
from tests.check_run import check_run
from tests.sampling.test_loras import pairs, peft
from tests.tiny import EMBEDDED, random_sd15, tiny_controlnet, tiny_ddpm, tiny_stable_diffusion

EMOJI = EMBEDDED / "emoji"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def requests() -> list[Request]:
    return [Request(id=str(k), prompt=p, seed=k, num_inference_steps=4 + k, guidance_scale=1.0 + 2 * k) for k, p in
            enumerate(["a red fox", "a green apple", "an owl"])]  # fmt: skip


def test_half_precision_is_the_default_and_close_to_the_cpu() -> None:
    gen = TextToImage.from_pretrained("emoji")
    assert gen.device.type == "cuda" and gen.unet.dtype == torch.float16
    slow = {r.id: r.pixels for r in TextToImage.from_pretrained("emoji", device="cpu").stream(requests())}
    for result in gen.stream(requests(), scorer=ClipScorer.from_pretrained("emoji-clip")):
        assert result.status == "done" and -1 <= result.scores["clip"] <= 1
        assert np.abs(result.pixels.astype(int) - slow[result.id].astype(int)).mean() < 4


def test_float32_gives_the_pictures_of_the_cpu() -> None:
    fast = {r.id: r.pixels for r in TextToImage.from_pretrained("emoji", dtype="float32").stream(requests())}
    for result in TextToImage.from_pretrained("emoji", device="cpu").stream(requests()):
        assert np.abs(result.pixels.astype(int) - fast[result.id].astype(int)).mean() < 0.5


def test_image_to_image_and_unconditional(tmp_path: Path) -> None:
    gen = TextToImage.from_pretrained("emoji")
    picture = gen("a red fox", seed=0, num_inference_steps=6).images[0]
    ImageToImage.from_generator(gen)("a blue fox", image=picture, strength=0.5, num_inference_steps=6, seed=1)
    tiny_ddpm(tmp_path)
    assert len(Unconditional.from_pretrained(tmp_path)(num_images=5, num_inference_steps=4, seed=0).images) == 5


def test_a_run(tmp_path: Path) -> None:
    summary = generate(requests(), out=tmp_path / "run", quiet=True)
    assert (summary.images, summary.failed) == (3, 0)
    check_run(tmp_path / "run")


def test_real_lack_of_memory_is_survived() -> None:
    gen = TextToImage.from_pretrained("emoji")
    rows = [Request(id=str(k), prompt="a fox", seed=k, num_inference_steps=2, width=512, height=512) for k in range(8)]
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 3 * 2**30) / total)
    try:
        results = list(gen.stream(rows, slots=1000))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert {r.status for r in results} == {"done"}


def test_recorded_calls_are_taken_and_give_the_pictures_of_plain_ones() -> None:
    gen = TextToImage.from_pretrained("emoji", dtype="float32")
    assert gen.denoiser.graphs is not None
    replayed = {r.id: r.pixels for r in gen.stream(requests())}
    assert gen.denoiser.graphs.reason is None and gen.denoiser.graphs._recorded
    with gen.denoiser.in_float32():  # moves nothing here, and goes around the recordings
        plain = {r.id: r.pixels for r in gen.stream(requests())}
    for name in plain:
        assert np.abs(replayed[name].astype(int) - plain[name].astype(int)).mean() < 0.5
    again = {r.id: r.pixels for r in gen.stream(requests())}
    for name in plain:
        assert np.abs(again[name].astype(int) - plain[name].astype(int)).mean() < 0.5


def test_controlnets_steer_beside_recorded_calls(tmp_path: Path) -> None:
    folder = tiny_controlnet(tmp_path / "net", EMOJI, hints=(8, 16, 32, 64))
    picture = TextToImage.from_pretrained("emoji")("a red fox", seed=0, num_inference_steps=4).images[0]
    rows = requests()
    control = {"file": str(folder), "image": picture, "weight": 0.5, "end": 0.6}
    rows += [row.filled({}).model_copy(update={"id": f"steered-{row.id}", "controls": [control]}) for row in rows]
    gen = TextToImage.from_pretrained("emoji", dtype="float32")
    fast = {r.id: r.pixels for r in gen.stream(rows)}
    assert gen.denoiser.graphs is not None and gen.denoiser.graphs.reason is None and gen.denoiser.graphs._recorded
    for result in TextToImage.from_pretrained("emoji", device="cpu").stream(rows):
        assert result.status == "done"
        assert np.abs(result.pixels.astype(int) - fast[result.id].astype(int)).mean() < 0.5
    assert np.abs(fast["steered-0"].astype(int) - fast["0"].astype(int)).mean() > 1


def test_recordings_are_made_while_pictures_are_decoded() -> None:
    gen = TextToImage.from_pretrained("emoji")
    rows = [Request(id=f"{k}", prompt="a red fox", seed=k, num_inference_steps=2 + k % 5) for k in range(24)]
    results = list(gen.stream(rows, slots=7, scorer=ClipScorer.from_pretrained("emoji-clip")))
    assert len(results) == 24 and {r.status for r in results} == {"done"}
    assert gen.denoiser.graphs is not None and gen.denoiser.graphs.reason is None


def test_a_nan_in_half_precision_is_redone_and_recordings_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    gen = TextToImage.from_pretrained("emoji")
    plain = gen.denoiser._plain

    def sick(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        out = plain(x, *rest)
        return out if gen.unet.dtype == torch.float32 else out * float("nan")

    assert gen.denoiser.graphs is not None
    monkeypatch.setattr(gen.denoiser.graphs, "call", sick)
    (result,) = gen.stream(requests()[:1])
    assert result.status == "done" and gen.unet.dtype == torch.float16
    monkeypatch.undo()
    gen.denoiser.graphs.reset()
    (result,) = gen.stream(requests()[:1])
    assert result.status == "done" and gen.denoiser.graphs._recorded


@pytest.mark.parametrize("width", [40, 64, 80, 160, 512])
@pytest.mark.parametrize("name", BACKENDS)
def test_attention_backends(name: str, width: int) -> None:
    for dtype, most in ((torch.float16, 8e-3), (torch.bfloat16, 6e-2), (torch.float32, 4e-3)):
        found = probe(BACKENDS[name], torch.device("cuda"), dtype, width, False)
        if found.reason is not None:
            assert name not in ("sdpa", "sliced", "math"), found.reason
            continue
        assert found.ms is not None and found.ms > 0
        q, k, v = (torch.randn(2, 300, 4 * width, device="cuda").to(dtype) for _ in range(3))
        q, k, v = (x.unflatten(-1, (4, width)).transpose(1, 2) for x in (q, k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
        with torch.inference_mode():
            assert (BACKENDS[name](q, k, v).double() - expected).abs().max() < most * expected.abs().max()


def test_networks_with_the_chosen_attention_never_wait_and_can_be_captured(tmp_path: Path) -> None:
    tiny_stable_diffusion(tmp_path)
    for name in ("auto", "sliced"):
        gen = TextToImage.from_pretrained(tmp_path, attention=name)
        assert gen.attention.chosen and any(hasattr(m, "to_qkv") for m in gen.unet.modules())
        x, t = torch.randn(4, 4, 8, 8, device="cuda").half(), torch.rand(4, device="cuda") * 900
        text = torch.randn(4, 32, 16, device="cuda").half()
        with torch.inference_mode():
            expected = gen.unet(x, t, text, return_dict=False)[0]
            torch.cuda.set_sync_debug_mode("error")
            try:
                gen.unet(x, t, text, return_dict=False)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = gen.unet(x, t, text, return_dict=False)[0]
            graph.replay()
            assert (out - expected).abs().max() < 1e-2
        assert not gen.attention.notes


def test_fused_projections_compute_the_same(tmp_path: Path) -> None:
    tiny_stable_diffusion(tmp_path)
    gen = TextToImage.from_pretrained(tmp_path, dtype="float32")
    plain = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet").to("cuda")
    x, t = torch.randn(4, 4, 8, 8, device="cuda"), torch.rand(4, device="cuda") * 900
    text = torch.randn(4, 32, 16, device="cuda")
    with torch.inference_mode():
        assert (gen.unet(x, t, text).sample - plain(x, t, text).sample).abs().max() < 1e-3


def test_rows_with_loras_share_recorded_calls(tmp_path: Path) -> None:
    """Rows with and without LoRAs in one batch are what the CPU draws, the second time, from recorded calls, too."""
    model = tiny_stable_diffusion(tmp_path)
    files = [str(peft(model, pairs(model, seed=i, rank=i + 1), tmp_path / f"{i}.safetensors")) for i in range(2)]
    loras = (None, [{"file": files[0]}], [{"file": files[1], "weight": 0.5}], [{"file": f} for f in files])
    rows = [
        Request(id=str(k), prompt="a red fox", seed=k, num_inference_steps=12, guidance_scale=3.0, loras=lora)
        for k, lora in enumerate(loras)
    ]
    slow = {r.id: r.pixels for r in TextToImage.from_pretrained(model, device="cpu").stream(rows)}
    gen = TextToImage.from_pretrained(model, dtype="float32")
    for _ in range(3):
        for result in gen.stream(rows):
            assert result.status == "done"
            assert np.abs(result.pixels.astype(int) - slow[result.id].astype(int)).mean() < 1, result.id


def test_fused_blocks_compute_the_same_in_half_precision(tmp_path: Path) -> None:
    """Widths of Stable Diffusion, two rows of them, with sums, norms and gates of the blocks in kernels."""
    from genkit.device.norms import fuse_norms

    torch.manual_seed(0)
    plain = UNet2DConditionModel(
        sample_size=16, block_out_channels=(320, 640), layers_per_block=1, cross_attention_dim=64, norm_num_groups=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).to("cuda").eval()  # fmt: skip
    x, t = torch.randn(2, 4, 16, 16, device="cuda"), torch.tensor([10.0, 900.0], device="cuda")
    text = torch.randn(2, 77, 64, device="cuda")
    with torch.inference_mode():
        expected = plain(x, t, text).sample
        fused = plain.half()
        assert fuse_norms(fused, x.device) is None
        assert any("forward" in m.__dict__ for m in fused.modules() if type(m).__name__ == "BasicTransformerBlock")
        found = fused(x.half(), t, text.half()).sample.float()
    assert (found - expected).norm() < 1e-2 * expected.norm()


def test_a_picture_that_overflows_while_others_are_encoded(tmp_path: Path) -> None:
    gen = ImageToImage.from_pretrained(tiny_stable_diffusion(tmp_path))
    before = {name: weight.clone() for name, weight in gen.vae.state_dict().items()}
    picture = torch.zeros(3, 16, 16, device="cuda")
    with ThreadPoolExecutor(1) as pool:
        for k in range(20):
            decoded = pool.submit(gen.codec.decode, torch.full((2, 4, 8, 8), 3e4, device="cuda"))
            gen.codec.encode(picture, torch.Generator().manual_seed(k))
            decoded.result()
    after = gen.vae.state_dict()
    assert gen.vae.dtype == torch.float16 and all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_sd15(tmp_path_factory.mktemp("sd15"))


def peak_of_one_image(folder: Path, memory: str) -> tuple[float, Budget]:
    """Return the most bytes that torch held from before loading to the finished 512x512 image, and what was planned."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gen = TextToImage.from_pretrained(folder, memory=memory)
    request = Request(id="0", prompt="a fox", seed=0, num_inference_steps=3, guidance_scale=7.5)
    results = list(gen.stream([request], slots=1))  # random weights draw nothing, maybe one colour
    assert len(results) == 1 and results[0].reason != "out of memory"
    assert gen.budget is not None
    return torch.cuda.max_memory_allocated() - before, gen.budget


def test_one_image_of_stable_diffusion_in_less_than_2_5_gb(sd15: Path) -> None:
    found, budget = peak_of_one_image(sd15, "low")
    assert found < 2.5e9
    assert found < 1.15 * budget.peak, "no more than was said"
    high, _ = peak_of_one_image(sd15, "high")
    assert found < high


def test_layer_by_layer_it_takes_a_fraction(sd15: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generators, "budget_for", lambda *_: Budget("layers", 1, 0, 1.5e9, 8e10))
    found, _ = peak_of_one_image(sd15, "low")
    assert found < 1.0e9


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_every_level_draws_the_same_pictures(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    pictures = {}
    for level in LEVELS:
        monkeypatch.setattr(generators, "budget_for", lambda *_, level=level: Budget(level, 2, 1e9, 1e9, 1e10))
        gen = TextToImage.from_pretrained("emoji", dtype=dtype)
        assert (gen.denoiser.graphs is not None) == (level in LEVELS[:2])
        homes = {e.device.type for e in gen.text(["a red fox"])} if gen.text is not None else set()
        assert homes == {"cuda" if level == LEVELS[0] else "cpu"}, "embeddings make room as well"
        pictures[level] = {r.id: r.pixels.astype(int) for r in gen.stream(requests())}
    for level in LEVELS[1:]:
        for key, picture in pictures[level].items():
            difference = np.abs(picture - pictures[LEVELS[0]][key])
            # Layers that come one by one are computed by torch's own kernels, which round differently
            assert difference.max() <= 2 or (level == LAYERS and difference.mean() < 1), (level, key)


def test_weights_wait_in_pinned_memory_and_nothing_is_there_twice() -> None:
    info = inspect_model("emoji")
    parts = load_components(info, device="cuda", dtype=torch.float16, in_ram=("vae",))
    assert all(w.is_pinned() for w in parts.vae.parameters()) and parts.unet.device.type == "cuda"
    del parts
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    parts = load_components(info, device="cuda", dtype=torch.float16)
    size = torch.cuda.memory_allocated() - before
    assert torch.cuda.max_memory_allocated() - before < 1.2 * size
    del parts


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_strips_are_the_whole_picture(dtype: torch.dtype) -> None:
    vae = load_components(inspect_model("emoji"), device="cuda", dtype=dtype).vae
    z = torch.randn(1, 8, 64, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    torch.cuda.reset_peak_memory_stats()
    whole = Codec(vae).decode(z)
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    strips = Codec(vae, area=0).decode(z)
    assert torch.cuda.max_memory_allocated() < most
    assert (whole.clamp(-1, 1) - strips.clamp(-1, 1)).abs().mean() * 127.5 < (0.5 if dtype == torch.float16 else 0.01)
