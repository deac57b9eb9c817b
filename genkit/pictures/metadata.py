"""Metadata of a picture: its settings as two texts, and as an EXIF block for formats without text chunks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from typing import Any

from genkit.components.control import network_hash
from genkit.components.info import SINGLE
from genkit.components.weights import hash_once
from genkit.durable import json_line
from genkit.pictures.edges import PREPROCESSORS
from genkit.pictures.samplers import SAMPLERS, SCHEDULE_TYPES

METADATA_BYTES = 48_000  # of both texts; in UTF-16 and ASCII they still fit a JPEG's segment of 65,533
RECORDED = ("id", "index", "seed", "steps", "nfe", "width", "height", "scores", "fingerprint")
_SUFFIX = ".safetensors"
# Fields of a row that AUTOMATIC1111's infotext has keys for; other fields that affect pixels are added as JSON.
_WRITTEN = (
    "prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "width", "height", "scheduler",
    "strength", "image", "mask_image", "loras", "clip_skip", "controls",
)  # fmt: skip
# Keys of a ControlNet in infotext: its field, and the default of that
UNIT = {"Weight": ("weight", 1.0), "Guidance Start": ("start", 0.0), "Guidance End": ("end", 1.0)}
_LEFT_OUT = ("boxes", "detected", "classes", "answers")  # long outputs of vision models among the scores
# Fields of a row that select or score its images and do not affect pixels
CHOOSING = ("id", "num_images", "keep", "gate", "rank_by", "max_images", "prune", "labels", "detect", "ask")


@dataclasses.dataclass(frozen=True)
class Origin:
    """The model and the environment that produced a picture.

    model: its name, without folders. solver: the model's own. weights: SHA-256 of each weight file, as of
    `weight_hashes`. config: `config_hash` of the model's scheduler. tuned: SHA-256 of files of tuned plans. vae: the
    name of a VAE's file in place of the model's own. refiner: name, start and weights of SDXL's.
    segmenter: SHA-256 of each weight file of what finds masks in words.
    """

    model: str
    version: str
    solver: str | None = None
    weights: Mapping[str, str] | None = None
    config: str | None = None
    tuned: Mapping[str, str] | None = None
    vae: str | None = None
    refiner: Mapping[str, Any] | None = None
    segmenter: Mapping[str, str] | None = None
    device: str | None = None
    dtype: str | None = None
    attention: str | None = None
    torch: str | None = None
    format: str | None = None


# Fields of Origin in genkit's record
_TOLD = (
    "weights", "config", "tuned", "refiner", "segmenter", "device", "dtype", "attention", "torch", "format",
)  # fmt: skip


def config_hash(config: Mapping[str, Any]) -> str:
    """Return 16 hex digits of a hash over a config, private keys such as versions left out."""
    told = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def texts(
    request: dict[str, Any],
    record: dict[str, Any],
    origin: Origin,
    solver: Mapping[str, Any] | None = None,
    learned: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the two texts of a picture: `parameters`, which other tools read, and `genkit`, all of it as JSON.

    request: Request.to_json() of a row whose defaults are filled in; record: Result.to_json(). solver: the options of
    the row's scheduler once they are resolved, in place of those in `request`. learned: hashes of the row's textual
    inversions by their words. `parameters` is AUTOMATIC1111's infotext; the JSON is ASCII. Together they take
    METADATA_BYTES at most. Of paths only the file's name is written: pictures travel, folders are private.
    """
    inputs = _inputs(request)
    if solver is None:
        stated = request.get("scheduler")
        solver = stated if isinstance(stated, dict) else {"solver": stated or origin.solver}
    parameters = _clipped(_infotext(request, record, origin, solver, learned or {}), METADATA_BYTES // 3)
    told = {name: value for name in _TOLD if (value := getattr(origin, name))}
    request = without_folders(request)
    found = {"version": origin.version, "model": origin.model, "request": request}
    scores = {name: value for name, value in (record["scores"] or {}).items() if name not in _LEFT_OUT}
    found |= {
        **{name: record[name] for name in RECORDED},
        "scores": scores,
        **told,
        **({"inputs": inputs} if inputs else {}),
    }
    found |= {"embeddings": dict(learned)} if learned else {}
    room = METADATA_BYTES - len(parameters.encode())
    whole = _json(found)
    if len(whole) > room:
        short = {name: value for name, value in request.items() if len(_json(value)) < 1000}
        whole = _json({**found, "request": short, "scores": {}, "cut": True})
    return {"parameters": parameters, "genkit": whole}


def without_folders(request: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a row with the names alone of the files in it."""
    paths = ("image", "mask_image", "scheduler")  # the last may be a file of tuned plans
    found = {k: os.path.basename(v) if k in paths and isinstance(v, str) else v for k, v in request.items()}
    if request.get("loras"):
        found["loras"] = [{**lora, "file": os.path.basename(lora["file"])} for lora in request["loras"]]
    if request.get("controls"):
        names = ("file", "image")
        found["controls"] = [
            {k: os.path.basename(str(v)) if k in names else v for k, v in control.items()}
            for control in request["controls"]
        ]
    return found


def _inputs(request: dict[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each file that a row names: of pictures by their field, of LoRAs by their name.

    Of a ControlNet, which may be a folder, it is `network_hash`.
    """
    files = {name: request[name] for name in ("image", "mask_image") if isinstance(request.get(name), str)}
    files |= {os.path.basename(lora["file"]): lora["file"] for lora in request.get("loras") or ()}
    controls = list(enumerate(request.get("controls") or ()))
    files |= {f"controls[{n}].image": control["image"] for n, control in controls}
    networks = {f"controls[{n}].file": network_hash(control["file"]) for n, control in controls}
    return {name: found for name, file in files.items() if (found := hash_once(file)) is not None} | networks


def exif(text: dict[str, str]) -> bytes:
    """Return an EXIF block of ImageDescription, the genkit record, and UserComment, `parameters` in UTF-16.

    The latter is where AUTOMATIC1111 writes it and others read it. By hand, since Pillow writes a UserComment as BYTE,
    not as the UNDEFINED of EXIF 2.32, table 8. Two directories at 8 and 38, then their values.
    """
    record = text["genkit"].encode("ascii") + b"\0"
    comment = b"UNICODE\0" + text["parameters"].encode("utf-16-be")  # of even length: values begin at even offsets
    image = struct.pack(">H HHII HHII I", 2, 0x010E, 2, len(record), 56 + len(comment), 0x8769, 4, 1, 38, 0)
    inner = struct.pack(">H HHII I", 1, 0x9286, 7, len(comment), 56, 0)
    return b"".join([b"Exif\0\0MM\0\x2a\0\0\0\x08", image, inner, comment, record])


def _infotext(
    request: dict[str, Any],
    record: dict[str, Any],
    origin: Origin,
    solver: Mapping[str, Any],
    learned: Mapping[str, str],
) -> str:
    loras = [(os.path.basename(lora["file"]).removesuffix(_SUFFIX), lora) for lora in request.get("loras") or ()]
    weights = origin.weights or {}
    spacing = solver.get("spacing")
    others = {name: value for name, value in solver.items() if name not in ("solver", "spacing")}
    fields = {
        "Steps": record["steps"] if record["steps"] is not None else request.get("num_inference_steps"),
        "Sampler": _sampler(solver.get("solver")),
        "Schedule type": SCHEDULE_TYPES.get(str(spacing), spacing),
        "Sampler options": json.dumps(others) if others else None,
        "CFG scale": request.get("guidance_scale"),
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model hash": weights[SINGLE][:10] if SINGLE in weights else None,  # AutoV2; sites know none of a folder
        "Model": origin.model.removesuffix(_SUFFIX),
        "Clip skip": request.get("clip_skip"),
        "VAE hash": weights.get(f"vae/{origin.vae}", "")[:10] or None,
        "VAE": origin.vae,
        "Denoising strength": request.get("strength"),
        "Refiner": (origin.refiner or {}).get("name"),
        "Refiner switch at": (origin.refiner or {}).get("start"),
        "Mask": os.path.basename(str(mask)) if (mask := request.get("mask_image")) else None,
        "Lora hashes": _hashes({name: hash_once(lora["file"], weights_only=True) for name, lora in loras}),
        "TI hashes": _hashes(learned),
        **{f"ControlNet {n}": _unit(c) for n, c in enumerate(request.get("controls") or ())},
        "Row": _rest(without_folders(request)),
        "Version": f"genkit {origin.version}",
    }
    negative = request.get("negative_prompt")
    prompt = " ".join([str(request.get("prompt", "")), *(_tag(name, lora) for name, lora in loras)])
    lines = [prompt, *([f"Negative prompt: {negative}"] if negative else [])]
    return "\n".join([*lines, ", ".join(f"{k}: {_quoted(v)}" for k, v in fields.items() if v is not None)])


def _rest(request: dict[str, Any]) -> str | None:
    """Return as JSON the fields that AUTOMATIC1111 has no words for; "cut" if they are too long for a line."""
    rest = {
        name: value
        for name, value in request.items()
        if name not in (*_WRITTEN, *CHOOSING, "meta") and value is not None
    }
    text = _json(rest) if rest else None
    return text if text is None or len(text) <= 2000 else "cut"


def _sampler(solver: Any) -> Any:
    return SAMPLERS.get(str(solver), os.path.basename(solver) if isinstance(solver, str) else solver)


def _tag(name: str, lora: Mapping[str, Any]) -> str:
    """Return a LoRA as AUTOMATIC1111 writes it into the prompt: of two numbers the first is the text encoder's."""
    weight, on_text = lora.get("weight", 1.0), lora.get("text_weight", lora.get("weight", 1.0))
    return f"<lora:{name}:{'' if on_text == weight else f'{_number(on_text)}:'}{_number(weight)}>"


def _unit(control: Mapping[str, Any]) -> str:
    """Return a ControlNet as sd-webui-controlnet writes it; of a file with 8 digits of its hash."""
    preprocess, file = control.get("preprocess", "none"), control["file"]
    digits = hash_once(file) if file.endswith(_SUFFIX) else None
    name = os.path.basename(file).removesuffix(_SUFFIX)
    told = {
        "Module": next(name for name, kind in PREPROCESSORS.items() if kind == preprocess),
        "Model": name if digits is None else f"{name} [{digits[:8]}]",
        **{key: f"{control.get(field, usual):g}" for key, (field, usual) in UNIT.items()},
        "Control Mode": "Balanced",
    }
    return ", ".join(f"{key}: {value}" for key, value in told.items())


def _hashes(hashes: Mapping[str, str | None]) -> str | None:
    """Return "name: 12 digits, …", as AUTOMATIC1111 has the AutoV3 of LoRAs and textual inversions."""
    return ", ".join(f"{name}: {digits[:12]}" for name, digits in hashes.items() if digits) or None


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _quoted(value: Any) -> str:
    text = _number(value) if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def _clipped(text: str, limit: int) -> str:
    """Cut the middle out of a text of more than `limit` bytes: its last line is what other tools look for."""
    data = text.encode("utf-8", "replace")  # of half surrogates, which a folder's name may hold
    if len(data) <= limit:
        return data.decode()
    last = len(data) - data.rfind(b"\n")
    tail = data[-min(max(2000, last), limit // 2) :].decode("utf-8", "ignore")
    return data[: limit - len(tail.encode()) - 3].decode("utf-8", "ignore") + "…" + tail


def _json(value: Any) -> str:
    return json.dumps(json.loads(json_line(value)))  # which has made null of NaN
