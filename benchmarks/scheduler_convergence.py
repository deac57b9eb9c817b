"""Error against network calls: genkit's schedulers beside every image scheduler of diffusers, as shipped.

    python benchmarks/scheduler_convergence.py [--only mixtures | embedded | NAME …] [--quick]
        [--json FILE] [--plot FILE.png] [--cache DIR]

Problems whose answer is known:
- Gaussian mixtures (mixtures.py) with their exact network: gm64 (64-D, 16 modes, low rank), gm2 (2-D), gmc64 (gap-free
  spectrum), under the betas of Stable Diffusion (vp), these with guidance 5 (cfg5), with zero terminal SNR and
  v-prediction (zsnr), and rectified flow. The truth is where the probability-flow ODE leads, by 240 RK4 steps.
- the embedded model, guidance 5, 32 prompts: the truth is its own solution by 400 calls of PNDM, linspace, exact
  levels. (On zsnr/gm64 that is within 0.001; 400 steps of DPM-Solver++ 2M, trailing, stop at t = 1 and are 0.01 away.)

The error of a trajectory is the root of the mean over coordinates of (x - truth)^2, for data of standard deviation 1;
printed is its mean over trajectories, and below it RMS and median. Everybody starts from the same noise at the same
place: the truth starts from it at the last training level (t = 999; pure noise for zsnr and flow), and so do genkit's
plans and diffusers' schedulers, by their own conventions (`init_noise_sigma`, `scale_model_input`). A schedule that
begins with less noise, as `leading` does, bears the difference. The network is told the timestep that the scheduler
gives, so rounding counts. float32 throughout, as in use; exact networks compute in float64 inside.

A call of the guided network counts as one. Classes with more calls than steps get as many steps as fit. diffusers'
loop is that of its pipelines, `set_begin_index(0)` included, which some classes need when timesteps repeat. What raises
or ends in NaN is listed with its reason. "Best" is the least error at that number of calls on the test noise itself,
for diffusers (about 190 settings) and for genkit alike; plans are tuned on other noises and, for the embedded model,
other prompts. Stochastic classes do not follow the ODE and have no error of this kind; SKIPPED lists what else is
left out.

Every result is kept in DIR (benchmarks/.cache) under its settings and versions; a run that was stopped goes on.
LMSDiscreteScheduler needs scipy, and --plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mixtures import Exact, Mixture, solve
from safetensors.torch import load_file, save_file

from genkit.errors import InputError
from genkit.rows.plans import plan_for
from genkit.schedulers import Plan, Scheduler, sample

Tensor = torch.Tensor
Model = Callable[[Tensor, Tensor], Tensor]
Run = tuple[Tensor, int]  # final sample, calls made
Result = dict[str, Any]  # calls, mean, rms, median; or failed: the reason
Runs = dict[str, dict[int, Result]]  # setting -> budget -> result

ROOT = Path(__file__).parent.parent
EMOJI = ROOT / "genkit" / "components" / "embedded" / "emoji"
CALLS = (6, 8, 10, 12, 16, 20, 25)
QUICK = (8, 12, 20)
SHOWN = 5  # diffusers settings beside those that are best somewhere

# ---------------------------------------------------------------------------------------------------- the contestants

PROCESSES: dict[str, dict[str, Any]] = {
    "vp": {"noise": "scaled_linear", "prediction": "epsilon"},
    "zsnr": {"noise": "scaled_linear", "prediction": "v_prediction", "zero_snr": True},
    "flow": {"noise": "flow", "prediction": "flow_prediction"},
}
# genkit: every solver with every spacing and end; what does not exist, or not together, is left out.
SOLVERS: tuple[dict[str, Any], ...] = (
    {"solver": "dpmpp_2m"}, {"solver": "unipc", "order": 2}, {"solver": "unipc", "order": 3},
    {"solver": "unipc", "order": 2, "solver_type": "bh1"}, {"solver": "unipc", "order": 3, "solver_type": "bh1"},
    {"solver": "pndm"}, {"solver": "dpmpp_3m"},
    {"solver": "deis", "order": 2}, {"solver": "deis", "order": 3}, {"solver": "dpmsolver_2m"},
    {"solver": "dpmsolver_3m"}, {"solver": "dpmpp_2s"}, {"solver": "dpmpp_3s"}, {"solver": "sa", "tau": 0.0},
    {"solver": "ipndm"}, {"solver": "lms"}, {"solver": "dpm2"}, {"solver": "heun"}, {"solver": "ddim"},
    {"solver": "unipc", "order": 2, "style": "dpm"}, {"solver": "unipc", "order": 3, "style": "dpm"},
)  # fmt: skip
SPACES: tuple[dict[str, Any], ...] = tuple(
    {"spacing": spacing, **({"shift": shift} if shift != 1 else {}), **({"final": final} if final != "zero" else {})}
    for spacing in ("trailing", "linspace", "karras", "exponential")
    for final in ("zero", "sigma_min")
    for shift in (1.0, 3.0)
)
PC: tuple[dict[str, Any], ...] = tuple(
    {"solver": "pc", "order": order, **space}
    for order in (1, 2, 3)
    for space in ({"spacing": "bounded"}, {"spacing": "karras"}, {"spacing": "karras", "final": "sigma_min"})
)
OURS = (*({**solver, **space} for solver in SOLVERS for space in SPACES), *PC)
OURS_EMBEDDED: tuple[dict[str, Any], ...] = (
    PC[0], PC[3], {"solver": "dpmpp_2m", "spacing": "trailing", "final": "sigma_min", "style": "dpm"},
    {"solver": "dpmpp_2m", "spacing": "trailing"}, {"solver": "unipc", "order": 2, "spacing": "trailing"},
    {"solver": "pndm", "spacing": "linspace"},
)  # fmt: skip
# The stock plan that a tuned one has to beat on noises of its own.
TUNED: dict[str, Any] = {"solver": "pc", "order": 2, "spacing": "bounded"}

_SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIGS: dict[str, dict[str, Any]] = {
    "vp": {**_SD, "prediction_type": "epsilon"},
    "zsnr": {**_SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "flow": {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
}
_DPM, _DPMS, _UNI = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"
_EPS = {"algorithm_type": "dpmsolver"}
# diffusers: name -> class and its options. Flow's own two classes are in _flow_peers.
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM++2M": (_DPM, {"solver_order": 2}),
    "DPM++3M": (_DPM, {"solver_order": 3}),
    "DPM++2M heun": (_DPM, {"solver_order": 2, "solver_type": "heun"}),
    "DPM-2M": (_DPM, {"solver_order": 2, **_EPS}),
    "DPM-3M": (_DPM, {"solver_order": 3, **_EPS}),
    "DPM++2S": (_DPMS, {"solver_order": 2}),
    "DPM++3S": (_DPMS, {"solver_order": 3}),
    "DPM-3S": (_DPMS, {"solver_order": 3, **_EPS}),
    "DEIS-2": ("DEISMultistepScheduler", {"solver_order": 2}),
    "DEIS-3": ("DEISMultistepScheduler", {"solver_order": 3}),
    "UniPC-2 bh1": (_UNI, {"solver_order": 2, "solver_type": "bh1"}),
    "UniPC-3 bh1": (_UNI, {"solver_order": 3, "solver_type": "bh1"}),
    "UniPC-2 bh2": (_UNI, {"solver_order": 2, "solver_type": "bh2"}),
    "UniPC-3 bh2": (_UNI, {"solver_order": 3, "solver_type": "bh2"}),
    "SA-Solver tau=0": ("SASolverScheduler", {"tau_func": "zero"}),
}
GRIDS: dict[str, dict[str, Any]] = {
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "karras": {"use_karras_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "exponential": {"use_exponential_sigmas": True},
}
FLOW_GRIDS: dict[str, dict[str, Any]] = {
    "shift 1": {"flow_shift": 1.0},
    "shift 3": {"flow_shift": 3.0},
    "karras": {"use_karras_sigmas": True},
}
# What is run on the embedded model, where a setting takes minutes: what can do zero SNR, without those that never lead.
EMBEDDED = (
    "DPM++2M trailing sigma_min", "DPM++2M trailing", "UniPC-2 bh2 trailing sigma_min", "UniPC-2 bh2 trailing",
    "DPM++3M trailing", "DPM++3M trailing sigma_min", "UniPC-3 bh2 trailing", "UniPC-2 bh1 trailing sigma_min",
    "UniPC-2 bh2 linspace", "DPM++2M linspace sigma_min", "DDIM trailing", "Euler trailing", "UniPC-2 bh2 karras",
)  # fmt: skip
LEADING = ("DDIM", "PNDM", "Euler")  # the default of Stable Diffusion's folders; for the others it only loses
ENDS: dict[str, dict[str, Any]] = {
    "": {},
    "sigma_min": {"final_sigmas_type": "sigma_min"},
    "sigma_min full": {"final_sigmas_type": "sigma_min", "lower_order_final": False},
}
SKIPPED = {
    "EulerAncestral, DDPM, KDPM2Ancestral, DPMSolverSDE, SDE-DPM++, CogVideoXDPM": "stochastic",
    "LCM, TCD, SCM, Piflow, FlowMap, Helios": "for distilled networks",
    "EDMEuler, EDMDPMSolver, CosineDPMSolver, IPNDM, KarrasVe, ScoreSdeVe": "noise schedules of their own",
    "DDIMParallel, CogVideoXDDIM, MiniMaxH3": "the steps of DDIM or Euler",
    "RePaint, UnCLIP, VQDiffusion, Amused, inverse schedulers and the like": "for other tasks",
}


@dataclasses.dataclass(frozen=True)
class Peer:
    """A diffusers class with its config. lacks: why it cannot solve the problem, where it cannot."""

    name: str
    kind: str
    config: dict[str, Any]
    lacks: str = ""

    def make(self) -> Any:
        import diffusers

        config = {k: (lambda t: 0) if v == "zero" and k == "tau_func" else v for k, v in self.config.items()}
        return getattr(diffusers, self.kind)(**config)


def peers(process: str) -> Iterator[Peer]:
    """Yield every setting of every class that knows the options: class x grid x end."""
    import diffusers

    if process == "flow":
        yield from _flow_peers()
    grids = FLOW_GRIDS if process == "flow" else GRIDS
    for name, (kind, options) in CLASSES.items():
        known = {*inspect.signature(getattr(diffusers, kind)).parameters} - {"self"}
        lacks = {"zsnr": "rescale_betas_zero_snr", "flow": "use_flow_sigmas"}.get(process, "")
        if lacks and lacks not in known:
            yield Peer(name, kind, {}, f"no {lacks}")
            continue
        plain = "timestep_spacing" not in known  # then linspace is all that there is
        for (grid, laid), (end, last) in itertools.product(grids.items(), ENDS.items()):
            if grid == "linspace" and plain:
                laid = {}
            if grid == "leading" and name not in LEADING:
                continue
            if "set_alpha_to_one" in known and "full" not in end:
                last = {"set_alpha_to_one": not end}
            if "full" in end and "solver_order" not in options:
                continue
            if {*laid, *last} <= known:
                yield Peer(f"{name} {grid} {end}".strip(), kind, {**CONFIGS[process], **options, **laid, **last})


def _flow_peers() -> Iterator[Peer]:
    for solver, shift in itertools.product(("Euler", "Heun"), (1.0, 3.0)):
        yield Peer(f"FlowMatch{solver} shift {shift:g}", f"FlowMatch{solver}DiscreteScheduler", {"shift": shift})


# ------------------------------------------------------------------------------------------------------- the problems


@dataclasses.dataclass(frozen=True)
class Problem:
    """An ODE whose solution is known.

    process: of PROCESSES. noise: (B, C, H, W) float32; truth: where it leads, (B, C, H, W). train: gives a network and
    noise to tune plans with, not those of the test. stamp: what results depend on besides a setting and versions.
    kept: the name under which final samples are kept too, for networks that take their time.
    """

    name: str
    title: str
    process: str
    model: Model
    noise: Tensor
    truth: Tensor
    train: Callable[[], tuple[Model, Tensor]]
    stamp: str
    kept: str = ""

    def score(self, x: Tensor, calls: int) -> Result:
        errors = (x.double() - self.truth.double()).flatten(1).pow(2).mean(1).sqrt()
        if not errors.isfinite().all():
            return {"calls": calls, "failed": "NaN"}
        rms = float(errors.pow(2).mean().sqrt())
        return {"calls": calls, "mean": float(errors.mean()), "rms": rms, "median": float(errors.median())}


# Data -> the mixture's seed, the test noise's seed, and what Mixture.draw takes.
DATA: dict[str, tuple[int, int, tuple[Any, ...]]] = {
    "gm64": (31, 32, (64, 16, 10, 0.08)),
    "gm2": (33, 34, (2, 16, 2, 0.08)),
    "gmc64": (35, 36, (64, 12, 28, 0.08, 0.5)),
}
# Name -> data, process, guidance.
MIXTURES: dict[str, tuple[str, str, float]] = {
    "vp/gm64": ("gm64", "vp", 1.0),
    "cfg5/gm64": ("gm64", "vp", 5.0),
    "zsnr/gm64": ("gm64", "zsnr", 1.0),
    "flow/gm64": ("gm64", "flow", 1.0),
    "vp/gm2": ("gm2", "vp", 1.0),
    "vp/gmc64": ("gmc64", "vp", 1.0),
    "cfg5/gmc64": ("gmc64", "vp", 5.0),
    "flow/gmc64": ("gmc64", "flow", 1.0),
}


def mixture_problem(name: str, cache: Path, quick: bool) -> Problem:
    data, process, guidance = MIXTURES[name]
    seed, noise_seed, shape = DATA[data]
    scheduler, count = Scheduler(**PROCESSES[process]), 128 if quick else 512
    exact = Exact(Mixture.draw(seed, *shape), scheduler, guidance)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return exact(x.double(), t.double()).to(x.dtype)

    def noise(seed: int, count: int) -> Tensor:
        return torch.randn(count, shape[0], 1, 1, generator=torch.Generator().manual_seed(seed))

    def truth() -> Tensor:
        top = scheduler.levels(np.array([scheduler.num_train_timesteps - 1]))
        first = (float(top.alpha[0]), float(top.sigma[0]))
        return solve(exact, test.flatten(1).double(), first)[..., None, None]

    test = noise(noise_seed, count)
    levels = torch.tensor([900.0, 500.0, 100.0, 0.0])
    probe = (exact(test[:4].flatten(1).double(), levels + 1) * 1e6).round().tolist()  # says what the mixture is
    stamp = digest(probe, noise_seed, count)
    where = cache / f"truth-{name.replace('/', '-')}-{stamp}.safetensors"
    reference = stored(where, lambda: {"truth": truth()})["truth"]
    title = f"{name}: exact network, guidance {guidance:g}, {count} noises"
    return Problem(name, title, process, model, test, reference, lambda: (model, noise(1000 + noise_seed, 256)), stamp)


TRAIN_PROMPTS = (
    "a blue car", "a 3d emoji of a strawberry", "noto banana", "a brown bear face", "a tulip on a white background",
    "a red umbrella", "an orange fish", "twemoji pizza", "a yellow star on a black background", "a winking face",
    "a 3d emoji of a cat face", "a house on a green background", "a purple grape", "a snowman",
    "a guitar on a red background", "a green tree",
)  # fmt: skip


def test_prompts(count: int) -> list[str]:
    """Return the prompts of prompts/, from the start again when there are not enough (their noises differ)."""
    demo = [x for x in (ROOT / "prompts" / "demo.txt").read_text().splitlines() if x.strip() and x[0] != "#"]
    rows = [json.loads(x)["prompt"] for x in (ROOT / "prompts" / "showcase.jsonl").read_text().splitlines()]
    found = list(dict.fromkeys(demo + rows))
    return [found[i % len(found)] for i in range(count)]


def embedded_problem(cache: Path, quick: bool) -> Problem:
    from genkit import TextToImage

    generator = TextToImage.from_pretrained("emoji", device="cpu", dtype="float32")
    generator.denoiser.limit = 16
    generator.unet.requires_grad_(False)
    shape = generator.geometry.latent_shape(generator.geometry.width, generator.geometry.height)

    def network(texts: list[str]) -> Model:
        assert generator.text is not None
        with torch.no_grad():
            cond = torch.stack([generator.text([text])[0] for text in texts])
            uncond = generator.text([""])[0].expand_as(cond)
        cond, uncond = cond.clone(), uncond.clone()  # no inference tensors: plans are tuned by gradients
        scale = torch.full((len(texts),), 5.0)
        return lambda x, t: generator.denoiser(x.float(), t.float(), cond[: len(x)], uncond[: len(x)], scale[: len(x)])

    def noise(seed: int, count: int) -> Tensor:
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))

    count = 8 if quick else 32
    model, test = network(test_prompts(count)), noise(2024, 32)[:count]
    weights = ROOT / "genkit" / "components" / "embedded" / "emoji" / "unet" / "diffusion_pytorch_model.safetensors"
    kept = digest(weights.read_bytes(), *test_prompts(count), count)
    stamp = digest(kept, TRUTH)
    found = stored(cache / f"truth-embedded-{stamp}.safetensors", lambda: _converged(model, test))
    moved = float((found["half"] - found["truth"][: len(found["half"])]).flatten(1).pow(2).mean(1).sqrt().mean())
    title = (f"embedded: the embedded model, guidance 5, {count} prompts; the truth (400 calls) is {moved:.4f} from "
             f"that of 200 calls; latents have a standard deviation of {float(found['truth'].std()):.2f}")  # fmt: skip
    train = list(TRAIN_PROMPTS)
    return Problem("embedded", title, "zsnr", model, test, found["truth"],
                   lambda: (network(train), noise(4048, len(train))), stamp, kept)  # fmt: skip


TRUTH: dict[str, Any] = {"solver": "pndm", "spacing": "linspace"}  # one call more than steps


def _converged(model: Model, noise: Tensor) -> dict[str, Tensor]:
    """Return the solution of 400 calls, and for 8 rows that of 200, which says how far it still moves."""
    scheduler = Scheduler(**PROCESSES["zsnr"], **TRUTH)
    with torch.inference_mode():
        half = sample(model, noise[:8], scheduler.plan(199))
        return {"truth": sample(model, noise, scheduler.plan(399)).clone(), "half": half.clone()}


# ----------------------------------------------------------------------------------------------------------- the runs


def digest(*parts: Any) -> str:
    """Return a short name for what results depend on."""
    found = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        found.update(len(data).to_bytes(8, "big") + data)
    return found.hexdigest()[:12]


def stored(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of `path`, made now if they are not there."""
    if not path.exists():
        made = {name: value.clone().contiguous() for name, value in make().items()}
        scratch = path.with_suffix(f".{os.getpid()}.new")
        save_file(made, scratch)
        os.replace(scratch, path)
    return load_file(path)


