"""LoRAs of every dialect: placed, equal to diffusers', different in each row of a batch, and refused where wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from genkit import Request, TextToImage, generate
from genkit.components.lora import kohya_names, sgm_name
from genkit.errors import InputError
from genkit.sampling.adapters import _Layer
from tests.components.checkpoints import folder_of
from tests.tiny import tiny_sdxl, tiny_stable_diffusion

Weights = dict[str, torch.Tensor]
RANK = 3


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return (tiny_sdxl if request.param == "sdxl" else tiny_stable_diffusion)(folder)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stable_diffusion(tmp_path_factory.mktemp("sd"))


def pairs(model: Path, seed: int = 0, rank: int = RANK, text: bool = True, scale: float = 0.5) -> Weights:
    """Return PEFT's names -> A and B for the attention of the UNet and of the text encoders."""
    from genkit.components import inspect_model

    drawn = torch.Generator().manual_seed(seed)
    found = {}
    for name, part in inspect_model(model).parts.items():
        for key, tensor in part.tensors.items():
            layer = key.removesuffix(".weight")
            wanted = (".to_q", ".to_v", ".to_out.0", ".ff.net.0.proj") if name == "unet" else ("q_proj", "out_proj")
            if (
                name == "vae"
                or not key.endswith(".weight")
                or not layer.endswith(wanted)
                or (name != "unet" and not text)
            ):
                continue
            inner = layer if name == "unet" or layer.startswith("text_model.") else f"text_model.{layer}"
            rows, columns = tensor.shape
            found[f"{name}.{inner}.lora_A.weight"] = torch.randn(rank, columns, generator=drawn) * scale
            found[f"{name}.{inner}.lora_B.weight"] = torch.randn(rows, rank, generator=drawn) * scale
    return found


def peft(model: Path, weights: Weights, out: Path) -> Path:
    save_file(weights, out)
    return out


