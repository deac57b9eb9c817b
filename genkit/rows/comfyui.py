"""Settings of a ComfyUI graph, as "Save (API format)" and its pictures have it, followed back from the sampler."""

from __future__ import annotations

from typing import Any

from genkit.errors import InputError, shown
from genkit.rows.found import Draft, Found, base_name, number

Graph = dict[str, Any]

SAMPLERS = ("KSampler", "KSamplerAdvanced")
_MOST_NODES = 10_000
_VALUES = ("value", "text", "string", "prompt", "seed", "noise_seed", "int", "float", "number")  # of nodes with one
_COMBINED = ("ConditioningCombine", "ConditioningConcat", "ConditioningAverage", "ConditioningSetArea")

# Of CLIPTextEncodeSDXL, by a row's field
_SIZES = {
    "original_size": ("width", "height"),
    "crop": ("crop_w", "crop_h"),
    "target_size": ("target_width", "target_height"),
}


def is_graph(data: Any) -> bool:
    """Whether JSON is a graph of ComfyUI: its API format, or the workflow of its editor."""
    if not isinstance(data, dict):
        return False
    nodes = data.get("nodes")
    return (isinstance(nodes, list) and "links" in data) or any(
        isinstance(node, dict) and "class_type" in node for node in data.values()
    )


def read_graph(graph: Graph) -> Found:
    """Return what the first sampler of a graph draws: prompts, size, steps, LoRAs, model.

    `about` has batch_size where it is not 1. Raises InputError, naming node and input, for a graph without exactly one
    first KSampler or KSamplerAdvanced, and for what comes from a node that is not read.
    """
    _check(graph)
    draft = Draft("comfyui")
    name = _first_sampler(graph, draft)
    inputs = graph[name]["inputs"]
    _text(graph, draft, "prompt", inputs.get("positive"))
    _text(graph, draft, "negative_prompt", inputs.get("negative"))
    draft.seed(_scalar(graph, name, "noise_seed" if "noise_seed" in inputs else "seed"))
    draft.put("guidance_scale", _scalar(graph, name, "cfg"))
    draft.scheduler(_scalar(graph, name, "sampler_name"), _scalar(graph, name, "scheduler"))
    _steps(graph, draft, name)
    _model(graph, draft, inputs)
    vaes = {str(n["inputs"].get("vae_name")) for n in graph.values() if n["class_type"] == "VAELoader"}
    draft.tell("vae", vaes.pop() if len(vaes) == 1 else None)
    return draft.done()


def _check(graph: Graph) -> None:
    if isinstance(graph.get("nodes"), list):
        raise InputError("is a workflow of ComfyUI's editor; save the graph with Export (API)")
    if not graph or len(graph) > _MOST_NODES:
        raise InputError(f"has {len(graph)} nodes; a graph of ComfyUI has 1 to {_MOST_NODES}")
    for name, node in graph.items():
        if not isinstance(node, dict) or not isinstance(node.get("class_type"), str):
            raise InputError(f"node {shown(name)}: has no class_type; is this a graph of ComfyUI?")
        if not isinstance(node.get("inputs"), dict):
            raise InputError(f"node {shown(name)}: inputs: {shown(node.get('inputs'))} is not an object")


def _called(graph: Graph, name: str) -> str:
    return f"node {shown(name)} ({shown(graph[name]['class_type'])[1:-1]})"


def _source(graph: Graph, value: Any) -> str | None:
    """Return the node that an input is linked to; None for a value."""
    if not isinstance(value, list):
        return None
    if len(value) != 2 or not isinstance(value[0], str) or type(value[1]) is not int:
        raise InputError(f"{shown(value)} is not a link to a node")
    if value[0] not in graph:
        raise InputError(f"{shown(value)}: links to a node that the graph lacks")
    return value[0]


def _scalar(graph: Graph, name: str, key: str) -> Any:
    """Return the value of an input, which may come through nodes that hold one. Raises InputError for others."""
    start, seen = name, set()
    value = graph[name]["inputs"].get(key)
    while (source := _source(graph, value)) is not None:
        inputs = graph[source]["inputs"]
        held = [inputs[k] for k in _VALUES if k in inputs]
        if source in seen or len(held) != 1:
            raise InputError(f"{_called(graph, start)}: {key} comes from {_called(graph, source)}, which is not read")
        seen.add(source)
        value = held[0]
    return value