class Cache:
    """Results of one problem on the disk, by whatever they depend on."""

    def __init__(self, folder: Path, problem: Problem) -> None:
        self.problem = problem
        self.path = folder / f"{problem.name.replace('/', '-')}-{problem.stamp}.json"
        self.samples = folder / f"samples-{problem.name}-{problem.kept}" if problem.kept else None
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.new = 0
        if self.samples:
            self.samples.mkdir(exist_ok=True)

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.found:
            self.found[key] = make()
            self.new += 1
        return self.found[key]

    def result(self, key: str, run: Callable[[], Run]) -> Result:
        """Return the score of a run, or why it failed."""
        return self.get(key, lambda: self._score(key, run))

    def _score(self, key: str, run: Callable[[], Run]) -> Result:
        try:
            if self.samples is None:
                return self.problem.score(*run())
            made = stored(self.samples / f"{digest(key)}.safetensors", lambda: _packed(*run()))
            return self.problem.score(made["x"], int(made["calls"]))
        except Exception as error:
            return {"calls": 0, "failed": type(error).__name__}

    def save(self) -> None:
        """Write what is new: after each setting, since one may take minutes."""
        if self.new:
            scratch = self.path.with_suffix(f".{os.getpid()}.new")
            scratch.write_text(json.dumps(self.found))
            os.replace(scratch, self.path)
            self.new = 0


