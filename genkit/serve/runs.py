"""Runs over HTTP: a prompt file in, a run folder that the server draws whatever happens, its pictures out."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from genkit.errors import HostError, InputError, shown
from genkit.pages.large import DATA
from genkit.rows.request import SEED_LIMIT
from genkit.rows.typed import integer
from genkit.runs.records import PICTURE, RESULTS
from genkit.serve.calls import Serving, bad, client_of
from genkit.serve.engine import Full
from genkit.serve.limits import STATUSES, Refused
from genkit.serve.served import Conflict, Runs, check_name
from genkit.serve.store import NAME, Served, owner_of
from genkit.serve.uploads import SUFFIXES

POLL = 0.2  # seconds between looks at the records of a run that is followed
QUIET = 15.0  # seconds after which a line says that the connection is alive
BLOCK = 2**20  # bytes of records read at a time
NUMBERS = {"seed": (0, SEED_LIMIT - 1), "quality": (1, 100)}  # whole numbers, each with the least and the most
KINDS = {".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg", ".jxl": "image/jxl"}
GALLERY_POLICY = "frame-ancestors 'self'"
GALLERY_FILE = re.compile(r"[0-9a-f-]{1,80}(?:/[a-z0-9]{1,20}){1,3}\.js")  # of a large run, see genkit/pages/large.py
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            **{kind: {"schema": {"type": "string"}} for kind in SUFFIXES if kind != "application/json"},
            "application/json": {"schema": {"type": "object"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object", "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        **{name: {"type": "string"} for name in ("seed", "format", "quality", "format_in")},
                    },
                }
            },
        },
    }
}  # fmt: skip
GONE: dict[int | str, Any] = {code: STATUSES[code] for code in (400, 404)}
CONFLICT: dict[int | str, Any] = {409: {**STATUSES[404], "description": "It does not go with what is there"}}


class Filter(BaseModel):
    """What of a run's pictures to keep, in place of what its rows say."""

    model_config = ConfigDict(extra="forbid")
    where: str | None = Field(None, max_length=2000, description="What an image must pass, say clip > 0.25.")
    rank_by: str | None = Field(None, max_length=2000, description="What 'best' means.")
    keep: int | None = Field(None, ge=1, le=100_000, description="Keep the best so many of a row.")


def router(serving: Serving) -> APIRouter:
    """Return the routes of the interface."""
    routes = APIRouter(prefix="/v1/runs", tags=["runs"], responses=GONE)

    def runs() -> Runs:
        if serving.runs is None:
            raise Refused(404, "this server keeps no runs: it was started without --runs", "no_runs")
        return serving.runs

    def owner(call: Request) -> str:
        return owner_of(client_of(call), list(serving.keys))

    def found(call: Request, run_id: str) -> Served:
        run = runs().store.runs.get(run_id) if NAME.fullmatch(run_id) else None
        if run is None or not run.seen_by(owner(call)):
            raise Refused(404, f"there is no run {shown(run_id)}", "not_found")
        return run

    _add_begin(routes, serving, runs, owner)
    _add_reading(routes, serving, runs, owner, found)
    _add_changes(routes, runs, found)
    return routes


def _add_begin(routes: APIRouter, serving: Serving, runs: Any, owner: Any) -> None:
    answers: dict[int | str, Any] = {code: STATUSES[code] for code in (400, 429, 503)}

    @routes.post("", status_code=202, openapi_extra=BODY, responses={
        **answers, **CONFLICT, 200: {"description": "The run of an earlier call with this Idempotency-Key"},
    })  # fmt: skip
    async def begin(
        call: Request,
        seed: Annotated[
            int,
            Query(
                ge=NUMBERS["seed"][0], le=NUMBERS["seed"][1], description="Rows without a seed derive theirs from it."
            ),
        ] = 0,
        format: Annotated[str, Query(description="Of the pictures: png, webp, jpeg or jxl.")] = "png",
        quality: Annotated[
            int | None, Query(ge=NUMBERS["quality"][0], le=NUMBERS["quality"][1], description="Of webp, jpeg and jxl.")
        ] = None,
        format_in: Annotated[str, Query(description="Of the prompt file, as of `genkit generate`.")] = "auto",
        name: Annotated[str | None, Query(description="Of the prompt file, whose ending says its kind.")] = None,
        idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
    ) -> Response:
        """Begin a run of a prompt file; it is on the disk when this answers, and is drawn whatever happens."""
        runs()
        serving.check_ready()
        asked: dict[str, Any] = {"seed": seed, "format": format, "quality": quality, "format_in": format_in}
        sent = await _form(call, asked) if _kind(call) == "multipart/form-data" else await _body(call, name)
        try:
            run, new = await run_in_threadpool(
                runs().accept, owner(call), check_name(sent[0]), sent[1], asked["format_in"], asked["seed"],
                asked["format"], asked["quality"], idempotency_key,
            )  # fmt: skip
        except InputError as error:
            raise bad(str(error)) from None
        except Conflict as error:
            raise Refused(409, str(error), "conflict", "Idempotency-Key") from None
        except Full as full:
            wait = {"Retry-After": str(round(full.seconds))}
            raise Refused(429, "too many runs wait to be drawn", "rate_limit_exceeded", None, wait) from None
        except HostError as error:
            raise _full(error, runs().store.folder) from None
        return JSONResponse(described(run), 202 if new else 200, {"Location": f"/v1/runs/{run.id}"})


