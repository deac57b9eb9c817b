"""`genkit serve` with many workers: an application of Ray Serve, which balances, restarts, scales and drains."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from genkit.cluster.crew import Share, share_here, share_there
from genkit.cluster.generate import check_workers
from genkit.cluster.raypool import connect, disconnect, has_ended, import_ray
from genkit.errors import HostError, InputError, reason
from genkit.options import Options
from genkit.serve.app import create_app
from genkit.serve.rows import Most
from genkit.serve.server import ANSWERED, Listen, bound, keys_of, prepare, url_of
from genkit.signals import Signals

APP, REPLICA = "genkit", "pictures"  # names within Ray Serve
ONGOING = 1000  # calls that a replica takes at once; its own --max-queue refuses before
EACH = 8  # calls of each replica, for which Ray Serve adds one, where --batch-size states no slots
BEAT = 0.5  # seconds between two looks at signals
QUIET = {"log_level": "ERROR", "enable_access_log": False}
CLAIMED, CLAIM = "genkit-serve", 5.0  # the actor of the command, by its name; seconds until a killed one is gone
GONE = 5.0  # seconds between two looks whether Ray is there


@dataclasses.dataclass(frozen=True)
class What:
    """What every replica serves. threads: of the CPU; 0 on a GPU."""

    options: Options
    defaults: dict[str, Any]
    listen: Listen
    most: Most
    max_queue: float
    keys: list[str]
    threads: int


class Replica:
    """A process of Ray Serve: the server without its socket, with an engine of its own."""

    def __init__(self, what: What) -> None:
        if what.threads:
            import torch

            torch.set_num_threads(what.threads)
        from ray import serve

        self.serving = prepare(what.options, what.defaults, what.listen, what.most, what.max_queue, what.keys)
        self.serving.replica = f"{serve.get_replica_context().replica_id.unique_id}, pid {os.getpid()}"
        self.serving.engine.start()
        self.serving.engine.warm()

    def __serve_build_asgi_app__(self) -> Any:
        """Return what answers calls, for Ray Serve."""
        return create_app(self.serving)

    def check_health(self) -> None:
        """Raise where /health is not 200: Ray Serve puts another in its place."""
        if not (self.serving.engine.ready or self.serving.draining):
            raise RuntimeError(self.serving.engine.why)

    def drain(self) -> int:
        """Take no new work; return how many requests are being drawn."""
        self.serving.draining = True
        return len(self.serving.engine.line.tickets)

    def give_up(self) -> None:
        """Draw no more, and fail all tickets with that reason."""
        self.serving.stopped = True
        self.serving.engine.give_up()

    def __del__(self) -> None:
        if hasattr(self, "serving"):
            self.serving.engine.close()


def run(
    options: Options, defaults: dict[str, Any], listen: Listen, most: Most, max_queue: float,
    workers: str | None, address: str | None,
) -> int:  # fmt: skip
    """Serve with many workers until a signal; return the exit code. Raises InputError and HostError."""
    bounds = check_workers(workers, address, options.device)
    if listen.runs is not None:
        raise InputError("--runs: one process draws the runs of a folder; leave --workers and --ray away, or --runs")
    if address is not None and not listen.port:
        raise InputError("--port: 0: the nodes of a cluster listen at one that is stated")
    keys = keys_of(listen)
    prepare(options, defaults, listen, most, max_queue, keys)  # raises errors here, once, and not in each replica
    serve = _import_serve()
    # Held until the end: no other program is given the port before Ray Serve listens there, which it still may
    held = contextlib.nullcontext() if address else contextlib.closing(bound(listen))
    gpu = None if options.device == "auto" else options.device != "cpu"
    with held as own, Signals() as signals, _connected(bounds, gpu, address) as (ray, share):
        listen = listen if own is None else dataclasses.replace(listen, port=own.getsockname()[1])
        options = dataclasses.replace(options, device="cuda" if share.gpu else "cpu")
        what = What(options, defaults, listen, most, max_queue, keys, 0 if share.gpu else share.threads)
        try:
            _serve(ray, serve, what, share, address, signals)
        except (InputError, HostError):
            raise
        except Exception as error:
            raise HostError(f"Ray Serve: {_last(str(error))[1] or reason(error)}") from None
        return signals.exit_code


def _import_serve() -> Any:
    import_ray()
    try:
        from ray import serve
    except ImportError as error:
        needed = "pip install 'genkit-diffusion[ray,serve]'"
        raise InputError(f"--workers and --ray: Ray Serve is not installed: {needed} ({error})") from None
    return serve


@contextlib.contextmanager
def _connected(bounds: tuple[int, int] | None, gpu: bool | None, address: str | None) -> Iterator[tuple[Any, Share]]:
    ray, temporary = import_ray(), None
    try:
        if address is None:
            assert bounds is not None
            share = share_here(bounds, gpu)
            temporary = connect(ray, None, share.most, share.gpu, share.threads)
        else:
            connect(ray, address, 0, False, 1)
            share = share_there(ray, bounds, gpu, address)
        yield ray, share
    finally:
        disconnect(ray, temporary, address is None and ray.is_initialized() and has_ended(ray, True))


def _serve(ray: Any, serve: Any, what: What, share: Share, address: str | None, signals: Signals) -> None:
    """Start the application, wait for a signal, and end it."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    _claim = None if address is None else _alone(ray, serve)  # an actor, which ends with its last reference
    everywhere = "HeadOnly" if address is None else "EveryNode"
    http = {"host": what.listen.host, "port": what.listen.port, "keep_alive_timeout_s": 30}
    serve.start(proxy_location=everywhere, http_options=http, logging_config=QUIET)
    _check_place(what.listen)
    handle, lost = None, False
    try:
        handle = _deployed(serve, application(what, share), signals)
        if handle is None:
            return
        print(url_of(what.listen.host, what.listen.port), flush=True)
        looked = time.monotonic()
        while not signals.exit_code:
            time.sleep(BEAT)
            if time.monotonic() - looked > GONE:
                looked = time.monotonic()
                lost = has_ended(ray, address is None)
                if lost:
                    raise HostError("Ray has ended: its processes are gone")
        print("stopping: drawing what is in flight", file=sys.stderr)
        _drain(handle, what.listen.drain)
    finally:
        if not lost and (address is not None or handle is not None):  # answers on their way arrive
            _end(serve, address is not None)