def peft_with_alpha(model: Path, weights: Weights, out: Path) -> Path:
    names = sorted({key.split(".")[0] for key in weights})
    config: dict[str, Any] = {}
    for name in names:
        own = sorted({key.split(".lora_")[0].partition(".")[2] for key in weights if key.startswith(f"{name}.")})
        own = own if name == "unet" else sorted({layer.rpartition(".")[2] for layer in own})
        told = {"r": RANK, "lora_alpha": 1.5, "target_modules": own, "peft_type": "LORA"}
        config |= {f"{name}.{key}": value for key, value in told.items()}
    save_file(weights, out, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    return out


def old_diffusers(model: Path, weights: Weights, out: Path) -> Path:
    ends = {"lora_A": "lora.down", "lora_B": "lora.up"}
    text = {"lora_A": "lora_linear_layer.down", "lora_B": "lora_linear_layer.up"}
    found = {}
    for key, value in weights.items():
        name, kind = key.removesuffix(".weight").rsplit(".", 1)
        found[f"{name}.{(ends if name.startswith('unet') else text)[kind]}.weight"] = value
    save_file(found, out)
    return out


def kohya(model: Path, weights: Weights, out: Path) -> Path:
    config = json.loads((model / "unet" / "config.json").read_text())

    class Config:
        addition_embed_type = config.get("addition_embed_type")
        layers_per_block = config["layers_per_block"]

    save_file({key: value.clone() for key, value in kohya_names(weights, 1.5, Config).items()}, out)
    return out


def comfy(model: Path, weights: Weights, out: Path) -> Path:
    found = {}
    for key, value in weights.items():
        name, kind = key.removesuffix(".weight").rsplit(".", 1)
        component, _, module = name.partition(".")
        prefix = {
            "unet": "diffusion_model.", "text_encoder": "text_encoders.clip_l.transformer.",
            "text_encoder_2": "text_encoders.clip_g.transformer.",
        }[component]  # fmt: skip
        module = sgm_name(module, 1) if component == "unet" else module
        found[f"{prefix}{module}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = value
    save_file(found, out)
    return out


DIALECTS: dict[str, Callable[[Path, Weights, Path], Path]] = {
    "peft": peft, "peft with alpha": peft_with_alpha, "old diffusers": old_diffusers, "kohya": kohya, "comfy": comfy,
}  # fmt: skip


def drawn(generator: TextToImage, loras: Any = None, seed: int = 0, **options: Any) -> np.ndarray:
    row = Request(
        id="a", prompt="a red fox", seed=seed, num_inference_steps=3, guidance_scale=4.0, loras=loras, **options
    )
    return pixels(generator, [row])[0]


def pixels(generator: TextToImage, rows: list[Request]) -> list[np.ndarray]:
    results = {f"{r.id}": r for r in generator.stream(rows)}
    assert all(r.status == "done" for r in results.values())
    return [np.asarray(results[str(row.id)].pixels).astype(int) for row in rows]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_equal_to_diffusers(model: Path, tmp_path: Path, dialect: str) -> None:
    import diffusers

    if dialect == "comfy":
        pytest.skip("diffusers reads no such names; compared with the same LoRA in another dialect below")
    file = DIALECTS[dialect](model, pairs(model), tmp_path / "style.safetensors")
    ours = drawn(TextToImage.from_pretrained(model), [{"file": str(file)}])
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
    generator = torch.Generator().manual_seed(0)
    made = pipeline("a red fox", num_inference_steps=3, guidance_scale=4.0, generator=generator)
    assert np.abs(ours - np.asarray(made.images[0]).astype(int)).max() <= 1
    assert np.abs(ours - drawn(TextToImage.from_pretrained(model))).max() > 5


def test_comfy_names_are_the_same_lora(model: Path, tmp_path: Path) -> None:
    generator = TextToImage.from_pretrained(model)
    files = [DIALECTS[d](model, pairs(model), tmp_path / f"{d}.safetensors") for d in ("peft", "comfy")]
    one, two = (drawn(generator, [{"file": str(file)}]) for file in files)
    assert np.array_equal(one, two) and all("adapts" in line for line in generator.adapters.lines)


def test_rows_with_different_loras_share_a_batch(model: Path, tmp_path: Path) -> None:
    """Eight rows with four LoRAs, alone and together, are the same; and the weights are never touched."""
    files = [str(peft(model, pairs(model, seed=i, rank=i + 1), tmp_path / f"{i}.safetensors")) for i in range(4)]
    loras = [
        None, [{"file": files[0]}], [{"file": files[1], "weight": 0.5}], [{"file": files[2], "text_weight": 0.0}],
        [{"file": files[3], "weight": -0.7}], [{"file": files[0]}, {"file": files[3], "weight": 0.3}],
        [{"file": files[0], "weight": 0.0}], [{"file": files[2]}],
    ]  # fmt: skip
    rows = [
        Request(id=f"r{i}", prompt="a red fox", seed=3, num_inference_steps=3, guidance_scale=4.0, loras=lora)
        for i, lora in enumerate(loras)
    ]
    together = TextToImage.from_pretrained(model)
    before = {key: weight.clone() for key, weight in together.unet.state_dict().items()}
    pictures = pixels(together, rows)
    after = together.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    for row, picture in zip(rows, pictures, strict=True):
        assert np.abs(picture - pixels(TextToImage.from_pretrained(model), [row])[0]).max() <= 1, row.id
    assert np.array_equal(pictures[0], pictures[6])
    assert len({picture.tobytes() for picture in pictures}) == 7


def whole(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def module_of(generator: TextToImage, name: str) -> Any:
    return generator.unet.get_submodule(name)


LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"


def kinds(
    name: str, out: int, inner: int, kernel: tuple[int, ...]
) -> dict[str, tuple[Weights, Callable[..., torch.Tensor]]]:
    """Return {kind: (tensors, base weight -> difference)}, each by its paper's formula."""
    flat = inner * (kernel[0] * kernel[1] if kernel else 1)
    shape = (out, inner, *kernel)
    down, up = whole((2, inner, *kernel), 1), whole((out, 2, *((1, 1) if kernel else ())), 2)
    product = (up.flatten(1) @ down.flatten(1)).reshape(shape)
    h = [whole(size, 3 + i) for i, size in enumerate(((out, 2), (2, flat), (out, 2), (2, flat)))]
    k1, k2 = whole((2, 2), 8), whole((out // 2, inner // 2, *kernel), 9)
    magnitude = whole((out, *[1] * (len(shape) - 1)), 10).abs() + 0.5

    def dora(base: torch.Tensor) -> torch.Tensor:
        moved = base + product
        return moved / moved.flatten(1).norm(dim=1).view(magnitude.shape) * magnitude - base

    pair = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    hada = dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), h, strict=True))
    kron = torch.kron(k1.view(2, 2, *[1] * len(kernel)), k2)
    return {
        "lora": (pair, lambda base: product),
        "half alpha": ({**pair, "alpha": torch.tensor(1.0)}, lambda base: product / 2),
        "dora": ({**pair, "dora_scale": magnitude}, dora),
        "loha": ({**hada, "alpha": torch.tensor(2.0)}, lambda base: ((h[0] @ h[1]) * (h[2] @ h[3])).reshape(shape)),
        "lokr": ({"lokr_w1": k1, "lokr_w2": k2, "alpha": torch.tensor(1.0)}, lambda base: kron),
        "diff": ({"diff": product}, lambda base: product),
    }


@pytest.mark.parametrize("name", [LINEAR, CONV])
@pytest.mark.parametrize("kind", ["lora", "half alpha", "dora", "loha", "lokr", "diff"])
def test_every_kind_equals_the_fused_weight(sd: Path, tmp_path: Path, name: str, kind: str) -> None:
    fused, beside = TextToImage.from_pretrained(sd), TextToImage.from_pretrained(sd)
    weight = module_of(fused, name).weight
    out, inner, *kernel = weight.shape
    tensors, difference = kinds(name, out, inner, tuple(kernel))[kind]
    file = tmp_path / "x.safetensors"
    save_file({f"lora_unet_{name.replace('.', '_')}.{key}": t.contiguous() for key, t in tensors.items()}, file)
    with torch.no_grad():
        weight += 0.5 * difference(weight.clone())
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 700.0])
    cond = torch.randn(2, 32, 16)
    adapters = torch.tensor([beside.adapters.weights([{"file": str(file), "weight": 0.5}])] * 2)
    with torch.inference_mode():
        expected = fused.denoiser(x, t, cond, None, torch.ones(2))
        found = beside.denoiser(x, t, cond, None, torch.ones(2), adapters=adapters)
        plain = beside.denoiser(x, t, cond, None, torch.ones(2))
    assert float((found - expected).abs().max()) < min(1e-4, 0.1 * float((plain - expected).abs().max()))


