"""Metadata of a picture: its settings as two texts, and as an EXIF block for formats without text chunks."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from typing import Any

from genkit.durable import json_line

METADATA_BYTES = 48_000  # of both texts; in UTF-16 and ASCII they still fit a JPEG's segment of 65,533
RECORDED = ("id", "index", "seed", "steps", "nfe", "width", "height", "scores", "fingerprint")


def texts(
    request: dict[str, Any], record: dict[str, Any], model: str, version: str, words: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the two texts of a picture: `parameters`, which other tools read, and `genkit`, all of it as JSON.

    request: Request.to_json() of a row whose defaults are filled in; record: Result.to_json(). words: SHA-256 of
    the textual inversion that each word stands for. `parameters` is AUTOMATIC1111's infotext; the JSON is ASCII.
    Together they take METADATA_BYTES at most. Of paths only the file's name is written: pictures travel, folders are
    private.
    """
    request = {
        name: os.path.basename(value) if name in ("image", "mask_image") else value for name, value in request.items()
    }
    if request.get("loras"):
        loras = [{**lora, "file": os.path.basename(lora["file"])} for lora in request["loras"]]
        request = {**request, "loras": loras}
    parameters = _clipped(_infotext(request, record, model, version, words or {}), METADATA_BYTES // 3)
    found = {"version": version, "model": model, "request": request, **{name: record[name] for name in RECORDED}}
    found |= {"embeddings": dict(words)} if words else {}
    room = METADATA_BYTES - len(parameters.encode())
    whole = _json(found)
    if len(whole) > room:
        short = {name: value for name, value in request.items() if len(_json(value)) < 1000}
        found.pop("embeddings", None)
        whole = _json({**found, "request": short, "scores": {}, "cut": True})
    return {"parameters": parameters, "genkit": whole}


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
    request: dict[str, Any], record: dict[str, Any], model: str, version: str, words: Mapping[str, str]
) -> str:
    scheduler = request.get("scheduler")
    options = scheduler if isinstance(scheduler, dict) else {"solver": scheduler}
    fields = {
        "Steps": record["steps"] if record["steps"] is not None else request.get("num_inference_steps"),
        "Sampler": _SAMPLERS.get(str(options.get("solver")), options.get("solver")),
        "Schedule type": options.get("spacing"),
        "CFG scale": request.get("guidance_scale"),
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model": model,
        "Denoising strength": request.get("strength"),
        "TI hashes": ", ".join(f"{word}: {digest[:12]}" for word, digest in words.items()) or None,
        "Version": f"genkit {version}",
    }
    negative = request.get("negative_prompt")
    lines = [str(request.get("prompt", "")), *([f"Negative prompt: {negative}"] if negative else [])]
    return "\n".join([*lines, ", ".join(f"{k}: {_quoted(v)}" for k, v in fields.items() if v is not None)])


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def _clipped(text: str, limit: int) -> str:
    """Cut the middle out of a text of more than `limit` bytes: its last line is what other tools look for."""
    data = text.encode("utf-8", "replace")  # of half surrogates, which a folder's name may hold
    if len(data) <= limit:
        return data.decode()
    tail = data[-min(2000, limit // 2) :].decode("utf-8", "ignore")
    return data[: limit - len(tail.encode()) - 3].decode("utf-8", "ignore") + "…" + tail


def _json(value: Any) -> str:
    return json.dumps(json.loads(json_line(value)))  # which has made null of NaN


_SAMPLERS = {
    "ddim": "DDIM", "ddpm": "DDPM", "euler": "Euler", "euler_ancestral": "Euler a", "heun": "Heun", "lms": "LMS",
    "dpmpp_2m": "DPM++ 2M", "sde-dpmpp_2m": "DPM++ 2M SDE", "pndm": "PLMS", "dpm2": "DPM2", "unipc": "UniPC",
}  # fmt: skip
