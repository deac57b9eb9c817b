"""Settings that InvokeAI writes into its pictures, of versions 1 to 6."""

from __future__ import annotations

import re
from typing import Any

from genkit.errors import InputError, shown
from genkit.files import parse_json
from genkit.rows.found import Draft, Found, base_name
from genkit.rows.sdxl import ALIASES

# What a row cannot have, by the key of `invokeai_metadata`; each counts if it is set.
_LACKING = {
    "controlnets": "ControlNet", "ipAdapters": "IP-Adapter", "t2iAdapters": "T2I-Adapter", "hrf_enabled": "hires fix",
    "refiner_model": "refiner", "seamless_x": "tiling", "seamless_y": "tiling",
    "cfg_rescale_multiplier": "guidance rescale", "ref_images": "reference pictures", "regions": "regional prompts",
    "seamless": "tiling", "hires_fix": "hires fix", "variations": "variation seed", "postprocessing": "postprocessing",
    "facetool": "face restoration", "upscale": "upscaling", "threshold": "threshold", "perlin": "perlin noise",
}  # fmt: skip
# Samplers as InvokeAI and its predecessor call them, where genkit's name or alias is another.
_SAMPLERS = {
    "kdpm_2": "dpm2", "kdpm_2_a": "dpm2_ancestral", "k_dpmpp_2": "dpmpp_2m", "dpmpp_2": "dpmpp_2s",
    "k_dpmpp_2_a": "DPM++ 2S a", "dpmpp_2_a": "DPM++ 2S a",
}  # fmt: skip
# Options of a command in `Dream`, and the fields they mean.
_OPTIONS = {"s": "num_inference_steps", "S": "seed", "W": "width", "H": "height", "C": "guidance_scale"}
_OPTION = re.compile(r"(?<=\s)-([A-Za-z]) ?(-?[0-9][^\s-]*|k_\w+|ddim|plms|\S+\.\w+)?(?=\s|$)")


def read_invokeai(text: str) -> Found:
    """Return what `invokeai_metadata` says, of version 3 and later. Raises InputError for damaged JSON or values."""
    data = parse_json(text, "JSON")
    draft = Draft("invokeai")
    draft.text("prompt", data.get("positive_prompt") or "")
    draft.text("negative_prompt", data.get("negative_prompt") or "")
    _numbers(draft, data)
    for name in ("positive_style_prompt", "negative_style_prompt"):
        if data.get(name):
            draft.text(ALIASES[name], data[name])
    _model(draft, data.get("model"))
    draft.tell("vae", _model_name(data.get("vae")))
    draft.tell("version", data.get("app_version"))
    if data.get("clip_skip"):
        draft.clip_skip(data["clip_skip"] + 1 if isinstance(data["clip_skip"], int) else data["clip_skip"])
    loras = data.get("loras") or []
    if not isinstance(loras, list) or not all(isinstance(lora, dict) for lora in loras):
        raise InputError(f"loras: {shown(loras)} is not a list of LoRAs")
    found = [_lora(draft, lora) for lora in loras]
    if found:
        draft.fields["loras"] = found
    if data.get("init_image") or (data.get("strength") and "img2img" in str(data.get("generation_mode"))):
        draft.strength(data.get("strength"), data.get("init_image"))
    if data.get("generation_mode") and re.search("inpaint|outpaint", str(data["generation_mode"])):
        draft.lack("mask_image")
    _lacking(draft, data)
    return draft.done()


