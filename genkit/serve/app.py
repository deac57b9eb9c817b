"""The FastAPI application: its interfaces, its errors, /health and /metrics."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from genkit.errors import shown
from genkit.serve.calls import Serving
from genkit.serve.limits import ANYWHERE, STATUSES, Gate, Refused, alone
from genkit.serve.metrics import Metrics
from genkit.version import __version__

# Modules of genkit.serve with a function `router(serving)`; of these the first path that fits answers.
INTERFACES = ("openai", "runs", "a1111", "a1111control", "page")
OF_MANY = ("openai", "a1111", "a1111control")  # those that many processes answer alike
# By the beginning of paths: how their errors look, a function (Refused) -> JSON. Others are {"error": message}.
ERRORS: dict[str, Callable[[Refused], Any]] = {}
# What is kept in the memory of one process, or in a folder of its own, and so is not served by several
ALONE = {
    "/": "the page is", "/app/{rest:path}": "the page is", "/metrics": "numbers of one process are",
    "/v1/runs": "runs are", "/v1/runs/{rest:path}": "runs are", "/v1/images/files/{name}": "pictures at a URL are",
    **{f"/sdapi/v1/{name}": f"{name} is" for name in ("progress", "interrupt", "skip")},
}  # fmt: skip
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
ABOUT = "Pictures of diffusion models, for clients of the OpenAI images API and others."


def create_app(serving: Serving) -> FastAPI:
    """Return the application of a server. Its engine is started and closed by the caller."""
    everywhere: Any = {code: STATUSES[code] for code in (*ANYWHERE, *((501,) if serving.replica else ()))}
    app = FastAPI(
        title="genkit", version=__version__, description=ABOUT, docs_url=None, redoc_url=None, responses=everywhere
    )
    app.state.serving, app.state.metrics = serving, Metrics([one.engine for one in serving.models.values()])
    serving.refused = app.state.metrics.refuse
    for path, what in ALONE.items() if serving.replica else ():
        app.add_api_route(path, _elsewhere(what), methods=[*METHODS], include_in_schema=False)
    for name in OF_MANY if serving.replica else INTERFACES:
        module = import_module(f"genkit.serve.{name}")
        app.include_router(module.router(serving))
        ERRORS.update(getattr(module, "ERRORS", {}))
    _add_facts(app, serving)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _broken)
    app.add_middleware(
        Gate, keys=serving.keys, body=serving.most.body, answer=answer, host=serving.host, hosts=serving.hosts,
        replica=serving.replica,
    )  # fmt: skip
    return app


def _add_facts(app: FastAPI, serving: Serving) -> None:
    @app.get("/health", tags=["server"], responses={503: STATUSES[503]})
    async def health() -> Response:
        """Say whether the server draws: 200 once a picture was drawn."""
        engine = serving.engine
        about: dict[str, Any] = {
            "status": "ok" if engine.ready else "not ready",
            "model": serving.name,
            "version": __version__,
        }
        about |= {"models": list(serving.models)} if len(serving.models) > 1 else {}
        return JSONResponse(about | ({} if engine.ready else {"reason": engine.why}), 200 if engine.ready else 503)

    @app.get("/metrics", tags=["server"], response_class=Response)
    async def metrics() -> Response:
        """Return counters and gauges as Prometheus reads them."""
        return Response(*app.state.metrics.text())


def _elsewhere(what: str) -> Callable[[], Any]:
    async def refuse() -> Response:
        raise alone(what)

    return refuse


def answer(scope: dict[str, Any], refused: HTTPException) -> JSONResponse:
    """Return an error as clients of its path expect it."""
    if not isinstance(refused, Refused):
        code = {404: "not_found", 405: "method_not_allowed"}.get(refused.status_code, "invalid_request")
        refused = Refused(refused.status_code, str(refused.detail), code, None, dict(refused.headers or {}))
    serving = getattr(getattr(scope.get("app"), "state", None), "serving", None)
    if serving is not None:
        serving.refused(refused.code)
    shape = next((shape for start, shape in ERRORS.items() if scope["path"].startswith(start)), None)
    content = {"error": refused.detail} if shape is None else shape(refused)
    return JSONResponse(content, refused.status_code, dict(refused.headers or {}))


async def _refuse(request: Any, error: Any) -> Response:
    return answer(request.scope, error)


async def _broken(request: Any, error: Any) -> Response:
    return answer(request.scope, Refused(500, f"the server failed: {type(error).__name__}", "server_error"))


async def _invalid(request: Any, error: Any) -> Response:
    """Answer a body that is no JSON, or of other types, in one line."""
    worst = error.errors()[0]
    field = next((str(part) for part in reversed(worst["loc"]) if isinstance(part, str)), "body")
    if worst["type"] == "json_invalid":
        field, said = "body", "is no JSON"
    else:
        said = f"{shown(worst.get('input'))}: {worst['msg']}"
    named = field if field.isidentifier() else None
    return answer(request.scope, Refused(400, f"{shown(field)[1:-1]}: {said}", "invalid_value", named))