def test_a_lora_that_did_not_fit_into_memory_is_loaded_whole_the_next_time(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [{"file": str(peft(sd, pairs(sd), tmp_path / f"{n}.safetensors"))} for n in "ab"]
    plain, full = TextToImage.from_pretrained(sd), TextToImage.from_pretrained(sd)
    for generator in (plain, full):
        generator.adapters.add(files[0]["file"])
    add, calls = _Layer.add, iter(range(1000))

    def once_full(layer: _Layer, *parts: Any) -> None:
        add(layer, *parts)
        if next(calls) == 3:
            raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(_Layer, "add", once_full)
        with pytest.raises(torch.OutOfMemoryError):
            full.adapters.add(files[1]["file"])
    assert len(full.adapters) == len(full.adapters.lines) == 1
    assert np.array_equal(drawn(full, files), drawn(plain, files))


def test_networks_of_8_bits_take_loras(tmp_path: Path) -> None:
    model = folder_of("SD 1", tmp_path / "model")
    file = peft(model, pairs(model), tmp_path / "x.safetensors")
    generator = TextToImage.from_pretrained(model, dtype="int8")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert "weight" not in module_of(generator, name).state_dict()
    size = {"width": 64, "height": 64}
    assert np.abs(drawn(generator, [{"file": str(file)}], **size) - drawn(generator, **size)).max() > 5
    assert "modules of unet" in generator.adapters.lines[0]


def test_tables_of_embeddings_are_not_adapted(sd: Path, tmp_path: Path) -> None:
    weights = pairs(sd)
    weights |= {
        "text_encoder.text_model.embeddings.token_embedding.lora_A.weight": torch.ones(RANK, 16),
        "text_encoder.text_model.embeddings.token_embedding.lora_B.weight": torch.ones(4096, RANK),
    }
    file = peft(sd, weights, tmp_path / "x.safetensors")
    generator = TextToImage.from_pretrained(sd)
    drawn(generator, [{"file": str(file)}])
    assert "2 keys have no place and are left out: 'text_encoder.text_model.embeddings" in generator.adapters.lines[0]


def broken(change: Callable[[Weights], Weights]) -> Callable[[Path, Path], Path]:
    def write(model: Path, out: Path) -> Path:
        return peft(model, change(pairs(model)), out)

    return write


def first(weights: Weights, suffix: str = "lora_A.weight") -> str:
    return next(key for key in weights if key.endswith(suffix))


def loha(key: str, shapes: Sequence[tuple[int, ...]]) -> Weights:
    roles = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return {key.replace("lora_A.weight", role): torch.ones(shape) for role, shape in zip(roles, shapes, strict=True)}


BAD: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "no lora": (broken(lambda w: {"x.weight": torch.zeros(2)}), "is no LoRA: of its 1 keys"),
    "of nothing here": (
        broken(lambda w: {k.replace("down_blocks", "sideways"): v for k, v in w.items() if "down_blocks" in k}),
        "none of its",
    ),
    "another base": (
        broken(lambda w: {**w, first(w): torch.zeros(RANK, 999)}), r"does not fit the weight of .*; it was made for"
    ),
    "no other half": (broken(lambda w: {k: v for k, v in w.items() if k != first(w)}), "but no down"),
    "a scalar": (broken(lambda w: {**w, first(w): torch.tensor(1.0)}), "down: has shape scalar, which it cannot have"),
    "two alphas": (
        broken(lambda w: {**w, first(w).replace("lora_A.weight", "alpha"): torch.ones(2)}), "alpha: has shape 2"
    ),
    "LoHa of two ranks": (
        broken(lambda w: loha(first(w), ((16, 2), (3, 16), (16, 2), (2, 16)))), "its LoHa does not fit"
    ),
    "LoHa that would be broadcast": (
        broken(lambda w: loha(first(w), ((16, 2), (2, 16), (1, 2), (2, 16)))), "its LoHa does not fit"
    ),
    "rank 0": (
        broken(lambda w: {**w, first(w): torch.zeros(0, 8), first(w, "lora_B.weight"): torch.zeros(8, 0)}), "of rank 0"
    ),
    "NaN": (broken(lambda w: {**w, first(w): w[first(w)] * torch.nan}), "holds a NaN"),
    "another rule of scaling": (
        lambda model, out: save(out, pairs(model), {"lora_adapter_metadata": '{"unet.use_rslora": true}'}),
        r"unet\.use_rslora: scales by alpha / sqrt",
    ),
    "cut": (lambda model, out: truncated(peft(model, pairs(model), out)), "its header describes"),
    "pickle": (lambda model, out: touched(out.with_suffix(".pt")), "is refused"),
    "absent": (lambda model, out: out, "x.safetensors"),
}  # fmt: skip


