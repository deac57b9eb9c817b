"""What a client asks for, as fields of a row, to checked rows: nothing in it may name a file or a URL."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit.components import ModelInfo
from genkit.components.collection import collection
from genkit.components.control import check_fit
from genkit.device.memory import CONTROL
from genkit.errors import InputError, nearest, shown
from genkit.files import place, user_path
from genkit.pictures.images import MAX_BYTES, MAX_PIXELS, as_pil
from genkit.rows.controls import MOST as MOST_CONTROLS
from genkit.rows.found import number
from genkit.rows.plans import TUNED, is_tuned
from genkit.rows.request import Request, canonical
from genkit.rows.result import Result
from genkit.rows.sdxl import PROMPTS
from genkit.rows.syntax import composed, lora_tags
from genkit.rows.wildcards import combinations
from genkit.selection.decide import decide, image_name
from genkit.serve.engine import ServingEngine

PICTURES = ("image", "mask_image")
INLINE = "pictures are sent inline, as data:image/png;base64,… or uploaded; none is read from a path or a URL"
# Fields of rows that are not served, and why
NOT_SERVED = {
    "mask": "a mask in words is not served; send mask_image",
    "mask_threshold": "a mask in words is not served; send mask_image",
    "mask_grow": "a mask in words is not served; send mask_image",
    "mask_invert": "a mask in words is not served; send mask_image",
    "prune": "is not served: give up pictures part-way with `genkit generate`",
    "expansions": "is not served: send a request for each text",
}
MOST_PROMPTS = 8  # composed with AND in one
_DECODING = threading.Semaphore(2)  # pictures that are decoded at once: each may take 200 MB


@dataclasses.dataclass(frozen=True)
class Most:
    """Limits of one request: pixels and steps of a picture, pictures, bytes of its body, characters of a prompt."""

    pixels: int = 2**22
    steps: int = 150
    images: int = 16
    body: int = 2**25
    prompt: int = 10_000


class Planned(list[Request]):
    """Planned rows, and notes of what was assumed or has no effect, as `genkit generate` prints them."""

    notes: tuple[str, ...] = ()


class Intake:
    """Turns clients' fields into planned rows, by the rules of one server.

    loras: files that clients may name, besides those of its options. controls: all ControlNets that they may name.
    """

    def __init__(
        self, engine: ServingEngine, most: Most, loras: Mapping[str, str] | None = None,
        controls: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.engine, self.most = engine, most
        self.loras = dict(loras or {}) | named_loras(engine.defaults.get("loras") or (), engine.options.lora_dir)
        self.controls = dict(controls or {})

    def rows(self, many: Sequence[Mapping[str, Any]]) -> Planned:
        """Return the planned rows of several sets of fields, pictures as `data:` URLs, bytes or PIL images.

        Raises InputError, one line naming the field, for anything that cannot be drawn or is over the limits.
        """
        made = [Request(**self._read(fields)) for fields in many]
        images = sum(row.max_images or row.num_images for row in made)
        if images > self.most.images:
            raise InputError(f"num_images: {images} pictures in one request; this server draws {self.most.images}")
        try:
            job = self.engine.plan(made)
        except InputError as error:
            message = self.without_folders(str(error))
            raise InputError(_alone(message) if len(made) == 1 else message) from None
        for row in job.rows:
            self.check(row)
        rows = Planned(job.rows)
        new = [self.without_folders(note) for note in job.notes if note not in self.engine.job.notes]
        rows.notes = tuple(_alone(note) if len(made) == 1 else note for note in new)
        return rows

    def without_folders(self, message: str) -> str:
        """Return a message for clients: of the server's files the names alone, not where they lie."""
        files = [*self.loras.values(), *self.controls.values()]
        folders = {self.engine.models.info.folder, *(Path(file).parent for file in files)}
        for folder in sorted(map(str, folders), key=len, reverse=True):
            message = message.replace(f"{folder}/", "")
        return message

    def check(self, row: Request) -> None:
        """Raise InputError for a planned row that is over the limits of one picture."""
        width, height, steps = row.width or 1, row.height or 1, row.num_inference_steps or 1
        if width * height > self.most.pixels:
            raise InputError(f"width: {width}x{height} has more than the {self.most.pixels} pixels of this server")
        if steps > self.most.steps:
            raise InputError(f"num_inference_steps: {steps} is more than the {self.most.steps} of this server")

    def _read(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        found = canonical({key: value for key, value in fields.items() if key not in PICTURES})
        found |= {name: picture(name, fields[name]) for name in PICTURES if fields.get(name) is not None}
        for name, why in NOT_SERVED.items():
            if name in found:
                raise InputError(f"{name}: {why}")
        for name in PICTURES:
            if isinstance(found.get(name), str):  # under another tool's name
                found[name] = picture(name, found[name])
        for name in ("prompt", "negative_prompt", *PROMPTS):
            text = found.get(name)
            if isinstance(text, str) and len(text) > self.most.prompt:
                raise InputError(f"{name}: has {len(text)} characters, more than the {self.most.prompt} of this server")
        check_scheduler(found.get("scheduler"))
        if "controls" in found:
            found["controls"] = self.controls_of(found["controls"])
        loras = self.loras_of(found.get("loras"))
        if found.get("syntax", self.engine.defaults.get("syntax")) == "a1111":
            loras += self._written(found)
        if loras or "loras" in found:
            found["loras"] = loras
        return found

    def _written(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        """Take the tags of LoRAs out of a prompt; return them. Refuses what expands to many texts."""
        folder = self.engine.options.wildcards
        for name in ("prompt", "negative_prompt"):
            text = found.get(name)
            if isinstance(text, str) and text:
                try:
                    if len(combinations(text, None if folder is None else user_path(folder), self.most.images)) > 1:
                        raise InputError("stands for several texts; send a request for each")
                    if len(composed(text)) > MOST_PROMPTS:
                        raise InputError(f"composes more than {MOST_PROMPTS} prompts with AND")
                except InputError as error:
                    raise InputError(f"{name}: {error}") from None
        if not isinstance(found.get("prompt"), str):
            return []
        found["prompt"], tags = lora_tags(found["prompt"])
        return [{"file": self.file_of(n), "weight": w, "text_weight": t} for n, w, t in tags]

    def loras_of(self, value: Any) -> list[dict[str, Any]]:
        """Return LoRAs as rows have them, of what a client says: names, or objects with one. Raises InputError."""
        if value is None:
            return []
        if not isinstance(value, list):
            raise InputError(f'loras: {shown(value)} is not a list, as in [{{"name": "style", "weight": 0.8}}]')
        found = []
        for lora in value:
            one = dict(lora) if isinstance(lora, dict) else {"name": lora}
            if "file" in one:
                raise InputError(f"loras: {shown(one['file'])} is a file; a served row names a LoRA of this server")
            name = one.pop("name", None)
            if isinstance(name, str) and name not in self.loras and re.search(r":-?[\d.]+\Z", name):
                name, _, weight = name.rpartition(":")
                one.setdefault("weight", float(weight) if re.fullmatch(r"-?\d*\.?\d+", weight) else weight)
            found.append({**one, "file": self.file_of(name)})
        return found

    def file_of(self, name: Any) -> str:
        """Return the file of a LoRA of this server. Raises InputError."""
        if not isinstance(name, str) or name not in self.loras:
            there = ", ".join(sorted(self.loras)) or "it was started with none"
            raise InputError(
                f"loras: {shown(name)} is no LoRA of this server{nearest(name, self.loras)}; there: {there[:300]}"
            )
        return self.loras[name]

    def controls_of(
        self, value: Any, kept: Callable[[str, Any], Any] = lambda field, image: image
    ) -> list[dict[str, Any]]:
        """Return ControlNets as rows have them, of what a client says: names, and pictures that are sent inline.

        kept: returns what a row has in place of a picture, given its field. Raises InputError.
        """
        if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
            usual = '[{"name": "canny", "image": "data:image/png;base64,…", "weight": 0.8}]'
            raise InputError(f"controls: {shown(value)} is not a list, as in {usual}")

        def read(control: Mapping[str, Any]) -> dict[str, Any]:
            one = dict(control)
            name = one.pop("name", one.pop("file", None))
            file = self.control_file(name)
            if one.get("image") is None:
                raise InputError(f"controls: {shown(name)} has no picture: send it as `image` or `control_image`")
            return {**one, "file": file, "image": kept("control_image", picture("control_image", one["image"]))}

        return limited(value, read)

    def control_file(self, name: Any) -> str:
        """Return the path of a ControlNet of this server. Raises InputError."""
        if not isinstance(name, str) or name not in self.controls:
            there = ", ".join(sorted(self.controls)) or "it was started with none"
            near = nearest(name, self.controls)
            raise InputError(f"controls: {shown(name)} is no ControlNet of this server{near}; there: {there[:300]}")
        return self.controls[name]


def chosen(rows: Sequence[Request], results: list[Result]) -> list[Result]:
    """Return the finished pictures that their row keeps, best first where it ranks; all, if no row chooses."""
    if all(row.keep is None and row.gate is None for row in rows):
        return results
    images = decide(rows, results)["images"]
    ranked = sorted(((images[image_name(r)], r) for r in results), key=lambda one: one[0]["rank"] or 0)
    return [result for about, result in ranked if about["kept"]]


def _alone(message: str) -> str:
    """Return a message about the only row of a request without the row's number."""
    return re.sub(r"\Arequest \d+: ", "", message)


def named_loras(given: Sequence[Mapping[str, Any]], folder: str | None) -> dict[str, str]:
    """Return {name: path} of the LoRAs that a server was started with, those of a folder included.

    Raises InputError for two files of one name.
    """
    files = [Path(lora["file"]) for lora in given]
    if folder is not None:
        files += sorted(user_path(folder).absolute().rglob("*.safetensors"))
    found: dict[str, str] = {}
    for file in files:
        if found.setdefault(file.stem, str(file)) != str(file):
            raise InputError(f"--lora: {file.stem} is the name of {found[file.stem]} and of {file}")
    return found


def limited(many: Sequence[Any], read: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what `read` makes of each ControlNet of a row.

    Raises InputError for too many, before a picture is decoded, and for pictures that are too large together.
    """
    if len(many) > MOST_CONTROLS:
        raise InputError(f"controls: {len(many)} of them; a row has {MOST_CONTROLS} at most")
    found: list[dict[str, Any]] = []
    pixels = 0
    for one in many:
        found.append(read(one))
        width, height = getattr(found[-1]["image"], "size", (0, 0))  # a path where it was written to a file
        pixels += width * height
        if pixels > MAX_PIXELS:
            raise InputError(f"controls: their pictures have more than {MAX_PIXELS} pixels together")
    return found


def named_controls(folder: str | None, variant: str | None, info: ModelInfo | None) -> dict[str, str]:
    """Return {name: path} of the ControlNets in a folder that can be used, with a model if one is given.

    Others are named on stderr with the reason. Raises InputError for a folder that is none.
    """
    found: dict[str, str] = {}
    if folder is None:
        return found
    try:
        items = collection(folder, variant)
    except InputError as error:
        raise InputError(f"--control-dir: {error}") from None
    for item in items:
        why = item.why and f"{place(item.path)}: {item.why}"
        if item.part is not None and info is not None:
            try:
                check_fit(item.part, info.configs["unet"], info.configs.get("vae"))
            except InputError as error:
                why = str(error)
        if why:
            print(f"--control-dir: {item.name} is not served: {why}", file=sys.stderr)
        elif item.kind == CONTROL:
            found[item.name] = str(item.path.absolute())
    return found


def check_scheduler(value: Any) -> None:
    """Raise InputError for a tuned plan that is a file."""
    if is_tuned(value) and value != TUNED:
        raise InputError(f"scheduler: {shown(value)} is a path; a served row names {TUNED!r} alone")


@contextlib.contextmanager
def as_file(data: bytes, field: str = "") -> Iterator[Path]:
    """Yield a file with what a client sent, to be read; an InputError names the field, if any, not the path."""
    with tempfile.TemporaryDirectory(prefix="genkit-sent-") as folder:
        path = Path(folder) / "picture"
        path.write_bytes(data)
        try:
            yield path
        except InputError as error:
            said = str(error).removeprefix(f"{place(path)}: ")
            raise InputError(f"{field}: {said}" if field else said) from None


def picture(field: str, value: Any) -> Any:
    """Return a picture that a client sent, decoded: bytes of a file, a `data:` URL, or a PIL image as it is.

    Raises InputError naming the field.
    """
    if hasattr(value, "getbands"):
        return value
    if isinstance(value, str):
        match = re.match(r"data:image/[a-z0-9.+-]{1,20};base64,", value)
        if match is None:
            raise InputError(f"{field}: {shown(value)}: {INLINE}")
        value = from_base64(field, value[match.end() :])
    if not isinstance(value, bytes):
        raise InputError(f"{field}: {shown(value)}: {INLINE}")
    if not 0 < len(value) <= MAX_BYTES:
        raise InputError(f"{field}: has {len(value)} bytes; a picture has 1 to {MAX_BYTES}")
    try:
        with _DECODING:
            return as_pil(value)
    except InputError as error:
        raise InputError(f"{field}: {error}") from None


def from_base64(field: str, text: str) -> bytes:
    """Return the bytes that base64 text stands for. Raises InputError naming the field."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{field}: {shown(text)} is no base64") from None


def inline(field: str, value: Any) -> Any:
    """Return a picture that is sent as base64, with or without `data:` before it. Raises InputError."""
    if not isinstance(value, str):
        raise InputError(f"{field}: {shown(value)} is no picture in base64")
    return picture(field, value if value.startswith("data:") else from_base64(field, value))


def number_of(name: str, value: Any, like: str = "guidance_scale") -> Any:
    """Return a parameter as the number that a field of a row takes. Raises InputError naming the parameter."""
    try:
        return number(like, value)
    except InputError as error:
        raise InputError(f"{name}{str(error).removeprefix(like)}") from None
