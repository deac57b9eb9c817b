"""The images API of OpenAI: /v1/images/generations and edits, and /v1/models."""

from __future__ import annotations

import base64
import json
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from genkit.errors import InputError
from genkit.rows.request import Request as Row
from genkit.rows.result import Result
from genkit.serve.calls import Serving, bad, encoded, failed, pictures
from genkit.serve.limits import STATUSES, Refused, alone
from genkit.serve.line import Event
from genkit.serve.openaifields import STOOD_FOR, Wanted, not_served, of_form, pictures_of, wanted
from genkit.serve.rows import Planned, chosen

KEPT_SECONDS, KEPT_BYTES = 3600.0, 2**28  # of pictures that are answered as a URL
LARGEST_PART = 2**20  # of a form, that is text
USAGE = {  # pictures are not made of tokens
    "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}  # fmt: skip


class Generation(BaseModel):
    """A request for pictures. Fields of genkit's rows, as seed, steps, guidance_scale, gate, may stand beside these."""

    model_config = ConfigDict(extra="allow", title="Generation")
    prompt: str = Field(description="What to draw.")
    model: str | None = Field(None, description="The served model's name, or one that stands for it.")
    n: int | None = Field(None, description="Pictures.")
    size: str | None = Field(None, description="auto, or as 1024x1024.")
    output_format: str | None = Field(None, description="png, webp or jpeg.")
    output_compression: int | None = Field(None, description="Of webp and jpeg, 0 to 100.")
    response_format: str | None = Field(None, description="b64_json, or url: kept for an hour.")
    stream: bool | None = Field(None, description="Answer with events.")
    partial_images: int | None = Field(None, description="With stream: unfinished pictures of each, 0 to 3.")


FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image", "prompt"],
                    "properties": {
                        "image": {"type": "string", "format": "binary", "description": "The picture to start from."},
                        "mask": {
                            "type": "string", "format": "binary", "description": "Transparent where to draw anew.",
                        },
                        **{name: {"type": "string"} for name in ("prompt", "model", "size", "n", "seed", "steps")},
                    },
                }
            }
        },
    }
}  # fmt: skip


def error(refused: Refused) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(refused.status_code)
    kind = kind or ("invalid_request_error" if refused.status_code < 500 else "server_error")
    return {"error": {"message": refused.detail, "type": kind, "param": refused.param, "code": refused.code}}


ERRORS = {"/v1/": error}


class Shelf:
    """Pictures that are fetched later, under names that nobody guesses: for an hour, or until there are too many."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    def put(self, data: bytes, suffix: str) -> str:
        """Keep a file; return its name."""
        name = f"{secrets.token_urlsafe(24)}{suffix}"
        with self._lock:
            self._kept[name] = time.monotonic(), data
            self._tidy()
        return name

    def get(self, name: str) -> bytes | None:
        """Return the file of that name, if it is still there."""
        with self._lock:
            self._tidy()
            return self._kept.get(name, (0.0, None))[1]

    def _tidy(self) -> None:
        held = sum(len(data) for _, data in self._kept.values())
        while self._kept:
            since, data = next(iter(self._kept.values()))
            if time.monotonic() - since < KEPT_SECONDS and (held <= KEPT_BYTES or len(self._kept) == 1):
                return
            held -= len(data)
            self._kept.popitem(last=False)


def router(serving: Serving) -> APIRouter:
    """Return the routes of the interface."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])
    began, shelf = int(time.time()), Shelf()
    found: dict[int | str, Any] = {code: STATUSES[code] for code in (400, 422, 429, 500, 503)}

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": began, "owned_by": "genkit"}

    @routes.get("/models")
    async def models() -> Response:
        """List the models that are served."""
        return JSONResponse({"object": "list", "data": [described(name) for name in serving.models]})

    @routes.get("/models/{name:path}", responses={404: STATUSES[404]})
    async def model(name: str) -> Response:
        """Describe a served model."""
        if name not in serving.models and name not in STOOD_FOR:
            raise _no_model(not_served("model", name[:100], serving.models))
        return JSONResponse(described(name))

    @routes.post("/images/generations", responses={404: STATUSES[404], **found})
    async def generations(body: Generation, call: Request) -> Response:
        """Draw pictures of a prompt."""
        return await _answered(serving, shelf, call, body.model_dump(), {}, "image_generation")

    @routes.post("/images/edits", responses={404: STATUSES[404], **found}, openapi_extra=FORM)
    async def edits(call: Request) -> Response:
        """Draw a picture anew: all of it, or what is transparent in its mask."""
        given, files = await _form(call)
        return await _answered(serving, shelf, call, given, files, "image_edit")

    @routes.get("/images/files/{name}", responses={404: STATUSES[404]}, response_class=Response)
    async def kept(name: str) -> Response:
        """Return a picture that was answered as a URL."""
        data = shelf.get(name)
        if data is None:
            raise Refused(404, "there is no such picture, or no longer: they are kept for an hour", "not_found")
        kinds = {"png": "image/png", "webp": "image/webp", "jpg": "image/jpeg"}
        return Response(data, media_type=kinds[name.rpartition(".")[2]])

    return routes


