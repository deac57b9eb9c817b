"""Threads that encode and save pictures while the next ones are drawn."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from genkit.phases import first_picture, phase
from genkit.pictures.encoders import Encoding
from genkit.pictures.metadata import Origin, texts
from genkit.rows.plans import is_tuned, scheduler_options
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.embeddings import Store
from genkit.runs.recorder import Recorder

# Images that may wait for a writer before denoising waits for the disk, and the bytes of their pixels: 64 of 1024x1024
QUEUE, QUEUE_BYTES = 64, 2**28
# Most of a small image's time is waiting for the disk. Of 128x128, on two cores: 1 thread 152 images/s, 2 334, 4 447,
# 8 725, 16 887; of 512x512, which keep the cores busy, two threads and more alike.
WRITERS = 8


class Writers:
    """Encode and save pictures in threads; `put` blocks when they fall behind.

    origin: what the metadata of the pictures says of what drew them; None writes pictures without metadata. store: for
    their embeddings; `close` closes it. words: {row id: {word: SHA-256 of the textual inversion it stands for}}.
    written: called in a writer's thread with each result whose record is on the disk.
    """

    def __init__(
        self, run: Recorder, rows: Iterable[Request], encoding: Encoding, origin: Origin | None,
        store: Store | None = None, words: Mapping[str, Mapping[str, str]] | None = None,
        written: Callable[[Result], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.words, self.written = words or {}, written
        self.run, self.encoding, self.origin, self.store = run, encoding, origin, store
        self.rows = {r.id: r for r in rows}
        self.pool = ThreadPoolExecutor(WRITERS, "genkit-write")
        self.waiting: deque[tuple[Future[None], int]] = deque()  # with the bytes of its pixels
        self.bytes = 0

    def put(self, result: Result) -> None:
        """Queue one result. Raises the error of an earlier write, e.g. HostError for a full disk."""
        size = 0 if result.pixels is None else result.pixels.nbytes
        self.bytes += size
        self.waiting.append((self.pool.submit(self._write, result), size))
        while self.waiting and (self._full() or self.waiting[0][0].done()):
            future, size = self.waiting.popleft()
            self.bytes -= size
            with phase("wait for writers"):
                future.result()

    def _full(self) -> bool:
        return len(self.waiting) > QUEUE or (self.bytes > QUEUE_BYTES and len(self.waiting) > 1)

    def close(self) -> None:
        """Wait for the queued writes."""
        with phase("wait for writers"):
            self.pool.shutdown(wait=True)
        try:
            for future, _ in self.waiting:
                future.result()
        finally:
            if self.store is not None:
                self.store.close()

    def _texts(self, result: Result, origin: Origin) -> dict[str, str]:
        return texts_of(self.rows[result.id], result, origin, self.words.get(result.id))

    def _write(self, result: Result) -> None:
        if result.status != "done":
            self.run.fail(result)
            self.written(result)
            return
        text = {} if self.origin is None else self._texts(result, self.origin)
        with phase("encode pictures"):
            data = self.encoding.encode(result.pixels, text)
        if self.store is not None and result.embedding is not None:  # before its record
            self.store.add(result.id, result.index, hashlib.sha256(data).hexdigest(), result.embedding)
        with phase("save to disk"):
            self.run.save(result, data, self.encoding.suffix)
        first_picture()
        result.pixels = None  # frees the memory
        self.written(result)


def texts_of(row: Request, result: Result, origin: Origin, words: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return `texts` of a picture of a row whose defaults are filled in."""
    tuned = is_tuned(row.scheduler)
    options = {"solver": row.scheduler} if tuned else scheduler_options(row.scheduler or {})
    record = {**result.to_json(), "fingerprint": row.fingerprint()}
    return texts(row.to_json(), record, origin, {"solver": origin.solver, **options}, words)
