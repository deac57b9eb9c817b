"""Workers as actors of Ray. Ray is imported here alone, and only when it is asked for."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from genkit.cluster.units import Event, Unit
from genkit.errors import EXIT_SIGTERM, HostError, InputError, reason
from genkit.job.plan import Job

THREADS = 8  # calls that an actor takes at a time: two chunks, a recall, a halt, and room
STORE = 2**27  # bytes of a local Ray's object store: the job is in it, and little else
SECONDS = 10  # to find a cluster
GONE = 5.0  # seconds between two looks whether any node is alive
_LOGGER = logging.getLogger("ray")
_TOKENS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class RayPool:
    """Workers on the nodes of a cluster, or, for `address` None, of a Ray that is started here and ends with it.

    Raises InputError where Ray is not installed, HostError where it does not answer.
    """

    def __init__(self, job: Job, folder: Path, address: str | None, gpu: bool, workers: int, threads: int) -> None:
        """gpu: whether each worker has one; else it has `threads` cores. workers: most, of a Ray that is started."""
        self.ray = import_ray()
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.actors: dict[str, Any] = {}
        self.finishing: set[str] = set()
        self.gpu, self.threads, self.local = gpu, threads, address is None
        self.lost = False
        self._temporary: str | None = None
        self._level = _LOGGER.level
        self.folder = folder
        self.recorded: dict[str, Any] | None = None
        self._looked = time.monotonic()
        try:
            # Its warnings, of tokens say, would cut into the progress
            _LOGGER.setLevel(max(self._level, logging.ERROR))
            self._temporary = connect(self.ray, address, workers, gpu, threads)
            self.job = self.ray.put((job, folder))
            self.actor = self.ray.remote(_actor())
        except BaseException:
            self.close()
            raise

    def start(self, worker: str, *, masks: bool = False) -> None:
        share: dict[str, Any] = {"num_gpus": 1, "num_cpus": 1} if self.gpu else {"num_cpus": self.threads}
        actor = self.actor.options(max_restarts=0, max_concurrency=THREADS, **share).remote(
            self.job, worker, 0 if self.gpu else self.threads
        )
        self.actors[worker] = actor
        self._when(actor.load.remote(self.recorded, masks), worker, "ready")

    def open(self, worker: str) -> None:
        self._order(worker, "open", "opened")

    def send(self, worker: str, units: list[Unit]) -> None:
        self._order(worker, "draw", "drawn", units)

    def recall(self, worker: str) -> None:
        self._order(worker, "give_back", "given")

    def halt(self, worker: str) -> None:
        self._order(worker, "halt", "halted")

    def finish(self, worker: str) -> None:
        self.finishing.add(worker)
        self._order(worker, "finish", "ended")

    def kill(self, worker: str) -> None:
        actor = self.actors.pop(worker, None)
        if actor is not None:
            with contextlib.suppress(Exception):
                self.ray.kill(actor, no_restart=True)

    def look_back(self, worker: str, detect: bool) -> None:
        """Have images of earlier starts scored again, or looked at again: "looked", with the results."""
        self._order(worker, "look_back", "looked", detect)

    def poll(self, seconds: float) -> list[Event]:
        came: list[Event] = []
        with contextlib.suppress(queue.Empty):
            came.append(self.events.get(timeout=seconds))
            while True:
                came.append(self.events.get_nowait())
        found = [event for event in came if event.worker in self.actors]  # further calls of a dead worker fail, too
        for event in found:
            if event.kind == "died":  # not in `_came`, where Ray's thread would wait for itself
                self.kill(event.worker)
        if time.monotonic() - self._looked > GONE or any(event.kind == "died" for event in found):
            self._looked = time.monotonic()
            self._check_alive()
        return found

    def _check_alive(self) -> None:
        """Raise HostError when Ray itself has ended: its calls would then wait for ever."""
        self.lost = has_ended(self.ray, self.local)
        if self.lost:
            raise HostError("Ray has ended: its processes are gone; run the same command again to continue")

    def close(self) -> None:
        for worker in () if self.lost else list(self.actors):
            self.kill(worker)
        disconnect(self.ray, self._temporary, self.lost)
        _LOGGER.setLevel(self._level)

    def _order(self, worker: str, method: str, kind: str, *given: Any) -> None:
        """Call a method of a worker; nothing where it died a moment ago, which is told already."""
        actor = self.actors.get(worker)
        if actor is not None:
            self._when(getattr(actor, method).remote(*given), worker, kind)

    def _when(self, call: Any, worker: str, kind: str) -> None:
        """Report the outcome of a call to a worker as an event of that kind."""
        call.future().add_done_callback(functools.partial(self._came, worker, kind))

    def _came(self, worker: str, kind: str, future: Any) -> None:
        """Turn the outcome of a call into an event; runs in a thread of Ray's."""
        error = future.exception()
        if error is None:
            value, notes, use = future.result()
            self.events.put(Event(kind, worker, value, tuple(notes), use))
            return
        cause = getattr(error, "cause", None) or error
        if worker in self.finishing and isinstance(cause, InterruptedError):
            return
        if isinstance(cause, InputError | HostError):
            cause = cause if self.local else type(cause)(f"worker {worker}: {cause}")
            self.events.put(Event("error", worker, cause))
            return
        self.events.put(Event("died", worker, _why(error, cause)))


