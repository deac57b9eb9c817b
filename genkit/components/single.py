"""A single file in the original layout of Stable Diffusion, recognised by its keys and shapes, to a ModelInfo."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from genkit.components.checks import check_network, check_together
from genkit.components.embeddingfile import is_embedding
from genkit.components.families import FAMILIES, SCHEDULERS, SIDES, VELOCITY_SIDE, clip_config, unet_config, vae_config
from genkit.components.geometry import REFINER_IDS, TIME_IDS
from genkit.components.info import ModelInfo, Part
from genkit.components.original import QKV, backward, openclip_modules, renamed, unet_modules, vae_modules
from genkit.components.registry import NETWORKS
from genkit.components.weights import Tensor, check_shapes, read_file
from genkit.errors import InputError, shown
from genkit.files import place, read_text

TOKENIZER = Path(__file__).parent / "embedded" / "clip-tokenizer"
VOCABULARY = 49408
WIDTHS = {768: False, 1280: True}  # of SDXL's text encoders: whether it is the second
VIT_H = 24  # layers of the text model of SD 2, whose last it does not use
UNET, VAE = "model.diffusion_model.", "first_stage_model."
# Text models by the prefix of their keys: (component, layout)
TEXT_PREFIXES = {
    "cond_stage_model.transformer.": ("text_encoder", "clip"),
    "cond_stage_model.model.": ("text_encoder", "openclip"),
    "conditioner.embedders.0.transformer.": ("text_encoder", "clip"),
    "conditioner.embedders.1.model.": ("text_encoder_2", "openclip"),
    "conditioner.embedders.0.model.": ("text_encoder_2", "openclip"),
}
# Keys that are no weights of a network: EMA weights, noise schedules and losses of training, and markers
LEFTOVER = re.compile(
    r"model_ema\..*|first_stage_model\.(loss|model_ema)\..*|(sqrt_|log_)?(one_minus_)?(recip_?m?1?_)?alphas_cumprod.*"
    r"|betas|sqrt_.*|log_one_minus_.*|posterior_.*|logvar|lvlb_weights|global_step|epoch|optimizer.*|denoiser\.sigmas"
    r"|v_pred|ztsnr|.*\.position_ids|.*\.logit_scale|cond_stage_model\.model\.(visual\..*|attn_mask)|scale_factor"
    r"|conditioner\.embedders\.\d\.model\.(visual\..*|attn_mask)"
)
# Other kinds of files, by a pattern that one of their keys matches
LORA = "a LoRA: give it with --lora"
STEERS = "a ControlNet: give it with --control"
OTHERS = {
    r"lora_(unet|te|transformer)|.*\.(lora_(up|down|A|B)\.|hada_w|lokr_w)": LORA,
    r"(model\.diffusion_model\.)?(double_blocks|single_blocks)\.": "of Flux, which genkit does not have",
    r"(model\.diffusion_model\.)?joint_blocks\.": "of Stable Diffusion 3, which genkit does not have",
    r"control_model\.|input_hint_block\.|controlnet_cond": STEERS,
    r"(model\.diffusion_model\.)?.*time_mix": "of Stable Video Diffusion, which genkit does not have",
    r"edm_(vpred|mean|std)": "of an EDM model of its own, which genkit does not have",
    r"(down_blocks\.|conv_in\.|text_model\.)": "one network in diffusers' layout: give its folder, with config.json",
    r"input_blocks\.|diffusion_model\.": "a UNet without VAE and text encoder: genkit takes whole checkpoints",
}


def read_single(
    path: Path, prediction: str, notes: list[str], others: Callable[[str], Mapping[str, Part]]
) -> ModelInfo:
    """Return the model in a safetensors file; its header alone is read.

    prediction: "auto" goes by the file's marks and metadata, the .yaml beside it, or the family. others: for a family,
    the parts to use in place of the file's, which it may then lack. Raises InputError for a file of another kind,
    naming what it is.
    """
    tensors, metadata = read_file(path)
    by_key = {tensor.key: tensor for tensor in tensors}
    where = place(path)
    groups, unknown = _grouped(by_key)
    if "input_blocks.0.0.weight" not in groups.get(UNET, {}):
        raise InputError(f"{where}: {kind_of(by_key)}")
    shapes = {name: tensor.shape for name, tensor in groups[UNET].items()}
    config = unet_config(shapes, f"{where}: unet")
    family = FAMILIES.get(config["cross_attention_dim"]) or _by_build(groups, config)
    if unknown:
        names = ", ".join(map(shown, unknown[:3]))
        raise InputError(f"{where}: {len(unknown)} of its keys have no place in a model of {family}: {names}")
    parts = _parts(groups, config, family, where) | dict(others(family))
    _complete(parts["unet"].config, parts)
    _check_missing(parts, family, where)
    leftover = sum(LEFTOVER.fullmatch(key) is not None for key in by_key)
    if leftover:
        averages = " (averaged weights among them)" if any(key.startswith("model_ema.") for key in by_key) else ""
        notes.append(f"{where}: {leftover} keys that no network has are left out{averages}")
    scheduler = dict(SCHEDULERS[family])
    kind, why = _prediction(path, by_key, metadata, family, prediction)
    if why:
        notes.append(f"{where}: prediction_type: is taken as {kind}{why}")
    scheduler["prediction_type"] = kind
    if family == "SD 2" and kind == "v_prediction":
        unet = parts["unet"]
        parts["unet"] = dataclasses.replace(unet, config={**unet.config, "sample_size": VELOCITY_SIDE})
    if "ztsnr" in by_key:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    sdxl, two = family.startswith("SDXL"), family == "SDXL"
    return ModelInfo(
        name=str(path), folder=path, kind="text-to-image", parts=parts, scheduler_config=scheduler,
        tokenizer=TOKENIZER if two or not sdxl else None, tokenizer_2=TOKENIZER if sdxl else None, zero_empty=two,
        padding={"tokenizer_2": "!"} if sdxl else {"tokenizer": "!"} if family == "SD 2" else {},
        defaults={"guidance_scale": 5.0} if sdxl else {}, family=family, metadata=metadata,
    )  # fmt: skip


def read_vae(path: Path, family: str) -> Part:
    """Return the VAE of a file, a VAE alone or a whole checkpoint in the original layout, for a model of `family`."""
    groups, _ = _grouped({tensor.key: tensor for tensor in read_file(path)[0]})
    found = groups.get(VAE) or groups.get("", {})
    return _vae(found, family, place(path))


def read_text_encoder(path: Path, family: str) -> Part:
    """Return the text encoder of a file for a model of `family`: under transformers' names, or open_clip's.

    For SDXL it is the second one if it is as wide as that, or, of another width, if it has a projection. Raises
    InputError for a file of another kind, naming what it is.
    """
    found = {t.key: t for t in read_file(path)[0] if not t.key.endswith((".position_ids", "logit_scale", "attn_mask"))}
    where = f"{place(path)}: "
    if "text_model.embeddings.token_embedding.weight" in found:
        width, layout = found["text_model.embeddings.token_embedding.weight"].shape[-1], "clip"
    elif "token_embedding.weight" in found:
        width, layout = found["token_embedding.weight"].shape[-1], "openclip"
        found = {key: tensor for key, tensor in found.items() if not key.startswith("visual.")}
    else:
        raise InputError(f"{where}{kind_of(found)}")
    second = WIDTHS.get(width, "text_projection.weight" in found or "text_projection" in found)
    name = "text_encoder_2" if family.startswith("SDXL") and second else "text_encoder"
    return _text(name, found, layout, family, where)


def _grouped(by_key: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return {prefix: {key after it: tensor}}, a VAE alone under "", and the keys that belong nowhere."""
    prefixes = (UNET, VAE, *TEXT_PREFIXES)
    groups: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in by_key.items():
        if LEFTOVER.fullmatch(key):
            continue
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if prefix is None and re.match(r"(encoder|decoder|quant_conv|post_quant_conv)\.", key):
            prefix = ""
        if prefix is None:
            unknown.append(key)
        else:
            groups.setdefault(prefix, {})[key[len(prefix) :]] = tensor
    return groups, unknown


