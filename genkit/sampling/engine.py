"""The slot engine: images at different steps of different plans share each call of the network."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch

from genkit.device.outofmemory import attempt, log
from genkit.phases import phase
from genkit.sampling.controls import Control, Steered, steered
from genkit.sampling.denoiser import Composed, Denoiser
from genkit.sampling.refiner import Refined
from genkit.schedulers.plan import COLUMNS, HISTORY, Plan, step

Take = Callable[[float, bool], list["Trajectory"]]
PATIENCE = 50  # calls until a network that is off the device gets its turn, if new trajectories arrive without end
AHEAD = 2  # network calls that are queued on a GPU
OPENING = 8  # the slots are divided by this until the first trajectory ends, so that the first pictures come early
# Inputs of the network with one row for each trajectory
INPUTS = ("cond", "uncond", "added_cond", "added_uncond", "beside", "embedded")
CANCELLED = "cancelled"
COLUMN = {name: i for i, name in enumerate(COLUMNS)}


@dataclasses.dataclass
class Trajectory:
    """One image on its way from noise: its starting latent, its conditioning, and the plan that it follows.

    latent: (C, H, W) float32 at the plan's first noise level, on any device. cond, uncond: embeddings of the prompt and
    of the negative prompt, (tokens, width), or None. added_cond, added_uncond: SDXL's added conditioning for each,
    (projection + 6,), or None. scales: guidance scale of each call of the plan, (nfe,), 1 where the call needs no
    `uncond`; None is 1 throughout. embedded: embedding of the guidance scale for latent consistency models, (width,),
    or None. beside: additional input channels of an inpainting UNet, (1 + C, H, W), or None. weight: of `cond`; more:
    (weight, cond, added_cond) of each prompt composed with it. changes: {call: new values of these fields from that
    call on}; embeddings keep their length. adapters: weight of each LoRA, zeros at the end left out. controls:
    its ControlNets, of which the refiner takes none. keep_mask, known: where keep_mask (1, H, W) is 0 the latent is
    replaced after each step by `known` = (x0, noise), each (C, H, W), at the level reached. cost: slots that it takes
    (1 at the model's own picture size, 4 at twice the sides).
    began: time.monotonic(). pause: after this many calls it leaves its slot unfinished, with the x0 predicted there and
    its solver history, and may be added again; 0 is never. refined: the conditioning for SDXL's refiner, or None.
    """

    tag: Any
    latent: torch.Tensor
    plan: Plan
    refined: Refined | None = None
    generator: torch.Generator | None = None
    cond: torch.Tensor | None = None
    uncond: torch.Tensor | None = None
    added_cond: torch.Tensor | None = None
    added_uncond: torch.Tensor | None = None
    scales: np.ndarray | None = None
    beside: torch.Tensor | None = None
    embedded: torch.Tensor | None = None
    weight: float = 1.0
    more: tuple[tuple[float, torch.Tensor, torch.Tensor | None], ...] = ()
    changes: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    adapters: tuple[float, ...] = ()
    controls: tuple[Control, ...] = ()
    keep_mask: torch.Tensor | None = None
    known: tuple[torch.Tensor, torch.Tensor] | None = None
    cost: float = 1.0
    pause: int = 0
    x0: torch.Tensor | None = None
    history: torch.Tensor | None = None
    step: int = 0
    error: str | None = None
    began: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def weights(self) -> list[float]:
        """The weight of each of its prompts."""
        return [self.weight, *(weight for weight, *_ in self.more)]

    @property
    def refines(self) -> bool:
        """Whether its next call is the refiner's."""
        return self.refined is not None and self.step >= self.refined.at

    @property
    def group(self) -> tuple[Any, ...]:
        """What trajectories that share a network call have in common: network, latent shape, number of tokens."""
        cond = self.read("cond")
        return (self.refines, *self.latent.shape, 0 if cond is None else len(cond))

    def read(self, name: str) -> Any:
        """Return one of INPUTS, `weight` or `more` as the network of its next call reads it."""
        return getattr(self.refined if self.refines else self, name)


class Watch(Protocol):
    """Whoever follows trajectories while they are drawn, as a server does. Called in the thread that draws."""

    def gone(self, tag: Any) -> bool:
        """Whether nobody waits for the trajectory any more: it then leaves its slot, with CANCELLED as its error."""

    def wants(self, trajectory: Trajectory) -> bool:
        """Whether to predict its x0 at its next call."""

    def stepped(self, trajectory: Trajectory) -> None:
        """Told after each of its calls; `x0` is there if it was wanted."""


class _Group:
    """The trajectories of one network, latent shape and number of tokens, stacked: a step needs no loop over images."""

    def __init__(self, key: tuple[Any, ...], device: torch.device, turn: int = 0) -> None:
        """turn: the tick of its last call, or of its beginning."""
        self.turn = turn
        self.device, self.refines, shape = device, key[0], key[1:-1]
        self.live: list[Trajectory] = []
        self.x = torch.empty(0, *shape, device=device)
        self.history = torch.empty(HISTORY, 0, *shape, device=device)
        self.inputs: dict[str, torch.Tensor | None] = dict.fromkeys(INPUTS)

    def add(self, new: list[Trajectory]) -> bool:
        """Add trajectories: all of them, or none if it raises."""
        # Moved one by one: paused trajectories are on the device already, new ones are not.
        x = torch.stack([t.latent.to(self.device, torch.float32) for t in new])
        history = torch.cat([self.history, x.new_zeros(HISTORY, *x.shape)], dim=1)
        for place, trajectory in enumerate(new, len(self.live)):
            if trajectory.history is not None:  # resumed after a pause
                history[:, place] = trajectory.history
        inputs = {name: self._extend(old, [t.read(name) for t in new]) for name, old in self.inputs.items()}
        self.x, self.history, self.inputs = torch.cat([self.x, x]), history, inputs
        self.live += new
        for trajectory in new:
            trajectory.history = None
        return True

    def _extend(self, old: torch.Tensor | None, new: list[torch.Tensor | None]) -> torch.Tensor | None:
        parts = [p.to(self.device) for p in new if p is not None]
        if not parts:
            return old
        added = torch.stack(parts)
        return added if old is None else torch.cat([old, added])

    def change(self, place: int) -> None:
        """Apply the changes of conditioning that the trajectory at a place has at its next call."""
        trajectory = self.live[place]
        if trajectory.refines != self.refines:  # it goes to the refiner
            return
        for name, value in trajectory.read("changes").get(trajectory.step, {}).items():
            setattr(trajectory.refined if self.refines else trajectory, name, value)  # for when it is added again
            rows = self.inputs.get(name)
            if rows is not None:
                rows[place] = value.to(self.device)

    def remove_finished(self) -> list[Trajectory]:
        """Remove and return the trajectories that finished, pause, or go to the refiner, each with its latent."""
        over = [
            i
            for i, t in enumerate(self.live)
            if t.step in (t.plan.nfe, t.pause) or t.error or t.refines != self.refines
        ]
        return self.remove(over) if over else []

    def remove(self, over: list[int]) -> list[Trajectory]:
        """Remove and return the trajectories at these places, each with its latent."""
        ended = [self.live[i] for i in over]
        for i, trajectory in zip(over, ended, strict=True):
            trajectory.latent = self.x[i].clone()  # a view would keep the tensors of the whole group
            if trajectory.step == trajectory.pause:
                trajectory.history = self.history[:, i].clone()
        stay = [i for i in range(len(self.live)) if i not in set(over)]
        self.live = [self.live[i] for i in stay]
        index = torch.tensor(stay, dtype=torch.long, device=self.device)
        self.x, self.history = self.x[index], self.history[:, index]
        self.inputs = {name: None if rows is None else rows[index] for name, rows in self.inputs.items()}
        return ended


class Engine:
    """Run trajectories through one denoiser, `slots` at a time.

    Each sample is updated from its own rows only, so steps, guidance, solver, strength and seed may differ within a
    batch. With a network whose arithmetic does not depend on the batch size, results are bitwise those of running each
    image alone.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        device: torch.device,
        slots: float,
        relieve: Callable[[], bool] = lambda: False,
        refiner: Denoiser | None = None,
        steady: bool = True,
        watch: Watch | None = None,
    ) -> None:
        """relieve: called when memory runs out; waits for other work on the device, returns whether there was any.

        refiner: the network of trajectories that are `refined`. steady: whether both networks stay on the device; else
        one computes until nothing is left for it. watch: follows what is drawn; all groups then take turns, as new
        trajectories come without end.
        """
        self.watch = watch
        self.denoiser, self.device, self.slots, self.relieve = denoiser, device, slots, relieve
        self.refiner, self.steady, self._refining = refiner, steady, False
        self.calls = 0  # network rows computed so far
        # A server's slots fill as requests come; networks that take turns on the device would move once more
        self._opened = watch is not None or not steady or slots < OPENING
        self._used, self._ticks = 0.0, 0  # slots in use, summed over the ticks since the opening; those ticks
        self._until_last = (0.0, 0)  # the same two when the last trajectory was admitted
        self._queued: deque[Any] = deque()  # CUDA events at the ends of the last calls
        self._groups: dict[tuple[Any, ...], _Group] = {}
        self._waiting: list[Trajectory] = []  # taken, but memory ran out when they were added

    @property
    def live(self) -> int:
        """How many trajectories are in flight."""
        return sum(len(g.live) for g in self._groups.values())

    @property
    def slots_full(self) -> float | None:
        """The share of the slots in use while there was more to draw; None if everything fitted at once.

        Counted from the end of the opening up to the last admitted trajectory: after it the slots empty without
        replacements.
        """
        used, ticks = self._until_last
        return used / (ticks * self.slots) if ticks else None

    @property
    def use(self) -> tuple[float, float]:
        """What `slots_full` is the quotient of: slots in use and slots, both summed over the calls of the network."""
        used, ticks = self._until_last
        return used, ticks * self.slots

    @torch.inference_mode()
    def run(self, take: Take) -> Iterator[list[Trajectory]]:
        """Yield after each call the trajectories that finished, with clean `latent` or `error` set, or that pause.

        Whenever slots are free, `take(free, alone)` returns new trajectories of a total cost up to `free`. alone:
        nothing is in flight, and one trajectory may cost more than `free`. The run ends when it then returns none.
        A few slots are used until the first trajectory ends, then all.
        """
        while True:
            ended = self._drop() + self._admit(take)
            if not self.live and not ended and not self._waiting:
                return
            if self.live:
                if self._opened:
                    self._used += self.held
                    self._ticks += 1
                ended += self._tick(self._turn())
            self._opened = self._opened or bool(ended)
            self._groups = {key: g for key, g in self._groups.items() if g.live}
            self._keep_pace()
            yield ended

    def _turn(self) -> _Group:
        """Return the largest group, for the most rows a call; smaller groups grow until it is their turn."""
        groups = [g for g in self._groups.values() if g.live]
        if not self.steady:  # a network is moved as seldom as possible
            same = [g for g in groups if g.refines == self._refining] or groups
            patient = self.watch is None or max(self._ticks - g.turn for g in groups) < PATIENCE
            groups = same if patient else groups
        group = max(groups, key=lambda g: len(g.live)) if self.watch is None else min(groups, key=lambda g: g.turn)
        self._refining, group.turn = group.refines, self._ticks
        return group

    def _drop(self) -> list[Trajectory]:
        """Remove and return the trajectories that nobody waits for any more."""
        watch, ended = self.watch, []
        if watch is None:
            return []
        for group in self._groups.values():
            over = [i for i, t in enumerate(group.live) if watch.gone(t.tag)]
            ended += group.remove(over) if over else []
        lost = [t for t in self._waiting if watch.gone(t.tag)]
        self._waiting = [t for t in self._waiting if t not in lost] if lost else self._waiting
        for trajectory in (*ended, *lost):
            trajectory.error = CANCELLED
        return ended + lost

    def _keep_pace(self) -> None:
        """Wait until a GPU is only AHEAD calls behind: so results are handed on while the next images are drawn."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(blocking=True)
            event.record()
            self._queued.append(event)
            if len(self._queued) > AHEAD:
                with phase("wait for the network"):
                    self._queued.popleft().synchronize()

    def halve(self, held: float) -> None:
        """Limit the slots to half of `held`, at which memory ran out. A single image is always admitted."""
        self.slots = min(self.slots, held) / 2
        log.warning("out of memory at %g slots of images in flight: from now on %g", held, self.slots)

    def _admit(self, take: Take) -> list[Trajectory]:
        """Fill the free slots. Returns a trajectory that does not fit in memory even alone, as failed."""
        coming = self._next(take)
        if coming:
            self._until_last = self._used, self._ticks
        return self._add(coming)

    def _add(self, coming: list[Trajectory]) -> list[Trajectory]:
        """Put trajectories into their groups. Returns one that does not fit in memory even alone, as failed."""
        groups: dict[tuple[Any, ...], list[Trajectory]] = {}
        for trajectory in coming:
            groups.setdefault(trajectory.group, []).append(trajectory)
        failed: list[Trajectory] = []
        for key, new in groups.items():
            group = self._groups.get(key) or _Group(key, self.device, self._ticks)
            if attempt(lambda g=group, t=new: g.add(t)):  # type: ignore[misc]
                self._groups[key] = group
                continue
            if len(new) == 1 and not self.live:
                new[0].error = "out of memory"
                failed += new
            else:
                self._waiting += new
            self.halve(self.held + sum(t.cost for t in new))
        return failed

    @property
    def held(self) -> float:
        return sum(t.cost for g in self._groups.values() for t in g.live)

    def _next(self, take: Take) -> list[Trajectory]:
        """Return trajectories for the free slots, waiting ones before new ones."""
        free = (self.slots if self._opened else self.slots / OPENING) - self.held
        if not self._waiting:
            return take(free, not self.live) if free > 0 else []
        new: list[Trajectory] = []
        while self._waiting and (self._waiting[0].cost <= free or not (new or self.live)):
            new.append(self._waiting.pop(0))
            free -= new[-1].cost
        return new

    def _tick(self, group: _Group) -> list[Trajectory]:
        """Advance every trajectory of `group` by one network call."""
        live = group.live
        with phase("draw noise"):
            noise = self._noise(live)  # drawn once: a retry must not advance the generators again
        if not attempt(lambda: self._advance(group, noise)) and not (
            self.relieve() and attempt(lambda: self._advance(group, noise))
        ):
            for trajectory in live:
                trajectory.error = "out of memory"
            return group.remove_finished()
        for i, trajectory in enumerate(live):
            trajectory.step += 1
            group.change(i)
            if trajectory.known is not None and trajectory.keep_mask is not None:
                group.x[i] = _blend(group.x[i], trajectory)
            if self.watch is not None:
                self.watch.stepped(trajectory)
        self.calls += len(live)
        ended = group.remove_finished()
        handed = [t for t in ended if t.refines != group.refines and t.step not in (t.plan.nfe, t.pause)]
        for trajectory in handed:
            trajectory.history = None  # the refiner's solver begins anew
        return [t for t in ended if t not in handed] + self._add(handed)

    def _advance(self, group: _Group, noise: torch.Tensor | float) -> bool:
        """Make one step of every trajectory. Changes nothing if it raises."""
        with phase("network and solver", self.device):
            return self._stepped(group, noise)

    def _stepped(self, group: _Group, noise: torch.Tensor | float) -> bool:
        live = group.live
        table = np.stack([t.plan.table[t.step] for t in live], axis=1).astype(np.float32)
        rows = torch.from_numpy(table)[:, :, None, None, None].to(self.device, non_blocking=True)
        denoiser = self.refiner if group.refines else self.denoiser
        assert denoiser is not None
        output = denoiser(
            rows[COLUMN["c_in"]] * group.x,
            rows[COLUMN["t"]].flatten(),
            group.inputs["cond"],
            group.inputs["uncond"],
            torch.tensor([1.0 if t.scales is None else float(t.scales[t.step]) for t in live]),
            group.inputs["added_cond"],
            group.inputs["added_uncond"],
            None if group.refines else _adapters(live, self.device),
            group.inputs["beside"],
            group.inputs["embedded"],
            _composed(live, self.device),
            () if group.refines else _steered(live),
        )
        shown = [t.step + 1 == t.pause or (self.watch is not None and self.watch.wants(t)) for t in live]
        if any(shown):
            predicted = rows[COLUMN["px"]] * group.x + rows[COLUMN["pm"]] * output
            for i, trajectory in enumerate(live):
                trajectory.x0 = predicted[i].clone() if shown[i] else None
        if isinstance(noise, torch.Tensor):
            noise = noise.to(self.device, non_blocking=True)
        x, new = step(group.x, output, rows, group.history, noise, any(t.plan.threshold for t in live))
        group.x, group.history = x, torch.cat([new[None], group.history[:-1]])
        return True

    def _noise(self, live: list[Trajectory]) -> torch.Tensor | float:
        """Return step noise, drawn on the CPU from each sample's own generator, for samples whose step adds noise."""
        drawing = [bool(t.plan.consumes_noise[t.step]) for t in live]
        if not any(drawing):
            return 0.0
        shape = live[0].latent.shape
        drawn = [
            torch.randn((1, *shape), generator=t.generator) if draws else torch.zeros((1, *shape))
            for t, draws in zip(live, drawing, strict=True)
        ]
        return torch.cat(drawn)


def _composed(live: list[Trajectory], device: torch.device) -> Composed | None:
    """Return the prompts composed with those of the rows; None if every row has one prompt, of weight 1."""
    weights, more = [t.read("weight") for t in live], [t.read("more") for t in live]
    if all(weight == 1 for weight in weights) and not any(more):
        return None
    owner = [i for i, others in enumerate(more) for _ in others]
    conds = [cond.to(device) for others in more for _, cond, _ in others]
    added = [a.to(device) for others in more for *_, a in others if a is not None]
    weights += [weight for others in more for weight, *_ in others]
    cond, pooled = (torch.stack(rows) if rows else None for rows in (conds, added))
    return Composed(owner, cond, pooled, weights)


def _steered(live: list[Trajectory]) -> list[Steered]:
    """Return the ControlNets of each row at its next call; nothing if no row has one."""
    found = [steered(t.controls, t.step) for t in live]
    return found if any(found) else []


def _adapters(live: list[Trajectory], device: torch.device) -> torch.Tensor | None:
    """Return the weights of the LoRAs in each row, (rows, adapters), or None without any."""
    most = max(len(t.adapters) for t in live)
    if not most:
        return None
    weights = [[*t.adapters, *[0.0] * (most - len(t.adapters))] for t in live]
    return torch.tensor(weights).to(device, non_blocking=True)


def _blend(x: torch.Tensor, trajectory: Trajectory) -> torch.Tensor:
    """Return x with the known picture, at the noise level just reached, where the mask is 0 (keep)."""
    assert trajectory.known is not None and trajectory.keep_mask is not None
    x0, noise = (k.to(x.device) for k in trajectory.known)
    at, plan = trajectory.step, trajectory.plan  # the end is treated as clean even if the last level has some noise
    alpha, sigma = (1.0, 0.0) if at == plan.nfe else (plan.alphas[at], plan.sigmas[at])
    mask = trajectory.keep_mask.to(x.device)
    return mask * x + (1 - mask) * (float(alpha) * x0 + float(sigma) * noise)