async def _form(call: Request) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the parameters and the files of an edit. Raises Refused."""
    if not call.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused(400, "an edit is a form of the type multipart/form-data", "invalid_request")
    texts: dict[str, str] = {}
    files: dict[str, bytes] = {}
    async with call.form(max_files=4, max_fields=100, max_part_size=LARGEST_PART) as form:
        for key, part in form.multi_items():
            name = key.removesuffix("[]")
            if name in texts or name in files:
                raise bad(f"{name}: is there twice; this server takes one")
            if isinstance(part, UploadFile):
                if name not in ("image", "mask"):
                    raise bad(f"{name}: is a file; files are image and mask")
                files[name] = await part.read()
            elif name in ("image", "mask", "mask_image"):
                raise bad(f"{name}: is text; pictures are uploaded as files")
            else:
                texts[name] = part
    if "image" not in files:
        raise bad("image: is missing: the picture to start from, uploaded as a file")
    try:
        return of_form(texts), files
    except InputError as error:
        raise bad(str(error)) from None


async def _answered(
    serving: Serving, shelf: Shelf, call: Request, given: Mapping[str, Any], files: dict[str, bytes], kind: str
) -> Response:
    try:
        asked = wanted(given, serving.models)
        serving = serving.of(given.get("model"))
        fields = asked.fields
        if files:
            drawn = await run_in_threadpool(pictures_of, files["image"], files.get("mask"))
            fields = {**drawn, **fields}
    except LookupError as missing:
        raise _no_model(str(missing.args[0])) from None
    except InputError as wrong:
        raise bad(str(wrong)) from None
    if asked.url and serving.replica:
        raise alone("response_format: url (ask for b64_json): pictures at a URL are", "response_format")
    rows = await serving.rows([fields])
    if asked.stream:
        steps = rows[0].num_inference_steps or 1
        events = await serving.events(call, rows, previews=max(1, steps // (asked.partial + 1)) if asked.partial else 0)
        return StreamingResponse(_streamed(serving, asked, rows, events, kind), media_type="text/event-stream")
    found = _kept(rows, await pictures(await serving.events(call, rows)))
    data = [await _datum(asked, shelf, call, result) for result in found]
    about = {"output_format": asked.form.name, "background": "opaque", "size": _size(found[0])}
    return JSONResponse({"created": int(time.time()), "data": data, **about, **_notes(serving, rows)})


def _notes(serving: Serving, rows: Planned) -> dict[str, Any]:
    """Return the field `notes`, which OpenAI's API lacks: what was assumed or ignored; {} if there is nothing."""
    found = [*rows.notes, *serving.engine.cut(rows)]
    return {"notes": found} if found else {}


async def _datum(asked: Wanted, shelf: Shelf, call: Request, result: Result) -> dict[str, Any]:
    content = await encoded(asked.form, result.pixels)
    if asked.url:
        picture = {"url": str(call.url_for("kept", name=shelf.put(content, asked.form.suffix)))}
    else:
        picture = {"b64_json": base64.b64encode(content).decode()}
    return {**picture, **_about(result)}


def _about(result: Result) -> dict[str, Any]:
    """Return the fields of a picture that OpenAI's API lacks: seed and steps, which draw it again, and scores."""
    scores = {name: value for name, value in result.scores.items() if name not in ("nan", "flat")}
    return {"seed": result.seed, "steps": result.steps, **({"scores": scores} if scores else {})}


def _size(result: Result) -> str:
    return f"{result.width}x{result.height}"


def _kept(rows: list[Row], results: list[Result]) -> list[Result]:
    """Return the pictures that their row keeps, best first where it ranks. Raises Refused if none passes."""
    found = chosen(rows, results)
    if not found:
        raise Refused(422, f"none of {len(results)} pictures passes the gate", "none_passed", "gate")
    return found


async def _streamed(
    serving: Serving, asked: Wanted, rows: Planned, events: AsyncIterator[Event], kind: str
) -> AsyncIterator[str]:  # fmt: skip
    about = {"background": "opaque", "output_format": asked.form.name, "quality": "auto"}
    partial: dict[int, int] = {}
    done: list[Result] = []
    row = rows[0]
    whole = row.keep is None and row.gate is None  # else what is kept is known at the end only
    try:
        async for event in events:
            if event["type"] == "failed":
                raise failed(event)
            if event["type"] == "preview" and partial.get(event["index"], 0) < asked.partial:
                number = partial[event["index"]] = partial.get(event["index"], 0) + 1
                content = await encoded(asked.form, await run_in_threadpool(_enlarged, event["image"], row))
                named = {"partial_image_index": number - 1, "size": f"{row.width}x{row.height}"}
                yield _event(f"{kind}.partial_image", content, {**about, **named})
            if event["type"] == "image":
                done.append(event["result"])
                if whole:
                    yield await _completed(asked, done[-1], kind, {**about, **_notes(serving, rows)})
        for result in () if whole else _kept(rows, done):
            yield await _completed(asked, result, kind, {**about, **_notes(serving, rows)})
    except Refused as refused:
        yield f"event: error\ndata: {json.dumps(error(refused))}\n\n"
    finally:
        await events.aclose()  # type: ignore[attr-defined]


async def _completed(asked: Wanted, result: Result, kind: str, about: dict[str, Any]) -> str:
    content = await encoded(asked.form, result.pixels)
    more = {"size": _size(result), "usage": USAGE, **_about(result)}
    return _event(f"{kind}.completed", content, {**about, **more})


def _event(name: str, content: bytes, about: dict[str, Any]) -> str:
    data = {"type": name, "b64_json": base64.b64encode(content).decode(), "created_at": int(time.time()), **about}
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _enlarged(pixels: Any, row: Row) -> Any:
    """Return a preview at the size of the picture."""
    import numpy as np
    from PIL import Image

    size = row.width or pixels.shape[1], row.height or pixels.shape[0]
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _no_model(message: str) -> Refused:
    return Refused(404, re.sub(r"\s+", " ", message), "model_not_found", "model")