def import_ray() -> Any:
    """Return the module. Raises InputError with the command that installs it."""
    try:
        import ray
    except ImportError:
        raise InputError("--workers and --ray: Ray is not installed: pip install 'genkit-diffusion[ray]'") from None
    return ray


def connect(ray: Any, address: str | None, workers: int, gpu: bool, threads: int) -> str | None:
    """Connect to a cluster, or start a Ray of this machine for so many workers; return its temporary folder.

    gpu: whether each worker has one; else it has `threads` cores. Raises HostError where that fails.
    """
    quiet = {"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR"}
    logging.getLogger("ray").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before = signal.getsignal(signal.SIGTERM)
    temporary = None
    if address is None:
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 is for work beside other work
        temporary = tempfile.mkdtemp(prefix="gk-", dir="/tmp" if os.access("/tmp", os.W_OK) else None)
        _give_token()
        resources = {"num_cpus": workers * threads, "num_gpus": workers if gpu else 0}
        try:
            with _says("cannot start Ray here"):
                ray.init(  # "local", as without an address it would take RAY_ADDRESS
                    address="local",
                    include_dashboard=False,
                    object_store_memory=STORE,
                    _temp_dir=temporary,
                    **resources,
                    **quiet,
                )
        except SystemExit:  # of Ray's own handler of SIGTERM, with 15
            disconnect(ray, temporary)
            raise SystemExit(EXIT_SIGTERM) from None
        except BaseException:
            disconnect(ray, temporary)
            raise
    else:
        address = _answering(ray, address)
        hint = "is it Ray's port, and the token right (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN)?"
        with _says(f"--ray: the cluster at {address} does not let this process in: {hint}"):
            ray.init(address=address, **quiet)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray's own would leave without a word
    return temporary


def has_ended(ray: Any, local: bool) -> bool:
    """Whether Ray itself has ended: its calls would then wait for ever."""
    return bool(_daemon(ray).dead_processes()) if local else not any(node["Alive"] for node in ray.nodes())


def disconnect(ray: Any, temporary: str | None, lost: bool = False) -> None:
    """Leave a cluster, or end the Ray that `connect` started in a temporary folder. lost: it has ended by itself."""
    with contextlib.suppress(Exception):
        if lost and temporary is not None:  # to ask it for anything would wait a minute
            _daemon(ray).kill_all_processes(check_alive=False, allow_graceful=False)
        elif not lost:
            ray.shutdown()
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)