def read_sd_metadata(text: str) -> Found:
    """Return what `sd-metadata` says, of version 1.15 to 2.3. Raises InputError for damaged JSON or values."""
    data = parse_json(text, "JSON")
    image = data.get("image")
    if not isinstance(image, dict):
        raise InputError(f"image: {shown(image)} is not an object of settings")
    draft = Draft("invokeai")
    prompt = image.get("prompt")
    if isinstance(prompt, list):
        if len(prompt) > 1:
            draft.lack("blended prompts", f"{len(prompt)} prompts were blended; the row has the first")
        prompt = prompt[0].get("prompt") if prompt and isinstance(prompt[0], dict) else ""
    _prompts(draft, prompt)
    _numbers(draft, {**image, "scheduler": image.get("sampler")})
    draft.tell("model", data.get("model_weights"))
    draft.tell("model_hash", data.get("model_hash"))
    draft.tell("version", data.get("app_version"))
    start = image.get("init_image_path") or image.get("init_img")
    if start or image.get("type") == "img2img":
        draft.strength(image.get("strength", image.get("strength_steps")), start)
    _lacking(draft, image)
    return draft.done()


def read_dream(text: str) -> Found:
    """Return what `Dream`, a command of version 1, says. Raises InputError for a value that is no number."""
    quoted = re.match(r'\s*"(.*)"(?=\s+-|\s*$)', text, re.DOTALL)
    first = _OPTION.search(text)
    end = quoted.end() if quoted else first.start() if first else len(text)
    draft = Draft("invokeai")
    _prompts(draft, quoted[1] if quoted else text[:end])
    for option in _OPTION.finditer(text, end):
        letter, value = option[1], option[2]
        if letter == "S":
            draft.seed(value)
        elif letter in _OPTIONS:
            draft.put(_OPTIONS[letter], value)
        elif letter == "A" and value:
            draft.scheduler(_SAMPLERS.get(value, value))
        elif letter == "I":
            draft.lack("image", "image: the settings start from a picture, which they do not hold")
        else:
            draft.notes.append(f"not used: {shown(option[0])}")
    return draft.done()


def _numbers(draft: Draft, data: dict[str, Any]) -> None:
    draft.put("num_inference_steps", data.get("steps"))
    draft.put("guidance_scale", data.get("cfg_scale"))
    draft.put("width", data.get("width"))
    draft.put("height", data.get("height"))
    draft.seed(data.get("seed"))
    sampler = data.get("scheduler")
    if sampler is not None:
        plain = re.sub(r"(?<=\w)_k$", "", str(sampler))  # of Karras; euler_k, not k_euler
        draft.scheduler(_SAMPLERS.get(plain, plain), "karras" if plain != sampler else None)
    if data.get("rand_device", "cpu") != "cpu":
        draft.notes.append("seed: its noise was drawn on a GPU, genkit's is drawn on the CPU: the picture will differ")


def _prompts(draft: Draft, prompt: Any) -> None:
    """Set both prompts of one text: before version 3 what is in [brackets] was the negative prompt."""
    if not isinstance(prompt, str):
        raise InputError(f"prompt: {shown(prompt)} is not text")
    negative = [part.strip(" ,") for part in re.findall(r"\[([^\[\]]+)\]", prompt)]
    draft.text("prompt", re.sub(r"\[[^\[\]]+\]", "", prompt).strip())
    draft.text("negative_prompt", ", ".join(part for part in negative if part))


def _model_name(model: Any) -> Any:
    return model.get("name") or model.get("model_name") if isinstance(model, dict) else model


def _model(draft: Draft, model: Any) -> None:
    draft.tell("model", _model_name(model))
    if isinstance(model, dict):
        draft.tell("model_hash", model.get("hash"))


def _lora(draft: Draft, lora: dict[str, Any]) -> dict[str, Any]:
    name = _model_name(lora.get("model") or lora.get("lora"))
    weight = lora.get("weight", 0.75)
    if type(weight) not in (int, float):
        raise InputError(f"loras: weight: {shown(weight)} is not a number")
    file = base_name("loras", name)
    if not file.endswith(".safetensors"):
        file += ".safetensors"
        draft.notes.append(f"loras: {shown(name)} is InvokeAI's name; its file is taken to be {shown(file)}")
    return {"file": file, "weight": float(weight), "text_weight": float(weight)}


def _lacking(draft: Draft, data: dict[str, Any]) -> None:
    for key, name in _LACKING.items():
        if data.get(key):
            draft.lack(name)
