"""Loading: the same numbers as from_pretrained, from every layout of files; wrong weights refused before."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from genkit.components import Components, inspect_model, load_components, weight_hashes
from genkit.errors import InputError
from genkit.schedulers import Scheduler
from tests.tiny import EMBEDDED, SCHEDULER, tiny_clip, tiny_ddpm, tiny_latent_unconditional, tiny_stable_diffusion

ROOT = Path(__file__).parents[2]
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
CLASSES: dict[str, tuple[Any, ...]] = {
    "unet": (diffusers.UNet2DConditionModel, diffusers.UNet2DModel),
    "vae": (diffusers.AutoencoderKL,),
    "text_encoder": (transformers.CLIPTextModel,),
    "clip": (transformers.CLIPModel,),
}


def load(folder: str | Path, variant: str | None = None, dtype: torch.dtype = torch.float32) -> Components:
    return load_components(inspect_model(folder, variant=variant), device="cpu", dtype=dtype)


def peer(network: Any, folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    """The same network by the library's own loader."""
    key = "dtype" if isinstance(network, transformers.PreTrainedModel) else "torch_dtype"
    return type(network).from_pretrained(folder, **{key: dtype}, **options)


def assert_equal(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    for named in ("named_parameters", "named_buffers"):
        a, b = dict(getattr(ours, named)()), dict(getattr(theirs, named)())
        assert a.keys() == b.keys()
        for name, weight in a.items():
            assert weight.dtype == b[name].dtype and weight.device == b[name].device
            assert torch.equal(weight, b[name]), name
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())


