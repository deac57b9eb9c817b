"""Several processes that train one model: their shares of a step, checks that they agree, and how all exit.

The batch of a step consists of `passes` batches of train.batch_size pictures, in an order given by seed and step.
Process `rank` of `world` takes the passes rank, rank + world, …; noise and timesteps are seeded by (seed, step, pass).
So the result of a run does not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from genkit.errors import EXIT_HOST, EXIT_INPUT, EXIT_SOME_FAILED, HostError, InputError, shown
from genkit.training.recipe import Recipe

LAUNCHED = "GENKIT_PROCESSES"  # set by `genkit train --processes`, which reports lost processes itself
PATIENCE = datetime.timedelta(hours=12)  # timeout while the first process evaluates, draws or writes
# Options of `accelerate launch` that are keys of a recipe here, or not supported.
FOREIGN = {
    "ACCELERATE_USE_FSDP": "FSDP is asked for in the recipe: train.sharding=full",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed is not supported; train.sharding=full shards the networks too",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported; train.sharding=full shards the networks",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "no parallelism config is supported; train.sharding=full shards the networks",
}
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # with --mpirun_hostfile
_GONE = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|socket", re.IGNORECASE)
_FAILED, _CODE = "genkit/failed", "genkit/code"


def rank() -> int:
    """Return the rank of this process, set by its launcher; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """Return the number of processes that the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_accelerator(recipe: Recipe, target: Any, out: Path) -> Any:
    """Return accelerate's Accelerator for the device type of `target`, connected to the other processes.

    Raises InputError for unsupported options of the launcher, and for more processes than GPUs.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    for name, complaint in FOREIGN.items():
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise InputError(f"accelerate launch: {complaint}")
    check_launch()
    _check_devices(target)
    if recipe.train.sharding == "full" and world() == 1:
        raise InputError("train.sharding: full is for several processes: genkit train … --processes 2, or torchrun")
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(
        mixed_precision=recipe.train.mixed_precision.replace("fp32", "no"), cpu=target.type == "cpu",
        log_with="tensorboard" if recipe.save.tensorboard else None, project_dir=out,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )  # fmt: skip
    accelerator.gradient_accumulation_steps = 1  # that of the launcher would divide the loss again
    return accelerator


def check_launch() -> None:
    """Raise InputError if `accelerate launch` has started one process although several were requested.

    It then sets MASTER_ADDR but no rank or world size.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if launched and not any(name in os.environ for name in ("WORLD_SIZE", *_MPI)):
        raise InputError(
            "accelerate launch: starts one process on a CPU, whatever --num_processes says: genkit train … --processes "
            "N, or accelerate launch --multi_gpu --num_processes N -m genkit train … --device cpu"
        )


def _check_devices(target: Any) -> None:
    import torch

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local == 1:
        return
    if target.type == "mps":
        raise InputError(f"{local} processes: this machine has one GPU; take one process, or --device cpu")
    if target.type == "cuda":
        if target.index is not None:
            raise InputError(f"--device: {target}: {local} processes take a GPU each: --device cuda")
        count = torch.cuda.device_count()
        if local > count:
            raise InputError(f"{local} processes: this machine has {count} GPUs, and each takes one; or --device cpu")


def passes_of(before: Mapping[str, Any] | None, recipe: Recipe, processes: int, where: str) -> int:
    """Return the passes of a step over all processes: those recorded in `before`, a run.json, else the recipe's.

    Raises InputError if another number of processes or of accumulation steps would change the step.
    """
    own = recipe.train.gradient_accumulation_steps
    if before is None:
        return own * processes
    first = before["recipe"]["train"]["gradient_accumulation_steps"]
    passes = before.get("passes", first * before.get("processes", 1))  # earlier versions recorded the processes
    if own * processes == passes or (own == first and passes % processes == 0):
        return int(passes)
    key = "recipe.train.gradient_accumulation_steps"
    batch = f"a step of this run is {passes} passes of {recipe.train.batch_size}"
    if own != first:
        fits = passes // processes if passes % processes == 0 else first
        raise InputError(f"{where}: {key}: was {first}, is now {own}: {batch}; take {fits}")
    fair = [n for n in range(1, passes + 1) if passes % n == 0]
    much = ", ".join(map(str, fair[:8])) + (", …" if len(fair) > 8 else "")
    raise InputError(f"{where}: {processes} processes: {batch}, which they cannot share equally: take {much}")


def gathered(accelerator: Any, value: Any) -> list[Any]:
    """Return the values of all processes, by rank."""
    if accelerator.num_processes == 1:
        return [value]
    import torch

    every: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(every, value)
    return every


def check_alike(accelerator: Any, facts: Mapping[str, Any]) -> None:
    """Raise InputError, in all processes, if a fact (version of torch, data) differs between processes."""
    every = gathered(accelerator, dict(facts))
    for number, other in enumerate(every):
        for name, value in every[0].items():
            if other[name] != value:
                raise InputError(
                    f"process {number} of {len(every)}: {name} is {shown(other[name])}, that of process 0 "
                    f"{shown(value)}: they must be alike"
                )


@contextlib.contextmanager
def as_one() -> Iterator[None]:
    """Report an error of several processes once: by the first that fails; the others exit silently with its code.

    Raises Silent in those, and HostError if a process has died without an error.
    """
    try:
        yield
    except Exception as error:
        if world() == 1:
            raise
        codes = {InputError: EXIT_INPUT, HostError: EXIT_HOST}
        code = next((code for kind, code in codes.items() if isinstance(error, kind)), EXIT_SOME_FAILED)
        if isinstance(error, HostError | InputError) or not is_lost(error):
            if _first(code):
                raise
            raise Silent(code) from error
        known = _code_of_first()
        if known is None and LAUNCHED not in os.environ and _first(EXIT_HOST):
            hint = "run the same command again to continue from the last checkpoint"
            raise HostError(f"process {rank()} of {world()}: another one has ended; {hint}") from error
        raise Silent(known or EXIT_HOST) from error


def leave(code: int) -> int:
    """Return the exit code; one of several processes exits with it at once, without waiting for the others."""
    if world() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


class Silent(Exception):  # not an error of this process
    """Another process has failed and reported it. code: the exit code of all."""

    def __init__(self, code: int = EXIT_SOME_FAILED) -> None:
        super().__init__(code)
        self.code = code


def is_lost(error: BaseException) -> bool:
    """Return whether an exception says that the connection to another process is gone."""
    import torch

    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(_GONE.search(str(error)))


def _store() -> Any:
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return torch.distributed.distributed_c10d._get_default_store()


def _first(code: int) -> bool:
    """Return whether this process is the first to fail, and record its exit code."""
    store = _store()
    if store is None:  # not yet connected: all processes of this machine have the same error
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        if store.add(_FAILED, 1) != 1:
            return False
        store.set(_CODE, str(code))
        return True
    except Exception:  # the process that hosts the store has exited
        return False


def _code_of_first() -> int | None:
    """Return the exit code of the process that failed first; None if it is not recorded."""
    store = _store()
    try:
        if store is None or store.add(_FAILED, 0) == 0:
            return None
        store.wait([_CODE], datetime.timedelta(seconds=5))
        return int(store.get(_CODE))
    except Exception:  # the process that hosts the store has exited
        return None
