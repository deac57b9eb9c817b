"""The task `detector`: an OWL-ViT (Minderer et al. 2022) on the encoders of a CLIP, trained on composed scenes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, normalize

from genkit.components import Components
from genkit.errors import InputError
from genkit.training.recipe import Recipe

if TYPE_CHECKING:
    from genkit.training.data import Batch

Tensors = dict[str, torch.Tensor]
# Weights of the losses: twice those of Deformable DETR (Zhu et al. 2021), whose ALPHA and GAMMA of the focal loss are
# taken as they are. The naming loss has a small weight because CLIP already knows names, while boxes are learnt anew.
CLASS, L1, GIOU, NAMES, ALPHA, GAMMA = 4.0, 10.0, 4.0, 0.25, 0.25, 2.0
REACH = 0.8  # a patch is assigned to an object within this distance, in patches, of centre to centre; above sqrt(0.5)
FADE = 0.3  # the target falls from 1 at the nearest patch to 0 at patches farther by this much, in patches
SHARP, SAME = 20.0, 0.9999  # scale of the naming logits; texts with a higher cosine count as the same
LIFT = 4.0  # bias of the vision encoder's last LayerNorm, as a multiple of its mean weight: see `owl_of`
SCALE, SHIFT = 10.0, -0.5  # logit = SCALE * (cosine + SHIFT) before training, so that most patches begin below 0.5
# Prefixes of parameter names in CLIPModel and in OwlViTModel.
RENAMED = (("vision_model.pre_layrnorm.", "vision_model.pre_layernorm."),)
POSITIONS = "vision_model.embeddings.position_embedding.weight"


def owl_config(clip: Any, side: int) -> Any:
    """Return the config of an OWL-ViT with the encoders of a CLIP, for `side` x `side` pixels. Raises InputError."""
    from transformers import OwlViTConfig

    text, vision = clip.text_config, clip.vision_config
    if text.hidden_size != clip.projection_dim:
        widths = f"its words have a width of {text.hidden_size}, its embeddings of {clip.projection_dim}"
        raise InputError(f"model: {widths}; an OWL-ViT has one width for both")
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
              "layer_norm_eps")  # fmt: skip
    words = {k: getattr(text, k) for k in (*shared, "vocab_size", "max_position_embeddings", "pad_token_id",
                                           "bos_token_id", "eos_token_id")}  # fmt: skip
    seen = {k: getattr(vision, k) for k in (*shared, "patch_size", "num_channels")} | {"image_size": side}
    return OwlViTConfig(text_config=words, vision_config=seen, projection_dim=clip.projection_dim)


def owl_of(clip: Any, side: int) -> Any:
    """Return an OwlViTForObjectDetection with the encoders of a CLIPModel and new heads.

    Position embeddings are interpolated to the new grid. The class head starts as CLIP's visual projection. OWL-ViT
    multiplies each patch token x by the class token y, after a LayerNorm. With a large bias b in that LayerNorm the
    product (b + x)(b + y) = b² + b (x + y) + xy is close to a sum, so that each patch starts from CLIP's embedding of
    the whole picture instead of noise.
    """
    from transformers import OwlViTForObjectDetection

    with clip.device:
        owl = OwlViTForObjectDetection(owl_config(clip.config, side))
    if clip.device.type == "meta":  # for the estimate of memory, which needs shapes alone
        return owl
    weights = {}
    for name, value in clip.state_dict().items():
        for old, new in RENAMED:
            name = name.replace(old, new)
        weights[name] = _spread(value, side // clip.config.vision_config.patch_size) if name == POSITIONS else value
    owl.owlvit.load_state_dict(weights, strict=False)
    head = owl.class_head
    for layer in (owl.box_head.dense0, owl.box_head.dense1, owl.box_head.dense2):
        layer.reset_parameters()  # transformers initialises them with a standard deviation of 1
    with torch.no_grad():
        norm = owl.owlvit.vision_model.post_layernorm
        norm.bias.fill_(LIFT * float(norm.weight.abs().mean()))
        head.dense0.weight.copy_(clip.visual_projection.weight)
        for layer, start in ((head.dense0, None), (head.logit_shift, SHIFT), (head.logit_scale, SCALE - 1)):
            layer.bias.fill_(start or 0.0)
            if start is not None:
                layer.weight.zero_()
    return owl


def _spread(positions: torch.Tensor, grid: int) -> torch.Tensor:
    """Return position embeddings (1 + n², width), the class token's first, interpolated to a grid of another size."""
    first, rest = positions[:1], positions[1:]
    old = round(len(rest) ** 0.5)
    square = rest.view(1, old, old, -1).permute(0, 3, 1, 2).float()
    new = interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([first, new.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(first)])


