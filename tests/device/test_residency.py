"""Networks that come and go, VAE maps in strips, weights in 8 bits: the same pictures in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from genkit import ClipScorer, ImageToImage, InputError, Request, TextToImage, generate
from genkit.components import inspect_model, load_components
from genkit.components.int8 import is_8_bit, store_in_8_bits
from genkit.device.memory import LAYERS, LEVELS, PARTS, RESIDENT, TURNS, Budget
from genkit.device.residency import Residency
from genkit.runs.records import read_config
from genkit.sampling.codec import Codec
from genkit.sampling.strips import can_strip, decode_in_strips, encode_in_strips
from genkit.scoring.panel import Panel
from genkit.scoring.senses import Senses
from genkit.vision.captioner import Captioner
from genkit.vision.classifier import Classifier
from genkit.vision.detector import Detector
from tests.classifiers import tiny_classifier
from tests.detectors import tiny_owlvit
from tests.grids import thinned
from tests.senses import tiny_blip_vqa
from tests.tiny import tiny_stable_diffusion

CPU = torch.device("cpu")
SMALL: Any = {"width": 64, "height": 64}


def tensors(network: Any) -> dict[str, torch.Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def addresses(network: Any) -> set[int]:
    return {t.data_ptr() for t in tensors(network).values()}


class Counting(Residency):
    """The CPU stands in for the device, as memory of its own; what comes and goes is written down."""

    def __init__(self, level: str) -> None:
        super().__init__(CPU, level)
        self.log: list[str] = []

    def bring(self, name: str) -> None:
        new = name not in self._homes
        super().bring(name)
        self.log += [name] * new

    def park(self, name: str) -> None:
        self.log += [f"-{name}"] * (name in self._homes)
        super().park(name)


def generator(
    level: str, dtype: torch.dtype = torch.float32, model: str | Path = "emoji"
) -> tuple[TextToImage, ClipScorer, Counting]:
    parts = load_components(inspect_model(model), device="cpu", dtype=dtype)
    residency = Counting(level)
    gen = TextToImage(
        unet=parts.unet, vae=parts.vae, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer,
        scheduler=parts.scheduler, residency=residency, budget=Budget(level, 2, 8 * 256, 0, 0), defaults={},
    )  # fmt: skip
    scorer = ClipScorer.from_pretrained("emoji-clip", device="cpu")
    scorer.texts.hold = residency.add("clip", scorer.model)
    return gen, scorer, residency


def rows(gen: TextToImage) -> list[Request]:
    image = gen("a cat", seed=3, num_inference_steps=1).images[0]
    return [
        Request(id="a", prompt="a fox", seed=1, num_inference_steps=1, guidance_scale=5.0, **SMALL),
        Request(id="b", prompt="an owl", seed=2, num_inference_steps=2, guidance_scale=1.0, labels=["a", "b"], **SMALL),
        Request(id="c", prompt="a cat", seed=3, num_inference_steps=2, image=image, strength=0.5, **SMALL),
        Request(id="d", prompt="a dog", seed=4, num_inference_steps=1, width=64, height=96),
    ]


def test_every_level_draws_the_same_pictures_and_scores() -> None:
    gen, scorer, _ = generator(RESIDENT)
    requests = rows(gen)
    expected = {r.id: r for r in gen.stream(requests, scorer=scorer)}
    for level in LEVELS[1:]:
        gen, scorer, residency = generator(level)
        found = {r.id: r for r in gen.stream(requests, scorer=scorer)}
        assert {r.status for r in found.values()} == {"done"} and len(found) == 4
        for key, result in found.items():
            # Where networks take turns more pictures are decoded together: rounding.
            assert np.abs(result.pixels.astype(int) - expected[key].pixels).max() <= 1, (level, key)
            assert result.scores["clip"] == pytest.approx(expected[key].scores["clip"], abs=1e-3)
            assert result.scores.keys() == expected[key].scores.keys()
        guests = {"vae", "text_encoder", "clip"} | ({"unet"} if level == TURNS else set())
        assert {name for name in residency.log if name[0] != "-"} == guests
        assert residency.steady == (level == PARTS)
        assert all(e.device == CPU for e in gen.text._seen.values())


def test_one_network_at_a_time_is_on_the_device() -> None:
    gen, scorer, residency = generator(TURNS)
    requests = [Request(id=str(k), prompt=f"fox {k}", num_inference_steps=1 + k % 3, **SMALL) for k in range(5)]
    list(gen.stream(requests, scorer=scorer))
    here: set[str] = set()
    for entry in residency.log:
        here = here - {entry[1:]} if entry[0] == "-" else here | {entry}
        assert len(here) <= 1
    assert residency.log == ["text_encoder", "-text_encoder", "unet", "-unet", "vae", "-vae", "clip"], (
        "prompts are embedded together, and pictures decoded and scored together"
    )


@pytest.mark.parametrize("level", [TURNS, pytest.param(PARTS, marks=pytest.mark.slow)])
def test_vision_models_come_for_their_work(level: str, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    for now in (RESIDENT, level):
        gen, scorer, residency = generator(now)
        senses = Senses(Detector.from_pretrained(tmp_path / "owl" if found else tiny_owlvit(tmp_path / "owl")),
                        Classifier.from_pretrained(tmp_path / "cls" if found else tiny_classifier(tmp_path / "cls")),
                        Captioner.from_pretrained(tmp_path / "vqa" if found else tiny_blip_vqa(tmp_path / "vqa")),
                        )  # fmt: skip
        for name in senses.names:
            sense = getattr(senses, name)
            sense.hold = residency.add(name, sense.model)
        asked: Any = {"detect": ["a cat"], "ask": ["how many cat?"]}
        requests = [Request(id=str(k), prompt="a fox", seed=k, num_inference_steps=1, **asked, **SMALL)
                    for k in range(2)]  # fmt: skip
        found.append({r.id: r.scores for r in gen.stream(requests, scorer=Panel(scorer, ["a fox"], senses=senses))})
    for key, scores in found[1].items():
        expected = found[0][key]
        assert scores["answers"] == expected["answers"] and len(scores["boxes"]) == len(expected["boxes"])
        assert scores["classes"] == pytest.approx(expected["classes"], abs=1e-3)
    here: set[str] = set()
    for entry in residency.log:
        here = here - {entry[1:]} if entry[0] == "-" else here | {entry}
        assert len(here) <= 1
    assert {"detector", "classifier", "captioner", "clip"} <= set(residency.log)


def test_moving_off_is_forgetting_a_copy() -> None:
    residency = Residency(CPU, TURNS)
    network, other = torch.nn.Linear(3, 4), torch.nn.Linear(5, 6)
    hold, hold_other = residency.add("vae", network), residency.add("clip", other)
    home, away = addresses(network), addresses(other)
    with torch.inference_mode(), hold():
        assert not addresses(network) & home and addresses(other) == away
        network.weight.data = torch.zeros(4, 3)  # say, in another precision for a while
    assert not addresses(network) & home, "a guest stays until another comes"
    with hold_other():
        assert addresses(network) == home and not network.weight.is_inference()
    assert network.weight.abs().sum() > 0


def test_a_network_that_does_not_fit_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    residency = Residency(CPU, TURNS)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
    hold, home = residency.add("vae", network), addresses(network)
    moved = []

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        moved.append(tensor)
        if len(moved) == 3:
            raise torch.OutOfMemoryError("no room")
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(torch.OutOfMemoryError), hold():
        pass
    assert addresses(network) == home
    with hold():
        assert not addresses(network) & home


class Sick(torch.nn.Module):
    """A UNet whose output is NaN in half precision."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet, self.config, self.seen = unet, unet.config, []  # type: ignore[var-annotated]

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def forward(self, x: torch.Tensor, *rest: Any, return_dict: bool = False) -> tuple[torch.Tensor]:
        out = self.unet(x, *rest, return_dict=False)[0]
        self.seen.append(out.dtype)
        return (out * (1 if out.dtype == torch.float32 else float("nan")),)