def _first_sampler(graph: Graph, draft: Draft) -> str:
    """Return the sampler that starts from noise or a picture, not from the latents of another."""
    names = [name for name, node in graph.items() if node["class_type"] in SAMPLERS]
    if not names:
        others = [node["class_type"] for node in graph.values() if "sampler" in node["class_type"].lower()]
        hint = f"; it samples with {shown(others[0])}, which is not read" if others else ""
        raise InputError(f"has no KSampler or KSamplerAdvanced{hint}")
    drafts = {name: Draft("comfyui") for name in names}
    first = [name for name in names if _latent(graph, drafts[name], name)]
    if len(first) != 1:
        raise InputError(f"has {len(first)} samplers that start a picture; one is read")
    draft.fields.update(drafts[first[0]].fields)
    draft.about.update(drafts[first[0]].about)
    draft.notes += drafts[first[0]].notes
    draft.lacking += drafts[first[0]].lacking
    if len(names) > 1:
        draft.lack("second pass", f"{len(names) - 1} more samplers draw on its result; the row has the first alone")
    return first[0]


def _latent(graph: Graph, draft: Draft, sampler: str) -> bool:
    """Read where the latents of a sampler come from; return False if it is another sampler."""
    seen, value = {sampler}, graph[sampler]["inputs"].get("latent_image")
    while (source := _source(graph, value)) is not None and source not in seen:
        seen.add(source)
        kind, inputs = graph[source]["class_type"], graph[source]["inputs"]
        if kind.startswith("Empty") and "width" in inputs:
            draft.put("width", _scalar(graph, source, "width"))
            draft.put("height", _scalar(graph, source, "height"))
            batch = number("num_images", _scalar(graph, source, "batch_size") or 1)
            if batch > 1:
                draft.about["batch_size"] = batch
                draft.notes.append(f"a batch of {batch}: ComfyUI draws its noise at once, so all but the first differ")
            return True
        if "sampler" in kind.lower():
            return False
        if kind == "SetLatentNoiseMask" or kind.startswith("VAEEncodeForInpaint"):
            draft.lack("mask_image")
        if kind.startswith("VAEEncode"):
            draft.strength(None, _picture(graph, inputs.get("pixels")))
            return True
        value = inputs.get("samples")
    raise InputError(f"{_called(graph, sampler)}: latent_image comes from nothing that is read")


def _picture(graph: Graph, value: Any) -> Any:
    """Return the name of the picture that is encoded, if it is loaded from a file."""
    seen: set[str] = set()
    while (source := _source(graph, value)) is not None and source not in seen:
        seen.add(source)
        inputs = graph[source]["inputs"]
        if graph[source]["class_type"].startswith("LoadImage"):
            return inputs.get("image") if isinstance(inputs.get("image"), str) else None
        value = inputs.get("image", inputs.get("pixels"))
    return None


def _steps(graph: Graph, draft: Draft, name: str) -> None:
    inputs = graph[name]["inputs"]
    steps = number("num_inference_steps", _scalar(graph, name, "steps"))
    strength = number("strength", _scalar(graph, name, "denoise")) if "denoise" in inputs else 1.0
    if "image" in draft.lacking:
        draft.fields["strength"] = strength
    elif strength < 1:
        draft.lack("denoise", f"denoise {strength:g} of an empty latent: the row denoises all of it")
    if 0 < strength < 1:  # ComfyUI does all `steps` within the part of the schedule; genkit that part of the steps
        whole = int(steps / strength)
        draft.notes.append(f"num_inference_steps: {whole}, of which strength {strength:g} leaves ComfyUI's {steps}")
        steps = whole if "image" in draft.lacking else steps
    draft.put("num_inference_steps", steps)
    if graph[name]["class_type"] == "KSamplerAdvanced":
        start, end = (number(k, _scalar(graph, name, k) or 0) for k in _PART)
        if start > 0 or end < steps or inputs.get("add_noise", "enable") != "enable":
            draft.lack("part of the steps", f"steps {start:g} to {end:g} of {steps}: the row does all of them")


