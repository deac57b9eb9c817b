"""What comes of training, in the layouts that everything loads: a model folder, LoRA files, new words, a model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from genkit.components.info import ModelInfo
from genkit.components.registry import NETWORKS
from genkit.durable import TEMP_PREFIX, TEMP_SUFFIX, disk
from genkit.training.recipe import Recipe
from genkit.training.tasks import NewTokens

PIPELINES = {"unconditional": ("DDPMPipeline", "LDMPipeline"), "text-to-image": ("StableDiffusionPipeline",)}
KEPT = ("checkpoints/*", "cache/*", "samples/*", "prior/*", ".lock", "log.jsonl", "tensorboard/*")  # not for the hub
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def write_model(recipe: Recipe, info: ModelInfo, task: Any, out: Path, scores: dict[str, Any]) -> None:
    """Write the model that the networks of `task` are now into the folder `out`, in place of an earlier one.

    Of parts that did not learn the files are linked or copied. Raises HostError when the disk does not do.
    """
    new = out / f"{TEMP_PREFIX}model{TEMP_SUFFIX}"
    with disk(new):
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        _LAYOUTS.get(recipe.task, _write_pipeline)(recipe, info, task, new, scores)
        (new / "README.md").write_text(model_card(recipe, scores), encoding="utf-8")
        for path in sorted(new.iterdir()):
            old = out / path.name
            if old.is_dir():
                shutil.rmtree(old)
            os.replace(path, old)
        new.rmdir()


def _write_pipeline(recipe: Recipe, info: ModelInfo, task: Any, out: Path, scores: dict[str, Any]) -> None:
    dtype = DTYPES[recipe.save.dtype]
    index: dict[str, Any] = {"_diffusers_version": "0.42.1"}
    for name, part in info.parts.items():
        if name in task.networks or not part.files:
            _write_network(getattr(task.parts, name), part.kind, out / name, dtype)
        else:
            _link(part.folder, out / name, {p.name for p in part.files} | {"config.json"})
        index[name] = [NETWORKS[part.kind].library, part.kind]
    for name in ("tokenizer", "tokenizer_2"):
        if (tokenizer := getattr(task.parts, name, None)) is not None:
            tokenizer.save_pretrained(out / name)
            index[name] = ["transformers", "CLIPTokenizer"]
    config = task.scheduler.to_config()
    _json(out / "scheduler" / "scheduler_config.json", config)
    index["scheduler"] = ["diffusers", config["_class_name"]]
    usual = PIPELINES[info.kind]
    index["_class_name"] = "StableDiffusionXLPipeline" if "text_encoder_2" in info.parts else usual[-1 * ("vae" in index)]
    if info.kind == "text-to-image":
        optional = ("feature_extractor", "image_encoder", *(() if "text_encoder_2" in index else ("safety_checker",)))
        index |= {name: [None, None] for name in optional}
        index |= {"force_zeros_for_empty_prompt": info.zero_empty} if "text_encoder_2" in index else {}
        index |= {} if "text_encoder_2" in index else {"requires_safety_checker": False}
    _json(out / "model_index.json", dict(sorted(index.items())))
    if recipe.lora is not None:
        _write_lora(recipe, task, out / "lora")
    if recipe.token is not None:
        from safetensors.torch import save_file

        vectors = task.networks["text_encoder"].get_input_embeddings().vectors.detach().float().cpu().contiguous()
        save_file({recipe.token.placeholder: vectors}, out / "learned_embeds.safetensors", metadata={"format": "pt"})


def _write_network(network: Any, kind: str, folder: Path, dtype: torch.dtype) -> None:
    """Write a network as save_pretrained does: adapters merged into what they adapt, new words into the table."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.torch import save_file

    adapted = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    for module in adapted:
        module.merge()
    weights = {}
    for name, value in network.state_dict().items():
        if ".lora_" in name or name.endswith(".vectors"):
            continue
        kept = value.detach().to(dtype if value.is_floating_point() else value.dtype)
        weights[name.replace(".base_layer", "").replace(".table.weight", ".weight")] = kept.cpu().clone().contiguous()
    for module in adapted:
        module.unmerge()
    config = json.loads(network.config.to_json_string()) if hasattr(network.config, "to_json_string") else dict(network.config)
    words = next((m for m in network.modules() if isinstance(m, NewTokens)), None)
    if words is not None:
        name = next(n for n, w in weights.items() if n.endswith("token_embedding.weight"))
        weights[name] = words.weight.detach().to(dtype).cpu().contiguous()
        config["vocab_size"] = len(weights[name])
    library, stem = NETWORKS[kind].library, NETWORKS[kind].stem
    config.pop("_name_or_path", None)
    config |= {"_class_name": kind} if library == "diffusers" else {"architectures": [kind], "dtype": str(dtype)[6:]}
    _json(folder / "config.json", config)
    save_file(weights, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def _write_lora(recipe: Recipe, task: Any, folder: Path) -> None:
    """Write the adapters twice: as diffusers and PEFT read them, and as kohya's scripts and most interfaces do."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    assert recipe.lora is not None
    found, configs = {}, {}
    for name, network in task.networks.items():
        for key, value in get_peft_model_state_dict(network).items():
            found[f"{name}.{key}"] = value.detach().float().cpu().contiguous()
        plain = network.peft_config["default"].to_dict()
        configs |= {f"{name}.{k}": sorted(v) if isinstance(v, set) else v for k, v in plain.items()}
    folder.mkdir()
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(configs, default=str, sort_keys=True)}
    save_file(found, folder / "pytorch_lora_weights.safetensors", metadata=metadata)
    alpha = recipe.lora.rank if recipe.lora.alpha is None else recipe.lora.alpha
    kohya = _kohya(found, alpha)
    told = {
        "format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(recipe.lora.rank),
        "ss_network_alpha": str(alpha), "ss_sd_model_name": str(recipe.model), "ss_learning_rate": str(recipe.train.learning_rate),
        "ss_steps": str(recipe.train.steps), "ss_seed": str(recipe.seed), "modelspec.sai_model_spec": "1.0.0",
        "modelspec.prediction_type": task.scheduler.prediction.removesuffix("_prediction"),
    }  # fmt: skip
    save_file(kohya, folder / "kohya.safetensors", metadata=told)


def _kohya(adapters: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """Return adapters under kohya's names: lora_unet_down_blocks_0_…_to_q.lora_down.weight, .lora_up.weight, .alpha."""
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
    if any(key.startswith("text_encoder_2.") for key in adapters):
        prefixes["text_encoder"] = "lora_te1"
    found = {}
    for key, value in adapters.items():
        part, _, rest = key.partition(".")
        module, _, kind = rest.removesuffix(".weight").rpartition(".")
        inner = module if part == "unet" or module.startswith("text_model.") else f"text_model.{module}"
        name = f"{prefixes[part]}_{inner.replace('.', '_')}"
        found[f"{name}.{_KOHYA[kind]}.weight"] = value.contiguous()
        found[f"{name}.alpha"] = torch.tensor(float(alpha))
    return found


_KOHYA = {"lora_A": "lora_down", "lora_B": "lora_up"}


def _write_vae(recipe: Recipe, info: ModelInfo, task: Any, out: Path, scores: dict[str, Any]) -> None:
    part = info.parts["vae"]
    if not part.files and scores.get("latent_std"):
        task.vae.register_to_config(scaling_factor=1 / scores["latent_std"])  # latents of unit variance are what UNets expect
    _write_network(task.vae, part.kind, out / "vae", DTYPES[recipe.save.dtype])


def _write_clip(recipe: Recipe, info: ModelInfo, task: Any, out: Path, scores: dict[str, Any]) -> None:
    _write_network(task.parts.clip, "CLIPModel", out, DTYPES[recipe.save.dtype])
    task.parts.tokenizer.save_pretrained(out)
    usual = {"do_normalize": True, "do_rescale": True, "do_resize": True, "do_convert_rgb": True, "resample": 3}
    _json(out / "preprocessor_config.json", {**usual, **info.preprocessor, "image_processor_type": "CLIPImageProcessor"})


_LAYOUTS: dict[str, Callable[[Recipe, ModelInfo, Any, Path, dict[str, Any]], None]] = {
    "autoencoder": _write_vae, "clip": _write_clip,
}  # fmt: skip


def model_card(recipe: Recipe, scores: dict[str, Any]) -> str:
    """Return a README.md with the front matter that the hub reads, the figures and the recipe."""
    base = f"base_model: {json.dumps(recipe.model)}\n" if recipe.model and "/" in recipe.model else ""
    library = "transformers" if recipe.task == "clip" else "diffusers"
    figures = "".join(f"- {key}: {value:.5g}\n" for key, value in scores.items() if isinstance(value, int | float))
    use = {"clip": "genkit score IMAGES --prompt \"…\" --clip FOLDER", "autoencoder": "networks: {vae: FOLDER/vae}"}
    how = use.get(recipe.task, 'genkit generate --prompt "…" --model FOLDER -o runs/first')
    word = "" if recipe.token is None else f"Its new word is `{recipe.token.placeholder}`.\n\n"
    told = json.dumps(recipe.plain, indent=1, ensure_ascii=False)
    return (
        f"---\nlibrary_name: {library}\ntags: [genkit, {recipe.task}]\n{base}---\n\n# {recipe.task}\n\n{word}"
        f"    {how}\n\n## Figures\n\n{figures}\n## Recipe\n\n```json\n{told}\n```\n"
    )


def push(out: Path, repository: str) -> str:
    """Upload the model in `out`, without checkpoints and logs, to the hub; return its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True, private=True)
    return str(api.upload_folder(repo_id=repository, folder_path=str(out), ignore_patterns=list(KEPT)))


def _link(source: Path, folder: Path, names: set[str]) -> None:
    folder.mkdir(parents=True)
    for name in sorted(names):
        try:
            os.link(os.path.realpath(source / name), folder / name)
        except OSError:
            shutil.copyfile(source / name, folder / name)


def _json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")