def _packed(x: Tensor, calls: int) -> dict[str, Tensor]:
    return {"x": x, "calls": torch.tensor(calls)}


def run_peer(peer: Peer, problem: Problem, calls: int) -> Run:
    """Run the loop of diffusers' pipelines with as many steps as `calls` allow."""
    for steps in range(calls, 0, -1):
        scheduler = peer.make()
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) <= calls:
            break
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x = problem.noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(problem.model(scaled, t.expand(len(x))), t, x).prev_sample
    return x, len(scheduler.timesteps)


def run_diffusers(problem: Problem, cache: Cache, wanted: list[Peer], budgets: tuple[int, ...]) -> Runs:
    import diffusers

    runs: Runs = {}
    for i, peer in enumerate(wanted):
        report(problem, f"diffusers {i + 1}/{len(wanted)}: {peer.name}")
        if peer.lacks:
            runs[peer.name] = {calls: {"calls": 0, "failed": peer.lacks} for calls in budgets}
            continue
        made = f"{diffusers.__version__} torch {torch.__version__} {peer.kind} {json.dumps(peer.config)}"
        runs[peer.name] = {}
        for calls in budgets:
            key = f"diffusers {made} {calls}"
            runs[peer.name][calls] = cache.result(key, functools.partial(run_peer, peer, problem, calls))
        cache.save()
    return runs