@pytest.mark.parametrize("level", thinned(LEVELS, 4, keep=[LAYERS]))
def test_a_nan_is_redone_in_float32_wherever_the_unet_is(level: str, tmp_path: Path) -> None:
    gen, _, residency = generator(level, torch.bfloat16, tiny_stable_diffusion(tmp_path))  # emulated on some CPUs
    home = addresses(gen.unet)
    before = {name: t.clone() for name, t in gen.unet.state_dict().items()}
    gen.unet = gen.denoiser.unet = Sick(gen.unet)
    request = Request(id="a", prompt="a fox", seed=1, num_inference_steps=1)
    assert [r.status for r in gen.stream([request])] == ["done"]
    assert set(gen.unet.seen) == {torch.bfloat16, torch.float32} and gen.unet.dtype == torch.bfloat16
    after = gen.unet.unet.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before), "the weights are those of before"
    residency.park("unet")
    assert level in (RESIDENT, PARTS) or addresses(gen.unet) == home, "and where they were, pinned"
    assert [r.status for r in gen.stream([request])] == ["done"], "and once more"


@pytest.mark.parametrize("level", thinned([TURNS, LAYERS], 2))
def test_float32_outlasts_another_network_s_turn(level: str, tmp_path: Path) -> None:
    gen, _, residency = generator(level, torch.bfloat16, tiny_stable_diffusion(tmp_path))
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 32, 16)
    with torch.inference_mode():
        gen.unet(x.bfloat16(), t, text.bfloat16())
        with residency.float32(gen.unet):
            for _ in range(2):
                assert gen.unet(x, t, text).sample.dtype == gen.unet.dtype == torch.float32
                gen.codec.decode(x)
        assert gen.unet(x.bfloat16(), t, text.bfloat16()).sample.dtype == torch.bfloat16