def _text(graph: Graph, draft: Draft, field: str, value: Any) -> None:
    """Set a prompt from the conditioning of a sampler."""
    seen: set[str] = set()
    while (source := _source(graph, value)) is not None and source not in seen:
        seen.add(source)
        kind, inputs = graph[source]["class_type"], graph[source]["inputs"]
        if kind == "ConditioningZeroOut":
            draft.notes.append(f"{field}: its conditioning is zeros; the row's is of an empty text")
            return
        if kind.startswith("CLIPTextEncode"):
            keys = [key for key in ("text", "text_g", "text_l") if key in inputs]
            found = [_scalar(graph, source, key) for key in keys]
            if not found:
                raise InputError(f"{_called(graph, source)}: has no text")
            both = keys == ["text_g", "text_l"] and found[0] != found[1]
            if both and all(isinstance(text, str) and text.strip() for text in found):  # the first encoder reads text_l
                draft.text(field, found[1])
                draft.text(f"{field}_2", found[0])
            else:
                if both:
                    draft.lack("two prompts", f"{field}: one text encoder has none; the row has that of the larger")
                draft.text(field, found[0])
            _sizes(graph, draft, source, "negative_" if field == "negative_prompt" else "")
            return
        if kind.startswith(_COMBINED):
            raise InputError(f"{_called(graph, source)}: combined prompts are not read")
        draft.lack("ControlNet" if "ControlNet" in kind else shown(kind)[1:-1])
        if kind.startswith("ControlNetApply") and field == "prompt":
            _control(graph, draft, source)
        second = isinstance(value, list) and value[1] == 1 and "negative" in inputs
        value = inputs.get("negative") if second else inputs.get("positive", inputs.get("conditioning"))
    raise InputError(f"{field}: comes from nothing that is read")


def _control(graph: Graph, draft: Draft, source: str) -> None:
    """Record the weight and the range of a ControlNet; a picture and a network are then to be given."""
    inputs = graph[source]["inputs"]
    told = {field: number(key, _scalar(graph, source, key)) for key, field in _CONTROL.items() if key in inputs}
    if (told.get("start", 0.0), told.get("end", 1.0)) != (0, 1):
        draft.notes.append("control_start, control_end: are parts of the noise schedule there, and of the steps here")
    draft.about.setdefault("controls", []).insert(0, told)


def _sizes(graph: Graph, draft: Draft, source: str, side: str) -> None:
    """Set the sizes that a node tells SDXL, unless they are those of the picture. side: "negative_" or ""."""
    told = {}
    for field, keys in _SIZES.items():
        if all(key in graph[source]["inputs"] for key in keys):
            told[field] = [number("width", _scalar(graph, source, key)) for key in keys]
    size = [draft.fields.get("width"), draft.fields.get("height")]
    usual = {field: draft.fields.get(field, [0, 0] if field == "crop" else size) for field in told}
    if any(told[field] != usual[field] for field in told):
        draft.fields |= {f"{side}{field}": pair for field, pair in told.items() if side or pair != usual[field]}


def _model(graph: Graph, draft: Draft, inputs: dict[str, Any]) -> None:
    """Follow the model back through its LoRAs to the file."""
    on_text = _text_loras(graph, draft, inputs.get("positive"))
    loras: list[dict[str, Any]] = []
    seen: set[str] = set()
    value = inputs.get("model")
    while (source := _source(graph, value)) is not None and source not in seen:
        seen.add(source)
        kind, given = graph[source]["class_type"], graph[source]["inputs"]
        file = next((given[k] for k in ("ckpt_name", "unet_name") if isinstance(given.get(k), str)), None)
        if kind in ("LoraLoader", "LoraLoaderModelOnly"):
            weight = number("strength_model", _scalar(graph, source, "strength_model"))
            text = number("strength_clip", _scalar(graph, source, "strength_clip")) if source in on_text else 0.0
            name = base_name("loras", _scalar(graph, source, "lora_name"))
            if weight or text:
                loras.append({"file": name, "weight": weight, "text_weight": text})
        elif file is not None:
            draft.tell("model", base_name("model", file))
        else:
            draft.lack(shown(kind)[1:-1])
        value = given.get("model")
    if loras:
        draft.fields["loras"] = loras[::-1]  # in the order in which they are applied


def _text_loras(graph: Graph, draft: Draft, value: Any) -> set[str]:
    """Return the nodes between the text encoder and its model: a LoRA among them changes the text encoder, too."""
    seen: set[str] = set()
    while (source := _source(graph, value)) is not None and source not in seen:
        seen.add(source)
        inputs = graph[source]["inputs"]
        if graph[source]["class_type"] == "CLIPSetLastLayer":
            draft.clip_skip(-number("clip_skip", _scalar(graph, source, "stop_at_clip_layer")))
        value = inputs.get("clip", inputs.get("positive", inputs.get("conditioning")))
    return seen


_CONTROL = {"strength": "weight", "start_percent": "start", "end_percent": "end"}
_PART = ("start_at_step", "end_at_step")
