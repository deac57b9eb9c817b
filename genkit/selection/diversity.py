"""Diverse selection by greedy choice on unit embeddings, and near-duplicate search among the chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from genkit.scoring.names import ALONE

BLOCK = 1024  # rows of a block of products
CHUNK = 16384  # columns
SKETCH = 4  # the bound computed before the full product has so many times fewer dimensions
ROUNDING = 2e-3  # error of cosines of float16 vectors
Other = tuple[int, float]  # the nearest item, and its cosine


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What one row may keep, best first: items (indices over the whole run), their scores, and how many to keep.

    weigh: for a row that uses `sim`: (position in items, cosine with the nearest chosen) -> value, NaN if it does not
    pass. moving: whether the order depends on sim, not only which items pass.
    """

    items: Sequence[int]
    scores: Sequence[float]
    keep: int
    weigh: Callable[[int, float], float] | None = None
    moving: bool = False


def pick(
    rows: Sequence[Candidates],
    vectors: np.ndarray,
    place: Sequence[int],
    same: Sequence[str | None],
    diverse: float = 0.0,
    threshold: float | None = None,
) -> tuple[list[list[int]], dict[int, Other]]:
    """Return the items that each row keeps, in order of choice, and {item: (what it is too like, cosine)}.

    vectors: (n, width) of unit length; place[item]: its row there, -1 for none; same[item]: hash of its file.
    Rows choose in turns. A choice whose cosine with an earlier choice of any row is `threshold` or more, or that is the
    same file, is dropped, and its row chooses again. With `diverse` above 0 a row's next choice maximises

        s - diverse * c    s = (score - mean) / (best - mean)    c = (cosine to the nearest chosen - m) / (1 - m)

    over its candidates: s is 1 for the best and 0 for the average candidate; c is 1 for a copy and 0 for two pictures
    as similar as those of the row on average (m: their mean cosine). After Carbonell & Goldstein 1998 (MMR).
    """
    chosen: list[list[int]] = [[] for _ in rows]
    alike: dict[int, Other] = {}
    kept = None if threshold is None else _Kept(vectors, place, same, threshold, rows)
    groups = [range(len(rows))] if kept is not None else [range(k, k + 1) for k in range(len(rows))]
    for group in groups:  # independent rows are processed one by one, which takes less memory
        queues = {k: _queue(rows[k], vectors, place, diverse) for k in group if rows[k].items}
        while queues:
            turns = [(turn, k, item) for k, q in queues.items() for turn, item in enumerate(q.propose())]
            turns.sort()
            found = [None] * len(turns) if kept is None else kept.admit([item for *_, item in turns])
            for (_, k, item), other in zip(turns, found, strict=True):
                queues[k].settle(item, other is None)
                if other is None:
                    chosen[k].append(item)
                else:
                    alike[item] = other
            queues = {k: q for k, q in queues.items() if q.left > 0}
    return chosen, alike


def _queue(row: Candidates, vectors: np.ndarray, place: Sequence[int], diverse: float) -> _Ranked | _Greedy:
    if row.weigh is not None:
        return _Weighed(row, vectors, place)
    return _Different(row, vectors, place, diverse) if diverse else _Ranked(row)


class _Ranked:
    """A row that takes its candidates by rank."""

    def __init__(self, row: Candidates) -> None:
        self.row, self.at, self.lacks = row, 0, row.keep

    @property
    def left(self) -> int:
        return min(self.lacks, len(self.row.items) - self.at)

    def propose(self) -> Sequence[int]:
        start, self.at = self.at, self.at + self.left
        return self.row.items[start : self.at]

    def settle(self, item: int, kept: bool) -> None:
        self.lacks -= kept