def fitting(scheduler: Scheduler, calls: int) -> Plan | None:
    """Return the plan of the most steps that `calls` allow."""
    for steps in range(calls, 0, -1):
        try:
            plan = scheduler.plan(steps)
        except InputError:
            return None
        if plan.nfe <= calls:
            return plan
    return None


def run_plan(problem: Problem, cache: Cache, plan: Plan | None) -> Result:
    if plan is None:
        return {"calls": 0, "failed": "InputError"}
    rounded = np.float32(plan.table).tobytes()
    key = f"genkit torch {torch.__version__} {digest(rounded, plan.start)}"
    return cache.result(key, lambda: (sample(problem.model, problem.noise, plan), plan.nfe))


def label(options: dict[str, Any]) -> str:
    plain = ("solver", "order", "solver_type")
    first = [str(options[name]) for name in plain if name in options]
    rest = {name: value for name, value in options.items() if name not in (*plain, "spacing", "final")}
    extra = [f"{name} {value}" for name, value in rest.items()]
    return " ".join([*first, *extra, options.get("spacing", ""), options.get("final", "")]).strip()


def schedulers(problem: Problem, settings: tuple[dict[str, Any], ...]) -> Iterator[tuple[str, Scheduler]]:
    """Yield the schedulers that there are; shift is flow's alone, and linspace there stops at the least sigma."""
    for options in settings:
        if "shift" in options and problem.process != "flow":
            continue
        try:
            yield label(options), Scheduler(**{**PROCESSES[problem.process], **options})
        except InputError:
            continue


