"""The page at /, and the routes that it alone uses: /app/…"""

from __future__ import annotations

import asyncio
import io
import json
import math
import time
import zipfile
from collections.abc import AsyncIterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from genkit.errors import InputError, shown
from genkit.pages.look import look
from genkit.pictures.edges import PREPROCESS
from genkit.rows.infotext import read_picture_settings
from genkit.rows.pictures import drawing, plain_prompts
from genkit.rows.plans import NAMED, is_tuned
from genkit.rows.request import Request as Row
from genkit.rows.request import canonical
from genkit.schedulers import SOLVERS
from genkit.serve.calls import Serving, bad, client_of
from genkit.serve.desks import INPUTS, Desk, Desks, Work, input_of
from genkit.serve.limits import Refused
from genkit.serve.rows import NOT_SERVED, PICTURES, as_file
from genkit.serve.runs import described
from genkit.serve.store import owner_of
from genkit.version import __version__

BEAT = 15.0  # seconds after which a stream says that it is there
LOOK = 0.9  # seconds between two looks at the runs
RUNS = 50  # runs that the page lists
LAST = 5.0  # seconds for the last events of a server that stops, before it closes open streams
KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".html": "text/html"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ALWAYS = {
    "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY", "Cache-Control": "no-store",
}  # fmt: skip
ERRORS = {"/app/": lambda refused: {"error": refused.detail, "field": refused.param}}


class Draw(BaseModel):
    """A row for a desk; pictures as data: URLs."""

    model_config = ConfigDict(extra="forbid")
    desk: str
    fields: dict[str, Any]


class Chosen(BaseModel):
    """A job of a desk, or a picture of it. kept: what the person thinks of the picture."""

    model_config = ConfigDict(extra="forbid")
    desk: str
    job: str
    index: int = 0
    kept: bool | None = None


def router(serving: Serving) -> APIRouter:
    """Return the routes of the page. They are no interface for others, and not in the OpenAPI description."""
    routes = APIRouter(include_in_schema=False)
    _add_files(routes, framed(serving.framed_by))
    desks = Desks(serving)
    _add_streams(routes, serving, desks)
    _add_jobs(routes, desks)

    @routes.get("/app/about")
    async def about() -> Response:
        found = await run_in_threadpool(lambda: [facts(one) for one in serving.models.values()])
        return JSONResponse({**found[0], "models": found}, headers=ALWAYS)

    @routes.post("/app/settings")
    async def settings(call: Request) -> Response:
        data = await call.body()
        try:
            return JSONResponse(await run_in_threadpool(settings_in, data, serving), headers=ALWAYS)
        except InputError as error:
            raise bad(str(error)) from None

    return routes


def framed(by: Sequence[str]) -> dict[str, str]:
    """Return the headers of the page, which pages of these origins may have in a frame; without any, none may."""
    if not by:
        return ALWAYS
    policy = POLICY.replace("frame-ancestors 'none'", f"frame-ancestors {' '.join(by)}")
    return {name: value for name, value in ALWAYS.items() if name != "X-Frame-Options"} | {
        "Content-Security-Policy": policy
    }


def _add_files(routes: APIRouter, page: dict[str, str]) -> None:
    folder = files("genkit.serve").joinpath("page")
    static = {entry.name: entry.read_bytes() for entry in folder.iterdir() if Path(entry.name).suffix in KINDS}
    static["look.css"] = look().encode()

    def answer(name: str, headers: dict[str, str] = ALWAYS) -> Response:
        return Response(static[name], media_type=f"{KINDS[Path(name).suffix]}; charset=utf-8", headers=headers)

    @routes.get("/")
    async def index() -> Response:
        return answer("index.html", page)

    @routes.get("/favicon.ico")
    async def icon() -> Response:
        return answer("icon.svg")

    @routes.get("/app/static/{name}")
    async def file(name: str) -> Response:
        if name not in static:
            raise Refused(404, "there is no such file", "not_found")
        return answer(name)


