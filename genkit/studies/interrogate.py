"""`genkit interrogate`: the phrases nearest to a picture by CLIP, and a caption made of them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genkit.components import inspect_model
from genkit.device.devices import check_device
from genkit.errors import InputError
from genkit.files import place
from genkit.pictures.images import check_image, read_image
from genkit.rows.request import Request
from genkit.scoring.lists import EMOJI, GENERAL, joined, read_lists
from genkit.studies.search import embedded, pictures_of

if TYPE_CHECKING:
    from genkit.job.run import Summary
    from genkit.scoring.clip import ClipScorer

TRIES = 8  # nearest phrases of each list that are tried in a caption
NAMED = 3  # nearest phrases of each list in the report
GAIN = 1e-3  # least gain in cosine similarity for adding or replacing a phrase


@dataclasses.dataclass(frozen=True)
class Described:
    """The caption of a picture, its cosine similarity (score), and {list: nearest phrases with their similarities}.

    error: for a picture that cannot be read, the reason.
    """

    file: str
    caption: str = ""
    score: float = 0.0
    phrases: Mapping[str, Sequence[tuple[str, float]]] = dataclasses.field(default_factory=dict)
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        if self.error is not None:
            return {"file": self.file, "error": self.error}
        return {"file": self.file, "caption": self.caption, "score": self.score, "phrases": dict(self.phrases)}


def interrogate(
    images: str | Path | Sequence[str | Path], *, clip: str = "emoji-clip", lists: str | Path | None = None,
    device: str = "auto", dtype: str = "auto", quiet: bool = True,
) -> Iterator[Described]:  # fmt: skip
    """Yield the captions of pictures, and of those in runs and folders, in order.

    lists: a folder of phrase lists (`scoring/lists.py`) instead of genkit's own. A caption begins with the nearest
    phrase of the first list. Then, as long as the cosine similarity grows, the phrase that raises it most is added, or
    replaces the phrase of its list (hill climbing). Raises InputError before anything is loaded.
    """
    paths = [Path(images)] if isinstance(images, str | Path) else [Path(path) for path in images]
    if not paths:
        raise InputError("pictures: none are given")
    for path in paths:
        pictures_of(path) if path.is_dir() else _check(path)
    check_device(device, dtype)
    info = inspect_model(clip)
    if info.kind != "clip":
        raise InputError(f"--clip: {clip} is a model of kind {info.kind}, not a CLIP model")
    phrases = read_lists(Path(lists) if lists is not None else EMOJI if info.name == "emoji-clip" else GENERAL)
    return _all(paths, info, phrases, device, dtype, quiet)


def _check(path: Path) -> None:
    try:
        check_image(path)
    except InputError as error:
        raise InputError(f"pictures: {error}") from None


def _all(
    paths: Sequence[Path], info: Any, phrases: Mapping[str, list[str]], device: str, dtype: str, quiet: bool
) -> Iterator[Described]:
    from genkit.components import load_components
    from genkit.device.devices import pick_device
    from genkit.scoring.clip import ClipScorer

    target, precision = pick_device(device, dtype)
    scorer = ClipScorer.from_components(load_components(info, device=target, dtype=precision))
    known: dict[str, np.ndarray] = {}
    for path in paths:
        if not path.is_dir():
            vector = scorer.embed_images([read_image(path)])[0].cpu().numpy()
            yield describe(str(path), vector, scorer, phrases, known)
            continue
        indexed, _ = embedded(path, *pictures_of(path), info, scorer, [], quiet)
        for file, problem in indexed.problems.items():
            yield Described(str(file), error=problem)
        for file, row in zip(indexed.files, indexed.rows, strict=True):
            yield describe(str(file), indexed.vectors[row], scorer, phrases, known)


def describe(
    file: str, vector: np.ndarray, scorer: ClipScorer, lists: Mapping[str, list[str]], known: dict[str, np.ndarray]
) -> Described:
    """Return the caption of a picture with this unit embedding (width,).

    known: a cache of text embeddings, to which those of single phrases are added.
    """
    image = vector.astype(np.float64)
    image /= np.linalg.norm(image)
    first, *others = lists
    ranked = {first: _ranked(lists[first], lists[first], image, scorer, known)}
    subject = ranked[first][0][0]
    for name in others:  # a phrase with {} is ranked with the subject in it
        texts = [joined(subject, phrase) if "{}" in phrase else phrase for phrase in lists[name]]
        ranked[name] = _ranked(lists[name], texts, image, scorer, known)
    chosen, score = _climbed({first: subject}, ranked, lists, image, scorer)
    named = {name: [(phrase, round(value, 4)) for phrase, value in found[:NAMED]] for name, found in ranked.items()}
    return Described(file, _caption(chosen, lists), round(score, 6), named)


def _climbed(
    chosen: dict[str, str], ranked: Mapping[str, Sequence[tuple[str, float]]], lists: Mapping[str, Any],
    image: np.ndarray, scorer: ClipScorer,
) -> tuple[dict[str, str], float]:  # fmt: skip
    """Return the phrases of the caption, and its cosine similarity, by hill climbing over single phrases.

    The subject may be replaced too: the phrase that is nearest on its own may describe the background.
    """
    score = -1.0
    while True:
        tries = [{**chosen, name: phrase} for name, found in ranked.items() for phrase, _ in found[:TRIES]]
        texts = [_caption(one, lists) for one in tries]
        cosines = scorer.embed_texts(texts).cpu().numpy().astype(np.float64) @ image
        best = int(cosines.argmax())
        if cosines[best] < score + GAIN:
            return chosen, score
        chosen, score = tries[best], float(cosines[best])


def _ranked(
    phrases: Sequence[str], texts: Sequence[str], image: np.ndarray, scorer: ClipScorer, known: dict[str, np.ndarray]
) -> list[tuple[str, float]]:
    """Return (phrase, cosine similarity of its text and the picture), nearest first."""
    new = [text for text in dict.fromkeys(texts) if text not in known]
    vectors = dict(zip(new, scorer.embed_texts(new).cpu().numpy().astype(np.float64), strict=True)) if new else {}
    known |= {phrase: vectors[phrase] for phrase in phrases if phrase in vectors}
    cosines = np.stack([known[text] if text in known else vectors[text] for text in texts]) @ image
    return [(phrases[n], float(cosines[n])) for n in np.argsort(-cosines, kind="stable")]


def _caption(chosen: Mapping[str, str], lists: Mapping[str, Any]) -> str:
    """Return the caption made of one phrase of each list, in the order of the lists."""
    caption = ""
    for name in lists:
        caption = joined(caption, chosen[name]) if name in chosen else caption
    return caption


def draw_similar(
    found: Sequence[Described], count: int, out: Path, model: str = "emoji", device: str = "auto", dtype: str = "auto"
) -> Summary:
    """Draw `count` pictures of each caption into the run `out`, or resume it; see `genkit.generate`.

    The id of a row is a hash of its picture, so that pictures can be added to the folder later.
    """
    from genkit.cluster.generate import generate

    rows = {}
    for one in found:
        if one.error is None:
            digest = hashlib.sha256(Path(one.file).read_bytes()).hexdigest()[:16]
            rows[digest] = Request(id=digest, prompt=one.caption, num_images=count, meta={"like": one.file})
    if not rows:
        raise InputError(f"{place(out)}: there is no caption to draw")
    return generate(list(rows.values()), out, model=model, device=device, dtype=dtype)


def report(one: Described) -> str:
    """Return the caption and phrases as text."""
    if one.error is not None:
        return f"{one.file}\n  {one.error}"
    width = max(map(len, one.phrases))
    lists = (
        f"  {name:<{width}}  " + ", ".join(f"{phrase} ({value:.3f})" for phrase, value in found)
        for name, found in one.phrases.items()
    )
    return "\n".join([one.file, f"  {one.caption}  ({one.score:.3f})", *lists])
