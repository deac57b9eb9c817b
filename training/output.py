"""The result of training: a model folder with a model card, LoRA files, learned embeddings."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from genkit.components.info import ModelInfo, Part
from genkit.components.loading import stored_weights
from genkit.components.lora import merged_weights, write_lora
from genkit.components.writing import link_network, write_index, write_json, write_network
from genkit.device.memory import CONTROL
from genkit.durable import TEMP_PREFIX, TEMP_SUFFIX, disk, sync_folder, sync_tree
from genkit.errors import HostError, shown
from genkit.files import place
from genkit.pictures.edges import COMPUTED
from genkit.training.recipe import Recipe
from genkit.training.tasks import NewTokens
from genkit.vision.models import THRESHOLD

# Files that are uploaded to the hub: the model, without pictures and reports.
PUSHED = ("README.md", "model_index.json", "*config.json", "*.safetensors", "*tokenizer*", "*.txt", "*vocab.json")
PRIVATE = ("checkpoints/*", "cache/*", "prior/*", "samples/*", "tensorboard/*")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def write_model(recipe: Recipe, info: ModelInfo, task: Any, out: Path, scores: dict[str, Any]) -> None:
    """Write the current networks of `task` as a model to the folder `out`, replacing an earlier one.

    Files of parts that were not trained are linked or copied. Raises HostError for a failing disk.
    """
    new = out / f"{TEMP_PREFIX}model{TEMP_SUFFIX}"
    try:
        with disk(new):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            _LAYOUTS.get(recipe.task, _pipeline)(recipe, info, task, new, scores)
            (new / "README.md").write_text(model_card(recipe, scores), encoding="utf-8")
            sync_tree(new)
            for path in sorted(new.iterdir()):
                if (old := out / path.name).is_dir():
                    shutil.rmtree(old)
                os.replace(path, out / path.name)
            sync_folder(out)
    except SafetensorError as error:  # safetensors raises this if the disk is full
        raise HostError(f"{place(out)}: the model was not written: {shown(str(error), 200)}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _pipeline(recipe: Recipe, info: ModelInfo, task: Any, out: Path, scores: dict[str, Any]) -> None:
    for name, part in info.parts.items():
        if name in task.networks or not part.files:
            _network(recipe, getattr(task.parts, name), part, out / name)
        else:
            link_network(part, out / name)
    for name in ("tokenizer", "tokenizer_2"):
        if (tokenizer := getattr(task.parts, name)) is not None:
            tokenizer.save_pretrained(out / name)
    write_index(out, info.parts, task.scheduler.to_config(), info.zero_empty)
    if recipe.lora is not None:
        metadata = {
            "ss_network_dim": str(recipe.lora.rank), "ss_sd_model_name": str(recipe.model), "ss_seed": str(recipe.seed),
            "ss_learning_rate": str(recipe.train.learning_rate), "ss_steps": str(scores["step"]),
            "modelspec.prediction_type": task.scheduler.prediction.removesuffix("_prediction"),
        }  # fmt: skip
        write_lora(out / "lora", task.networks, recipe.lora.alpha or recipe.lora.rank, metadata)
    if recipe.token is not None:
        from safetensors.torch import save_file

        vectors = task.networks["text_encoder"].get_input_embeddings().vectors.detach().float().cpu().contiguous()
        save_file({recipe.token.placeholder: vectors}, out / "learned_embeds.safetensors", metadata={"format": "pt"})


def _network(recipe: Recipe, network: Any, part: Part, folder: Path) -> None:
    """Write a network with merged adapters and new token embeddings; other weights are bitwise those of its files."""
    dtype, config = DTYPES[recipe.save.dtype], network.config
    stored = {} if recipe.lora is None and recipe.token is None else stored_weights(part)
    weights = merged_weights(network, stored)
    words = next((module for module in network.modules() if isinstance(module, NewTokens)), None)
    if words is not None:
        name = next(n for n in weights if n.endswith(".table.weight"))
        vectors = weights.pop(name.replace(".table.weight", ".vectors"))
        plain, own = name.replace(".table.weight", ".weight"), weights.pop(name)
        table = weights[plain] = torch.cat([stored.get(plain, own).to(vectors), vectors])
        config = type(config).from_dict({**config.to_dict(), "vocab_size": len(table)})
    kept = {n: w.to(dtype if w.is_floating_point() else w.dtype).cpu().contiguous() for n, w in weights.items()}
    write_network(part.kind, config, kept, folder)


def _autoencoder(recipe: Recipe, info: ModelInfo, task: Any, out: Path, scores: dict[str, Any]) -> None:
    part = info.parts["vae"]
    if not part.files and scores.get("latent_std"):  # UNets expect latents of unit variance
        task.vae.register_to_config(scaling_factor=1 / scores["latent_std"])
    _network(recipe, task.vae, part, out / "vae")


def _clip(recipe: Recipe, info: ModelInfo, task: Any, out: Path, scores: dict[str, Any]) -> None:
    _network(recipe, task.parts.clip, info.parts["clip"], out)
    task.parts.tokenizer.save_pretrained(out)
    usual = {"do_normalize": True, "do_rescale": True, "do_resize": True, "do_convert_rgb": True, "resample": 3}
    kind = {"image_processor_type": "CLIPImageProcessor"}
    write_json(out / "preprocessor_config.json", {**usual, **info.preprocessor, **kind})


def _detector(recipe: Recipe, info: ModelInfo, task: Any, out: Path, scores: dict[str, Any]) -> None:
    """Write an OWL-ViT in transformers' layout. Its config has the threshold that counts best on training scenes."""
    dtype, config = DTYPES[recipe.save.dtype], task.owl.config
    if scores.get("threshold") is not None:
        setattr(config, THRESHOLD, scores["threshold"])
    weights = {name: w.to(dtype).cpu().contiguous() for name, w in task.owl.state_dict().items()}
    write_network("OwlViTForObjectDetection", config, weights, out)
    task.parts.tokenizer.save_pretrained(out)
    side = task.resolution[0]
    usual = {"do_normalize": True, "do_rescale": True, "do_resize": True, "do_center_crop": False, "resample": 3}
    size = {"size": {"height": side, "width": side}, "image_mean": task.mean, "image_std": task.std}
    write_json(out / "preprocessor_config.json", {**usual, **size, "image_processor_type": "OwlViTImageProcessor"})