def run_genkit(problem: Problem, cache: Cache, wanted: tuple[dict[str, Any], ...], budgets: tuple[int, ...]) -> Runs:
    runs: Runs = {}
    for name, scheduler in schedulers(problem, wanted):
        report(problem, f"genkit: {name}")
        found = {calls: run_plan(problem, cache, fitting(scheduler, calls)) for calls in budgets}
        if any("mean" in result for result in found.values()):
            runs[name] = found
        cache.save()
    return runs


def run_tuned(problem: Problem, cache: Cache, budgets: tuple[int, ...]) -> Runs:
    runs: Runs = {}
    for name, scheduler in schedulers(problem, (TUNED,)):
        for calls in budgets:
            report(problem, f"tuning: {name}, {calls} calls")
            plan = tuned(problem, cache, scheduler, calls)
            cache.save()
            if plan is not None:
                runs.setdefault("tuned", {})[calls] = run_plan(problem, cache, plan)
    cache.save()
    return runs


def tuned(problem: Problem, cache: Cache, scheduler: Scheduler, calls: int) -> Plan | None:
    """Return the plan fitted to the problem's network on its training noise; None where there is none.

    That of the embedded model is the one that `genkit tune` left beside it.
    """
    if problem.name == "embedded":
        try:
            return plan_for(Scheduler.from_config(EMOJI / "scheduler"), "tuned", calls, guidance=5.0, folder=EMOJI)
        except InputError:
            return None
    from genkit.schedulers.tune import fit

    def make() -> dict[str, Any]:
        model, noise = problem.train()
        plan = fit(lambda x, t, index: model(x, t), scheduler, calls, noise).plan
        return {field.name: np.asarray(getattr(plan, field.name)).tolist() for field in dataclasses.fields(Plan)}

    source = b"".join(path.read_bytes() for path in sorted((ROOT / "schedulers" / "tune").glob("*.py")))
    kept = cache.get(f"tuned {scheduler} {calls} {digest(source)}", make)
    fields: dict[str, Any] = {name: np.array(value) for name, value in kept.items()}
    return Plan(**{**fields, "start": tuple(kept["start"])})


