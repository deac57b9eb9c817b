"""On a GPU: half precision by default, decoding beside denoising, the pictures of the CPU. Skipped elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from genkit import ClipScorer, ImageToImage, Request, TextToImage, Unconditional, generate
from tests.check_run import check_run
from tests.tiny import tiny_ddpm

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
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, free - 3 * 2**30), dtype=torch.uint8, device="cuda")
    results = list(gen.stream(rows, slots=1000))
    del ballast
    assert {r.status for r in results} == {"done"}