class Detection(torch.nn.Module):
    """Finds the boxes of objects that texts name. The text encoder is CLIP's and is not trained."""

    def __init__(self, recipe: Recipe, parts: Components, dtype: torch.dtype) -> None:
        super().__init__()
        self.device, self.parts = parts.device, parts
        vision = parts.clip.config.vision_config
        self.multiple = vision.patch_size
        asked = recipe.data.resolution
        side = vision.image_size if asked is None else asked if isinstance(asked, int) else asked[0]
        if side % self.multiple:
            raise InputError(f"data.resolution: {side} is not a multiple of {self.multiple}, as the networks need it")
        self.owl = owl_of(parts.clip, side)
        self.owl.requires_grad_(True)
        owl = self.owl.owlvit
        for unused in (owl.text_model, owl.text_projection, owl.visual_projection):  # the class head replaces the last
            unused.requires_grad_(False)
        owl.logit_scale.requires_grad_(False)
        self.networks: dict[str, torch.nn.Module] = {"detector": self}
        self.nets: dict[str, Any] = dict(self.networks)
        self.resolution = (side, side)
        self.mean, self.std = (parts.info.preprocessor.get(f"image_{n}", [0.5] * 3) for n in ("mean", "std"))
        self.most = recipe.scenes.most
        self.count = recipe.scenes.absent + min(
            3, self.most
        )  # most texts of a scene: absent ones and those of its objects
        self._words: dict[str, torch.Tensor] = {}

    def encode(self, batch: Batch) -> Tensors:
        """Return pixel_values (B, 3, H, W), queries (B, Q, width), asked (B, Q), boxes (B, N, 4), owners (B, N).

        queries: text embeddings. asked: 1 for a text, 0 for padding. owners: for each box the index of its text, -1
        for padding.
        """
        pixels = batch.pixels.to(self.device, non_blocking=True) / 2 + 0.5
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        size, scenes = len(pixels), batch.scenes or []
        width = self.owl.config.projection_dim
        queries = torch.zeros(size, self.count, width, device=self.device)
        asked = torch.zeros(size, self.count, device=self.device)
        boxes = torch.zeros(size, self.most, 4, device=self.device)
        owners = torch.full((size, self.most), -1, device=self.device)
        known = self.embedded([word for scene in scenes for word in scene.words])
        for n, scene in enumerate(scenes):
            queries[n, : len(scene.words)] = torch.stack([known[word] for word in scene.words])
            asked[n, : len(scene.words)] = 1
            boxes[n, : len(scene.boxes)] = torch.from_numpy(scene.boxes).to(self.device)
            owners[n, : len(scene.boxes)] = torch.tensor(scene.owners, device=self.device)
        found = {"pixel_values": (pixels - mean) / std, "queries": queries, "asked": asked}
        return found | {"boxes": boxes, "owners": owners}

    @torch.no_grad()
    def embedded(self, words: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the unit embedding (width,) of each text; they are cached, as the text encoder is not trained."""
        new = [word for word in dict.fromkeys(words) if word not in self._words]
        for at in range(0, len(new), 64):
            some = new[at : at + 64]
            # Attention is causal, so that padding to the longest text is enough; this saves four fifths of the work.
            options = {"padding": "longest", "max_length": self.parts.tokenizer.model_max_length}
            ids = self.parts.tokenizer(some, return_tensors="pt", truncation=True, **options).to(self.device)
            owl = self.owl.owlvit
            pooled = owl.text_model(input_ids=ids.input_ids, attention_mask=ids.attention_mask).pooler_output
            self._words |= dict(zip(some, normalize(owl.text_projection(pooled), dim=-1), strict=True))
        return self._words

    def forward(
        self, pixel_values: torch.Tensor, queries: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return for T patches: logits (B, T, Q) of each text, class embeddings (B, T, width), boxes (B, T, 4)."""
        features = self.owl.image_embedder(pixel_values=pixel_values)[0]
        flat = features.flatten(1, 2)
        logits, names = self.owl.class_predictor(flat, queries, None)
        return logits.float(), names.float(), self.owl.box_predictor(flat, features).float()

    def loss(
        self, tensors: Tensors, generator: torch.Generator, timesteps: torch.Tensor | None = None, plain: bool = False
    ) -> torch.Tensor:
        """Return the loss of each picture, (B,): see `detection_loss`."""
        logits, names, boxes = self.nets["detector"](tensors["pixel_values"], tensors["queries"])
        kind = "cpu" if logits.device.type == "meta" else logits.device.type
        with torch.autocast(kind, enabled=False):  # in half precision the cosines of similar texts would be equal
            return detection_loss(logits, names, boxes, tensors)


def detection_loss(logits: torch.Tensor, names: torch.Tensor, boxes: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """Return the loss of each picture, (B,). logits: (B, T, Q); names: class embeddings (B, T, width); boxes:
    (B, T, 4); tensors: those of `encode`.

    An object is assigned to the patches near its centre, and not by bipartite matching (Carion et al. 2020), whose
    assignment changes from step to step early in training. All of these patches learn its box and its name, but only
    the nearest one is a positive of the focal loss, and others that are almost as near in part (soft targets, as in
    the quality focal loss of Li et al. 2020); non-maximum suppression removes the duplicates. Naming is a softmax over
    the texts of the whole batch, which gives more negatives than those of one picture.
    """
    thing, inside, nearest = owned(tensors["boxes"], tensors["owners"], round(boxes.shape[1] ** 0.5))
    count = inside.sum(dim=1).clamp(min=1)
    word = tensors["owners"].gather(1, thing).clamp(min=0)  # index of the text of each patch's object, (B, T)
    target = torch.zeros_like(logits).scatter(2, word[..., None], nearest[..., None].to(logits.dtype))
    weight = (ALPHA * target + (1 - ALPHA) * (1 - target)) * (logits.sigmoid() - target).abs() ** GAMMA
    focal = binary_cross_entropy_with_logits(logits, target, reduction="none") * weight
    wide = thing[..., None].expand(-1, -1, 4)
    own = tensors["boxes"].gather(1, wide)
    apart = L1 * (boxes - own).abs().sum(dim=2) + GIOU * (1 - giou(boxes, own)) + NAMES * naming(names, word, tensors)
    return (CLASS * (focal * tensors["asked"][:, None]).sum(dim=(1, 2)) + (apart * inside).sum(dim=1)) / count


def owned(boxes: torch.Tensor, owners: torch.Tensor, grid: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Assign objects to the patches of a square grid. Return three tensors (B, T): the index of the nearest object;
    1 where its centre is within REACH, else 0; and the soft target: 1 at an object's nearest patch, falling to 0 over
    FADE.

    boxes: (B, N, 4), centre and size; owners: (B, N), -1 for padding.
    """
    middle = (torch.arange(grid, device=boxes.device) + 0.5) / grid
    rows, columns = torch.meshgrid(middle, middle, indexing="ij")
    places = torch.stack([columns.flatten(), rows.flatten()], dim=1)
    far = ((boxes[:, :, None, :2] - places) * grid).square().sum(dim=3).sqrt()  # in patches, (B, N, T)
    far = far.masked_fill((owners < 0)[:, :, None], 1e6)
    least, thing = far.min(dim=1)
    inside = (least <= REACH).to(boxes.dtype)
    beyond = least - far.amin(dim=2).gather(1, thing)
    return thing, inside, inside * (1 - beyond / FADE).clamp(min=0)


def naming(names: torch.Tensor, word: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """Return the cross-entropy (B, T) of each patch's class embedding over the texts of the batch.

    Texts that are equal count as one.
    """
    queries = tensors["queries"]
    every, asked = queries.flatten(0, 1), tensors["asked"].flatten()
    own = queries.gather(1, word[..., None].expand(-1, -1, queries.shape[2]))
    same = (own @ every.T > SAME) & (asked > 0)
    logits = (SHARP * normalize(names, dim=-1) @ every.T).masked_fill(asked == 0, -1e4)
    return logits.logsumexp(dim=-1) - logits.masked_fill(~same, -1e4).logsumexp(dim=-1)


def giou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the generalised intersection over union (Rezatofighi et al. 2019) of boxes (..., 4), centre and size."""
    (a0, a1), (b0, b1) = ((x[..., :2] - x[..., 2:] / 2, x[..., :2] + x[..., 2:] / 2) for x in (a, b))
    shared = (torch.minimum(a1, b1) - torch.maximum(a0, b0)).clamp(min=0).prod(dim=-1)
    union = a[..., 2:].prod(dim=-1) + b[..., 2:].prod(dim=-1) - shared
    hull = (torch.maximum(a1, b1) - torch.minimum(a0, b0)).prod(dim=-1)
    return shared / union.clamp(min=1e-9) - (hull - union) / hull.clamp(min=1e-9)