def report(problem: Problem, text: str) -> None:
    """Say on the terminal what is being computed."""
    if os.isatty(2):
        os.write(2, f"\r\033[K{problem.name}: {text}".encode())


# ------------------------------------------------------------------------------------------------------- what to print


def best(runs: Runs, calls: int, by: str = "mean") -> tuple[str, float]:
    """Return the setting of the least error, and that."""
    found = [(budgets[calls][by], name) for name, budgets in runs.items() if by in budgets.get(calls, {})]
    return (min(found)[1], min(found)[0]) if found else ("", math.nan)


def leading(runs: Runs, budgets: tuple[int, ...], extra: int) -> list[str]:
    """Return the settings that are best somewhere, and the `extra` that are best on the whole (geometric mean)."""
    names = {best(runs, calls)[0] for calls in budgets} - {""}
    whole: dict[str, float] = {}
    for name, found in sorted(runs.items()):
        errors = [found[calls].get("mean", math.inf) for calls in budgets if calls in found]
        if len(errors) == len(budgets) and all(0 < e < math.inf for e in errors):
            mean = statistics.geometric_mean(errors)
            if mean not in whole.values():  # options that change nothing give the same figures under another name
                whole[name] = mean
    names |= {*sorted(whole, key=whole.__getitem__)[:extra]}
    return sorted(names, key=lambda name: whole.get(name, math.inf))


def figure(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.4f}" if value < 1 else f"{value:.3g}"


def line(title: str, cells: list[str]) -> str:
    return f"  {title:48}" + "".join(f"{cell:>9}" for cell in cells)


def show(problem: Problem, runs: dict[str, Runs], budgets: tuple[int, ...]) -> None:
    print(f"\n{problem.title}\n" + line("mean error by network calls", [str(calls) for calls in budgets]))
    for side, extra in (("diffusers", SHOWN), ("genkit", 2), ("tuned", 9)):
        winners = {calls: best(runs[side], calls)[0] for calls in budgets}
        for name in leading(runs[side], budgets, extra):
            found = runs[side][name]
            cells = [
                figure(found.get(calls, {}).get("mean", math.nan)) + ("*" if winners[calls] == name else " ")
                for calls in budgets
            ]
            print(line(f"{side if side != 'tuned' else 'genkit'}  {name}", cells))
    for by in ("mean", "rms", "median"):
        least = {side: [best(found, calls, by)[1] for calls in budgets] for side, found in runs.items()}
        for side in ("diffusers", "genkit", "tuned"):
            if not all(map(math.isnan, least[side])):
                title = {"diffusers": "best of diffusers", "genkit": "best of genkit, stock", "tuned": "genkit, tuned"}
                print(line(f"{by}: {title[side]}", [figure(value) + " " for value in least[side]]))
        for side in ("genkit", "tuned"):
            if not all(map(math.isnan, least[side])):
                ratios = [a / b for a, b in zip(least[side], least["diffusers"], strict=True)]
                ours = "stock" if side == "genkit" else "tuned"
                cells = ["- " if math.isnan(ratio) else f"{ratio:.2f}x" for ratio in ratios]
                print(line(f"{by}: {ours} / best of diffusers", cells))


