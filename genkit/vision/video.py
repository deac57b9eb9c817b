"""Zero-shot video classification with X-CLIP (Ni et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from genkit.errors import InputError, shown
from genkit.pictures.frames import read_frames
from genkit.vision.models import Loaded, Sense

FRAMES = 64  # of all clips in a batch


class VideoClassifier(Sense):
    """Probabilities of labels for video clips. frames: how many frames the model reads of each clip."""

    sense = "video classifier"

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        self.frames = int(self.model.config.vision_config.num_frames)
        self.batch = max(1, FRAMES // self.frames)

    def __call__(self, clips: Sequence[Any], labels: Sequence[str]) -> torch.Tensor:
        """Return the probabilities (B, L), float32 on the CPU, of L labels for B clips; each row sums to 1.

        clips: files, folders or lists of frames, as in `read_frames`. Raises InputError for clips that cannot be read
        or are too short, and as `probabilities` does.
        """
        return self.probabilities(torch.stack([self.clip(clip)[0] for clip in clips]), labels)

    def clip(self, clip: Any) -> tuple[torch.Tensor, int]:
        """Return the sampled and preprocessed frames (T, 3, h, w), and the number of frames of the clip."""
        from genkit.scoring.clip import as_tensor

        frames, total = read_frames(clip, self.frames)
        ready = [self.pixels(as_tensor(frame))[0] for frame in frames]
        side = self.model.config.vision_config.image_size
        expected = (side, side) if isinstance(side, int) else tuple(side)
        odd = next((one for one in ready if tuple(one.shape[-2:]) != expected), None)
        if odd is not None:
            read, want = (f"{size[1]}x{size[0]}" for size in (odd.shape[-2:], expected))
            raise InputError(f"{self.loaded.info.name}: preprocessor_config.json makes {read} of a frame, not {want}")
        return torch.stack(ready), total

    def probabilities(self, pixels: torch.Tensor, labels: Sequence[str]) -> torch.Tensor:
        """Return the probabilities (B, L) of labels for clips (B, T, 3, h, w) that `clip` has prepared.

        Raises InputError for labels that are empty or too long for the model, HostError if the logits are NaN.
        """
        for label in labels:
            if not label.strip() or "\x00" in label:
                raise InputError(f"labels: {shown(label)} is no text")
        if not labels:
            raise InputError("labels: there are none")
        tokens = self.loaded.tokenizer(list(labels), padding=True, return_tensors="pt", verbose=False)
        length, most = tokens.input_ids.shape[1], self.model.config.text_config.max_position_embeddings
        if length > most:
            raise InputError(f"labels: the longest has {length} tokens, more than the {most} read")
        words = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}

        def look(part: slice) -> torch.Tensor:
            found: torch.Tensor = self.model(pixel_values=pixels[part].to(self.device), **words).logits_per_video
            return found.float().softmax(dim=1).cpu()

        found = torch.cat(self.in_batches(len(pixels), look, "clips"))
        if not bool(found.isfinite().all()):
            raise self.nan_error()
        return found
