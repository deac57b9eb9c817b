"""Zero-shot (open-vocabulary) object detectors: OWL-ViT, OWLv2, Grounding DINO."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from genkit.errors import InputError
from genkit.scoring.boxes import Box, check_word
from genkit.vision.colors import colors_of
from genkit.vision.models import Loaded, Sense
from genkit.vision.words import joined, refuse_long, refuse_many

FLOOR = 0.05  # boxes with lower scores are not stored with a run
MOST = 300  # boxes stored of one picture, those with the highest scores
WORDS = 256  # words whose embeddings are cached
LIKE_SAME = 0.3  # IoU threshold of non-maximum suppression in image-guided detection; transformers' default

Raw = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor
]  # scores (n,), index of the word (n,), boxes (n, 4) as centre and size, 0 to 1


@dataclasses.dataclass(frozen=True)
class Seen:
    """The boxes of a picture, highest score first. floor: lower scores are left out. broken: the scores were NaN."""

    boxes: tuple[Box, ...] = ()
    floor: float = FLOOR
    broken: bool = False


class Detector(Sense):
    """A zero-shot detector. threshold: the default one, from its config or else that of transformers' processor."""

    sense = "detector"

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        self._find, default = _KINDS[loaded.kind]
        self.threshold = default if loaded.info.threshold is None else loaded.info.threshold
        self._words: dict[str, torch.Tensor] = {}

    def detect(self, pictures: Any, words: Sequence[str] | Sequence[Sequence[str]],
               threshold: float | None = None) -> list[list[Box]]:  # fmt: skip
        """Return the boxes of each picture with a score above `threshold`, highest score first.

        pictures: uint8 (B, 3, H, W), or PIL images, paths, arrays or uint8 (3, H, W). words: one list for all
        pictures, or a list for each. Boxes are in pixels, clipped to the picture. Raises InputError for words that are
        empty or too long, HostError if scores are NaN.
        """
        tensors = self._tensors(pictures)
        each: list[list[str]] = (
            [[str(w) for w in words]] * len(tensors)
            if all(isinstance(w, str) for w in words)
            else [list(w) for w in words]
        )
        if len(each) != len(tensors):
            raise InputError(f"words: {len(each)} lists for {len(tensors)} pictures; give one for each, or one for all")
        found = self.see(tensors, each, self.threshold if threshold is None else threshold, None)
        return [self._boxes(seen) for seen in found]

    def see(self, pictures: Sequence[torch.Tensor] | torch.Tensor, words: Sequence[Sequence[str]],
            least: float = FLOOR, most: int | None = MOST) -> list[Seen]:  # fmt: skip
        """Return the boxes of uint8 pictures (3, H, W) with a score above `least`, at most the best `most` of each."""
        self.check_words(word for some in words for word in some)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for n, (picture, some) in enumerate(zip(pictures, words, strict=True)):
            groups.setdefault((tuple(picture.shape), tuple(some)), []).append(n)
        found: dict[int, Seen] = {}
        for (_, some), places in groups.items():
            if not some:
                found |= dict.fromkeys(places, Seen(floor=least))
                continue

            def look(part: slice, places: list[int] = places, some: tuple[str, ...] = some) -> list[Raw]:
                return self._find(self, torch.stack([pictures[n] for n in places[part]]), some)

            raw = self.in_batches(len(places), look)
            for n, one in zip(places, (r for part in raw for r in part), strict=True):
                found[n] = self._seen(pictures[n], one, some, least, most)
        return [found[n] for n in range(len(words))]

    def detect_like(self, pictures: Any, example: Any, threshold: float = 0.6, label: str = "like") -> list[list[Box]]:
        """Return the boxes of objects like the one in the picture `example` (image-guided detection of the OWLs).

        As in transformers, non-maximum suppression drops boxes with an IoU above 0.3 with a better one, and boxes with
        less than a tenth of the best score are dropped too. Raises InputError for Grounding DINO, which cannot do this.
        """
        if not self.loaded.kind.startswith("Owl"):
            raise InputError(f"{self.name}: {self.loaded.kind} finds by words only; OWL-ViT and OWLv2 find by example")
        tensors = self._tensors(pictures)
        with torch.inference_mode():
            queries = _example(self, self._tensors([example])[0][None])
        found = []
        for picture in tensors:
            [[raw]] = self.in_batches(1, lambda _, x=picture: _owl(self, x[None], ("",), queries))  # type: ignore[misc]
            boxes = self._boxes(self._seen(picture, _separate(raw), [label], 0.0, None))
            best = boxes[0].score if boxes else 0.0
            found.append([box for box in boxes if box.score >= threshold and box.score > 0.1 * best])
        return found

    def check_words(self, words: Any) -> None:
        """Raise InputError for a word that is empty, or has more tokens than the model reads."""
        tokenizer = self.loaded.tokenizer
        for word in dict.fromkeys(words):
            check_word(word)
            if word not in self._words:
                ids = tokenizer(word, truncation=False, verbose=False)["input_ids"]
                refuse_long(word, len(ids), self.loaded.info)

    def forget(self) -> None:
        """Clear the cached embeddings of words."""
        self._words.clear()

    def _tensors(self, pictures: Any) -> list[torch.Tensor]:
        if isinstance(pictures, torch.Tensor):
            if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
                raise InputError(
                    f"pictures: {pictures.dtype} {tuple(pictures.shape)} is not uint8 of shape (B, 3, H, W)"
                )
            return list(pictures)
        from genkit.scoring.clip import as_tensor

        return [p if isinstance(p, torch.Tensor) else as_tensor(p)[0] for p in pictures]

    def _seen(self, picture: torch.Tensor, raw: Raw, words: Sequence[str], least: float, most: int | None) -> Seen:
        scores, numbers, boxes = (x.float().cpu() for x in raw)
        height, width = picture.shape[-2:]
        if bool(scores.isnan().any() | boxes.isnan().any()):
            return Seen(floor=least, broken=True)
        scale = torch.tensor([width, height, width, height], dtype=torch.float32)
        if self.loaded.processor_config.square:  # OWLv2's boxes are relative to the padded square
            scale = torch.full((4,), float(max(width, height)))
        order = torch.argsort(-scores, stable=True)[: int((scores > least).sum())]
        floor = least
        if most is not None and len(order) > most:
            floor = float(scores[order[most]])  # the highest score that is left out
            order = order[:most]
        corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)[order] * scale
        corners = corners.clamp(min=0).minimum(torch.tensor([width, height, width, height], dtype=torch.float32))
        places = [tuple(box) for box in corners.tolist()]
        names = [words[int(n)] for n in numbers[order].tolist()]
        colors = colors_of(picture, places)
        values = scores[order].tolist()
        found = zip(names, values, places, colors, strict=True)
        return Seen(tuple(Box(n, s, p[0], p[1], p[2], p[3], c) for n, s, p, c in found), floor)

    def _boxes(self, seen: Seen) -> list[Box]:
        if seen.broken:
            raise self.nan_error()
        return list(seen.boxes)