class _Greedy:
    """A row that takes its candidates one by one, by their similarity to those already taken."""

    def __init__(self, row: Candidates, vectors: np.ndarray, place: Sequence[int]) -> None:
        self.row, self.lacks = row, row.keep
        self.vectors, self.known = _gather(vectors, place, row.items)
        self.nearest = np.full(len(row.items), -np.inf)
        self.out = np.zeros(len(row.items), bool)
        self.last = -1

    @property
    def left(self) -> int:
        return min(self.lacks, int((~self.out).sum()))

    def propose(self) -> Sequence[int]:
        raise NotImplementedError

    def settle(self, item: int, kept: bool) -> None:
        self.out[self.last] = True
        self.lacks -= kept
        if kept and self.known[self.last]:
            self.nearest = np.maximum(self.nearest, self.vectors @ self.vectors[self.last])


class _Weighed(_Greedy):
    """A row with `weigh`. A candidate that does not pass at its turn is rejected for good."""

    def propose(self) -> Sequence[int]:
        assert self.row.weigh is not None
        self.last, best = -1, -np.inf
        for k in np.flatnonzero(~self.out).tolist():
            like = np.nan if not self.known[k] else min(1.0, max(ALONE, float(self.nearest[k])))
            value = self.row.weigh(k, like)
            if value != value:
                self.out[k] = True
            elif self.last < 0 or value > best:
                self.last, best = k, value
            if self.last >= 0 and not self.row.moving:
                break
        return [] if self.last < 0 else [self.row.items[self.last]]


class _Different(_Greedy):
    """A row that takes its candidates by score less similarity to those already taken; see `pick`."""

    def __init__(self, row: Candidates, vectors: np.ndarray, place: Sequence[int], weight: float) -> None:
        super().__init__(row, vectors, place)
        self.weight = weight
        n = len(row.items)
        scores = np.array(row.scores, np.float64)
        spread = scores.max() - scores.mean()
        self.value = (scores - scores.mean()) / spread if spread > 0 else np.zeros(n)
        some, total = int(self.known.sum()), self.vectors.sum(axis=0, dtype=np.float64)
        self.mean = float(total @ total - some) / (some * (some - 1)) if some > 1 else 0.0

    def propose(self) -> Sequence[int]:
        like = (self.nearest - self.mean) / max(1 - self.mean, ROUNDING)
        like[~self.known | np.isinf(self.nearest)] = 0.0  # nothing is known of it, or nothing is chosen
        self.last = int(np.argmax(np.where(self.out, -np.inf, self.value - self.weight * like)))
        return [self.row.items[self.last]]