def show_failures(problem: Problem, runs: Runs) -> None:
    """List what did not work: settings with the same reason at the same budgets share a line."""
    reasons: dict[str, list[str]] = {}
    for name, found in runs.items():
        failed = {calls: result["failed"] for calls, result in found.items() if "failed" in result}
        for reason in sorted({*failed.values()}):
            at = [str(calls) for calls, why in failed.items() if why == reason]
            where = "" if len(at) == len(found) else f" at {', '.join(at)}"
            reasons.setdefault(f"{reason}{where}", []).append(name)
    for reason, names in reasons.items():
        classes: dict[str, list[str]] = {}
        for name in names:
            of = max((c for c in CLASSES if name.startswith(c)), key=len, default=name)
            classes.setdefault(of, []).append(name.removeprefix(of).strip())
        print(f"  {reason}: " + "; ".join(f"{of} {', '.join(grids)}".strip() for of, grids in classes.items()))


def machine() -> dict[str, str]:
    import diffusers

    info = Path("/proc/cpuinfo")
    names = [x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")] if (
        info.exists()) else []  # fmt: skip
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


# Line in the figure -> side, how the settings that it may be begin, and its colour; the best on the whole is drawn.
DRAWN: dict[str, tuple[str, tuple[str, ...], str]] = {
    "DDIM": ("diffusers", ("DDIM",), "#b5bac2"),
    "Heun": ("diffusers", ("Heun", "FlowMatchHeun"), "#9aa1ac"),
    "PNDM": ("diffusers", ("PNDM",), "#b5bac2"),
    "DEIS": ("diffusers", ("DEIS",), "#7e8794"),
    "DPM++ 2M": ("diffusers", ("DPM++2M",), "#5f6875"),
    "UniPC": ("diffusers", ("UniPC",), "#20262e"),
    "genkit": ("genkit", ("",), "#e08a1e"),
    "genkit, tuned": ("tuned", ("",), "#d6336c"),
}


ENVELOPE = "best of diffusers"  # at each number of calls


def series(runs: dict[str, Runs], budgets: tuple[int, ...]) -> dict[str, tuple[str, list[float]]]:
    """Return title -> (setting, errors) of the lines to draw.

    Settings that do not run at every budget are left out; a plan that was not tuned for one is NaN there.
    """
    lines = {}
    for title, (side, starts, _) in DRAWN.items():
        if side == "tuned":
            tuned = runs[side].get("tuned", {})
            lines[title] = ("tuned", [tuned.get(calls, {}).get("mean", math.nan) for calls in budgets])
            continue
        group = {name: found for name, found in runs[side].items() if name.startswith(starts)}
        whole = {name for name, found in group.items() if all("mean" in found.get(calls, {}) for calls in budgets)}
        names = [name for name in leading(group, budgets, 1) if name in whole]
        if names:
            lines[title] = (names[0], [group[names[0]][calls]["mean"] for calls in budgets])
    return {ENVELOPE: ("", [best(runs["diffusers"], calls)[1] for calls in budgets]), **lines}


def apart(wanted: list[float], gap: float) -> list[float]:
    """Return heights near the wanted ones, in their order, no two closer than `gap`."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    heights = list(wanted)
    for _ in range(200):
        for low, high in itertools.pairwise(order):
            short = gap - (heights[high] - heights[low])
            if short > 0:
                heights[low] -= short / 2
                heights[high] += short / 2
    return heights


def draw(path: Path, panels: list[tuple[str, dict[str, Runs]]], budgets: tuple[int, ...]) -> None:
    """Draw error against calls, a panel for each problem, with the lines labelled at their ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    pyplot.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "svg.hashsalt": "genkit"})
    picture, axes = pyplot.subplots(1, len(panels), figsize=(5.6 * len(panels), 4.6), squeeze=False, facecolor="white")
    for axis, (title, runs) in zip(axes[0], panels, strict=True):
        lines = series(runs, budgets)
        axis.set_xscale("log")
        axis.set_yscale("log")
        for name, (_, errors) in lines.items():
            side, _, colour = DRAWN.get(name, ("", (), "#20262e"))
            ours, envelope = side in ("genkit", "tuned"), name == ENVELOPE
            there = [(calls, error) for calls, error in zip(budgets, errors, strict=True) if error > 0]
            axis.plot(*zip(*there, strict=True), color=colour, linewidth=2.6 if ours else 1.5, zorder=3 if ours else 2,
                      linestyle=(0, (1.2, 1.6)) if envelope else "-", marker="" if envelope else "o",
                      markersize=5 if ours else 3, solid_capstyle="round")  # fmt: skip
        low, high = (math.log(f(e for _, es in lines.values() for e in es if e > 0)) for f in (min, max))
        ends = [max(i for i, e in enumerate(errors) if e > 0) for _, errors in lines.values()]
        axis.set_ylim(math.exp(low - 0.05 * (high - low)), math.exp(high + 0.05 * (high - low)))
        heights = apart([math.log(e[i]) for (_, e), i in zip(lines.values(), ends, strict=True)], 0.055 * (high - low))
        for (name, (_, errors)), height, end in zip(lines.items(), heights, ends, strict=True):
            side, _, colour = DRAWN.get(name, ("", (), "#20262e"))
            heavy = "bold" if side in ("genkit", "tuned") else "normal"
            thread = {"arrowstyle": "-", "color": colour, "linewidth": 0.6}
            last = end == len(budgets) - 1  # a line that ends early is named on its left, where no other goes
            axis.annotate(name, (budgets[end], errors[end]), (budgets[end] * (1.11 if last else 0.95),
                          math.exp(height)), va="center", ha="left" if last else "right",
                          color=colour, fontweight=heavy, fontsize=9.5, annotation_clip=False,
                          arrowprops=thread)  # fmt: skip
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color="#20262e")
        axis.set_xlabel("network calls")
        axis.xaxis.set_major_locator(FixedLocator(budgets))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axis.xaxis.set_minor_locator(NullLocator())
        decades = [m * 10.0**e for e in range(-5, 3) for m in (1, 2, 5)]
        axis.yaxis.set_major_locator(FixedLocator(decades))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(length=0, colors="#5f6875")
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.spines["bottom"].set_color("#b5bac2")
    axes[0][0].set_ylabel("mean error")
    picture.tight_layout(w_pad=2.5)
    picture.savefig(path, dpi=160)
    pyplot.close(picture)