def _separate(raw: Raw) -> Raw:
    """Return boxes after non-maximum suppression with an IoU threshold of LIKE_SAME, highest score first."""
    scores, numbers, boxes = raw
    order = torch.argsort(-scores, stable=True)
    sides = boxes[order].double().cpu()
    low, high = sides[:, :2] - sides[:, 2:] / 2, sides[:, :2] + sides[:, 2:] / 2
    area = sides[:, 2:].prod(dim=1)
    left = torch.ones(len(order), dtype=torch.bool)
    for k in range(len(order)):
        if left[k]:
            shared = (torch.minimum(high[k], high) - torch.maximum(low[k], low)).clamp(min=0).prod(dim=1)
            near = shared / (area[k] + area - shared) > LIKE_SAME
            near[: k + 1] = False
            left &= ~near
    kept = order[left.to(order.device)]
    return scores[kept], numbers[kept], boxes[kept]


def _owl(
    detector: Detector, pictures: torch.Tensor, words: Sequence[str], queries: torch.Tensor | None = None
) -> list[Raw]:
    """Return the raw boxes of an OWL for uint8 pictures (B, 3, H, W).

    queries: embeddings (Q, width) instead of words.
    """
    model, pixels = detector.model, detector.pixels(pictures)
    del pictures  # a stacked copy, which need not stay in memory during the forward pass
    features = model.image_embedder(pixel_values=pixels)[0]
    flat = features.flatten(1, 2)
    asked = _embedded(detector, words) if queries is None else queries
    mask = torch.ones(len(flat), len(asked), dtype=torch.bool, device=flat.device)
    logits = model.class_predictor(flat, asked.expand(len(flat), -1, -1), mask)[0]
    best = logits.max(dim=-1)
    boxes = model.box_predictor(flat, features)
    return list(zip(best.values.sigmoid(), best.indices, boxes, strict=True))


