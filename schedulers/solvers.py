"""Solver axis: a solver is a function from the levels it passes to rows of coefficients, one row a network call.

    x' = cx x + c0 x0 + cr x0_raw + cn noise + c[0] h1 + c[1] h2 + ...

x0 is the clipped and x0_raw the unclipped prediction of this call; h1, h2, … are what earlier calls left behind, newest
first: their x0, or their eps = (x - alpha x0) / sigma for solvers that extrapolate that. Below, a prime marks the level
that a step leads to, k = sigma / alpha, lambda = -log k, h = lambda' - lambda.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from genkit.schedulers.noise import Noise

if TYPE_CHECKING:
    from genkit.schedulers.scheduler import Scheduler

HISTORY = 4  # earlier predictions that a row can use
FEW = 15  # plans of fewer steps end in steps of lower order (lower_order_final), as in diffusers' DPM-Solver


class Point(NamedTuple):
    """One noise level: what the network is told there, alpha and sigma."""

    t: float
    alpha: float
    sigma: float

    @property
    def k(self) -> float:
        """sigma / alpha: infinite at pure noise."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def lam(self) -> float:
        """log(alpha / sigma), half the log signal-to-noise ratio: -inf at pure noise, +inf at the picture."""
        return -math.log(self.k) if self.k else math.inf


