"""Set up a training run from a recipe: networks, data, optimizer, checkpoints, evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import re
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch

from genkit.components import ModelInfo, load_components, weight_hashes
from genkit.components.text import as_word
from genkit.components.weights import sha256
from genkit.datasets.duplicates import fingerprint_all
from genkit.datasets.sources import read_examples, repeated, split
from genkit.device.devices import compute_dtype, peak_memory, pick_device
from genkit.durable import disk
from genkit.errors import HostError, InputError, shown
from genkit.files import place
from genkit.pictures.edges import check_preprocess
from genkit.progress import Steps, printable
from genkit.training.cache import encoded
from genkit.training.checkpoint import Checkpoints
from genkit.training.control import model_of
from genkit.training.data import Feed, Pictures
from genkit.training.doctor import check_data
from genkit.training.evaluate import LOWER_IS_BETTER, Evaluation
from genkit.training.folder import alike, facts_of, free_or_own, locked, same_run
from genkit.training.output import write_model
from genkit.training.processes import check_alike, make_accelerator
from genkit.training.recipe import Recipe
from genkit.training.report import write_page
from genkit.training.scenes import pictures_of
from genkit.training.sharding import full, shard, whole
from genkit.training.state import State, fold
from genkit.training.tasks import KINDS, MIXED, Tensors, make_task
from genkit.version import __version__

log = logging.getLogger("genkit")


@dataclasses.dataclass
class Setup:
    """Everything that the training loop uses."""

    recipe: Recipe
    out: Path
    info: ModelInfo
    accelerator: Any
    task: Any
    state: State
    checkpoints: Checkpoints
    evaluation: Evaluation
    feeds: list[Feed]
    bar: Steps
    passes: int  # of a step, in this process
    began: float = 0.0
    first: int = 0

    @classmethod
    @contextlib.contextmanager
    def prepared(cls, recipe: Recipe, out: Path, device: str, quiet: bool) -> Iterator[Self]:
        """Lock the folder, check recipe and data, load the networks and restore the newest checkpoint."""
        target, _ = pick_device(device, "float32")
        if recipe.save.tensorboard and find_spec("tensorboard") is None:
            raise InputError("save.tensorboard: tensorboard is not installed: pip install 'genkit-diffusion[train]'")
        accelerator = make_accelerator(recipe, target, out)
        check_preprocess(recipe.data.conditioning, "data.conditioning")
        info = model_of(recipe, KINDS.get(recipe.task, "text-to-image"))
        _check_channels(info)
        read = read_examples(recipe.data)
        examples, held = split(read, recipe.data)
        with disk(out):
            out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            facts = facts_of(recipe, info, examples)
            check_alike(accelerator, {"torch": torch.__version__, "genkit": __version__, **alike(facts)})
            with accelerator.main_process_first():
                if accelerator.is_main_process:
                    free_or_own(out)
                    say = functools.partial(_message, quiet=quiet)
                    check_data(recipe, examples, held, info, out, say, read=read, quiet=quiet)
                passes = same_run(out, recipe, facts, accelerator.num_processes)
            torch.manual_seed(fold(recipe.seed, "weights"))  # for new networks and adapters
            components = load_components(info, device=_placed(accelerator.device), dtype=torch.float32)
            task = make_task(recipe, components, compute_dtype(target, MIXED[recipe.train.mixed_precision]))
            pictures = pictures_of(recipe, repeated(examples), task)
            if recipe.token and not any(re.search(as_word(recipe.token.placeholder), t) for t in pictures.names()):
                raise InputError(f"data.captions: none has the new word {shown(recipe.token.placeholder)} in it")
            validation = pictures.plain(held) if held else None
            if recipe.train.sharding == "full":
                shard(task.networks, _placed(accelerator.device))
            state = State(task.networks, recipe.train)
            metric = recipe.evaluate.best
            checkpoints = Checkpoints(out / "checkpoints", recipe.save, metric in LOWER_IS_BETTER, metric)
            evaluation = Evaluation(recipe, task, validation, pictures.plain(examples), out)
            sources = [pictures]
            if recipe.prior is not None:
                with accelerator.main_process_first():
                    sources.append(_prior(recipe, task, out, device, accelerator.is_main_process))
            feeds = [_feed(recipe, source, task, info, out, accelerator) for source in sources]
            bar = Steps(quiet=quiet or not accelerator.is_main_process)
            shares = passes // accelerator.num_processes
            found = cls(recipe, out, info, accelerator, task, state, checkpoints, evaluation, feeds, bar, shares)
            try:
                found._prepare()
                yield found
            except torch.OutOfMemoryError as error:
                hint = "try less, with train.gradient_accumulation_steps or train.gradient_checkpointing"
                much = f"train.batch_size {recipe.train.batch_size} is too much"
                raise HostError(f"device {device}: out of memory: {much}; {hint}") from error

    def _prepare(self) -> None:
        """Wrap the networks and the optimizer for device, precision and processes; restore the newest checkpoint."""
        if self.recipe.train.compile:
            self.task.nets = {name: torch.compile(net) for name, net in self.task.nets.items()}
        for network in self.task.networks.values():
            network.train()
        prepare = self.accelerator.prepare_model if self.sharded else self.accelerator.prepare
        how = {"evaluation_mode": True} if self.sharded else {}  # mixed precision only, no DDP
        self.task.nets = {name: prepare(net, **how) for name, net in self.task.nets.items()}
        self.stepper = self.accelerator.prepare(self.state.optimizer)
        if self.recipe.save.tensorboard:
            self.accelerator.init_trackers("tensorboard")
        if self.accelerator.is_main_process:
            self.checkpoints.sweep()
        manifest = self.checkpoints.restore(self.state, self.message)
        if manifest is not None:
            if self.accelerator.scaler is not None and manifest["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(manifest["scaler"])
            self.message(f"going on from step {self.state.step} of {self.recipe.train.steps}")
            if self.wants_evaluation(self.state.step) and self.state.step not in self.state.scores:
                self.evaluate()  # the run was stopped before this evaluation
                self.save()
        elif self.recipe.evaluate.every and self.recipe.model is not None:
            self.evaluate()  # of the initial weights: the first row of the report
        self.began, self.first = time.monotonic(), self.state.step

    @property
    def device(self) -> torch.device:
        return _placed(self.accelerator.device)

    @property
    def shared(self) -> bool:
        """Whether several processes train together."""
        return self.accelerator.num_processes > 1

    @property
    def sharded(self) -> bool:
        """Whether the weights are sharded over the processes."""
        return self.recipe.train.sharding == "full"

    def agreed(self, seconds: float, stop: int) -> tuple[float, int]:
        """Return the maximum time and exit code over all processes."""
        if not self.shared:
            return seconds, stop
        every = self.accelerator.gather(torch.tensor([[seconds, stop]], dtype=torch.float64, device=self.device))
        seconds, stop = every.amax(dim=0).tolist()
        return seconds, int(stop)

    def message(self, text: str) -> None:
        """Print a line to standard error, in the main process only."""
        _message(text, self.bar.quiet)

    def feed(self, start: int) -> Iterator[tuple[Tensors, list[str], float]]:
        """Yield (tensors, names, loss weight) of each micro-step from `start` on, with DreamBooth's prior pictures.

        The loss of a step is the weighted sum of the mean losses of its micro-steps.
        """
        every = zip(*(feed.from_micro_step(start) for feed in self.feeds), strict=True)
        for number, parts in enumerate(every, start):
            tensors = [self._tensors(batch) for _, batch in parts]
            count = sum(len(t["weights"]) for t in tensors)
            if (prior := self.recipe.prior) is not None:  # so that the loss is the sum of both means
                for found, weight in zip(tensors, (1.0, prior.weight), strict=True):
                    found["weights"] *= count / len(found["weights"]) * weight
            joined = {name: torch.cat([t[name] for t in tensors]) for name in tensors[0]}
            yield (
                joined,
                [key for _, batch in parts for key in batch.keys],
                self.feeds[0].weight_of(number, self.passes),
            )

    def _tensors(self, batch: Any) -> Tensors:
        found = self.task.encode(batch) if batch.tensors is None else batch.tensors
        found = {name: tensor.to(self.device, non_blocking=True) for name, tensor in found.items()}
        return found | {"weights": batch.weights.to(self.device), "dropped": batch.dropped.to(self.device)}

    def place_of(self, part: int) -> int:
        """Return the index of this process's pass in the step."""
        return int(part * self.accelerator.num_processes + self.accelerator.process_index)

    def seeded(self, step: int, part: int) -> torch.Generator:
        """Return the generator of a pass, and seed dropout, both by the step and the index of the pass only."""
        seed = fold(self.recipe.seed, step, self.place_of(part), 0)
        torch.manual_seed(seed)
        return torch.Generator(self.device).manual_seed(seed)

    def step_optimizer(self, most: float) -> torch.Tensor:
        """Clip the gradients to norm `most`, take a step, and return the norm before clipping."""
        norm = full(self.accelerator.clip_grad_norm_(list(self.state.params.values()), most))
        self.stepper.step()
        self.state.optimizer.zero_grad(set_to_none=True)
        return norm

    def save(self) -> None:
        """Write a checkpoint, in the main process; sharded weights are gathered from all."""
        main = self.accelerator.is_main_process
        tensors = self.state.tensors(keep=main) if self.sharded else None
        if main:
            self.checkpoints.write(self.state, self._scaler_state(), tensors)

    def _scaler_state(self) -> dict[str, Any] | None:
        """Return the state of fp16's loss scaler; None in other precisions."""
        return None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def wants_evaluation(self, step: int) -> bool:
        """Return whether the recipe asks for an evaluation after this step."""
        every = self.recipe.evaluate.every
        return step == self.recipe.train.steps or bool(every and step % every == 0)

    def evaluate(self) -> None:
        """Evaluate the averaged weights in one process, share the scores with the others, and update index.html."""
        shared: list[Any] = [None]
        with self._averaged():
            if self.accelerator.is_main_process:
                nets = self.task.nets
                if self.shared:  # unwrapped: the forward of DDP would wait for the other processes
                    self.task.nets = dict(self.task.networks)
                shared = [self.evaluation(self.state.step)]
                self.task.nets = nets
        if self.shared:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(shared)
        found = self.state.scores[self.state.step] = shared[0]
        self.track({f"validation/{k}": v for k, v in found.items() if isinstance(v, int | float)}, self.state.step)
        if self.accelerator.is_main_process:
            best = self.ranked()[:1] or [self.state.step]
            write_page(self.out, self.out.name, self.state.scores, self.recipe.evaluate.prompts, best[0])

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """Use the averaged weights within this context; sharded ones are gathered in the main process."""
        if self.sharded:
            return whole(self.task.networks, self.state.ema, self.accelerator.is_main_process)
        return self.state.averaged()

    def is_best(self) -> bool:
        """Return whether this step has the best score so far, if best checkpoints are kept."""
        return bool(self.recipe.save.keep_best) and self.ranked()[:1] == [self.state.step]

    def enough(self) -> str:
        """Return the reason for early stopping, or ""."""
        patience, ranked = self.recipe.evaluate.patience, self.ranked()
        if patience is None or not ranked:
            return ""
        since = sum(step > ranked[0] for step in self.state.scores)
        return f"no better {self.recipe.evaluate.best} since step {ranked[0]}" if since >= patience else ""

    def ranked(self) -> list[int]:
        """The evaluated steps, best first."""
        return self.checkpoints.ranked(self.state, list(self.state.scores))

    def finish(self) -> None:
        """Write the model of the best checkpoint, or of the last step if best checkpoints are not kept."""
        main = self.accelerator.is_main_process
        if not main and not self.sharded:
            return
        if self.sharded:  # wait until the last checkpoint is written
            self.accelerator.wait_for_everyone()
        self.message("writing the model")
        best = self.checkpoints.ranked(self.state, self.checkpoints.steps())[: min(1, self.recipe.save.keep_best)]
        scores = dict(self.state.scores)
        if best and best[0] != self.state.step:
            self.checkpoints.restore_best(self.state, best[0])
            self.state.scores = scores
        with self._averaged():
            facts = {"step": self.state.step, **scores.get(self.state.step, {})}
            if main:
                write_model(self.recipe, self.info, self.task, self.out, facts)

    def track(self, values: dict[str, float], step: int) -> None:
        """Log to TensorBoard, if the recipe asks for it."""
        if self.recipe.save.tensorboard:
            self.accelerator.log(values, step=step)

    def report(self, bar: Steps, step: int, loss: float) -> None:
        """Show the progress: loss, pictures a second, memory."""
        train = self.recipe.train
        rate, peak = self.rate(step - self.first), peak_memory(self.device) / 2**30
        total = train.steps
        if train.max_seconds is not None and self.state.seconds > 0:  # training may end before all steps are done
            total = min(total, max(step, round(step * train.max_seconds / self.state.seconds)))
        bar(step, total, f"step {step} of {train.steps}, loss {loss:.4f}, {rate:.1f} images/s, {peak:.1f} GiB")

    def rate(self, steps: int) -> float:
        """Return the pictures a second since this start."""
        each = sum(feed.batch_size * feed.world for feed in self.feeds) * self.passes
        return steps * each / max(1e-9, time.monotonic() - self.began)

    def best(self) -> dict[str, Any]:
        """Return the step and the scores of the best evaluation."""
        ranked = self.ranked()
        return {"step": ranked[0], **self.state.scores[ranked[0]]} if ranked else {}