def _add_reading(routes: APIRouter, serving: Serving, runs: Any, owner: Any, found: Any) -> None:
    @routes.get("")
    async def every(call: Request) -> Response:
        """List the runs, the newest first."""
        mine = [described(run) for run in reversed(runs().store.of(owner(call)))]
        return JSONResponse({"object": "list", "data": mine})

    @routes.get("/{run_id}")
    async def one(call: Request, run_id: str) -> Response:
        """Return the state of a run, and how many of its images are drawn."""
        return JSONResponse(described(found(call, run_id)))

    @routes.get("/{run_id}/events", response_class=StreamingResponse)
    async def events(
        call: Request, run_id: str, last_event_id: Annotated[str | None, Header(max_length=20)] = None
    ) -> Response:
        """Follow a run: an event `image` for each record, `progress` between them, `done` at the end."""
        run = found(call, run_id)
        after = int(last_event_id) if last_event_id and last_event_id.isascii() and last_event_id.isdigit() else 0
        stream = followed(run, after, lambda: serving.stopped)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @routes.get("/{run_id}/results", response_class=StreamingResponse)
    async def results(call: Request, run_id: str) -> Response:
        """Return the record of each image, as JSON lines."""
        return StreamingResponse(runs().results(found(call, run_id)), media_type="application/jsonl")

    @routes.get("/{run_id}/images/{name:path}", response_class=FileResponse)
    async def image(call: Request, run_id: str, name: str) -> Response:
        """Return a picture, by the name that its record has."""
        run, path = found(call, run_id), f"images/{name}"
        file = run.folder / path
        if not PICTURE.fullmatch(path) or not file.is_file():
            raise Refused(404, f"there is no picture {shown(name)}", "not_found")
        return FileResponse(file, media_type=KINDS[file.suffix], headers={"Cache-Control": "private, no-cache"})

    @routes.get("/{run_id}/gallery", response_class=FileResponse)
    async def gallery(call: Request, run_id: str) -> Response:
        """Return the gallery page of a run."""
        path: Path = await _changed(runs().page, found(call, run_id))
        headers = {"Content-Security-Policy": GALLERY_POLICY, "Cache-Control": "private, no-cache"}
        return FileResponse(path, media_type="text/html", headers=headers)

    @routes.get("/{run_id}/gallery/{name:path}", response_class=FileResponse, include_in_schema=False)
    async def gallery_file(call: Request, run_id: str, name: str) -> Response:
        """Return a file that the gallery page of a large run loads."""
        file = found(call, run_id).folder / DATA / name
        if not GALLERY_FILE.fullmatch(name) or not file.is_file():
            raise Refused(404, f"there is no file {shown(name)}", "not_found")
        return FileResponse(file, media_type="text/javascript", headers={"Cache-Control": "private, no-cache"})


def _add_changes(routes: APIRouter, runs: Any, found: Any) -> None:
    busy: dict[int | str, Any] = {503: STATUSES[503]}

    @routes.post("/{run_id}/cancel", responses=busy)
    async def cancel(call: Request, run_id: str) -> Response:
        """Draw no more of a run; what is drawn stays."""
        run = found(call, run_id)
        await _changed(runs().cancel, run)
        return JSONResponse(described(run))

    @routes.post("/{run_id}/filter", responses={400: STATUSES[400], **busy})
    async def filter_(call: Request, run_id: str, body: Filter) -> Response:
        """Decide again what is kept of what is drawn; nothing is drawn."""
        run = found(call, run_id)
        return JSONResponse(await _changed(runs().refilter, run, body.where, body.rank_by, body.keep))

    @routes.delete("/{run_id}", status_code=204, responses={**CONFLICT, **busy}, response_class=Response)
    async def delete(call: Request, run_id: str) -> Response:
        """Delete a run that is over, with its pictures."""
        await _changed(runs().delete, found(call, run_id))
        return Response(status_code=204)