def _alone(ray: Any, serve: Any) -> Any:
    """Return an actor whose name only one command on a cluster can hold; end what one that was killed has left.

    Raises InputError where another command serves: the newer would end the application of the older.
    """

    class Command:
        def __init__(self, where: str) -> None:
            self.where = where

        def tell(self) -> str:
            return self.where

    where, end = f"process {os.getpid()} of {socket.gethostname()}", time.monotonic() + CLAIM
    while True:
        try:
            claim = ray.remote(num_cpus=0)(Command).options(name=CLAIMED, namespace=APP).remote(where)
            break
        except ValueError:  # it is there: a command that was killed a moment ago still has it
            if time.monotonic() > end:
                other = "another process"
                with contextlib.suppress(Exception):
                    other = ray.get(ray.get_actor(CLAIMED, namespace=APP).tell.remote(), timeout=CLAIM)
                raise InputError(f"--ray: {other} runs genkit serve on this cluster, which has room for one") from None
            time.sleep(BEAT)
    ray.get(claim.tell.remote())
    if APP in serve.status().applications:
        print("note: replacing what a genkit serve that was killed left on the cluster", file=sys.stderr)
        _end(serve)  # Ray Serve itself would keep its replicas, and so their devices, until the new ones have some
    return claim


def _deployed(serve: Any, app: Any, signals: Signals) -> Any:
    """Return the handle of the application once it answers, None where a signal comes first.

    Says what Ray Serve waits for, as devices that others use. Raises HostError where a replica cannot start.
    """
    target = serve.RunTarget(app, name=APP, route_prefix="/", logging_config=QUIET)
    serve.run_many([target], wait_for_applications_running=False)  # serve.run would not heed a signal
    said, looked = None, time.monotonic()
    while not signals.exit_code:
        status = serve.status().applications[APP].status
        if status == "RUNNING":
            _client().wait_for_proxies_serving()
            return serve.get_app_handle(APP)
        if status == "DEPLOY_FAILED":
            kind, why = _why(serve)
            raise InputError(why) if kind == "InputError" else HostError(f"Ray Serve: {why or status}")
        if time.monotonic() - looked > GONE:
            looked = time.monotonic()
            now = _why(serve)[1]
            if now and now != said:
                said = now
                print(f"note: Ray Serve: {now}", file=sys.stderr)
        time.sleep(BEAT)
    return None