def _placed(device: torch.device) -> torch.device:
    """Return the device, with cpu:0, which accelerate assigns to some processes, as cpu."""
    return torch.device("cpu") if device.type == "cpu" else device


def _message(text: str, quiet: bool) -> None:
    if not quiet:
        print(printable(text), file=sys.stderr, flush=True)


def _check_channels(info: ModelInfo) -> None:
    """Raise InputError for a pixel-space UNet without 3 channels, and for a UNet that reads the guidance scale."""
    unet = info.configs.get("unet")
    if unet is not None and unet.get("time_cond_proj_dim"):
        raise InputError(
            "networks.unet.time_cond_proj_dim: a network that reads the guidance scale is not trained here"
        )
    if unet is not None and "vae" not in info.parts and unet["in_channels"] != 3:
        raise InputError(f"networks.unet.in_channels: {unet['in_channels']}, but pictures are trained on in 3 (RGB)")


def _prior(recipe: Recipe, task: Any, out: Path, device: str, draw: bool) -> Pictures:
    """Return DreamBooth's prior pictures: those given, or drawn once with the untrained model."""
    from genkit.cluster.generate import generate
    from genkit.rows.request import Request

    prior = recipe.prior
    assert prior is not None
    folder = Path(prior.path) if prior.path is not None else out / "prior" / "images"
    if prior.path is None and draw:
        row = Request(id="prior", prompt=prior.prompt, num_images=prior.count, seed=recipe.seed)
        if generate([row], out=out / "prior", model=str(recipe.model), device=device, clip="none").exit_code:
            raise HostError(
                f"{place(out / 'prior')}: the model did not draw all pictures of prior.prompt; see results.jsonl"
            )
    changes: dict[str, Any] = {"captions": ["{caption}"], "recolour": None, "buckets": False, "limit": None}
    plain = recipe.data.model_copy(update=changes)
    captioned = [dataclasses.replace(e, caption=prior.prompt) for e in read_examples(plain, str(folder), "prior.path")]
    for fingerprint in fingerprint_all(captioned):
        if fingerprint.problem:
            raise InputError(f"prior.path: {fingerprint.problem}")
    return Pictures(captioned, plain, task.resolution, task.multiple, recipe.seed)


