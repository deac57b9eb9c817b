"""Between the event loop of the server and the thread that draws: rows in, events out, and a caller that leaves."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as Call

from genkit.errors import HostError, InputError
from genkit.job.origin import origin_of
from genkit.pictures.encoders import Encoding
from genkit.pictures.metadata import Origin
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.serve.engine import STOPPING, Full, ServingEngine
from genkit.serve.feeder import config_of
from genkit.serve.limits import Refused
from genkit.serve.line import Event, Ticket
from genkit.serve.rows import Intake, Most, Planned


@dataclasses.dataclass
class Serving:
    """What the interfaces share. name: of the model, as clients name it. runs: the folder of served runs.

    others: where several models are served, the Serving of each by name, the first model's first; else empty. replica:
    the name of this process where it is one of several workers; what a process keeps in its memory is not served then.
    hosts: names of the server behind a proxy. framed_by: origins whose pages may have the server's page in a frame.
    """

    engine: ServingEngine
    intake: Intake
    most: Most
    name: str
    keys: Sequence[str] = ()
    host: str = "127.0.0.1"
    runs: Any = None
    drain: float = 30.0
    replica: str = ""
    hosts: Sequence[str] = ()
    framed_by: Sequence[str] = ()
    refused: Callable[[str], None] = lambda _: None  # counts a refused call by its code
    others: dict[str, Serving] = dataclasses.field(default_factory=dict)
    _origin: asyncio.Task[Origin] | None = None
    draining = stopped = False  # no new work is taken; nothing is drawn any more

    @property
    def models(self) -> dict[str, Serving]:
        """The Serving of each model by its name, the first model's first."""
        return self.others or {self.name: self}

    def of(self, name: Any) -> Serving:
        """Return the Serving of the model of that name, or this one if no model has that name."""
        return self.models.get(name, self) if isinstance(name, str) else self

    async def rows(self, many: Sequence[Mapping[str, Any]]) -> Planned:
        """Return planned rows. Raises Refused, 400 with the field as `param`."""
        try:
            return await run_in_threadpool(self.intake.rows, many)
        except InputError as error:
            raise bad(str(error)) from None

    def origin(self) -> Awaitable[Origin]:
        """Return an awaitable of what pictures' metadata says of model, weights and versions; it is computed once.

        It hashes the weights in a thread: called when pictures are asked for, it is ready once they are drawn.
        """
        failed = self._origin is not None and self._origin.done() and self._origin.exception() is not None
        if self._origin is None or failed:
            self._origin = asyncio.get_running_loop().create_task(run_in_threadpool(_origin, self.engine))
        return asyncio.shield(self._origin)

    def check_ready(self) -> None:
        """Raise Refused, 503, where the server takes no new work."""
        first = next(iter(self.models.values()))
        if first.draining:
            raise stopping()
        if not self.engine.ready:
            raise Refused(503, f"the server is not ready: {self.engine.why}", "not_ready", None, {"Retry-After": "5"})

    def submit(
        self, rows: Sequence[Request], client: str, on: Callable[[Event], None] | None = None, previews: int = 0,
        steps: bool = False, seed: int | None = None,
    ) -> Ticket:  # fmt: skip
        """Queue planned rows. Raises Refused: 429 with Retry-After, or 503 where the server does not draw."""
        engine = self.engine
        self.check_ready()
        try:
            return engine.submit(rows, client, on, previews, steps, seed)
        except Full as full:
            wait = {"Retry-After": str(min(3600, round(full.seconds + 0.5)))}
            said = f"the queue is full; try again in {wait['Retry-After']} s"
            raise Refused(429, said, "rate_limit_exceeded", None, wait) from None
        except HostError as error:
            raise Refused(503, str(error), "not_ready") from None

    async def events(
        self, call: Call, rows: Sequence[Request], previews: int = 0, steps: bool = False, seed: int | None = None
    ) -> AsyncIterator[Event]:
        """Queue planned rows and return their events; the rows are cancelled when the caller leaves.

        Raises Refused as `submit` does, before a streamed answer begins.
        """
        queue: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def on(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, event)

        ticket = self.submit(rows, client_of(call), on, previews, steps, seed)
        gone = asyncio.create_task(_left(call))
        gone.add_done_callback(lambda _: ticket.cancel())  # also where nobody ever asks for the first event
        return _followed(gone, queue)


def _origin(engine: ServingEngine) -> Origin:
    job = engine.plan([])
    return origin_of(job, config_of(job, engine)["binding"], engine.generator)


async def _followed(gone: asyncio.Task[None], queue: asyncio.Queue[Event]) -> AsyncIterator[Event]:
    """Yield events up to the last, or until `gone`, which is cancelled in the end, says that the caller left."""
    try:
        while True:
            event = asyncio.create_task(queue.get())
            await asyncio.wait((event, gone), return_when=asyncio.FIRST_COMPLETED)
            if not event.done():
                event.cancel()
                raise Refused(499, "the caller left", "caller_left")
            yield event.result()
            if event.result()["type"] == "done":
                return
    finally:
        gone.cancel()


async def _left(call: Call) -> None:
    while (await call.receive())["type"] != "http.disconnect":
        pass


async def encoded(form: Encoding, pixels: Any, text: dict[str, str] | None = None) -> bytes:
    """Return pixels as the bytes of a file, encoded beside the event loop."""
    return await run_in_threadpool(functools.partial(form.encode, pixels, text))


async def pictures(events: AsyncIterator[Event]) -> list[Result]:
    """Return the finished images of a request, by row and index. Raises Refused, 500, if one failed."""
    found: list[Result] = []
    async for event in events:
        if event["type"] == "failed":
            raise failed(event)
        if event["type"] == "done" and event["cancelled"]:
            raise stopping()
        if event["type"] == "image":
            found.append(event["result"])
    return sorted(found, key=lambda r: (r.id, r.index))


def stopping() -> Refused:
    """Return the error of what a server that ends does not do any more."""
    return Refused(503, STOPPING, "stopping", None, {"Retry-After": "10"})


def failed(event: Event) -> Refused:
    """Return the error of an image that failed, or of all."""
    if event["result"] is None:
        return stopping() if event["reason"] == STOPPING else Refused(500, event["reason"], "server_error")
    return Refused(500, f"image {event['index']} failed: {event['reason']}", "server_error")


def client_of(call: Call) -> str:
    """Return who calls, for turns and limits: a key, or an address."""
    return str(call.scope.get("client_name", "local"))


def bad(message: str, status: int = 400, code: str = "invalid_value") -> Refused:
    """Return the error of a request that states something wrong, with the field as `param` if the message names one."""
    field = message.split(":")[0].split("[")[0].strip("'\"")
    return Refused(status, " ".join(message.split()), code, field if field.replace("_", "").isalnum() else None)
