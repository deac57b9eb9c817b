"""The images API of OpenAI: /v1/images/generations and edits, and /v1/models."""

from __future__ import annotations

import base64
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from genkit.errors import InputError
from genkit.pictures.encoders import encoding
from genkit.serve.calls import Serving, bad, encoded, pictures
from genkit.serve.limits import Refused

# Names of models that clients have built in, answered by the model that is served.
STOOD_FOR = ("gpt-image-1", "gpt-image-1-mini", "dall-e-3", "dall-e-2")


class Generation(BaseModel):
    """The body of a generation. Fields of genkit's rows (seed, steps, guidance_scale, …) may stand beside these."""

    model_config = ConfigDict(extra="allow", title="Generation")
    prompt: str
    model: str | None = None
    n: int | None = None
    size: str | None = None


def error(refused: Refused) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(refused.status_code)
    kind = kind or ("invalid_request_error" if refused.status_code < 500 else "server_error")
    about = {"message": refused.detail, "type": kind, "param": refused.param, "code": refused.code}
    return {"error": about}


ERRORS = {"/v1/": error}
STATUSES: dict[int | str, dict[str, Any]] = {
    code: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
    for code, text in {
        400: "Something in the request is wrong: `param` names it", 401: "No key, or a wrong one",
        403: "Called by a page of another site", 404: "No such model", 413: "The body is too large",
        421: "The Host header names another machine", 429: "The queue is full: see Retry-After",
        500: "A picture failed", 503: "The server is not ready",
    }.items()
}  # fmt: skip


def router(serving: Serving) -> APIRouter:
    """Return the routes of the interface."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"], responses=STATUSES)
    began = int(time.time())

    def described() -> dict[str, Any]:
        return {"id": serving.name, "object": "model", "created": began, "owned_by": "genkit"}

    @routes.get("/models")
    async def models() -> Response:
        """List the model that is served."""
        return JSONResponse({"object": "list", "data": [described()]})

    @routes.post("/images/generations")
    async def generations(body: Generation, call: Request) -> Response:
        """Draw pictures of a prompt."""
        fields = body.model_dump(exclude_none=True)
        fields.pop("model", None)
        rows = await serving.rows([fields])
        found = await pictures(await serving.events(call, rows))
        form = encoding("png")
        data = [{"b64_json": base64.b64encode(await encoded(form, r.pixels)).decode()} for r in found]
        return JSONResponse({"created": int(time.time()), "data": data})

    return routes


__all__ = ["ERRORS", "InputError", "bad", "router"]
