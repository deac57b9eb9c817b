"""Networks to files, in the layout that `inspect_model` and everything else reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.components.info import Part
from genkit.components.loading import stored_weights
from genkit.components.registry import NETWORKS, STEMS

if TYPE_CHECKING:
    import torch


def write_network(kind: str, config: Any, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write a network of class `kind`: its config.json and its weights as one safetensors file. Raises OSError."""
    from safetensors.torch import save_file

    library = NETWORKS[kind].library if kind in NETWORKS else "transformers"  # all vision models are of these
    told = json.loads(config.to_json_string()) if hasattr(config, "to_json_string") else dict(config)
    told.pop("_name_or_path", None)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    told |= {"_class_name": kind} if library == "diffusers" else {"architectures": [kind], "dtype": dtype}
    write_json(folder / "config.json", told)
    save_file(dict(weights), folder / f"{STEMS[library]}.safetensors", metadata={"format": "pt"})


def link_network(part: Part, folder: Path) -> None:
    """Have a network's own files in another folder too: as links to the same data, or as copies elsewhere."""
    if part.origin is None:  # not of a file that holds other networks too
        link_files(part.folder, {"config.json", *(path.name for path in part.files)}, folder)
        return
    weights = {name: weight.contiguous() for name, weight in stored_weights(part).items()}
    write_network(part.kind, part.config, weights, folder)


def link_files(source: Path, names: Iterable[str], folder: Path) -> None:
    """Link or copy files of one folder into another, which is made. Raises OSError."""
    folder.mkdir(parents=True)
    for name in sorted(names):
        try:
            os.link(os.path.realpath(source / name), folder / name)
        except OSError:
            shutil.copyfile(source / name, folder / name)


def write_index(folder: Path, parts: Mapping[str, Part], scheduler: Mapping[str, Any], zero_empty: bool) -> None:
    """Write model_index.json for the parts of a model, and the scheduler's config. Raises OSError."""
    two, text = "text_encoder_2" in parts, "text_encoder" in parts
    refines = two and not text
    pipelines = ("LDMPipeline" if "vae" in parts else "DDPMPipeline", "StableDiffusionPipeline")
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline" if two else pipelines[text]}
    index |= {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True} if refines else {}
    index |= {name: [NETWORKS[part.kind].library, part.kind] for name, part in parts.items()}
    tokenizers = {"tokenizer": text, "tokenizer_2": two}
    index |= {name: ["transformers", "CLIPTokenizer"] for name, there in tokenizers.items() if there}
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    if refines:
        index |= {"text_encoder": [None, None], "tokenizer": [None, None], "force_zeros_for_empty_prompt": zero_empty}
    if text:
        index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
        index |= {"force_zeros_for_empty_prompt": zero_empty} if two else {"safety_checker": [None, None]}
        index |= {} if two else {"requires_safety_checker": False}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", index)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a config. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