class _Kept:
    """The items chosen so far, and the search for near duplicates among them.

    Most pairs are ruled out by a bound in few dimensions: with P an orthonormal basis of the candidates' first
    principal axes and r(a) the length of the residual of a, a . b <= Pa . Pb + r(a) r(b) (Cauchy-Schwarz).
    """

    def __init__(
        self,
        vectors: np.ndarray,
        place: Sequence[int],
        same: Sequence[str | None],
        threshold: float,
        rows: Sequence[Candidates],
    ) -> None:
        self.vectors, self.place, self.same = vectors, place, same
        self.threshold = min(threshold, 1 - ROUNDING)
        self.files: dict[str, int] = {}
        self.items: list[int] = []
        width, most = vectors.shape[1], sum(len(row.items) for row in rows)
        sample = [place[item] for row in rows for item in row.items if place[item] >= 0]
        sample = sample[:: max(1, len(sample) // 4096)]
        some = np.asarray(vectors[sample], np.float32)
        self.basis: np.ndarray = np.linalg.eigh(some.T @ some)[1][:, -(width // SKETCH) :].astype(np.float32)
        self.whole = np.empty((most, width), np.float32)
        self.short = np.empty((most, self.basis.shape[1] + 1), np.float32)
        self.bounded = width >= 8 * SKETCH

    def admit(self, items: Sequence[int]) -> list[Other | None]:
        """Add items in order, except near duplicates of one added before; return for each that one, or None."""
        found: list[Other | None] = []
        for start in range(0, len(items), BLOCK):
            found += self._admit(items[start : start + BLOCK])
        return found

    def _admit(self, items: Sequence[int]) -> list[Other | None]:
        whole, known = _gather(self.vectors, self.place, items)
        short = self._sketch(whole)
        hits = [self.files.get(self.same[item] or "") for item in items]
        found: list[Other | None] = [None if hit is None else (hit, 1.0) for hit in hits]
        for start in range(0, len(self.items), CHUNK):
            self._search(whole, short, known, slice(start, min(start + CHUNK, len(self.items))), found)
        among = np.triu(whole @ whole.T, 1) if len(items) > 1 else np.zeros((1, 1), np.float32)
        near: dict[int, list[int]] = {}
        for i, j in np.argwhere(among >= self.threshold).tolist():
            near.setdefault(j, []).append(i)
        for j, item in enumerate(items):
            digest = self.same[item]
            if found[j] is None and digest in self.files:
                found[j] = (self.files[digest], 1.0)
            for i in near.get(j, ()) if found[j] is None else ():
                if found[i] is None:
                    found[j] = (items[i], float(among[i, j]))
                    break
            if found[j] is None and digest:
                self.files[digest] = item
        new = [j for j in range(len(items)) if found[j] is None and known[j]]
        at = slice(len(self.items), len(self.items) + len(new))
        self.whole[at], self.short[at] = whole[new], short[new]
        self.items += [items[j] for j in new]
        return found

    def _search(
        self, whole: np.ndarray, short: np.ndarray, known: np.ndarray, at: slice, found: list[Other | None]
    ) -> None:
        """Set `found[j]` where item j is a near duplicate of one of the chosen items in the slice `at`."""
        asked = [j for j in range(len(found)) if found[j] is None and known[j]]
        if self.bounded and asked:
            bound = (short[asked] @ self.short[at].T).max(axis=1)
            open_ = np.flatnonzero(bound >= self.threshold - 1e-4).tolist()
            self.bounded = len(open_) < len(asked) / 2 or len(asked) < BLOCK // 2  # else it only costs time
            asked = [asked[k] for k in open_]
        if not asked:
            return
        cosines = whole[asked] @ self.whole[at].T
        best = cosines.argmax(axis=1)
        for j, k, row in zip(asked, best.tolist(), cosines, strict=True):
            if row[k] >= self.threshold:
                found[j] = (self.items[at.start + k], float(row[k]))

    def _sketch(self, whole: np.ndarray) -> np.ndarray:
        """Return (n, width // SKETCH + 1): the coordinates on the first axes, and the length of the rest."""
        inside = whole @ self.basis
        rest = np.sqrt(np.maximum((whole * whole).sum(axis=1) - (inside * inside).sum(axis=1), 0) + 1e-6)
        return np.concatenate([inside, rest[:, None]], axis=1)


def nearest(
    vectors: np.ndarray, asked: Sequence[int], others: np.ndarray, numbers: Sequence[int] | None = None
) -> Iterator[Other | None]:
    """Yield for each row of `vectors` named in `asked` the nearest row of `others`, and the cosine.

    numbers: the row of `vectors` that each of `others` is, if they are rows of it: no row is its own neighbour.
    """
    targets = np.asarray(others, np.float32)
    own = np.full(len(targets), -1) if numbers is None else np.array(numbers)
    for start in range(0, len(asked), BLOCK):
        rows = np.array(asked[start : start + BLOCK])
        block = np.asarray(vectors[rows], np.float32)
        best, which = np.full(len(rows), -np.inf, np.float32), np.zeros(len(rows), np.int64)
        for left in range(0, len(targets), CHUNK):
            cosines = block @ targets[left : left + CHUNK].T
            if numbers is not None:
                cosines[rows[:, None] == own[None, left : left + CHUNK]] = -np.inf
            k = cosines.argmax(axis=1)
            value = np.take_along_axis(cosines, k[:, None], axis=1)[:, 0]
            better = value > best
            best[better], which[better] = value[better], left + k[better]
        for other, cosine in zip(which.tolist(), best.tolist(), strict=True):
            yield None if cosine == -np.inf else (other, min(1.0, cosine))


def _gather(vectors: np.ndarray, place: Sequence[int], items: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the items' vectors as float32, zero where there is none, and a mask of those that have one."""
    at = np.array([place[item] for item in items], np.int64)
    known = at >= 0
    found = np.zeros((len(items), vectors.shape[1]), np.float32)
    found[known] = vectors[at[known]]
    return found, known