def _feed(recipe: Recipe, pictures: Pictures, task: Any, info: ModelInfo, out: Path, accelerator: Any) -> Feed:
    """Return the feed of batches of pictures, or of their cached latents and embeddings."""
    source: Any = pictures
    if recipe.data.cache:
        frozen = {name: part for name, part in info.parts.items() if name not in task.networks}
        weights = weight_hashes(dataclasses.replace(info, parts=frozen))
        configs = {name: dict(part.config) for name, part in frozen.items()}
        words = [_words(folder) for folder in (info.tokenizer, info.tokenizer_2) if folder is not None]
        fingerprint = [weights, configs, words, recipe.token and recipe.token.names, recipe.train.mixed_precision]
        folder = out / "cache" if recipe.data.cache_folder is None else Path(recipe.data.cache_folder)
        fill = functools.partial(encoded, pictures, task.encode, folder, fingerprint)
        source = fill(not accelerator.is_main_process, accelerator.process_index, accelerator.num_processes)
        accelerator.wait_for_everyone()
        if accelerator.num_processes > 1:  # encode what the others wrote to another disk, if the folder is not shared
            source = fill(not accelerator.is_main_process)
    rank, world = accelerator.process_index, accelerator.num_processes
    return Feed(source, recipe.train.batch_size, recipe.data.workers, rank, world, accelerator.device.type == "cuda")


def _words(folder: Path) -> list[str]:
    """Return the SHA-256 of a tokenizer's files."""
    return [sha256(path) for path in sorted(folder.iterdir()) if path.suffix in (".json", ".txt", ".model")]
