"""The API of AUTOMATIC1111's web UI: /sdapi/v1/txt2img, img2img, progress, interrupt, and what it lists."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from genkit.durable import json_line
from genkit.errors import InputError
from genkit.pictures.encoders import encoding
from genkit.pictures.samplers import SAMPLERS, SCHEDULE_TYPES
from genkit.pictures.written import read_texts
from genkit.rows.infotext import is_infotext, pairs, read_infotext
from genkit.rows.plans import ALIASES
from genkit.rows.request import Request as Row
from genkit.rows.result import Result
from genkit.runs.writers import texts_of
from genkit.serve.a1111fields import Asked, as_sent, asked, check_settings
from genkit.serve.calls import Serving, bad, client_of, encoded, failed, stopping
from genkit.serve.limits import STATUSES, Refused
from genkit.serve.line import Event
from genkit.serve.rows import as_file, inline

PREVIEWS = 5  # previews of a picture, for `progress`
CHOICES = 1000  # clients whose model is remembered
EMPTY = {  # what clients list, and this server has none of
    "hypernetworks": [], "face-restorers": [], "realesrgan-models": [], "upscalers": [], "latent-upscale-modes": [],
    "prompt-styles": [], "sd-vae": [], "script-info": [], "scripts": {"txt2img": [], "img2img": []}, "cmd-flags": {},
}  # fmt: skip


class Body(BaseModel):
    """A request for pictures, as AUTOMATIC1111 has it. What would change the picture and genkit lacks is refused."""

    model_config = ConfigDict(extra="allow")
    prompt: str = Field("", description="In AUTOMATIC1111's syntax: (weights:1.2), BREAK, AND, [edits].")
    negative_prompt: str | None = None
    seed: int | None = Field(None, description="-1 is any.")
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    sampler_name: str | None = None
    scheduler: str | None = None
    batch_size: int | None = None
    n_iter: int | None = None


class Drawn(Body):
    """A request for pictures that start from one."""

    init_images: list[Any] | None = Field(None, description="One picture, in base64.")
    denoising_strength: float | None = None
    mask: str | None = Field(None, description="White where to draw anew, in base64.")


class Info(BaseModel):
    """A picture whose settings are asked for."""

    image: str = Field(description="In base64.")


@dataclasses.dataclass
class Progress:
    """A call that draws. at: (step, steps) of each image in flight."""

    images: int
    began: float = dataclasses.field(default_factory=time.time)
    done: int = 0
    at: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    preview: Any = None
    interrupted: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    @property
    def share(self) -> float:
        """How much of it is done, 0 to 1."""
        return min(1.0, (self.done + sum(step / max(1, steps) for step, steps in self.at.values())) / self.images)

    def see(self, event: Event) -> None:
        """Take over an event."""
        if event["type"] in ("step", "preview"):
            self.at[event["index"]] = event["step"], event["steps"]
            self.preview = event.get("image", self.preview)
        elif event["type"] == "image":
            self.done += 1
            self.at.pop(event["index"], None)


def error(refused: Refused) -> dict[str, Any]:
    """Return an error as clients of AUTOMATIC1111 read it."""
    return {"error": refused.code, "detail": refused.detail, "body": "", "errors": refused.detail}


ERRORS = {"/sdapi/": error, "/controlnet/": error}


def router(serving: Serving) -> APIRouter:
    """Return the routes of the interface."""
    routes = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"], responses={400: STATUSES[400]})
    api = Api(serving)
    answers: dict[int | str, Any] = {code: STATUSES[code] for code in (400, 422, 429, 500, 503)}

    @routes.post("/txt2img", responses=answers)
    async def txt2img(body: Body, call: Request) -> Response:
        """Draw pictures of a prompt."""
        return await api.draw(call, body.model_dump(exclude_unset=True), from_picture=False)

    @routes.post("/img2img", responses=answers)
    async def img2img(body: Drawn, call: Request) -> Response:
        """Draw a picture anew, or what its mask shows."""
        return await api.draw(call, body.model_dump(exclude_unset=True), from_picture=True)

    @routes.get("/progress")
    async def progress(call: Request, skip_current_image: bool = False) -> Response:
        """Return how far the caller's newest call is, with a small preview."""
        return JSONResponse(await api.progress(client_of(call), not skip_current_image))

    @routes.post("/interrupt")
    async def interrupt(call: Request) -> Response:
        """End the caller's calls with the pictures that are finished."""
        api.interrupt(client_of(call))
        return JSONResponse({})

    routes.add_api_route("/skip", interrupt, methods=["POST"], name="skip")
    _add_lists(routes, serving, api)
    _add_settings(routes, serving, api)
    return routes