# ------------------------------------------------------------------------------------------------------------ the rest


def wanted_peers(problem: Problem, quick: bool) -> list[Peer]:
    """Return the peers, those of the embedded model in the order in which they are of interest."""
    found = list(peers(problem.process))
    if problem.name == "embedded":
        found = [p for p in found if p.lacks or p.name in EMBEDDED]
        found.sort(key=lambda p: EMBEDDED.index(p.name) if p.name in EMBEDDED else 99)
    if quick:
        names = ("DDIM", "Euler", "DPM++2M", "UniPC", "FlowMatchEuler")
        found = [p for p in found if p.name.startswith(names) and not p.lacks and "full" not in p.name]
    return found


def solve_problem(name: str, given: argparse.Namespace, budgets: tuple[int, ...]) -> dict[str, Runs]:
    if name == "embedded":
        problem = embedded_problem(given.cache, given.quick)
    else:
        problem = mixture_problem(name, given.cache, given.quick)
    cache = Cache(given.cache, problem)
    with torch.inference_mode():
        peers = run_diffusers(problem, cache, wanted_peers(problem, given.quick), budgets)
        ours = run_genkit(problem, cache, OURS_EMBEDDED if name == "embedded" else OURS, budgets)
    fitted = run_tuned(problem, cache, budgets)
    report(problem, "")
    runs = {"diffusers": peers, "genkit": ours, "tuned": fitted}
    show(problem, runs, budgets)
    show_failures(problem, peers)
    return runs


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("mixtures", "embedded", *MIXTURES)
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", default=["mixtures", "embedded"])
    parser.add_argument("--quick", action="store_true", help="fewer noises, prompts, settings and budgets")
    parser.add_argument("--calls", type=int, nargs="+", metavar="N", help="budgets; default 6 8 10 12 16 20 25")
    parser.add_argument("--json", type=Path, help="write every result there")
    parser.add_argument("--plot", type=Path, help="draw there: vp/gm64 (or the first problem) and the embedded model")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".cache")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="diffusers")
    given.cache.mkdir(parents=True, exist_ok=True)
    (given.cache / ".gitignore").write_text("*\n")
    began, budgets = time.perf_counter(), tuple(given.calls or (QUICK if given.quick else CALLS))
    names = [*(MIXTURES if "mixtures" in given.only else ()), *(x for x in given.only if x != "mixtures")]
    print(", ".join(f"{key} {value}" if key != "processor" else value for key, value in machine().items()))
    found = {name: solve_problem(name, given, budgets) for name in dict.fromkeys(names)}
    print(f"\nleft out: {'; '.join(f'{who} ({why})' for who, why in SKIPPED.items())}")
    print(f"* best of its side at that number of calls; {time.perf_counter() - began:.0f} s, less what was kept before")
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "problems": found}, indent=1) + "\n")
    if given.plot:
        titles = {"vp/gm64": "Exact network (64-D mixture)", "embedded": "The embedded model, guidance 5"}
        shown = [name for name in titles if name in found] or [*found][:1]
        draw(given.plot, [(titles.get(name, name), found[name]) for name in shown], budgets)


if __name__ == "__main__":
    main()