def save(path: Path, weights: Weights, metadata: dict[str, str]) -> Path:
    save_file(weights, path, metadata=metadata)
    return path


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-9])
    return path


def touched(path: Path) -> Path:
    path.write_bytes(b"PK\x03\x04")
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_before_anything_loads(sd: Path, tmp_path: Path, case: str) -> None:
    write, message = BAD[case]
    file = write(sd, tmp_path / "x.safetensors")
    rows = [Request(prompt="a fox", loras=[{"file": str(file)}], num_inference_steps=2)]
    if case == "NaN":  # values are read when the file is loaded
        results = list(TextToImage.from_pretrained(sd).stream(rows))
        assert results[0].status == "failed" and message in str(results[0].reason)
        return
    with pytest.raises(InputError, match=message):
        generate(rows, out=tmp_path / "run", model=str(sd), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_run_says_what_matched_and_a_changed_file_is_drawn_again(
    sd: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = pairs(sd, text=False)
    peft(sd, {**weights, "unet.nowhere.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "style.safetensors")
    prompts = tmp_path / "rows.jsonl"
    prompts.write_text(
        '{"id": "a", "prompt": "a fox", "loras": ["style.safetensors"]}\n{"id": "b", "prompt": "a fox"}\n'
        '{"id": "c", "prompt": "a fox", "loras": [{"file": "style.safetensors", "weight": 0.5}]}\n'
    )
    options: dict[str, Any] = {"model": str(sd), "defaults": {"num_inference_steps": 2}}
    assert generate(prompts, out=tmp_path / "run", **options).images == 3
    told = capfd.readouterr().err
    assert "modules of unet, rank 3; 1 keys have no place and are left out: 'unet.nowhere.lora_A.weight'" in told
    assert generate(prompts, out=tmp_path / "run", **options).new == 0
    recorded = [json.loads(line) for line in (tmp_path / "run" / "requests.jsonl").read_text().splitlines()]
    with Image.open(tmp_path / "run" / "images" / "c-00.png") as picture:  # folders are private, and pictures travel
        told = json.loads(picture.info["genkit"])["request"]["loras"]
    assert told == [{"file": "style.safetensors", "weight": 0.5, "text_weight": 0.5}]
    assert recorded[2]["loras"][0]["weight"] == recorded[2]["loras"][0]["text_weight"] == 0.5
    peft(sd, pairs(sd, seed=9, text=False), tmp_path / "style.safetensors")
    assert generate(prompts, out=tmp_path / "run", **options).new == 2


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        ([{"file": "x", "wieght": 1.0}], "wieght.*did you mean 'weight'"),
        ([{"weight": 1.0}], "must each have a file"),
        ([{"file": "x", "weight": "1"}], "weight must be a number"),
        ([{"file": "x", "weight": 1e9}], "weight must be a number from -100 to 100"),
        ("x", "must be a list"),
    ],
)
def test_bad_fields_are_named(loras: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Request(prompt="a", loras=loras)