def _controlnet(recipe: Recipe, info: ModelInfo, task: Any, out: Path, scores: dict[str, Any]) -> None:
    _network(recipe, task.parts.controlnet, info.parts[CONTROL], out)


def model_card(recipe: Recipe, scores: dict[str, Any]) -> str:
    """Return a README.md with the hub's front matter, the metrics and the recipe."""
    hub = recipe.model is not None and recipe.model.count("/") == 1 and not Path(recipe.model).exists()
    base = f"base_model: {json.dumps(recipe.model)}\n" if hub else ""
    library = "transformers" if recipe.task in ("clip", "detector") else "diffusers"
    figures = "".join(f"- {key}: {value:.5g}\n" for key, value in scores.items() if isinstance(value, int | float))
    how = _USE.get(recipe.task, 'genkit generate --prompt "…" --model FOLDER -o runs/first')
    how += f" --control-preprocess {recipe.data.conditioning}" if recipe.data.conditioning in COMPUTED else ""
    word = "" if recipe.token is None else f"Its new word is `{' '.join(recipe.token.names)}`.\n\n"
    metadata = json.dumps(recipe.plain, indent=1, ensure_ascii=False)
    return (
        f"---\nlibrary_name: {library}\ntags: [genkit, {recipe.task}]\n{base}---\n\n# {recipe.task}\n\n{word}"
        f"    {how}\n\n## Figures\n\n{figures}\n## Recipe\n\n```json\n{metadata}\n```\n"
    )


def push(out: Path, repository: str) -> str:
    """Upload the model in `out` to a private repository of the hub, without checkpoints and logs; return its URL."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True, private=True)
    return str(
        api.upload_folder(
            repo_id=repository, folder_path=str(out), allow_patterns=list(PUSHED), ignore_patterns=list(PRIVATE)
        )
    )


_USE = {
    "clip": 'genkit score IMAGES --prompt "…" --clip FOLDER', "autoencoder": "networks: {vae: FOLDER/vae}",
    "controlnet": 'genkit generate --prompt "…" --model MODEL --control FOLDER --control-image PICTURE -o runs/first',
    "detector": 'genkit detect IMAGES --words "…" --detector FOLDER',
}  # fmt: skip
_LAYOUTS: dict[str, Callable[[Recipe, ModelInfo, Any, Path, dict[str, Any]], None]] = {
    "autoencoder": _autoencoder, "clip": _clip, "controlnet": _controlnet, "detector": _detector,
}  # fmt: skip