def embedded_vae() -> Any:
    return load_components(inspect_model("emoji"), device="cpu", dtype=torch.float32).vae


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 10), (9, 34)])
def test_strips_are_the_whole_picture_to_rounding(height: int, width: int) -> None:
    vae = embedded_vae()
    torch.manual_seed(0)
    z = torch.randn(1, 8, height, width) * torch.linspace(0.2, 3, height)[:, None]  # strips unlike each other
    picture = torch.rand(1, 3, 8 * height, 8 * width) * 2 - 1
    picture[:, :, : 4 * height] *= 0.1
    with torch.inference_mode():
        given = z.clone(), picture.clone()
        whole, strips = vae.decode(z).sample, decode_in_strips(vae, z)
        moments, coded = vae.encode(picture).latent_dist.parameters, encode_in_strips(vae, picture)
    assert strips.shape == whole.shape and (strips - whole).abs().max() * 127.5 < 0.01, "hundredths of a level"
    assert coded.shape == moments.shape and (coded - moments).abs().max() < 1e-4
    assert torch.equal(z, given[0]) and torch.equal(picture, given[1]), "what is given is left alone"


@pytest.mark.parametrize("blocks", [2, 3])
def test_strips_of_smaller_vaes(blocks: int) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16)[:blocks], down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks, layers_per_block=2, norm_num_groups=4,
    ).eval()  # fmt: skip
    z, picture = torch.randn(1, 4, 30, 10), torch.rand(1, 3, 30 * 2 ** (blocks - 1), 24)
    with torch.inference_mode():
        assert (decode_in_strips(vae, z) - vae.decode(z).sample).abs().max() < 1e-5
        assert (encode_in_strips(vae, picture) - vae.encode(picture).latent_dist.parameters).abs().max() < 1e-5


@pytest.mark.timeout(1200)  # half precision is emulated on a CPU
@pytest.mark.slow
def test_strips_in_half_precision_stay_within_a_level() -> None:
    vae = embedded_vae()
    torch.manual_seed(0)
    z = torch.randn(1, 8, 32, 8)  # narrow: strips are of rows
    with torch.inference_mode():
        exact = vae.decode(z).sample.clamp(-1, 1)
        half = vae.to(torch.bfloat16)
        whole, strips = (d.float().clamp(-1, 1) for d in (half.decode(z.bfloat16()).sample,
                                                          decode_in_strips(half, z.bfloat16())))  # fmt: skip
    errors = [float((d - exact).abs().mean()) * 127.5 for d in (whole, strips)]
    assert errors[1] < 1.2 * errors[0], "no further from the truth than the whole decode"


