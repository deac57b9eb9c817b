"""Confidence intervals of shares and means, for small samples and for grouped values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

Interval = tuple[float, float]

Z95 = 1.959964  # 97.5 % quantile of the normal distribution


def wilson(right: int, of: int, z: float = Z95) -> tuple[float, float]:
    """Return the score interval of a share (Wilson 1927): (0, 1) when nothing was counted."""
    if of == 0:
        return 0.0, 1.0
    share, spread = right / of, z * z / of
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / of + spread / (4 * of))
    return max(0.0, centre - half), min(1.0, centre + half)


def clopper_pearson(good: int, of: int, confidence: float) -> Interval:
    """Return the exact two-sided confidence interval of a share, given `good` out of `of` independent draws.

    Clopper and Pearson (1934): covers the truth in at least `confidence` of all cases, whatever the truth.
    """
    tail = (1 - confidence) / 2
    low = 0.0 if good == 0 else _root(lambda share: at_least(good, of, share) >= tail)
    high = 1.0 if good == of else _root(lambda share: 1 - at_least(good + 1, of, share) < tail)
    return low, high


def at_least(good: int, of: int, share: float) -> float:
    """Return the probability of `good` or more out of `of` independent draws that are good with probability `share`."""
    if good <= 0 or share >= 1:
        return 1.0
    if share <= 0:
        return 0.0
    odds, rest = math.log(share), math.log1p(-share)
    whole = math.lgamma(of + 1)
    terms = (
        math.exp(whole - math.lgamma(k + 1) - math.lgamma(of - k + 1) + k * odds + (of - k) * rest)
        for k in range(good, of + 1)
    )
    return min(1.0, math.fsum(terms))


def _root(beyond: Callable[[float], bool]) -> float:
    """Return the point in 0 to 1 where `beyond` changes from false to true, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return (low + high) / 2


def t_quantile(share: float, degrees: int) -> float:
    """Return a quantile of Student's t for a share above one half; the normal one from 1,000 degrees of freedom on."""
    if degrees >= 1000:
        return NormalDist().inv_cdf(share)
    angle = _root(lambda part: (1 + _within(part * math.pi / 2, degrees)) / 2 >= share) * math.pi / 2
    return math.tan(angle) * math.sqrt(degrees)


def _within(angle: float, degrees: int) -> float:
    """Return the probability of |t| below sqrt(degrees) * tan(angle): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= k / (k + 1) * cosine * cosine
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def grouped(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the mean over all values and its standard error; values of one group may be correlated.

    The ratio estimator over clusters: sqrt(C / (C - 1) * sum over groups of (sum of x - mean)^2) / n. One group: NaN.
    """
    n, count = sum(map(len, groups)), len(groups)
    mean = math.fsum(x for group in groups for x in group) / n
    spread = math.fsum(math.fsum(x - mean for x in group) ** 2 for group in groups)
    return mean, math.sqrt(count / (count - 1) * spread) / n if count > 1 else math.nan


def mean_interval(groups: Sequence[Sequence[float]], confidence: float = 0.95) -> tuple[float, float, float]:
    """Return (mean, low, high) of values in groups; an unbounded interval if there is only one group."""
    mean, error = grouped(groups)
    if len(groups) < 2:
        return mean, -math.inf, math.inf
    wide = t_quantile((1 + confidence) / 2, len(groups) - 1) * error
    return mean, mean - wide, mean + wide


def share_interval(groups: Sequence[Sequence[float]], confidence: float = 0.95) -> tuple[float, float, float]:
    """Return (share, low, high) of values from 0 to 1 in groups.

    Wilson's interval (1927) for as many independent values as have the standard error of the groups (Korn and Graubard
    1998), with Student's t for its width. If all values are equal, each group counts as one value.
    """
    share, error = grouped(groups)
    if len(groups) < 2:
        return share, 0.0, 1.0
    n = min(sum(map(len, groups)), share * (1 - share) / error**2) if error > 1e-12 else len(groups)
    t = t_quantile((1 + confidence) / 2, len(groups) - 1)
    middle = (share + t * t / (2 * n)) / (1 + t * t / n)
    wide = t * math.sqrt(share * (1 - share) / n + t * t / (4 * n * n)) / (1 + t * t / n)
    return share, max(0.0, middle - wide), min(1.0, middle + wide)
