"""Sessions of pages in browsers, called desks: each page's jobs are kept in memory, so that a reload loses nothing."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import itertools
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from genkit.errors import reason
from genkit.pictures.encoders import encoding
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.writers import texts_of
from genkit.serve.calls import Serving, bad, encoded
from genkit.serve.limits import Refused
from genkit.serve.line import Event, Ticket
from genkit.serve.openaifields import not_served
from genkit.serve.rows import PICTURES

# Bytes of all pictures in memory; above it the oldest finished jobs are forgotten, those with kept pictures last
BYTES = 2**28
DESKS, JOBS = 64, 200  # desks of a server, and jobs of a desk
GRACE, HOURS = 30.0, 3600.0  # seconds without a page until a desk's jobs are cancelled, and until it is forgotten
BACKLOG = 500  # events that wait for a slow page, above which steps and previews are left out
LIVE = ("queued", "drawing")
CONTROL = "control_image"  # of the first ControlNet
INPUTS = (*PICTURES, CONTROL)
HELD = (*INPUTS, "controls")  # fields with pictures, which are not sent back


@dataclasses.dataclass
class Picture:
    """A picture of a job. about: what the page shows of it; data: the file; kept: by the person who looks at it."""

    about: dict[str, Any]
    data: bytes = b""
    kept: bool | None = None

    def told(self) -> dict[str, Any]:
        """Return it for the page."""
        return self.about | {"kept": self.kept, "drawn": bool(self.data)}


def input_of(row: Request, name: str) -> Any:
    """Return a picture that a row is drawn from: one of INPUTS, or None."""
    return row.controls[0]["image"] if name == CONTROL and row.controls else getattr(row, name, None)


@dataclasses.dataclass
class Work:
    """A job of a desk: a row. fields: as they were sent, without pictures; states: LIVE, done, cancelled, failed."""

    id: str
    fields: dict[str, Any]
    row: Request
    serving: Serving
    state: str = "queued"
    reason: str | None = None
    ticket: Ticket | None = None
    notes: tuple[str, ...] = ()  # what was assumed, or has no effect
    pictures: dict[int, Picture] = dataclasses.field(default_factory=dict)
    encoding: int = 0
    over: bool = False
    made: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def bytes(self) -> int:
        """Return about how much memory it takes."""
        inputs = [input_of(self.row, name) for name in INPUTS]
        return sum(len(p.data) for p in self.pictures.values()) + sum(
            3 * image.width * image.height for image in inputs if image is not None
        )

    def told(self) -> dict[str, Any]:
        """Return it for the page: nothing in it names a file of this machine."""
        hidden = ("id", "seed", "loras", "controls", "meta", "prompt", "negative_prompt", *PICTURES)
        settings = {name: value for name, value in self.row.to_json().items() if name not in hidden}
        inputs = [name for name in INPUTS if input_of(self.row, name) is not None]
        return {
            "id": self.id, "fields": self.fields, "settings": settings, "inputs": inputs, "state": self.state,
            "reason": self.reason, "count": self.row.num_images,
            "pictures": [picture.told() for _, picture in sorted(self.pictures.items())],
        }  # fmt: skip


class Desk:
    """What one page asked for, and the streams of events to it: several, where its address is open twice."""

    def __init__(self, client: str) -> None:
        self.id, self.client = secrets.token_urlsafe(16), client
        self.jobs: OrderedDict[str, Work] = OrderedDict()
        self.listeners: set[asyncio.Queue[dict[str, Any]]] = set()
        self.left: float | None = time.monotonic()
        self.numbers = itertools.count(1)

    def tell(self, kind: str, **about: Any) -> None:
        """Send an event to the page; steps and previews only if it keeps up."""
        for queue in self.listeners:
            if kind not in ("step", "preview") or queue.qsize() < BACKLOG:
                queue.put_nowait({"type": kind, **about})

    def tell_job(self, job: Work) -> None:
        """Send a job as it is now."""
        self.tell("job", job=job.told())

    @property
    def busy(self) -> bool:
        """Whether something is not drawn yet."""
        return any(job.state in LIVE for job in self.jobs.values())


class Desks:
    """All desks of a server; used in its event loop alone."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.desks: OrderedDict[str, Desk] = OrderedDict()

    def open(self, client: str, name: str | None) -> Desk:
        """Return a desk, a new one if the caller has none of that name. Raises Refused where there are too many."""
        desk = self.desks.get(name or "")
        if desk is not None and desk.client == client:
            return desk
        self.sweep()
        if len(self.desks) >= DESKS:
            raise Refused(429, f"{DESKS} pages are open; close one", "too_many_pages", None, {"Retry-After": "60"})
        desk = Desk(client)
        self.desks[desk.id] = desk
        return desk

    def find(self, client: str, name: str) -> Desk:
        """Return a desk of the caller. Raises Refused, 404."""
        desk = self.desks.get(name)
        if desk is None or desk.client != client:
            raise Refused(404, "the server does not know this page any more: load it again", "no_such_page", "desk")
        return desk

    def job(self, client: str, name: str, number: str) -> tuple[Desk, Work]:
        """Return a job and its desk. Raises Refused, 404."""
        desk = self.find(client, name)
        if number not in desk.jobs:
            raise Refused(404, "this job is not held any more", "no_such_job", "job")
        return desk, desk.jobs[number]

    def listen(self, desk: Desk) -> asyncio.Queue[dict[str, Any]]:
        """Return a queue of the desk's events; the first event has all its jobs."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        queue.put_nowait({"type": "hello", "desk": desk.id, "jobs": [job.told() for job in desk.jobs.values()]})
        desk.listeners.add(queue)
        desk.left = None
        return queue

    def leave(self, desk: Desk, queue: asyncio.Queue[dict[str, Any]]) -> None:
        """End a stream; the jobs of a desk without a stream are cancelled after GRACE seconds."""
        desk.listeners.discard(queue)
        if not desk.listeners:
            desk.left = time.monotonic()
            with contextlib.suppress(RuntimeError):  # the loop has ended
                asyncio.get_running_loop().call_later(GRACE, self.sweep)

    def sweep(self) -> None:
        """Cancel the jobs of desks that have no stream, and forget desks that have had none for long."""
        now = time.monotonic()
        for desk in list(self.desks.values()):
            gone = 0.0 if desk.left is None else now - desk.left
            for job in desk.jobs.values() if gone >= GRACE - 1 else ():
                self.cancel(job)
            if gone >= HOURS or (gone >= GRACE and not desk.jobs):
                del self.desks[desk.id]

    async def draw(self, desk: Desk, fields: Mapping[str, Any]) -> Work:
        """Queue a row for a desk. Raises Refused as `Serving.submit`, and for a field that cannot be drawn."""
        if len(desk.jobs) >= JOBS and next(iter(desk.jobs.values())).state in LIVE:
            raise Refused(429, f"{JOBS} jobs wait; cancel some", "too_many_jobs", None, {"Retry-After": "10"})
        stated = {"seed": secrets.randbits(32)} | {k: v for k, v in fields.items() if v is not None}
        name = stated.get("model")
        if name is not None and not (isinstance(name, str) and name in self.serving.models):
            raise bad(not_served("model", name, self.serving.models))
        serving = self.serving.of(name)
        rows = await serving.rows([{k: v for k, v in stated.items() if k != "model"}])
        row = rows[0]
        job = Work(f"{next(desk.numbers)}", {k: v for k, v in stated.items() if k not in HELD}, row, serving)
        job.notes = tuple(getattr(rows, "notes", ()))
        loop = asyncio.get_running_loop()

        def on(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._happened, desk, job, event)

        every = max(1, -(-(row.num_inference_steps or 1) // 10))
        job.ticket = serving.submit([row], desk.client, on, every, True)
        desk.jobs[job.id] = job
        serving.origin()  # begins while the pictures are drawn
        while len(desk.jobs) > JOBS:
            self.forget(desk, next(iter(desk.jobs.values())))
        desk.tell_job(job)
        return job

    def cancel(self, job: Work) -> None:
        """Cancel what is not drawn yet of a job."""
        if job.state in LIVE and job.ticket is not None:
            job.ticket.cancel()

    def forget(self, desk: Desk, job: Work) -> None:
        """Cancel a job and forget its pictures."""
        self.cancel(job)
        desk.jobs.pop(job.id, None)
        desk.tell("forgotten", job=job.id)

    # Events of the engine

    def _happened(self, desk: Desk, job: Work, event: Event) -> None:
        kind = event["type"]
        if kind == "step":
            if job.state == "queued":
                job.state = "drawing"
                desk.tell_job(job)
            desk.tell("step", job=job.id, **{name: event[name] for name in ("index", "step", "steps")})
        elif kind == "preview":
            url = "data:image/png;base64," + base64.b64encode(encoding("png").encode(event["image"])).decode()
            desk.tell("preview", job=job.id, index=event["index"], image=url)
        elif kind == "image":
            job.encoding += 1
            task = asyncio.get_running_loop().create_task(self._keep(desk, job, event["result"]))
            _TASKS.add(task)
            task.add_done_callback(_TASKS.discard)
        elif kind == "failed":
            job.reason = str(event["reason"])
            if event["index"] is not None:
                self._add(desk, job, Picture({"index": event["index"], "reason": job.reason}))
        elif kind == "done":
            job.over = True
            self._end(desk, job, event["cancelled"])

    async def _keep(self, desk: Desk, job: Work, result: Result) -> None:
        scores = {k: v for k, v in result.scores.items() if type(v) in (int, float)}
        about = {name: getattr(result, name) for name in ("index", "seed", "width", "height", "steps", "seconds")}
        try:
            text = texts_of(job.row, result, await job.serving.origin())
            picture = Picture(about | {"scores": scores}, await encoded(encoding("png"), result.pixels, text))
        except Exception as error:  # say, weights that cannot be hashed, as their files are gone
            job.reason = reason(error)
            picture = Picture({"index": result.index, "reason": job.reason})
        job.encoding -= 1
        self._add(desk, job, picture)
        self._end(desk, job, bool(job.ticket and job.ticket.cancelled))
        self._make_room()

    def _add(self, desk: Desk, job: Work, picture: Picture) -> None:
        job.pictures[picture.about["index"]] = picture
        desk.tell("picture", job=job.id, picture=picture.told())

    def _end(self, desk: Desk, job: Work, cancelled: bool) -> None:
        """Close a job once the engine is done with it and its last picture is encoded."""
        if job.over and not job.encoding:
            failed = job.reason is not None and not any(p.data for p in job.pictures.values())
            job.state = "cancelled" if cancelled else "failed" if failed else "done"
            desk.tell_job(job)

    def _make_room(self) -> None:
        held = [(desk, job) for desk in self.desks.values() for job in desk.jobs.values()]
        total = sum(job.bytes for _, job in held)
        over = [(desk, job) for desk, job in held if job.state not in LIVE]
        over.sort(key=lambda pair: (any(p.kept for p in pair[1].pictures.values()), pair[1].made))
        for desk, job in over[:-1]:
            if total <= BYTES:
                return
            total -= job.bytes
            self.forget(desk, job)


_TASKS: set[asyncio.Task[None]] = set()  # the loop itself holds them weakly