def _client() -> Any:
    """Return Ray Serve's internal client, once it was started: what is read from it has no public interface."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None, "it was started"
    return client


def _check_place(listen: Listen) -> None:
    """Raise InputError where Ray Serve already runs on the cluster at another host or port, which it keeps."""
    found = _client().http_config
    if (found.host, found.port) != (listen.host, listen.port):
        there = f"--host {found.host} --port {found.port}"
        raise InputError(f"--port: Ray Serve runs on this cluster already, and keeps its place: give {there}")


def application(what: What, share: Share) -> Any:
    """Return the application for `serve.run`: as many replicas as workers, each with its share."""
    from ray import serve

    scale: dict[str, Any] = {"num_replicas": share.least}
    if share.least < share.most:
        each = what.options.batch_size or EACH
        bounds = {"min_replicas": share.least, "max_replicas": share.most, "target_ongoing_requests": each}
        scale = {"autoscaling_config": bounds}
    has = {"num_gpus": 1, "num_cpus": 1} if share.gpu else {"num_cpus": share.threads}
    drain = max(ANSWERED, what.listen.drain)
    return serve.deployment(
        name=REPLICA, max_ongoing_requests=ONGOING, ray_actor_options=has, graceful_shutdown_timeout_s=drain,
        graceful_shutdown_wait_loop_s=BEAT, health_check_period_s=5.0, **scale,
    )(serve.ingress()(Replica)).bind(what)  # fmt: skip


def _drain(handle: Any, seconds: float) -> None:
    """Let replicas take no new work, and wait up to `seconds` until their requests are drawn.

    Ray Serve's own end, which follows, would answer new calls with 404 meanwhile, and cut off what is in flight.
    """
    end, busy = time.monotonic() + seconds, 1
    while busy and time.monotonic() < end:
        try:
            busy = sum(handle.broadcast("drain").results(timeout_s=ANSWERED))
        except Exception:  # a replica died meanwhile: the others draw on
            busy = 1
        time.sleep(BEAT if busy else 0)
    with contextlib.suppress(Exception):
        handle.broadcast("give_up").results(timeout_s=ANSWERED)


def _end(serve: Any, whole: bool = True) -> None:
    """End the application. whole: and Ray Serve, if it has no other."""
    with contextlib.suppress(Exception):
        serve.delete(APP)
    with contextlib.suppress(Exception):
        if whole and not serve.status().applications:
            serve.shutdown()


def _why(serve: Any) -> tuple[str, str]:
    """Return the kind of error that a replica could not start of, and why, from what Ray Serve says of it."""
    said = ""
    with contextlib.suppress(Exception):
        said = serve.status().applications[APP].deployments[REPLICA].message
    kind, why = _last(said)
    return kind, why or said.strip().replace("\n", " ")[-300:]


def _last(said: str) -> tuple[str, str]:
    """Return the kind and the text of the last error in a trace: Ray puts traces of other processes into errors."""
    found = re.findall(r"([A-Za-z]*(?:Error|Exception)): (.+)", said)
    return (found[-1][0], found[-1][1].strip()) if found else ("", "")


__all__ = ["Replica", "application", "run"]