def _full(error: HostError, folder: Path) -> Refused:
    """Return the answer to a call for which the disk has no room, or fails."""
    return Refused(503, _within(str(error), folder), "disk", None, {"Retry-After": "30"})


def _within(said: str, folder: Path) -> str:
    """Return a message with the names of files below the folder of runs, and not where on this machine it lies."""
    return said.replace(f"{folder}/", "")


async def _changed(work: Any, run: Served, *given: Any) -> Any:
    try:
        return await run_in_threadpool(work, run, *given)
    except InputError as error:
        raise bad(str(error)) from None
    except Conflict as error:
        raise Refused(409, str(error), "conflict") from None
    except HostError as error:
        raise _full(error, run.folder.parent) from None


def _kind(call: Request) -> str:
    return call.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _body(call: Request, name: str | None) -> tuple[str, bytes]:
    """Return name and bytes of a prompt file that is the body itself."""
    suffix = SUFFIXES.get(_kind(call))
    if name is None and suffix is None:
        known = ", ".join(SUFFIXES)
        raise Refused(
            400, f"content-type: {shown(_kind(call))} is no prompt file; send {known}, or a form", "invalid_value"
        )
    return name or f"prompts{suffix}", await call.body()


async def _form(call: Request, asked: dict[str, Any]) -> tuple[str, bytes]:
    """Return name and bytes of the file of a form; its other fields go into `asked`."""
    sent = None
    async with call.form(max_files=1, max_fields=10, max_part_size=2**16) as form:
        for name, part in form.multi_items():
            if isinstance(part, UploadFile):
                sent = part.filename or "", await part.read()
            elif name in NUMBERS:
                asked[name] = _number(name, part)
            elif name in asked:
                asked[name] = part
            else:
                raise bad(f"{shown(name)[1:-1]}: unknown field; there are file, {', '.join(asked)}")
    if sent is None:
        raise bad("file: is missing: the prompt file, uploaded as a file")
    return sent


def _number(name: str, text: str) -> int:
    least, most = NUMBERS[name]
    try:
        number = integer(name, text)
    except InputError as error:
        raise bad(str(error)) from None
    if not least <= number <= most:
        raise bad(f"{name}: {shown(text)} is not within {least} to {most}")
    return number


def described(run: Served) -> dict[str, Any]:
    """Return what clients see of a run."""
    images = {"done": run.done, "failed": run.failed, "kept": run.kept, "least": run.certain, "most": run.most}
    at = f"/v1/runs/{run.id}"
    reason = None if run.reason is None else _within(run.reason, run.folder.parent)
    links = {name: f"{at}/{name}" for name in ("events", "results", "gallery")}
    return {
        "id": run.id, "object": "run", "state": run.state, "reason": reason, "created": round(run.created),
        "finished": None if run.finished is None else round(run.finished), "name": run.name, "rows": run.rows,
        "images": images, "links": links,
    }  # fmt: skip


async def followed(run: Served, after: int, stopped: Any) -> AsyncIterator[str]:
    """Yield the events of a run. An image's id is the number of its record in results.jsonl; `after` is the last known.

    Records are on the disk before they are told, so that ids hold over restarts of the server.
    """
    number, at, told, last = 0, 0, None, time.monotonic()
    while True:
        over = run.over and run.finished is not None
        while lines := await run_in_threadpool(_new_lines, run.folder / RESULTS, at):
            for line in lines:
                number, at = number + 1, at + len(line)
                if number > after:
                    yield f"id: {number}\nevent: image\ndata: {line.decode('utf-8', 'replace')}\n"
                    last = time.monotonic()
        now = described(run)
        if (now["state"], now["images"]) != told and not over:
            told, last = (now["state"], now["images"]), time.monotonic()
            yield f"event: progress\ndata: {json.dumps(now)}\n\n"
        if over:
            yield f"event: done\ndata: {json.dumps(now)}\n\n"
            return
        if stopped():
            yield f"event: stopping\ndata: {json.dumps(now)}\n\n"
            return
        if time.monotonic() - last > QUIET:
            last = time.monotonic()
            yield ": here\n\n"
        await asyncio.sleep(POLL)


def _new_lines(path: Path, at: int) -> list[bytes]:
    """Return complete lines of a journal from byte `at` on, with their newlines, about BLOCK bytes of them."""
    try:
        with open(path, "rb") as file:
            file.seek(at)
            lines = file.readlines(BLOCK)
    except OSError:
        return []
    if lines and not lines[-1].endswith(b"\n"):  # is being written
        lines.pop()
    return lines