def _add_settings(routes: APIRouter, serving: Serving, api: Api) -> None:
    @routes.post("/png-info", responses={400: STATUSES[400], 422: STATUSES[422]})
    async def png_info(body: Info) -> Response:
        """Return the settings in a picture."""
        try:
            return JSONResponse(await run_in_threadpool(settings_of, body.image))
        except InputError as wrong:
            raise bad(str(wrong), 422) from None

    @routes.get("/options")
    async def options(call: Request) -> Response:
        """Return the settings that clients look for."""
        found = {"sd_model_checkpoint": api.of(call).name, "sd_vae": "Automatic", "CLIP_stop_at_last_layers": 1}
        return JSONResponse({**found, "samples_format": "png", "samples_save": False, "enable_pnginfo": True})

    @routes.post("/options", responses={400: STATUSES[400], 422: STATUSES[422]})
    async def set_options(body: dict[str, Any], call: Request) -> Response:
        """Choose the model of the caller's later calls; take settings that change nothing."""
        try:
            name = check_settings(body, serving.models)
        except InputError as wrong:
            raise bad(as_sent(str(wrong)), 422) from None
        if name is not None:
            api.choose(call, name)
        return JSONResponse({})


def _add_lists(routes: APIRouter, serving: Serving, api: Api) -> None:
    @routes.get("/samplers")
    async def samplers() -> Response:
        """List the samplers, by their names there."""
        spelt = {solver: [alias for alias, one in ALIASES.items() if one == solver] for solver in SAMPLERS}
        found = [{"name": n, "aliases": [s, *spelt[s]], "options": {}} for s, n in SAMPLERS.items()]
        return JSONResponse(found)

    @routes.get("/schedulers")
    async def schedulers() -> Response:
        """List the schedules of noise, by their names there."""
        named = [("automatic", "Automatic"), *SCHEDULE_TYPES.items()]
        about = {"aliases": None, "default_rho": -1.0, "need_inner_model": False}
        return JSONResponse([{"name": label.lower().replace(" ", "_"), "label": label, **about} for _, label in named])

    @routes.get("/sd-models")
    async def models() -> Response:
        """List the served models."""
        about = {"hash": None, "sha256": None, "config": None}
        return JSONResponse([{"title": n, "model_name": n, "filename": n, **about} for n in serving.models])

    @routes.get("/loras")
    async def loras() -> Response:
        """List the LoRAs that prompts may name, as in <lora:name:0.8>."""
        names = sorted(serving.intake.loras)
        return JSONResponse([{"name": n, "alias": n, "path": f"{n}.safetensors", "metadata": {}} for n in names])

    @routes.get("/embeddings")
    async def embeddings() -> Response:
        """List the textual inversions that prompts may name."""
        about = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
        found = {
            one.word: {**about, "shape": one.file.widths[0], "vectors": one.file.vectors} for one in await api.words()
        }
        return JSONResponse({"loaded": found, "skipped": {}})

    for name, nothing in EMPTY.items():
        routes.add_api_route(f"/{name}", _constant(nothing), methods=["GET"], name=name, summary="None of them here")
    for name in ("refresh-checkpoints", "refresh-loras", "refresh-vae", "refresh-embeddings"):
        routes.add_api_route(f"/{name}", _constant({}), methods=["POST"], name=name, summary="Does nothing")