def networks(components: Components) -> dict[str, Any]:
    return {name: network for name in CLASSES if (network := getattr(components, name)) is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("maker", [tiny_stable_diffusion, tiny_ddpm, tiny_latent_unconditional, tiny_clip])
def test_equal_to_from_pretrained(tmp_path: Path, maker: Callable[[Path], Path], dtype: torch.dtype) -> None:
    components = load(maker(tmp_path), dtype=dtype)
    found = networks(components)
    assert found.keys() == components.info.parts.keys()
    for name, network in found.items():
        assert isinstance(network, CLASSES[name])
        folder = tmp_path if name == "clip" else tmp_path / name
        assert_equal(network, peer(network, folder, dtype))
        assert network.dtype == dtype


def test_outputs_equal_those_of_from_pretrained(tmp_path: Path) -> None:
    """Weights may be equal and a buffer or a setting differ: so the networks are also run."""
    ours = load(tiny_stable_diffusion(tmp_path))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    # Theirs view the file, off the 64-byte grid, where the kernels of a CPU round otherwise; a copy is on the grid.
    unet, vae, text_encoder = (copy.deepcopy(getattr(theirs, name)) for name in ("unet", "vae", "text_encoder"))
    options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = ours.tokenizer(["a red fox"], **options).input_ids
    assert torch.equal(ids, theirs.tokenizer(["a red fox"], **options).input_ids)
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        text = ours.text_encoder(ids)[0]
        assert torch.equal(text, text_encoder(ids)[0])
        assert torch.equal(ours.unet(x, 10, text)[0], unet(x, 10, text)[0])
        assert torch.equal(ours.vae.decode(x)[0], vae.decode(x)[0])


@pytest.mark.parametrize("name", ["emoji", "emoji-clip"])
def test_embedded_models(name: str) -> None:
    components = load(name)
    for part, network in networks(components).items():
        assert_equal(network, peer(network, EMBEDDED / name / ("" if part == "clip" else part), torch.float32))
    assert components.tokenizer.model_max_length == 32
    assert components.info.name == name
    assert components.info.defaults == (
        {"num_inference_steps": 20, "guidance_scale": 5.0, "tuned_steps": 12} if name == "emoji" else {}
    )


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("maker", [tiny_stable_diffusion, tiny_clip])
def test_shards_and_variants(tmp_path: Path, maker: Callable[..., Path], variant: str | None) -> None:
    maker(tmp_path / "sharded", variant=variant, max_shard_size="60KB")
    maker(tmp_path / "single", variant=variant)
    ours, single = (load(tmp_path / name, variant) for name in ("sharded", "single"))
    assert max(len(part.files) for part in ours.info.parts.values()) > 1
    for name, network in networks(ours).items():
        assert_equal(network, networks(single)[name])
    if variant:
        with pytest.raises(InputError, match=r"safetensors: is absent: to take '.*fp16.*', name its variant"):
            inspect_model(tmp_path / "single")


def test_shard_names_of_older_diffusers(tmp_path: Path) -> None:
    tiny_stable_diffusion(tmp_path, variant="fp16", max_shard_size="60KB")
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    text = index.read_text()
    for file in set(json.loads(text)["weight_map"].values()):
        old = file.replace(".fp16-", "-").replace(".safetensors", ".fp16.safetensors")
        (tmp_path / "unet" / file).rename(tmp_path / "unet" / old)
        text = text.replace(file, old)
    index.write_text(text)
    load(tmp_path, "fp16")


def rewrite(path: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file({k: v.contiguous() for k, v in edit(load_file(path)).items()}, path, metadata={"format": "pt"})


OLD_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def old_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, weight in weights.items():
        for new, old in OLD_ATTENTION.items():
            name = name.replace(new, old)
        found[name] = weight
    return found


def test_old_names_of_weights(tmp_path: Path) -> None:
    """Stable Diffusion 1.5's own files: attention of the VAE, prefix and saved buffer of the text encoder."""
    new = load(tiny_stable_diffusion(tmp_path))
    rewrite(tmp_path / VAE, old_names)
    text_file = tmp_path / "text_encoder" / "model.safetensors"
    ids = {"text_model.embeddings.position_ids": torch.arange(32)[None]}
    rewrite(text_file, lambda w: {f"text_model.{k}": v for k, v in w.items()} | ids)
    assert any("proj_attn" in name for name in load_file(tmp_path / VAE))
    old = load(tmp_path)
    for name, network in networks(old).items():
        assert_equal(network, networks(new)[name])
        assert_equal(network, peer(network, tmp_path / name, torch.float32))


def test_old_names_in_an_unconditional_model(tmp_path: Path) -> None:
    new = load(tiny_ddpm(tmp_path))
    rewrite(tmp_path / UNET, old_names)
    assert_equal(load(tmp_path).unet, new.unet)


def test_old_layout_with_everything_beside_the_index(tmp_path: Path) -> None:
    """As the first DDPM models on the hub are laid out."""
    new = load(tiny_ddpm(tmp_path))
    for part in ("unet", "scheduler"):
        for file in (tmp_path / part).iterdir():
            file.rename(tmp_path / file.name)
        (tmp_path / part).rmdir()
    assert_equal(load(tmp_path).unet, new.unet)


@pytest.mark.parametrize("maker", [tiny_stable_diffusion, tiny_ddpm, tiny_latent_unconditional])
def test_a_folder_without_an_index(tmp_path: Path, maker: Callable[[Path], Path]) -> None:
    before = inspect_model(maker(tmp_path))
    (tmp_path / "model_index.json").unlink()
    after = inspect_model(tmp_path)
    assert (after.kind, after.configs) == (before.kind, before.configs)


def test_extras_are_known_and_never_loaded(tmp_path: Path) -> None:
    tiny_stable_diffusion(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {
        "_name_or_path": "somewhere/else",
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizerFast"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "safety_checker").mkdir()
    (tmp_path / "safety_checker" / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    assert networks(load(tmp_path)).keys() == {"unet", "vae", "text_encoder"}


def test_vocab_and_merges(tmp_path: Path) -> None:
    fast = load(tiny_stable_diffusion(tmp_path)).tokenizer
    model = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n"
    (tmp_path / "tokenizer" / "merges.txt").write_text(merges)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    slow = load(tmp_path).tokenizer
    for prompt in ("a red fox", "a 3d emoji of a pizza, twemoji", "Ünï 🦊"):
        assert slow(prompt).input_ids == fast(prompt).input_ids


def test_prompts_are_cut_to_what_the_text_encoder_reads(tmp_path: Path) -> None:
    tiny_stable_diffusion(tmp_path)
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config))
    assert load(tmp_path).tokenizer.model_max_length == 32


def test_links_are_followed(tmp_path: Path) -> None:
    """The hub's cache is a folder of links."""
    tiny_stable_diffusion(tmp_path / "real")
    for file in (tmp_path / "real").rglob("*"):
        twin = tmp_path / "links" / file.relative_to(tmp_path / "real")
        if file.is_file():
            twin.parent.mkdir(parents=True, exist_ok=True)
            twin.symlink_to(file)
    assert_equal(load(tmp_path / "links").unet, load(tmp_path / "real").unet)


def test_hashes_are_of_every_weight_file(tmp_path: Path) -> None:
    tiny_stable_diffusion(tmp_path)
    before = weight_hashes(inspect_model(tmp_path))
    assert before.keys() == {UNET, VAE, "text_encoder/model.safetensors"}
    rewrite(tmp_path / VAE, lambda w: {k: v * 2 for k, v in w.items()})
    after = weight_hashes(inspect_model(tmp_path))
    assert {k for k in before if before[k] != after[k]} == {VAE}


def test_describe_is_json(tmp_path: Path) -> None:
    for maker in (tiny_stable_diffusion, tiny_ddpm, tiny_latent_unconditional, tiny_clip):
        info = inspect_model(maker(tmp_path / maker.__name__))
        text = json.dumps(info.describe())
        assert info.kind in text and "parameters" in text
    described = inspect_model("emoji").describe()
    assert described["size"] == "128x128" and described["parameters"] == 25_319_267
    assert described["components"]["unet"]["dtype"] == "float16"


# Wrong weights.


def without(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda w: {k: v for k, v in w.items() if k != name}


def put(
    name: str, value: Callable[[torch.Tensor], torch.Tensor], like: str = ""
) -> Callable[..., dict[str, torch.Tensor]]:
    return lambda w: w | {name: value(w[like or name])}


DEEP = "mid_block.resnets.0.conv1.weight"  # of no landmark: only the network itself tells
WRONG: dict[str, tuple[Any, ...]] = {
    "missing": (without(DEEP), DEEP, "is missing", "16x16x3x3"),
    "extra": (put("more.weight", lambda v: v.clone(), DEEP), "'more.weight'", "has no place in the network"),
    "mistyped": (
        lambda w: without(DEEP)(put("mid_block.resnets.0.conv1.wieght", lambda v: v, DEEP)(w)),
        "wieght",
        DEEP,
    ),
    "shape": (put(DEEP, lambda v: v[:8]), DEEP, "8x16x3x3", "16x16x3x3"),
    "transposed": (
        put("time_embedding.linear_1.weight", lambda v: v.T),
        "time_embedding.linear_1.weight",
        "(transposed)",
    ),
    "all NaN": (lambda w: {k: v * float("nan") for k, v in w.items()}, UNET, "NaN"),
    "one NaN": (put(DEEP, lambda v: v.index_fill(0, torch.tensor([3]), float("nan"))), DEEP, "NaN"),
    "infinite": (put(DEEP, lambda v: v / 0), DEEP, "infinity"),
    "one integer": (put(DEEP, lambda v: v.to(torch.int32)), DEEP, "is of int32, not of floating-point numbers"),
    "all integers": (lambda w: {k: v.to(torch.int8) for k, v in w.items()}, UNET, "is of int8, not of floating-point"),
    "all zero": (lambda w: {k: v * 0 for k, v in w.items()}, UNET, "every weight is zero"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_weights(tmp_path: Path, name: str) -> None:
    edit, *words = WRONG[name]
    tiny_stable_diffusion(tmp_path)
    rewrite(tmp_path / UNET, edit)
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert UNET in str(caught.value) and "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_names_and_shapes_are_checked_before_any_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_stable_diffusion(tmp_path)
    rewrite(tmp_path / VAE, lambda w: w | {"more.weight": torch.zeros(1)})
    info = inspect_model(tmp_path)
    monkeypatch.setattr("safetensors.safe_open", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=r"more\.weight"):
        load_components(info, device="cpu", dtype=torch.float32)


def test_weights_too_large_for_half_precision(tmp_path: Path) -> None:
    tiny_stable_diffusion(tmp_path)
    rewrite(tmp_path / UNET, put(DEEP, lambda v: v * 1e6))
    load(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"holds a NaN or an infinity as float16"):
        load(tmp_path, dtype=torch.float16)


def test_weights_that_change_after_the_check(tmp_path: Path) -> None:
    info = inspect_model(tiny_stable_diffusion(tmp_path))
    os.truncate(tmp_path / UNET, 20_000)
    with pytest.raises(InputError, match=UNET):
        load_components(info, device="cpu", dtype=torch.float32)


def test_weights_are_not_a_view_of_the_file(tmp_path: Path) -> None:
    components = load(tiny_stable_diffusion(tmp_path))
    before = components.unet.conv_in.weight.clone()
    with open(tmp_path / UNET, "r+b") as file:
        file.seek(20_000)
        file.write(b"\xff" * (os.path.getsize(tmp_path / UNET) - 20_000))
    assert torch.equal(components.unet.conv_in.weight, before)
    assert all(torch.isfinite(p).all() for p in components.unet.parameters())


# The hub, offline: its cache as huggingface_hub lays it out.

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache(home: Path, maker: Callable[[Path], Path], name: str) -> None:
    repo = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    maker(snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs").mkdir()
    for number, file in enumerate(p for p in snapshot.rglob("*") if p.is_file()):
        shutil.move(file, repo / "blobs" / str(number))
        file.symlink_to(os.path.relpath(repo / "blobs" / str(number), file.parent))


def inspected(home: Path, name: str) -> str:
    code = (
        "import sys\nfrom genkit.components import inspect_model\n"
        "try:\n    info = inspect_model(sys.argv[1])\n    print(info.name, info.kind, info.revision, len(info.parts))\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    environment.pop("HF_HUB_CACHE", None)
    result = subprocess.run(
        [sys.executable, "-c", code, name], capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    return result.stdout.strip()


def test_a_hub_id_from_the_cache(tmp_path: Path) -> None:
    cache(tmp_path, tiny_stable_diffusion, "owner/name")
    cache(tmp_path, tiny_clip, "owner/clip-1.5_b")
    assert inspected(tmp_path, "owner/name") == f"owner/name text-to-image {COMMIT} 3"
    assert inspected(tmp_path, "owner/clip-1.5_b") == f"owner/clip-1.5_b clip {COMMIT} 1"


def test_a_hub_id_that_is_not_in_the_cache(tmp_path: Path) -> None:
    message = "HostError owner/name: is neither a folder here nor in the hub cache, and HF_HUB_OFFLINE is set"
    assert inspected(tmp_path, "owner/name") == message


def test_only_wanted_files_are_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs first; weights only once these are in order, of the same commit, and no others."""
    folder = tiny_stable_diffusion(tmp_path / COMMIT, max_shard_size="60KB")
    hidden = {p: p.read_bytes() for p in folder.rglob("*.safetensors")}
    asked: list[tuple[str | None, list[str]]] = []
    for path in hidden:
        path.unlink()

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((revision, allow_patterns))
        for path, data in hidden.items():
            if path.relative_to(folder).as_posix() in allow_patterns:
                path.write_bytes(data)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert inspect_model("owner/name").revision == COMMIT
    (first, configs), (second, weights) = asked
    assert first is None and not any(pattern.endswith("safetensors") for pattern in configs)
    assert second == COMMIT and set(weights) == {p.relative_to(folder).as_posix() for p in hidden}

    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusion3Pipeline"}))
    with pytest.raises(InputError, match="StableDiffusion3Pipeline"):
        inspect_model("owner/name")
    assert len(asked) == 3, "weights of a model that is not supported were asked for"


def test_the_scheduler_is_read(tmp_path: Path) -> None:
    config = {**SCHEDULER, "_class_name": "EulerDiscreteScheduler"}
    del config["clip_sample"], config["set_alpha_to_one"]
    components = load(tiny_stable_diffusion(tmp_path, scheduler=config))
    assert components.info.scheduler_config["_class_name"] == "EulerDiscreteScheduler"
    assert components.scheduler == Scheduler.from_config(config)
    assert components.scheduler != Scheduler.from_config(SCHEDULER)