def _give_token() -> None:
    """Set a token for a Ray that is started here, where Ray cannot write its own into the home folder."""
    home = Path(os.environ.get("HOME", "/"))
    own = home / ".ray"
    writable = os.access(own if own.exists() else home, os.W_OK | os.X_OK)
    if not writable and not any(os.environ.get(name) for name in _TOKENS) and not (own / "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _daemon(ray: Any) -> Any:
    """Return Ray's node of this machine, which started its processes."""
    return ray._private.worker._global_node


def _actor() -> type:
    """Return the class of the actors: a Worker, and what Ray's metrics show of it."""
    from genkit.cluster.worker import Worker

    class GenkitWorker:
        def __init__(self, job: tuple[Job, Path], name: str, threads: int) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN) if _main() else None
            self.worker = Worker(*job, name, threads)
            self.metrics = _Metrics(self.worker)

        def _answer(self, value: Any) -> tuple[Any, list[str], tuple[float, float]]:
            feed = getattr(self.worker, "feed", None)
            return value, self.worker.news(), (0.0, 0.0) if feed is None else feed.use()

        def load(self, recorded: dict[str, Any] | None, masks: bool) -> Any:
            return self._answer(self.worker.load(recorded, masks))

        def look_back(self, detect: bool) -> Any:
            return self._answer(self.worker.look_back(detect))

        def open(self) -> Any:
            self.worker.open()
            return self._answer(None)

        def draw(self, units: list[Unit]) -> Any:
            drawn = self.worker.draw(units)
            self.metrics.update()
            return self._answer(drawn)

        def give_back(self) -> Any:
            return self._answer(self.worker.give_back())

        def halt(self) -> Any:
            self.worker.halt()
            return self._answer(None)

        def finish(self) -> Any:
            self.worker.finish()
            return self._answer(None)

    return GenkitWorker


class _Metrics:
    """Counters and a gauge that Ray exports, to Prometheus say."""

    def __init__(self, worker: Any) -> None:
        from ray.util.metrics import Counter, Gauge

        self.worker = worker
        names = {"done": "genkit_pictures", "failed": "genkit_failed"}
        self.counters = {key: Counter(name, tag_keys=("worker",)) for key, name in names.items()}
        self.slots = Gauge("genkit_slots_full", "Share of the slots in use.", tag_keys=("worker",))
        self.said = {"done": 0, "failed": 0}
        self.lock = threading.Lock()

    def update(self) -> None:
        tags = {"worker": self.worker.name}
        with self.lock:
            for key, counter in self.counters.items():
                if (new := self.worker.counted[key] - self.said[key]) > 0:
                    counter.inc(new, tags)
                    self.said[key] += new
        if (full := self.worker.slots_full) is not None:
            self.slots.set(full, tags)


def _main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _why(error: BaseException, cause: BaseException) -> str:
    """Return why a worker died, as a few words."""
    if type(error).__name__ == "OutOfMemoryError":
        return _SIGNS["NODE_OUT_OF_MEMORY"]
    if type(error).__name__ in ("ActorDiedError", "ActorUnavailableError", "RayActorError"):
        text = str(error)
        for sign, words in _SIGNS.items():
            if sign in text:
                return words
        return "its process ended"
    return f"{type(cause).__name__}: {reason(cause)}"


_SIGNS = {
    "NODE_OUT_OF_MEMORY": "memory of its node ran out",
    "node has died": "its node is gone",
    "node was": "its node is gone",
}


@contextlib.contextmanager
def _says(what: str) -> Any:
    """Turn what Ray raises into a HostError of one line."""
    try:
        yield
    except (InputError, HostError):
        raise
    except Exception as error:
        asks = "Token" in str(error.__cause__) and os.environ.get("RAY_AUTH_MODE") != "token"
        why = "it asks for a token: set RAY_AUTH_MODE=token" if asks else reason(error)
        raise HostError(f"{what}: {why}") from None


def _answering(ray: Any, address: str) -> str:
    """Return HOST:PORT of a cluster that takes calls: Ray itself would try for a minute. Raises HostError."""
    if address == "auto":
        running = sorted(ray._private.services.find_gcs_addresses())
        started = ray._private.utils.read_ray_address()  # by `ray start`, and not for a run with --workers alone
        address = os.environ.get("RAY_ADDRESS") or (started if started in running else next(iter(running), ""))
        if not address or address == "auto":
            raise HostError("--ray: auto: no cluster of Ray runs here, and RAY_ADDRESS names none")
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), SECONDS).close()
    except (OSError, ValueError) as error:
        raise HostError(f"--ray: no cluster answers at {address}: {reason(error)}") from None
    return address
