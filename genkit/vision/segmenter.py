"""Text-guided segmentation with CLIPSeg (Lüddecke and Ecker 2022), and masks from its probability maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from genkit.errors import InputError, shown
from genkit.vision.footprint import MAPS
from genkit.vision.models import Loaded, Sense

THRESHOLD = 0.5  # a pixel with at least this probability is in the mask
MOST_WORDS = 100
CACHED = 10_000  # embeddings of texts


class Segmenter(Sense):
    """Per-pixel probabilities that a pixel shows what a text names.

    A picture is encoded once for all texts, and a text once for all pictures.
    """

    sense = "segmenter"

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        self._embedded: dict[str, torch.Tensor] = {}

    def __call__(self, pictures: torch.Tensor, words: Sequence[str]) -> torch.Tensor:
        """Return the probability maps (B, N, H, W), float32, of uint8 pictures (B, 3, H, W) for N texts."""
        return enlarged(self.maps(self.pixels(pictures), words), (pictures.shape[-2], pictures.shape[-1]))

    def maps(self, pixels: torch.Tensor, words: Sequence[str]) -> torch.Tensor:
        """Return the probability maps (B, N, h, w), float32, of pictures that `pixels` has prepared, for N texts.

        Raises InputError as `check_words` does.
        """
        check_words(words)
        told = self._embed(words)
        return torch.cat(self.in_batches(len(pixels), lambda part: self._maps(pixels[part], told)))

    def _maps(self, pixels: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        seen = self.model.clip.get_image_features(pixels.to(self.device), output_hidden_states=True)
        layers = [seen.hidden_states[layer + 1] for layer in self.model.extract_layers]
        count, each = len(pixels), max(1, MAPS // len(pixels))
        found = []
        for part in told.split(each):
            activations = [layer.repeat_interleave(len(part), dim=0) for layer in layers]
            logits = self.model.decoder(activations, part.repeat(count, 1)).logits
            found.append(logits.float().sigmoid().view(count, len(part), *logits.shape[-2:]))
        return torch.cat(found, dim=1)

    def _embed(self, words: Sequence[str]) -> torch.Tensor:
        """Return the embeddings (N, D) of texts, from the cache where they are known."""
        cache = self._embedded
        if len(cache) > CACHED:
            cache.clear()
        new = [word for word in dict.fromkeys(words) if word not in cache]
        if new:
            with torch.inference_mode():
                tokens = self.loaded.tokenizer(new, padding=True, truncation=True, return_tensors="pt").to(self.device)
                found = self.model.clip.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask)
            cache.update(zip(new, found.pooler_output, strict=True))
        return torch.stack([cache[word] for word in words])

    def forget(self) -> None:
        """Clear the cached embeddings of texts."""
        self._embedded.clear()


def check_words(words: Sequence[str]) -> None:
    """Raise InputError unless there are 1 to MOST_WORDS different, non-empty texts."""
    if not 1 <= len(words) <= MOST_WORDS:
        raise InputError(f"words: {len(words)} texts; name 1 to {MOST_WORDS}")
    for word in words:
        if not word.strip() or "\x00" in word:
            raise InputError(f"words: {shown(word)} is no text")
    twice = next((word for word in words if list(words).count(word) > 1), None)
    if twice is not None:
        raise InputError(f"words: {shown(twice)} is named twice")


def enlarged(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return maps (B, N, h, w) resized to (height, width): bilinear, align_corners=False."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    return torch.nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def binary(maps: torch.Tensor, threshold: float = THRESHOLD, grow: int = 0, invert: bool = False) -> torch.Tensor:
    """Return bool masks of maps (B, N, h, w): thresholded, then dilated by `grow` pixels, then inverted.

    Dilation is that of PIL's MaxFilter(2 grow + 1).
    """
    masks = maps >= threshold
    if grow:
        side = 2 * grow + 1
        tall = torch.nn.functional.max_pool2d(masks.float(), (side, 1), stride=1, padding=(grow, 0))
        masks = torch.nn.functional.max_pool2d(tall, (1, side), stride=1, padding=(0, grow)) > 0
    return ~masks if invert else masks