def _constant(value: Any) -> Any:
    async def answer() -> Response:
        return JSONResponse(value)

    return answer


class Api:
    """The calls that draw. calls: by client, the newest last."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.calls: dict[str, list[Progress]] = {}
        self.chosen: OrderedDict[str, str] = OrderedDict()  # the models that clients chose

    def of(self, call: Request) -> Serving:
        """Return the Serving of the model that the caller chose."""
        return self.serving.of(self.chosen.get(client_of(call)))

    def choose(self, call: Request, name: str) -> None:
        """Take a model for the caller's later calls."""
        self.chosen[client_of(call)] = name
        self.chosen.move_to_end(client_of(call))
        if len(self.chosen) > CHOICES:
            self.chosen.popitem(last=False)

    async def draw(self, call: Request, given: dict[str, Any], from_picture: bool) -> Response:
        """Answer txt2img, or img2img. Raises Refused, 422 for what genkit lacks."""
        try:
            wanted = await run_in_threadpool(asked, given, self.serving.models, from_picture)
        except InputError as wrong:
            raise bad(as_sent(str(wrong)), 422) from None
        serving = self.of(call) if wanted.model is None else self.serving.of(wanted.model)
        geometry = serving.engine.models.info.geometry
        assert geometry is not None
        try:
            rows = await serving.rows([await run_in_threadpool(wanted.steered, geometry.width, geometry.height)])
        except Refused as refused:
            raise bad(as_sent(refused.detail), refused.status_code) from None
        except InputError as wrong:
            raise bad(str(wrong), 422) from None
        wanted.notes += rows.notes
        row = rows[0]
        progress = Progress(row.max_images or row.num_images)
        mine = self.calls.setdefault(client_of(call), [])
        mine.append(progress)
        serving.origin()  # begins while the pictures are drawn
        try:
            previews = max(1, (row.num_inference_steps or 1) // PREVIEWS)
            results = await _finished(await serving.events(call, rows, previews=previews, steps=True), progress)
        finally:
            mine.remove(progress)
            if not mine:
                self.calls.pop(client_of(call), None)
        origin = await serving.origin()
        texts = [texts_of(row, result, origin) for result in results]
        images = [await run_in_threadpool(_laid, wanted, result) for result in results]
        files = [await encoded(encoding("png"), pixels, text) for pixels, text in zip(images, texts, strict=True)]
        sent = [base64.b64encode(data).decode() for data in files] if wanted.send else []
        echo = {**given, "init_images": None, "mask": None} if from_picture else dict(given)
        echo |= {"alwayson_scripts": {}} if wanted.units else {}  # pictures are not sent back
        infotexts = [text["parameters"] for text in texts]
        info = self._info(serving.name, wanted, row, results, given) | {"infotexts": infotexts}
        answer = json_line({"images": sent, "parameters": echo, "info": json.dumps(info)})  # any float is echoed
        return Response(answer, media_type="application/json")

    def _info(
        self, model: str, wanted: Asked, row: Row, results: list[Result], given: dict[str, Any]
    ) -> dict[str, Any]:  # fmt: skip
        seeds = [result.seed for result in results]
        prompt, negative = str(given.get("prompt") or ""), str(given.get("negative_prompt") or "")
        solver = row.scheduler.get("solver") if isinstance(row.scheduler, dict) else row.scheduler
        return {
            "prompt": prompt, "all_prompts": [prompt] * len(seeds), "negative_prompt": negative,
            "all_negative_prompts": [negative] * len(seeds), "seed": row.seed_of(0), "all_seeds": seeds, "subseed": -1,
            "all_subseeds": [-1] * len(seeds), "subseed_strength": 0, "width": row.width, "height": row.height,
            "sampler_name": SAMPLERS.get(str(solver), solver), "cfg_scale": row.guidance_scale,
            "steps": row.num_inference_steps, "batch_size": row.num_images, "restore_faces": False,
            "sd_model_name": model, "denoising_strength": row.strength, "clip_skip": row.clip_skip or 1,
            "index_of_first_image": 0, "notes": wanted.notes,
        }  # fmt: skip

    async def progress(self, client: str, picture: bool) -> dict[str, Any]:
        """Return what `progress` answers."""
        mine = self.calls.get(client)
        state = {"skipped": False, "interrupted": False, "stopping_generation": False, "job": "", "job_count": 0,
                 "job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0}  # fmt: skip
        if not mine:
            nothing = {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
            return {**nothing, "current_task": None}
        now, share = mine[-1], mine[-1].share
        step, steps = max(now.at.values(), default=(0, 0))
        state |= {"job": "scripts_txt2img", "job_count": now.images, "job_no": now.done, "sampling_step": step,
                  "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(now.began)), "sampling_steps": steps,
                  "interrupted": now.interrupted.is_set()}  # fmt: skip
        shown = None
        if picture and now.preview is not None:
            shown = base64.b64encode(await encoded(encoding("png"), now.preview)).decode()
        left = 0.0 if not share else (time.time() - now.began) * (1 - share) / share
        found = {"progress": round(share, 4), "eta_relative": round(left, 2), "state": state, "current_image": shown}
        return {**found, "textinfo": None, "current_task": None}

    def interrupt(self, client: str) -> None:
        """End a client's calls."""
        for one in self.calls.get(client, ()):
            one.interrupted.set()

    async def words(self) -> Any:
        """Return the textual inversions of the server."""
        return (await run_in_threadpool(self.serving.engine.words)).used


async def _finished(events: AsyncIterator[Event], progress: Progress) -> list[Result]:
    """Return the finished images of a call, in order, until it is interrupted. Raises Refused if one failed."""
    found: list[Result] = []
    stop = asyncio.create_task(progress.interrupted.wait())
    try:
        while not progress.interrupted.is_set():
            following = asyncio.ensure_future(anext(events))
            await asyncio.wait((following, stop), return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
                break
            event = following.result()
            progress.see(event)
            if event["type"] == "failed":
                raise failed(event)
            if event["type"] == "image":
                found.append(event["result"])
            if event["type"] == "done":
                if event["cancelled"]:
                    raise stopping()
                break
    finally:
        stop.cancel()
        await events.aclose()  # type: ignore[attr-defined]
    return sorted(found, key=lambda r: r.index)


def _laid(wanted: Asked, result: Result) -> Any:
    """Return a picture laid over its start, as a mask's soft edge has it; (h, w, 3) uint8."""
    if wanted.soft is None:
        return result.pixels
    import numpy as np
    from PIL import Image

    drawn = Image.fromarray(result.pixels)
    start, soft = (one if one.size == drawn.size else one.resize(drawn.size) for one in (wanted.start, wanted.soft))
    return np.asarray(Image.composite(drawn, start, soft))


def settings_of(image: str) -> dict[str, Any]:
    """Return what `png-info` answers for a picture in base64: the infotext, all texts, and the infotext's parts.

    Raises InputError for what is no picture.
    """
    inline("image", image)
    data = base64.b64decode(image.partition("base64,")[2] if image.startswith("data:") else image)
    with as_file(data, "image") as path:
        texts = read_texts(path)
    text = next((one for one in texts.values() if is_infotext(one)), "")
    if not text:
        return {"info": "", "items": texts, "parameters": {}}
    found = read_infotext(text).fields
    prompts = {"Prompt": found.get("prompt", ""), "Negative prompt": found.get("negative_prompt", "")}
    return {"info": text, "items": texts, "parameters": {**prompts, **pairs(text.strip().split("\n")[-1])}}