X0 = (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Row:
    """A network call at a level, and the coefficients of the step after it. leaves: (x, x0) parts of its h."""

    at: Point
    cx: float
    c0: float
    cr: float = 0.0
    cn: float = 0.0
    c: tuple[float, ...] = ()
    leaves: tuple[float, float] = X0
    draws: bool = False  # noise also where cn is 0, as diffusers does


@dataclasses.dataclass(frozen=True)
class Path:
    """The levels that a trajectory passes: calls are made at points[0 … n-1], and points[n] is where it ends.

    targets: where step i aims; points[i + 1], but for diffusers' DDIM, whose stride ignores rounding. total: steps of
    the whole plan, before `strength` cut it.
    """

    points: tuple[Point, ...]
    targets: tuple[Point, ...]
    total: int
    noise: Noise

    @property
    def n(self) -> int:
        return len(self.targets)

    @property
    def steps(self) -> list[tuple[Point, Point]]:
        return list(itertools.pairwise(self.points))

    def at(self, k: float) -> Point:
        return Point(*map(float, self.noise.at_k(np.array(k))))


class Step(NamedTuple):
    """x' = cx x + w[0] m_0 + w[1] m_1 + … + cn noise, with m the x0 (or eps) of the calls it uses, newest first."""

    cx: float
    w: tuple[float, ...]
    cn: float = 0.0


def _row(at: Point, step: Step, eps: bool = False, draws: bool = False) -> Row:
    """Return the row of a step whose w[0] belongs to this call's x0, or eps."""
    first, *past = step.w
    if not eps:
        return Row(at, cx=step.cx, c0=first, cn=step.cn, c=tuple(past), draws=draws)
    x, x0 = 1 / at.sigma, -at.alpha / at.sigma
    return Row(at, step.cx + first * x, first * x0, cn=step.cn, c=tuple(past), leaves=(x, x0), draws=draws)


def _add(first: Sequence[float], second: Sequence[float], scale: float) -> tuple[float, ...]:
    return tuple(p + scale * q for p, q in itertools.zip_longest(first, second, fillvalue=0.0))


# ---------------------------------------------------------------------------------------------- one-step formulas


def _transfer(here: Point, to: Point, eta: float) -> tuple[float, float]:
    """Return (direction, noise) of x' = alpha' x0 + direction (x - alpha x0) + noise * unit noise.

    noise = eta sigma' sqrt(1 - (k'/k)^2), direction = sqrt(sigma'^2 - noise^2) / sigma: Song et al. 2021, equations
    12 and 16, in a form that holds for any alpha and sigma.
    """
    fresh = eta**2 * max(0.0, 1 - (to.k / here.k) ** 2)  # share of the new variance that is drawn anew
    return to.sigma / here.sigma * math.sqrt(1 - fresh), to.sigma * math.sqrt(fresh)


def ddim(path: Path, s: Scheduler) -> list[Row]:
    """x' = alpha' x0 + sqrt(sigma'^2 - z^2) eps + z noise, z = eta sigma' sqrt(1 - (k'/k)^2) (Song et al. 2021).

    A clip bounds x0 and leaves eps as it was predicted.
    """
    steps = [(here, to, *_transfer(here, to, s.eta)) for here, to in zip(path.points, path.targets, strict=False)]
    return [Row(here, cx=turn, c0=to.alpha, cr=-here.alpha * turn, cn=noise) for here, to, turn, noise in steps]


def _euler(here: Point, to: Point, eta: float = 0.0) -> Row:
    direction, noise = _transfer(here, to, eta)
    return Row(here, cx=direction, c0=to.alpha - here.alpha * direction, cn=noise)


def euler(path: Path, s: Scheduler) -> list[Row]:
    """x'/alpha' = x/alpha + (k' - k) eps: DDIM without noise, but a clip changes eps with x0 (Karras et al. 2022)."""
    return [_euler(here, to) for here, to in zip(path.points, path.targets, strict=False)]


def euler_ancestral(path: Path, s: Scheduler) -> list[Row]:
    """Euler's step to less noise than wanted, then noise up to it (k-diffusion): DDIM with eta 1."""
    return [_euler(here, to, eta=1.0) for here, to in zip(path.points, path.targets, strict=False)]


def ddpm(path: Path, s: Scheduler) -> list[Row]:
    """The posterior of x' given x and x0 (Ho et al. 2020, equations 6 and 7) between any two levels.

    beta = sigma^2 - (alpha sigma'/alpha')^2; x' = (alpha/alpha') (sigma'/sigma)^2 x + alpha' beta/sigma^2 x0 + noise of
    variance beta (fixed_large) or beta (sigma'/sigma)^2 (fixed_small).
    """
    rows = []
    for i, (here, to) in enumerate(zip(path.points, path.targets, strict=False)):
        ratio, shrink = here.alpha / to.alpha, (to.sigma / here.sigma) ** 2
        beta = here.sigma**2 - (ratio * to.sigma) ** 2
        variance = {"fixed_small": beta * shrink, "fixed_large": beta}[s.variance]
        quiet = here.t == 0 if s.placing.noisy_end else i == path.n - 1
        noise = 0.0 if quiet else math.sqrt(max(variance, 1e-20))
        rows.append(Row(here, cx=ratio * shrink, c0=to.alpha * beta / here.sigma**2, cn=noise))
    return rows


def lcm(path: Path, s: Scheduler) -> list[Row]:
    """x' = alpha' (c_out x0 + c_skip x) + sigma' noise, x' without noise at the end (Luo et al. 2023, algorithm 3).

    c_skip = 0.5^2 / ((10 t)^2 + 0.5^2), c_out = 10 t / sqrt((10 t)^2 + 0.5^2): the consistency model at t.
    """
    rows = []
    for i, (here, to) in enumerate(path.steps):
        alpha, sigma = (to.alpha, to.sigma) if i < path.n - 1 else (1.0, 0.0)
        square = (10 * here.t) ** 2 + 0.25
        rows.append(Row(here, cx=alpha * 0.25 / square, c0=alpha * 10 * here.t / math.sqrt(square), cn=sigma))
    return rows


def tcd(path: Path, s: Scheduler) -> list[Row]:
    """DDIM's step to the timestep (1 - eta) t', then noise up to t' (Zheng et al. 2024, strategic stochastic sampling).

    x' = alpha'/alpha_s (alpha_s x0 + sigma_s eps) + sqrt(1 - (alpha'/alpha_s)^2) noise, s = floor((1 - eta) t').
    """
    rows = []
    for i, (here, to) in enumerate(path.steps):
        last = i == path.n - 1
        at = 0.0 if last else math.floor((1 - s.eta) * to.t)
        less = Point(*map(float, path.noise.at(np.array(at)))) if s.eta or last else to
        up = 1.0 if last else to.alpha / less.alpha
        direction = up * less.sigma / here.sigma
        noise = math.sqrt(max(0.0, 1 - up**2))
        rows.append(Row(here, cx=direction, c0=up * less.alpha - here.alpha * direction, cn=noise))
    return rows


# --------------------------------------------------------------------------------- exponential integrators, multistep

_S, _W = (0.5 * (1 + np.polynomial.legendre.leggauss(40)[0]), 0.5 * np.polynomial.legendre.leggauss(40)[1])


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a multistep solver integrates what the network predicts, as a polynomial through this and earlier calls.

    With x0 and tau = 0 the exact solution is x'/sigma' = x/sigma + int exp(lambda) x0 dlambda, with eps it is
    x'/alpha' = x/alpha - int exp(-lambda) eps dlambda (Lu et al. 2022, proposition 3.1); tau = 1 adds the noise of the
    reverse SDE (Xue et al. 2023, proposition 3.2). in_k: polynomials in k rather than lambda. pair: the first moment
    when there are two nodes, "exact", "midpoint" (half of the zeroth) or "bh1" (half of h). half: diffusers takes half
    of the second moment. ending: orders fall towards the end by "dpm" (see `_orders`), by the steps "left", or not.
    """

    eps: bool = False
    tau: float = 0.0
    in_k: bool = False
    pair: str = "exact"
    half: bool = False
    ending: str = "dpm"

    def step(self, here: Point, to: Point, nodes: Sequence[Point]) -> Step:
        """Return the step from `here` with predictions at `nodes`, newest first; from pure noise, or to none, Euler's.

        Nodes that are infinitely far, or no way apart, get no weight.
        """
        h, rate = max(0.0, to.lam - here.lam), 1 + self.tau**2
        if self.eps:
            cx, total = to.alpha / here.alpha, rate * to.alpha * (to.k - here.k)
            cn = self.tau * to.sigma * math.sqrt(math.expm1(2 * h)) if self.tau and h < math.inf else 0.0
        else:
            decay = self.tau**2 * h if self.tau else 0.0
            cx, total = to.sigma / here.sigma * math.exp(-decay), to.alpha * -math.expm1(-rate * h)
            cn = to.sigma * math.sqrt(-math.expm1(-2 * decay))
        begin, *rest = ((p.k if self.in_k else p.lam) for p in (here, to, *nodes))
        length = rest.pop(0) - begin
        places = [(at - begin) / length if length else math.inf for at in rest]
        used = [j for j, r in enumerate(places) if math.isfinite(r) and r not in places[:j]]
        w = np.zeros(len(nodes))
        if len(used) < 2 or not h or not math.isfinite(length):
            w[0] = total
        else:
            powers = np.vander([places[j] for j in used], increasing=True).T
            w[used] = np.linalg.solve(powers, self._moments(h, rate, total, len(used)))
        return Step(cx, tuple(map(float, w)), cn)

    def _moments(self, h: float, rate: float, total: float, size: int) -> np.ndarray:
        """Return the integrals of 1, u, u^2, … over the step, u from 0 to 1, scaled so that the first is `total`."""
        grow = 0.0 if self.in_k else h if self.eps else -rate * h
        kernel = _W * np.exp(grow * (1 - _S))
        moments = np.array([(kernel * _S**i).sum() for i in range(size)])
        moments *= total / moments[0]
        if size == 2 and self.pair != "exact":
            moments[1] = total / 2 if self.pair == "midpoint" else total * grow / 2 / math.expm1(grow)
        if size == 3 and self.half:
            moments[2] /= 2
        return moments


def _orders(path: Path, s: Scheduler, ending: str) -> list[int]:
    """Return the order of every step: as asked, and at most the calls made so far.

    Endings: "dpm", 1 in the last step when it leads to sigma 0, or euler_at_final or (below 15 steps) lower_order_final
    ask for it, and with the latter 2 before; "left", at most the steps left, with lower_order_final.
    """
    order = s.order_or_default
    asked = [order] * path.n if isinstance(order, int) else [*order, *[order[-1]] * path.n]
    few, left = s.lower_order_final and path.total < FEW, range(path.n, 0, -1)
    if ending == "dpm":
        easy = s.euler_at_final or few or not path.points[-1].sigma
        most = [1 if n == 1 and easy else 2 if n == 2 and few else HISTORY for n in left]
    else:
        most = [*left] if ending == "left" and s.lower_order_final else [HISTORY] * path.n
    return [min(asked[i], i + 1, most[i]) for i in range(path.n)]


def multistep(path: Path, s: Scheduler) -> list[Row]:
    """Steps by the solver's Rule, from the newest predictions; with a corrector each is redone with the call it led to.

    Redoing a step adds the difference of its weights, with predictions including the new one, to x: UniPC's corrector
    (Zhao et al. 2023, algorithm 7) and SA-Solver's (Xue et al. 2023, equation 17; the noise stays the same).
    """
    rule = SOLVERS[s.solver].rule
    pair = {"heun": "exact", "bh1": "bh1"}.get(s.solver_type or "", rule.pair)
    eps = rule.eps or (s.predict_eps and s.solver == "unipc")
    rule = dataclasses.replace(rule, eps=eps, half=rule.half and s.placing.half, pair=pair)
    orders, rules, redone = _orders(path, s, rule.ending), [rule] * path.n, [0] * path.n
    if s.solver == "sa":
        end = 0.2 * (path.noise.table.t[-1] + 1)
        rules = [dataclasses.replace(rule, tau=s.tau if end <= p.t <= 4 * end else 0.0) for p in path.points[:-1]]
        most = [n + 2 if s.lower_order_final else HISTORY for n in range(path.n, 0, -1)]
        redone = [min(s.corrector_order, i + 1, most[i]) for i in range(path.n)]
    elif s.solver == "unipc":
        redone = [0, *(p + 1 for p in orders)]
    rows: list[Row] = []
    before = Step(0.0, ())
    for i, (here, to) in enumerate(path.steps):
        if rule.eps and not here.alpha:  # eps says nothing there
            rows.append(dataclasses.replace(_euler(here, to), leaves=(1 / here.sigma, 0.0)))
            continue
        step, start = rules[i].step(here, to, path.points[i::-1][: orders[i]]), path.points[i - 1]
        added: tuple[float, ...] = ()
        if i and s.corrector and redone[i] and start.alpha:
            again = rules[i - 1].step(start, here, path.points[i::-1][: redone[i]])
            added = _add(again.w, (0.0, *before.w), -1.0)
        before = step
        rows.append(_row(here, step._replace(w=_add(step.w, added, step.cx)), rule.eps, s.solver == "sa" and s.tau > 0))
    return rows


# Adams-Bashforth weights, newest first: Liu et al. 2022, equation 12, and its lower orders.
ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(path: Path, s: Scheduler) -> list[Row]:
    """DDIM's step with eps extrapolated from up to four calls as if they were evenly apart (Liu et al. 2022, eq. 12).

    x' = alpha'/alpha x + (sigma' - alpha' sigma/alpha) sum_j w_j eps_j, of order 2 where steps are not even.
    """
    return _adams(path, _orders(path, s, "none"), again=False)


def pndm(path: Path, s: Scheduler) -> list[Row]:
    """ipndm, the second call repeating the first step with the mean of the eps at both of its ends (PLMS).

    Liu et al. 2022 without Runge-Kutta steps; the repeated call is not used again. From pure noise it is not repeated.
    """
    return _adams(path, [HISTORY] * path.n, again=path.n > 1 and path.points[0].alpha > 0)


def _adams(path: Path, orders: Sequence[int], again: bool) -> list[Row]:
    rows: list[Row] = []
    usable: list[bool] = []  # which calls of the history count, newest first
    for i, (here, to) in enumerate(zip(path.points, path.targets, strict=False)):
        gain = to.sigma - to.alpha / here.alpha * here.sigma if here.alpha else 0.0
        if here.alpha:
            weights = iter(ADAMS[min(sum(usable) + 1, orders[i]) - 1])
            past = tuple(next(weights, 0.0) * gain if counts else 0.0 for counts in (True, *usable[:HISTORY]))
            rows.append(_row(here, Step(to.alpha / here.alpha, past), eps=True))
        else:
            rows.append(dataclasses.replace(_euler(here, to), leaves=(1 / here.sigma, 0.0)))
        usable.insert(0, True)
        if i == 0 and again:
            rows.append(_row(path.points[1], Step(1.0, (gain / 2, -gain / 2)), eps=True))
            usable.insert(0, False)
    return rows


STD = 0.54  # of the data, as `pc` takes it
AXIS = (1.15, 36.0)  # `pc` interpolates in log((k + first) / (k + second)): finite from pure noise to none


def pc(path: Path, s: Scheduler) -> list[Row]:
    """y' = y + int v da: v, the turning of y = x / r, as a polynomial through the last calls; each step redone (ours).

    r = sqrt((alpha std)^2 + sigma^2), a = atan(k / std), so that v = cos(a) eps - sin(a) x0 / std is finite from pure
    noise to none, and so is log((k + 1.15) / (k + 36)), in which it is interpolated; the quadrature over a is exact.
    The predictor has order `order`, the corrector one more: UniPC's structure (Zhao et al. 2023) on the velocity. Goes
    with the spacing `bounded`. Order 1 suits guided networks, 2 or (from 12 steps) 3 smoother ones.
    """
    orders = _orders(path, s, "none")
    rows: list[Row] = []
    before: tuple[float, ...] = ()
    for i, (here, to) in enumerate(path.steps):
        radius, after = (math.hypot(p.alpha * STD, p.sigma) for p in (here, to))
        w = _turn(here, to, path.points[i::-1][: orders[i]])
        predicted = w
        if i and s.corrector:
            again = _turn(path.points[i - 1], here, path.points[i::-1][: orders[i - 1] + 1])
            w = _add(w, _add(again, (0.0, *before), -1.0), 1.0)
        before = predicted
        cosine, sine = here.alpha * STD / radius, here.sigma / radius
        x, x0 = cosine / here.sigma, -sine / STD - cosine * here.alpha / here.sigma
        first, *past = (after * weight for weight in w)
        rows.append(Row(here, after / radius + first * x, first * x0, c=tuple(past), leaves=(x, x0)))
    return rows


def _turn(here: Point, to: Point, nodes: Sequence[Point]) -> tuple[float, ...]:
    """Return the weights of v at `nodes` in the integral over the angle from `here` to `to`."""
    begin, end = (math.atan2(p.sigma, p.alpha * STD) for p in (here, to))
    angles = begin + (end - begin) * _S
    sine, cosine = np.sin(angles), np.cos(angles)

    def axis(sigma: Any, alpha: Any) -> Any:
        return np.log((sigma + AXIS[0] * alpha) / (sigma + AXIS[1] * alpha))

    at = [float(axis(p.sigma, p.alpha)) for p in nodes]
    used = [j for j in range(len(at)) if at[j] not in at[:j]]
    powers = np.vander([at[j] for j in used], increasing=True).T
    values = np.vander(axis(STD * sine, cosine), len(used), increasing=True)
    w = np.zeros(len(nodes))
    w[used] = np.linalg.solve(powers, (end - begin) * (_W @ values))
    return tuple(map(float, w))


# ------------------------------------------------------------------------------------------- several calls a step


def _stages(calls: Sequence[Point], steps: Sequence[Step], eps: bool) -> list[Row]:
    """Rows of steps that all start where the first call is made; step j uses the calls up to j, newest first.

    No noise but in the last: the start is got back from where the step before led.
    """
    rows, before = [], Step(1.0, ())
    for at, step in zip(calls, steps, strict=True):
        ratio = step.cx / before.cx
        rows.append(_row(at, Step(ratio, _add(step.w, (0.0, *before.w), -ratio), step.cn), eps))
        before = step
    return rows


def _slope(here: Point, to: Point, *shares: float) -> Step:
    """Return Euler's step along a mean of eps, the newest call's share first."""
    gain = to.sigma - to.alpha / here.alpha * here.sigma
    return Step(to.alpha / here.alpha, tuple(gain * share for share in shares))


def heun(path: Path, s: Scheduler) -> list[Row]:
    """x'/alpha' = x/alpha + (k' - k) (eps + eps') / 2, two calls a step (Karras et al. 2022, algorithm 1).

    For flow x' = x + (sigma' - sigma) (v + v') / 2 with v = (x - x0) / sigma. Steps to sigma 0 are Euler's, and from
    pure noise where k is infinite.
    """
    rows = []
    for here, to in path.steps:
        if not to.sigma or not (here.alpha or s.noise == "flow"):
            rows.append(_euler(here, to))
        elif s.noise == "flow":
            a, b = (to.sigma - here.sigma) / here.sigma, (to.sigma - here.sigma) / to.sigma
            whole = Step(1 + a, (-b / 2, -a / 2 * (1 + b)))
            rows += _stages([here, to], [Step(1 + a, (-a,)), whole], eps=False)
        else:
            rows += _stages([here, to], [_slope(here, to, 1), _slope(here, to, 0.5, 0.5)], eps=True)
    return rows


def dpm2(path: Path, s: Scheduler) -> list[Row]:
    """x'/alpha' = x/alpha + (k' - k) eps at sqrt(k k'), where Euler's step led (Karras et al. 2022, algorithm 2)."""
    return _dpm2(path, eta=0.0)


def dpm2_ancestral(path: Path, s: Scheduler) -> list[Row]:
    """dpm2 to less noise than wanted, then noise up to it (k-diffusion, sample_dpm_2_ancestral)."""
    return _dpm2(path, eta=1.0)


def _dpm2(path: Path, eta: float) -> list[Row]:
    rows = []
    for here, to in path.steps:
        if not here.alpha or not to.k:
            rows.append(_euler(here, to))
            continue
        noise = eta * to.sigma * math.sqrt(max(0.0, 1 - (to.k / here.k) ** 2))
        down = Point(to.t, to.alpha, math.sqrt(to.sigma**2 - noise**2))
        middle = path.at(math.sqrt(here.k * (down.k or to.k)))
        last = _slope(here, down, 1, 0)._replace(cn=noise)
        rows += _stages([here, middle], [_slope(here, middle, 1), last], eps=True)
    return rows


def singlestep(path: Path, s: Scheduler) -> list[Row]:
    """Blocks of two or three levels, each from its own start: x_1 by a step of order 1, x_2 through two calls, x_3.

    x_3 weighs both differences exactly (solver_type heun) or that of the block's ends only (midpoint): Lu et al. 2022,
    algorithms 1 and 2, on eps, and 2022b, algorithm 1, on x0. With noise each step has its own, as in diffusers.
    """
    rule, heun, rows, at = SOLVERS[s.solver].rule, s.solver_type == "heun", [], 0
    exact = dataclasses.replace(rule, pair="exact", half=False)
    for size in _blocks(path, s):
        start, *rest = path.points[at : at + size + 1]
        calls, at = [start, *rest[:-1]], at + size
        if rule.eps and not start.alpha:
            rows += [_euler(here, to) for here, to in zip(calls, rest, strict=True)]
            continue
        steps = [rule.step(start, rest[0], [start])]
        if size > 1:
            steps.append((exact if heun else rule).step(start, rest[1], [rest[0], start]))
        if size > 2:
            steps.append(exact.step(start, rest[2], [rest[1], rest[0], start] if heun else [rest[1], start]))
            steps[2] = steps[2] if heun else steps[2]._replace(w=(steps[2].w[0], 0.0, steps[2].w[1]))
        if rule.tau and size > 1:  # the start is out of reach behind the noise: its part is made when it is at hand
            rows.append(dataclasses.replace(_row(start, steps[0]), leaves=(steps[1].cx, steps[1].w[1])))
            rows.append(Row(rest[0], cx=0.0, c0=steps[1].w[0], cn=steps[1].cn, c=(1.0,)))
        else:
            rows += _stages(calls, steps, rule.eps)
    return rows


def _blocks(path: Path, s: Scheduler) -> list[int]:
    """Return how many levels each block covers, for all steps of a plan; `strength` cuts the first."""
    order, n, zero = s.order_or_default, path.total, not path.points[-1].sigma
    order = order if isinstance(order, int) else max(order)
    whole, over = divmod(n, order)
    if over == 0 and (s.lower_order_final or zero) and order > 1:
        sizes = [order] * (whole - 1) + [order - 1, 1]
    else:
        sizes = [order] * whole + ([over] if over else [])
    if zero and sizes[-1] > 1:
        sizes[-1:] = [sizes[-1] - 1, 1]
    skip = n - path.n
    while skip:  # a plan that starts within a block starts it anew
        sizes[0], skip = sizes[0] - 1, skip - 1
        sizes = sizes if sizes[0] else sizes[1:]
    return sizes


def dpmpp_sde(path: Path, s: Scheduler) -> list[Row]:
    """x' = alpha' D + direction (x - alpha D) + noise with D = x0 at sqrt(k k'), where an ancestral step led.

    k-diffusion's sample_dpmpp_sde with r = 1/2 (DPM-Solver++(2S) on the SDE); the noise up to the middle is a part of
    the whole step's, as increments of one Brownian motion in k.
    """
    rows = []
    for here, to in path.steps:
        if not here.alpha or not to.k or here.k <= to.k:
            rows.append(_euler(here, to))
            continue
        middle = path.at(math.sqrt(here.k * to.k))
        (near, z), (far, noise) = _transfer(here, middle, 1.0), _transfer(here, to, 1.0)
        share = (here.k - middle.k) / (here.k - to.k)
        again = noise * math.sqrt(share) / z  # of the middle's noise, got back from x there
        kept = (far - again * near, -again * (middle.alpha - here.alpha * near))
        rows.append(Row(here, near, middle.alpha - here.alpha * near, cn=z, leaves=kept))
        rows.append(Row(middle, again, to.alpha - here.alpha * far, cn=noise * math.sqrt(1 - share), c=(1.0,)))
    return rows


@dataclasses.dataclass(frozen=True)
class Solver:
    """rows: the coefficients. style: the family of diffusers classes it is in, see STYLES. options: those it reads.

    orders: the order it has when none is asked for, and the greatest. rule: of multistep and singlestep solvers.
    formula: theirs, and where it is from; the others' is in the docstring of `rows`. spacing: what it goes with when it
    is chosen without one.
    """

    rows: Callable[[Path, Any], list[Row]]
    style: str
    options: tuple[str, ...] = ()
    orders: tuple[int, int] = (1, 1)
    rule: Rule = Rule()
    formula: str = ""
    spacing: str | None = None


_DPM = ("lower_order_final", "euler_at_final", "threshold", "order", "solver_type")
_UNIPC = ("order", "solver_type", "corrector", "lower_order_final", "predict_eps", "threshold")
_SA = ("order", "corrector_order", "corrector", "tau", "lower_order_final", "threshold")
_X0 = Rule(pair="midpoint", half=True)
_EPS, _SDE_X0 = dataclasses.replace(_X0, eps=True), dataclasses.replace(_X0, tau=1.0)
_SDE_EPS = dataclasses.replace(_EPS, tau=1.0)
_X0_FORMULA = (
    "x' = sigma'/sigma x + alpha' (1 - e^-h) D, D = x0 + h/2 (x0 - x0_prev) / h_prev (Lu et al. 2022b, alg. 2)"
)
_SDE_FORMULA = (
    "x' = sigma'/sigma e^-h x + alpha' (1 - e^-2h) D + sigma' sqrt(1 - e^-2h) noise (Lu et al. 2022b, app. A)"
)
_EPS_FORMULA = "x' = alpha'/alpha x - sigma' (e^h - 1) (eps + h/2 (eps - eps_prev) / h_prev) (Lu et al. 2022, eq. 4.1)"
_THIRD = "; D a quadratic, in diffusers' style with half of its second moment (k-diffusion), which is of second order"

SOLVERS = {
    "ddim": Solver(ddim, "ddim", ("eta", "clip", "threshold")),
    "ddpm": Solver(ddpm, "ddpm", ("variance", "clip", "threshold")),
    "euler": Solver(euler, "euler", ("clip",)),
    "euler_ancestral": Solver(euler_ancestral, "euler", ("clip",)),
    "heun": Solver(heun, "euler", ("clip",)),
    "dpm2": Solver(dpm2, "dpm2"),
    "dpm2_ancestral": Solver(dpm2_ancestral, "dpm2"),
    "lms": Solver(
        multistep, "euler", ("order",), (4, 4), Rule(eps=True, in_k=True, ending="none"),
        "x'/alpha' = x/alpha + int eps dk, eps a polynomial in k (Adams-Bashforth with variable steps; k-diffusion)",
    ),
    "pndm": Solver(pndm, "ddim"),
    "ipndm": Solver(ipndm, "ddim", ("order",), (4, 4)),
    "deis": Solver(
        multistep, "dpm", ("order", "lower_order_final", "threshold"), (2, 3), Rule(eps=True),
        "x'/alpha' = x/alpha + int eps dk, eps a polynomial in log k (Zhang and Chen 2023, equation 15, log-rho)",
    ),
    "dpmsolver_2m": Solver(multistep, "dpm", _DPM, (2, 2), _EPS, _EPS_FORMULA),
    "dpmsolver_3m": Solver(multistep, "dpm", _DPM, (3, 3), _EPS, _EPS_FORMULA + _THIRD),
    "dpmsolver_2s": Solver(singlestep, "singlestep", _DPM, (2, 2), _EPS),
    "dpmsolver_3s": Solver(singlestep, "singlestep", _DPM, (3, 3), _EPS),
    "sde-dpmsolver_2m": Solver(
        multistep, "dpm", _DPM, (2, 2), _SDE_EPS,
        "x' = alpha'/alpha x - 2 sigma' (e^h - 1) E + sigma' sqrt(e^2h - 1) noise, E as in dpmsolver_2m",
    ),
    "dpmpp_2m": Solver(multistep, "dpm", (*_DPM, "clip"), (2, 2), _X0, _X0_FORMULA),
    "dpmpp_3m": Solver(multistep, "dpm", (*_DPM, "clip"), (3, 3), _X0, _X0_FORMULA + _THIRD),
    "dpmpp_2s": Solver(singlestep, "singlestep", (*_DPM, "clip"), (2, 2), _X0),
    "dpmpp_3s": Solver(singlestep, "singlestep", (*_DPM, "clip"), (3, 3), _X0),
    "sde-dpmpp_2m": Solver(multistep, "dpm", (*_DPM, "clip"), (2, 2), _SDE_X0, _SDE_FORMULA),
    "sde-dpmpp_3m": Solver(multistep, "dpm", (*_DPM, "clip"), (3, 3), _SDE_X0, _SDE_FORMULA + _THIRD),
    "sde-dpmpp_2s": Solver(singlestep, "singlestep", _DPM, (2, 2), _SDE_X0),
    "dpmpp_sde": Solver(dpmpp_sde, "euler"),
    "unipc": Solver(
        multistep, "dpm", _UNIPC, (2, 3), Rule(pair="midpoint", ending="left"),
        "dpmpp's integral with exact weights, each step redone with the call that it led to (Zhao et al. 2023); "
        "with two nodes the difference weighs half of 1 - e^-h (bh2) or half of h (bh1)",
    ),
    "sa": Solver(
        multistep, "dpm", _SA, (2, 4), Rule(pair="bh1", ending="left"),
        "x' = sigma'/sigma e^(-tau^2 h) x + sum w x0 + sigma' sqrt(1 - e^(-2 tau^2 h)) noise, tau at timesteps 200-800 "
        "of 1000, redone with corrector_order predictions (Xue et al. 2023, equations 14 and 17)",
    ),
    "pc": Solver(pc, "exact", ("order", "corrector", "threshold"), (1, 3), spacing="bounded"),
    "lcm": Solver(lcm, "lcm", ("clip", "threshold")),
    "tcd": Solver(tcd, "lcm", ("eta",)),
}  # fmt: skip