def test_what_cannot_be_cut_is_not() -> None:
    attentive = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    )  # fmt: skip
    assert can_strip(embedded_vae())
    assert not can_strip(attentive) and not can_strip(AutoencoderKL()) and not can_strip(torch.nn.Identity())


def test_a_codec_takes_strips_only_for_what_is_too_large() -> None:
    vae, calls = embedded_vae(), list[tuple[int, ...]]()
    vae.decoder.register_forward_pre_hook(lambda module, given: calls.append(tuple(given[0].shape)))
    codec = Codec(vae, area=2 * 16 * 16)
    torch.manual_seed(0)
    small, large = torch.randn(5, 8, 16, 16), torch.randn(1, 8, 24, 24)
    pictures = codec.decode(small)
    assert calls == [(2, 8, 16, 16), (2, 8, 16, 16), (1, 8, 16, 16)] and pictures.shape == (5, 3, 128, 128)
    found = codec.decode(large)
    assert len(calls) == 3, "in strips"
    assert (found - Codec(embedded_vae()).decode(large)).abs().max() < 1e-4


def test_weights_in_8_bits() -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(16, 64, 3, padding=1), torch.nn.GroupNorm(4, 64),
                                 torch.nn.Conv2d(64, 3, 1))  # fmt: skip
    layers[0].weight.data[5] = 0.0  # type: ignore[operator]
    x = torch.randn(2, 16, 8, 8)
    with torch.inference_mode():
        expected = layers(x)
        size = sum(t.nbytes for t in tensors(layers).values())
        assert store_in_8_bits(layers) == 1, "small weights are left alone"
        found = layers(x)
        assert 0 < (found - expected).abs().mean() < 0.01 * expected.abs().mean()
        assert sum(t.nbytes for t in tensors(layers).values()) < 0.35 * size
        layers.to(torch.float64)
        assert layers(x.double()).dtype == torch.float64, "scales follow .to(), codes stay"
        layers.to(torch.float32)
        assert torch.equal(layers(x), found)


@pytest.mark.slow
def test_int8_from_end_to_end(tmp_path: Path) -> None:
    exact = TextToImage.from_pretrained("emoji", device="cpu")
    small = TextToImage.from_pretrained("emoji", device="cpu", dtype="int8")
    assert is_8_bit(small.unet) and not is_8_bit(exact.unet) and small.unet.dtype == torch.float32
    a, b = (np.asarray(g("a red fox", seed=1, num_inference_steps=4).images[0]).astype(int) for g in (exact, small))
    assert 0 < np.abs(a - b).mean() < 2
    request = Request(id="a", prompt="a fox", seed=1, num_inference_steps=1)
    assert generate([request], tmp_path / "run", device="cpu", dtype="int8", quiet=True).failed == 0
    config = read_config(tmp_path / "run")
    assert config is not None and config["binding"]["dtype"] == "int8"
    again = Request(id="a", prompt="an owl", seed=1, num_inference_steps=1)
    assert generate([again], tmp_path / "run", device="cpu", quiet=True).failed == 0, "auto is what the run began with"
    with pytest.raises(InputError, match="dtype"):
        generate([request], tmp_path / "run", device="cpu", dtype="float32", quiet=True)


def test_int8_layer_by_layer() -> None:
    parts = [load_components(inspect_model("emoji"), device="cpu", dtype=torch.int8).unet for _ in range(2)]
    Residency(CPU, LAYERS).add("unet", parts[1])
    x, t, text = torch.randn(2, 8, 16, 16), torch.tensor([3.0, 500.0]), torch.randn(2, 32, 256)
    with torch.inference_mode():
        plain, by_layer = (unet(x, t, text, return_dict=False)[0] for unet in parts)
    assert torch.equal(plain, by_layer)


@pytest.mark.slow
def test_image_to_image_in_turns_fetches_each_network_once_an_image() -> None:
    gen, _, residency = generator(TURNS)
    image = gen("a cat", seed=3, num_inference_steps=2).images[0]
    residency.log.clear()
    ImageToImage.from_generator(gen)("a dog", image=image, seed=1, num_inference_steps=2)
    assert [name for name in residency.log if name[0] != "-"] == ["text_encoder", "vae", "unet", "vae"]