def _add_streams(routes: APIRouter, serving: Serving, desks: Desks) -> None:
    @routes.get("/app/events")
    async def events(call: Request, desk: str | None = None) -> Response:
        found = desks.open(client_of(call), desk)
        owner = owner_of(client_of(call), list(serving.keys))
        kind = {"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
        return StreamingResponse(_stream(serving, desks, found, owner), headers=ALWAYS | kind)


async def _stream(serving: Serving, desks: Desks, desk: Desk, owner: str) -> AsyncIterator[str]:
    queue, said, listed = desks.listen(desk), "", ""
    looked, beat, end = -math.inf, time.monotonic(), math.inf
    try:
        while time.monotonic() < end and (desk.busy or not queue.empty() or not serving.draining):
            if serving.stopped and end == math.inf:
                end = time.monotonic() + LAST
            if (now := _state(serving)) != said:
                said = now
                yield f"data: {said}\n\n"
            if serving.runs is not None and time.monotonic() - looked > LOOK:
                looked = time.monotonic()
                if (now := _runs(serving, owner)) != listed:
                    listed = now
                    yield f"data: {listed}\n\n"
            try:
                event = await asyncio.wait_for(queue.get(), 0.5)
            except TimeoutError:
                if time.monotonic() - beat > BEAT:
                    beat = time.monotonic()
                    yield ":\n\n"
                continue
            yield f"data: {json.dumps(event, default=str)}\n\n"
    finally:
        desks.leave(desk, queue)


def _state(serving: Serving) -> str:
    """Return the event that says whether the server draws, and why not."""
    ready, why = serving.engine.ready, serving.engine.why
    if serving.draining:
        ready, why = False, "the server is stopping"
    return json.dumps({"type": "server", "ready": ready, "why": why})


def _runs(serving: Serving, owner: str) -> str:
    """Return the event that has the newest runs of an owner, as /v1/runs tells of them."""
    mine = serving.runs.store.of(owner)
    shown = [described(run) for run in reversed(mine[-RUNS:])]
    live = sum(not run.over for run in mine)
    return json.dumps({"type": "runs", "runs": shown, "count": len(mine), "live": live})


def _add_jobs(routes: APIRouter, desks: Desks) -> None:
    def job_of(call: Request, chosen: Chosen) -> tuple[Desk, Work]:
        return desks.job(client_of(call), chosen.desk, chosen.job)

    @routes.post("/app/draw", status_code=202)
    async def draw(body: Draw, call: Request) -> Response:
        job = await desks.draw(desks.find(client_of(call), body.desk), body.fields)
        return JSONResponse({"job": job.id, "notes": job.notes}, 202, ALWAYS)

    @routes.post("/app/cancel")
    async def cancel(body: Chosen, call: Request) -> Response:
        desks.cancel(job_of(call, body)[1])
        return JSONResponse({}, headers=ALWAYS)

    @routes.post("/app/forget")
    async def forget(body: Chosen, call: Request) -> Response:
        desks.forget(*job_of(call, body))
        return JSONResponse({}, headers=ALWAYS)

    @routes.post("/app/keep")
    async def keep(body: Chosen, call: Request) -> Response:
        desk, job = job_of(call, body)
        if body.index not in job.pictures:
            raise Refused(404, "this picture is not held any more", "no_such_picture", "index")
        job.pictures[body.index].kept = body.kept
        desk.tell("picture", job=job.id, picture=job.pictures[body.index].told())
        return JSONResponse({}, headers=ALWAYS)

    @routes.get("/app/pictures/{desk}/{job}/{name}.png")
    async def picture(desk: str, job: str, name: str, call: Request) -> Response:
        found = desks.job(client_of(call), desk, job)[1]
        data = await run_in_threadpool(_file, found, name)
        return Response(data, media_type="image/png", headers=ALWAYS | {"Cache-Control": "private, max-age=3600"})

    @routes.get("/app/kept/{desk}.zip")
    async def kept(desk: str, call: Request) -> Response:
        found = desks.find(client_of(call), desk)
        data = await run_in_threadpool(_zip, found)
        name = {"Content-Disposition": 'attachment; filename="kept.zip"'}
        return Response(data, media_type="application/zip", headers=ALWAYS | name)


def _file(job: Work, name: str) -> bytes:
    """Return a picture of a job by its index, or one that it was drawn from. Raises Refused, 404."""
    if name in INPUTS and (image := input_of(job.row, name)) is not None:
        buffer = io.BytesIO()
        image.save(buffer, "png")
        return buffer.getvalue()
    held = job.pictures.get(int(name)) if name.isascii() and name.isdigit() and len(name) < 6 else None
    if held is None or not held.data:
        raise Refused(404, "this picture is not held any more", "no_such_picture")
    return held.data


def _zip(desk: Desk) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for job in list(desk.jobs.values()):
            for index, held in sorted(job.pictures.items()):
                if held.kept and held.data:
                    archive.writestr(f"{int(job.id):04d}-{index:02d}.png", held.data)
    return buffer.getvalue()


def facts(serving: Serving) -> dict[str, Any]:
    """Return what the page must know of the server: the model's defaults, choices, and limits."""
    engine, most = serving.engine, serving.most
    geometry = engine.models.info.geometry
    assert geometry is not None
    row = engine.plan([Row(**({"prompt": "x"} if geometry.text else {}))]).rows[0].to_json()
    usual = ("num_inference_steps", "guidance_scale", "width", "height", "negative_prompt")
    return {
        "model": serving.name,
        "version": __version__,
        "text": geometry.text,
        "inpaints": geometry.inpaints,
        "multiple": geometry.multiple,
        "defaults": {name: row[name] for name in usual if isinstance(row.get(name), str | int | float)},
        "solvers": sorted(SOLVERS),
        "spacings": sorted(NAMED),
        "loras": sorted(serving.intake.loras),
        "controls": sorted(serving.intake.controls),
        "preprocess": list(PREPROCESS),
        "scores": engine.models.clip is not None,
        "most": {"pixels": most.pixels, "steps": most.steps, "images": most.images, "body": most.body},
    }


def settings_in(data: bytes, serving: Serving) -> dict[str, Any]:
    """Return {"fields", "notes", "model"} of a picture file of genkit or another tool, as `genkit replay` reads it.

    notes: what is not as it was there. Raises InputError for a file without settings.
    """
    with as_file(data) as path:
        found = read_picture_settings(path)
    fields = drawing(canonical(found.fields))
    notes = [*found.notes]
    if found.about["form"] == "genkit" and "seed" in found.about:
        fields["seed"] = found.about["seed"]
    elif found.about["form"] != "json" and not str(found.about.get("version")).startswith("genkit"):
        notes += plain_prompts(fields, found.about["form"])
    loras = [lora if isinstance(lora, dict) else {"file": lora} for lora in fields.pop("loras", None) or []]
    named = [dict(lora, name=Path(str(lora.get("file"))).stem) for lora in loras]
    here = [lora for lora in named if lora["name"] in serving.intake.loras]
    notes += [f"LoRA {shown(lora['name'])}: this server has none of that name" for lora in named if lora not in here]
    if here:
        fields["loras"] = [{k: v for k, v in lora.items() if k != "file"} for lora in here]
    if fields.get("controls") or found.about.get("controls"):
        notes.append("ControlNet: its picture is not in the settings; the page draws without")
    for name in ("template", "meta", "controls", *PICTURES):
        fields.pop(name, None)
    notes += [f"{name}: {why}" for name, why in NOT_SERVED.items() if fields.pop(name, None) is not None]
    if is_tuned(fields.get("scheduler")):
        del fields["scheduler"]
        notes.append("scheduler: a tuned plan is a file; the model's own is taken")
    return {"fields": fields, "notes": list(dict.fromkeys(notes)), "model": found.about.get("model")}


__all__ = ["ERRORS", "router"]