def _embedded(detector: Detector, words: Sequence[str]) -> torch.Tensor:
    """Return the unit embeddings of words, (len(words), width), from the cache where they are known."""
    new = [word for word in dict.fromkeys(words) if word not in detector._words]
    if new:
        owl = getattr(detector.model, "owlvit", None) or detector.model.owlv2
        texts = detector.loaded.tokenizer(new, padding="max_length", truncation=True, return_tensors="pt").to(
            detector.device
        )
        pooled = owl.text_model(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"]).pooler_output
        found = torch.nn.functional.normalize(owl.text_projection(pooled), dim=-1)
        if len(detector._words) + len(new) > WORDS:
            old = {word: detector._words[word] for word in words if word in detector._words}
            detector._words = old
        detector._words |= dict(zip(new, found, strict=True))
    return torch.stack([detector._words[word] for word in words])


def _example(detector: Detector, picture: torch.Tensor) -> torch.Tensor:
    """Return the query embedding (1, width) of the object in a picture, as transformers selects it among the boxes."""
    model = detector.model
    features = model.image_embedder(pixel_values=detector.pixels(picture))[0]
    found = model.embed_image_query(features.flatten(1, 2), features)[0]
    if found is None:
        raise InputError("example: the detector sees nothing in it")
    return found.reshape(1, -1)


def _grounding_dino(detector: Detector, pictures: torch.Tensor, words: Sequence[str]) -> list[Raw]:
    """Return the raw boxes of Grounding DINO for uint8 pictures (B, 3, H, W).

    Its prompt is "a cat. a dog."; the score of a word is the highest of its tokens.
    """
    tokens = detector.loaded.tokenizer(joined(words), return_tensors="pt", return_offsets_mapping=True)
    refuse_many(words, tokens["input_ids"].shape[1], detector.loaded.info)
    owner, at = torch.zeros(tokens["input_ids"].shape[1], len(words), dtype=torch.bool), 0
    for n, word in enumerate(words):
        length = len(word.strip().lower())
        for k, (start, end) in enumerate(tokens["offset_mapping"][0].tolist()):
            owner[k, n] = at <= start < end <= at + length
        at += length + 2  # of ". "
    inputs = {key: value.to(detector.device).expand(len(pictures), -1)
              for key, value in tokens.items() if key != "offset_mapping"}  # fmt: skip
    pixels = detector.pixels(pictures)
    mask = torch.ones(len(pixels), *pixels.shape[-2:], dtype=torch.long, device=pixels.device)
    out = detector.model(pixel_values=pixels, pixel_mask=mask, **inputs)
    odds = out.logits.float().sigmoid()  # (B, boxes, tokens)
    of_words = torch.stack([odds[..., : len(owner)][..., owner[:, n].to(odds.device)].amax(dim=-1) if owner[:, n].any()
                            else odds.new_zeros(odds.shape[:2]) for n in range(len(words))], dim=-1)  # fmt: skip
    return list(zip(odds.amax(dim=-1), of_words.argmax(dim=-1), out.pred_boxes, strict=True))


_KINDS: dict[str, tuple[Callable[..., list[Raw]], float]] = {  # function, and the default threshold in transformers
    "OwlViTForObjectDetection": (_owl, 0.1),
    "Owlv2ForObjectDetection": (_owl, 0.1),
    "GroundingDinoForObjectDetection": (_grounding_dino, 0.25),
}