def kind_of(by_key: Mapping[str, Tensor]) -> str:
    """Return what a file is that has no UNet in the original layout."""
    for pattern, kind in OTHERS.items():
        if any(re.match(pattern, key) for key in by_key):
            return f"is {kind}"
    if is_embedding(by_key):
        return "is a textual inversion, not a model: give it with --embedding"
    if any(key.startswith("encoder.down.") for key in by_key):
        return "is a VAE alone: give it with --vae"
    first = ", ".join(map(shown, list(by_key)[:3]))
    return f"is no model that genkit knows: of {len(by_key)} keys none begins with {UNET}; there are {first}"


def _by_build(groups: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return the family of a UNet of unusual width, by how it is built."""
    if config.get("addition_embed_type"):
        return "SDXL refiner" if "conditioner.embedders.0.model." in groups else "SDXL"
    return "SD 2" if config["use_linear_projection"] else "SD 1"


def _parts(groups: Mapping[str, dict[str, Tensor]], config: dict[str, Any], family: str, where: str) -> dict[str, Part]:
    """Return the networks that the file has."""
    config["sample_size"] = SIDES[family]
    modules = unet_modules(len(config["block_out_channels"]), config["layers_per_block"])
    tensors = named(groups[UNET], modules, where, UNET)
    parts = {"unet": network_part("unet", "UNet2DConditionModel", config, tensors, where)}
    if VAE in groups:
        parts["vae"] = _vae(groups[VAE], family, where)
    for prefix, (name, layout) in TEXT_PREFIXES.items():
        if prefix in groups:
            parts[name] = _text(name, groups[prefix], layout, family, f"{where}: {prefix}")
    return parts


def _vae(found: Mapping[str, Tensor], family: str, where: str) -> Part:
    config = vae_config({name: tensor.shape for name, tensor in found.items()}, family, f"{where}: vae")
    tensors = named(found, vae_modules(len(config["block_out_channels"]), config["layers_per_block"]), where, "")
    for name, tensor in tensors.items():
        if re.search(r"\.attentions\.\d\.to_\w+(\.0)?\.weight$", name) and len(tensor.shape) == 4:
            tensors[name] = tensor.as_taken("flat")
    return network_part("vae", "AutoencoderKL", config, tensors, where)


def _text(name: str, found: Mapping[str, Tensor], layout: str, family: str, where: str) -> Part:
    """Return a text encoder; of open_clip's for SD 2 without its last layer, which SD 2 does not use."""
    cls = "CLIPTextModelWithProjection" if name == "text_encoder_2" else "CLIPTextModel"
    tensors: dict[str, Tensor] = {}
    if layout == "clip":
        unused = f"encoder.layers.{VIT_H - 1}." if family == "SD 2" else "-"
        for key, tensor in found.items():
            own = key.removeprefix("text_model.")
            if (own != "text_projection.weight" or name == "text_encoder_2") and not own.startswith(unused):
                tensors[own] = tensor
    else:
        layers = 1 + max(
            (int(m[1]) for key in found if (m := re.match(r"transformer\.resblocks\.(\d+)\.", key))), default=0
        )
        kept = layers - 1 if family == "SD 2" and layers == VIT_H else layers
        tensors = _open_clip(found, openclip_modules(kept), kept, where)
    projection = tensors.pop("text_projection.weight", None)
    width = None if projection is None else projection.shape[0]
    act = "quick_gelu" if layout == "clip" and name == "text_encoder" and family != "SD 2" else "gelu"
    config = clip_config({key: tensor.shape for key, tensor in tensors.items()}, act, where, width)
    if name == "text_encoder_2":
        if projection is None:
            raise InputError(f"{where}text_projection: is missing, which SDXL needs")
        tensors = {f"text_model.{key}": tensor for key, tensor in tensors.items()}
        tensors["text_projection.weight"] = projection
    return network_part(name, cls, config, tensors, where.split(": ")[0])


def _open_clip(found: Mapping[str, Tensor], modules: Mapping[str, str], layers: int, where: str) -> dict[str, Tensor]:
    """Return open_clip's text model under transformers' names, its joint query, key and value as three."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in found.items():
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", key)
        block = re.match(r"transformer\.resblocks\.(\d+)\.", key)
        if block is not None and int(block[1]) >= layers:
            continue
        if match:
            for third, name in enumerate(QKV):
                taken = tensor.as_taken(f"{third}/3")
                tensors[f"encoder.layers.{match[1]}.self_attn.{name}.{match[2]}"] = taken
        elif key == "positional_embedding":
            tensors["embeddings.position_embedding.weight"] = tensor
        elif key == "text_projection":
            tensors["text_projection.weight"] = tensor.as_taken("turned")
        else:
            tensors |= named({key: tensor}, modules, where, "")
    return tensors


def named(found: Mapping[str, Tensor], modules: Mapping[str, str], where: str, prefix: str) -> dict[str, Tensor]:
    """Return the tensors under diffusers' names; some files have those already (merges by other tools)."""
    back = backward(modules)
    named = {}
    for key, tensor in found.items():
        name = renamed(key, modules) or (key if renamed(key, back) else None)
        if name is None:
            raise InputError(f"{where}: {shown(prefix + key)}: has no place in this network")
        named[name] = tensor
    return named


def network_part(name: str, cls: str, config: dict[str, Any], tensors: Mapping[str, Tensor], where: str) -> Part:
    """Return a network of a file, once its config and the shapes of some of its weights are checked."""
    origin = f"{where}: {name}"
    network = NETWORKS[cls]
    checked = check_network(cls, config, origin)
    check_shapes(tensors, network.landmarks(checked), origin, complete=False)
    files = tuple(dict.fromkeys(tensor.file for tensor in tensors.values()))
    return Part(name, cls, files[0].parent, checked, files, tensors, origin=origin)


def _check_missing(parts: Mapping[str, Part], family: str, where: str) -> None:
    """Raise InputError for networks that the file lacks, naming the option that gives them."""
    wanted = {"vae": "--vae"} | ({"text_encoder": "--text-encoder"} if family != "SDXL refiner" else {})
    wanted |= {"text_encoder_2": "--text-encoder"} if family.startswith("SDXL") else {}
    for name, option in wanted.items():
        if name not in parts:
            raise InputError(f"{where}: is of {family}, without a {name}: give {option} FILE or FOLDER to take it from")
    for name in ("text_encoder", "text_encoder_2"):
        if name in parts and parts[name].config["vocab_size"] != VOCABULARY:
            size = parts[name].config["vocab_size"]
            raise InputError(
                f"{where}: its {name} has {size} tokens, and CLIP's tokenizer, the only one here, {VOCABULARY}"
            )
    check_together("text-to-image", parts)


def _complete(config: Any, parts: Mapping[str, Part]) -> None:
    """Fill in what only the text encoders show: the width of each of SDXL's size embeddings."""
    if "text_encoder_2" in parts:
        inputs, projection = config["projection_class_embeddings_input_dim"], parts["text_encoder_2"].config
        count = len(TIME_IDS if "text_encoder" in parts else REFINER_IDS)
        config["addition_time_embed_dim"] = (inputs - projection["projection_dim"]) // count


def _prediction(
    path: Path, by_key: Mapping[str, Tensor], metadata: Mapping[str, str], family: str, asked: str
) -> tuple[str, str]:
    """Return the prediction type, and how it is known where nobody asked for it or the family left no choice."""
    if asked != "auto":
        return asked, ""
    stated = metadata.get("modelspec.prediction_type", "")
    if stated in ("v", "epsilon"):
        return "v_prediction" if stated == "v" else stated, ""
    if "v_pred" in by_key:
        return "v_prediction", ", by its key v_pred"
    beside = path.with_suffix(".yaml")
    if beside.is_file():
        velocity = re.search(r"^\s*parameterization:\s*[\"']?v\b", read_text(beside), re.MULTILINE) is not None
        return "v_prediction" if velocity else "epsilon", f", by {beside.name}"
    if family == "SD 2":
        return (
            "v_prediction",
            ", as SD 2.1 has it, which the file does not show; SD 2's base needs --prediction epsilon",
        )
    return "epsilon", ""
