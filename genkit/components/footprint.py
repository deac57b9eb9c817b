"""What a network's config says about the memory of one call: the most numbers that are alive at once.

Each function walks the network as diffusers runs it and adds up what is held: the skip connections, the arguments of
the callers, and within a layer its inputs and outputs. Everything is per row (one picture, one prompt) and in numbers,
not bytes: times the item size it is memory. `workspace` counts the copies of a convolution's input and output in the
library's own memory layout, as cuDNN and oneDNN make them (measured for the latter).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from genkit.components.shapes import per_block

Config = Mapping[str, Any]
FEED_FORWARD = 20  # widths a token in a transformer block: residual, tokens, norm, 8 projected, gate, product
SELF_ATTENTION = 8  # residual, norm, query, key, value, out, projected, and one to spare
CLIP_LAYER = 6
STRIPED = 2  # VAE blocks, from the picture's end, that genkit.sampling.strips works on in strips
COUNT, LEAST = 32, 16  # strips a map, and rows a strip


class _Walk:
    """What is alive along the way: `held` numbers now, `most` at any time."""

    def __init__(self, workspace: bool) -> None:
        self.held, self.most, self.workspace = 0.0, 0.0, workspace

    def need(self, extra: float) -> None:
        self.most = max(self.most, self.held + extra)

    def conv(self, inputs: float, outputs: float) -> None:
        """A convolution whose input nobody else holds."""
        self.need((inputs + outputs) * (2 if self.workspace else 1))

    def resnet(self, c_in: int, c_out: int, area: float) -> None:
        """ResnetBlock2D, its input held: norm and activation, two convolutions, a sum that is divided."""
        self.need(2 * c_in * area)
        self.conv(c_in * area, c_out * area)
        self.conv(c_out * area, c_out * area)
        self.need((3 if c_in == c_out else 4) * c_out * area)

    def attention(self, kind: str, channels: int, area: float) -> None:
        """The attention of a block of class `kind`, its input held."""
        if "CrossAttn" in kind and "Simple" not in kind:
            self.need(FEED_FORWARD * channels * area)
        elif "Attn" in kind:
            self.need(SELF_ATTENTION * channels * area)

    def upsample(self, channels: int, area: float) -> None:
        """Upsample2D of a map of `area`: nearest neighbours, then a convolution."""
        self.conv(4 * channels * area, 4 * channels * area)


def unet_row(config: Config, height: int, width: int, workspace: bool = True) -> int:
    """Return the numbers alive at the peak of a UNet's call on one row, a latent of height x width."""
    walk = _Walk(workspace)
    widths = list(config["block_out_channels"])
    layers = per_block(config["layers_per_block"], config)
    area = float(height * width)
    skips = [widths[0] * area]
    x = widths[0]
    for i, (kind, channels, count) in enumerate(zip(config["down_block_types"], widths, layers, strict=True)):
        for _ in range(count):
            walk.held = sum(skips)
            walk.resnet(x, channels, area)
            walk.held += channels * area
            walk.attention(kind, channels, area)
            skips.append(channels * area)
            x = channels
        if i < len(widths) - 1:
            walk.held = sum(skips)
            area /= 4
            walk.conv(0, x * area)
            skips.append(x * area)
    walk.held = sum(skips)
    walk.resnet(x, x, area)
    walk.held += x * area
    walk.attention(config.get("mid_block_type") or "", x, area)
    for i, (kind, channels, count) in enumerate(
        zip(config["up_block_types"], reversed(widths), reversed(layers), strict=True)
    ):
        entry = x * area  # the block's input stays a variable of the network's forward
        for j in range(count + 1):
            walk.held = sum(skips) + entry  # the block's skips stay until it ends
            skip = skips[-1 - j]
            walk.held += x * area + skip
            walk.need(0)
            c_in = x + round(skip / area)
            walk.resnet(c_in, channels, area)
            walk.held = sum(skips) + entry + channels * area
            walk.attention(kind, channels, area)
            x = channels
        del skips[-count - 1 :]
        if i < len(widths) - 1:
            walk.held = sum(skips) + entry + x * area
            walk.upsample(x, area)
            area *= 4
    return math.ceil(walk.most)


def control_row(config: Config, height: int, width: int) -> int:
    """Return the numbers that a ControlNet leaves for the UNet's call on one row, and its picture beside them."""
    widths, count = config["block_out_channels"], config["layers_per_block"]
    areas = [height * width / 4**i for i in range(len(widths))]
    levels = sum((count + 1) * channels * area for channels, area in zip(widths, areas, strict=True))
    halvings = len(config["conditioning_embedding_out_channels"]) - 1
    return math.ceil(widths[0] * areas[0] + levels + 3 * areas[0] * 4**halvings)


def vae_decode(config: Config, height: int, width: int, workspace: bool = True) -> int:
    """Return the numbers alive at the peak of decoding one latent of height x width."""
    walk = _Walk(workspace)
    widths = list(reversed(config["block_out_channels"]))
    area = float(height * width)
    x = widths[0]
    walk.held = x * area
    walk.resnet(x, x, area)
    walk.attention("Attn", x, area)
    for i, channels in enumerate(widths):
        for _ in range(config["layers_per_block"] + 1):
            walk.held = x * area
            walk.resnet(x, channels, area)
            x = channels
        walk.attention(config["up_block_types"][i], x, area)
        if i < len(widths) - 1:
            walk.upsample(x, area)
            area *= 4
    return math.ceil(walk.most)


def vae_strips(config: Config, height: int, width: int, workspace: bool = True) -> int:
    """Return the numbers alive at the peak of `decode_in_strips`, which encoding does not exceed."""
    widths = list(reversed(config["block_out_channels"]))
    whole = max(1, len(widths) - STRIPED)
    types = config["up_block_types"][:whole]
    head = {**config, "block_out_channels": list(reversed(widths[:whole])), "up_block_types": types}
    walk = _Walk(workspace)
    walk.most = vae_decode(head, height, width, workspace)
    area, x = float(height * width) * 4 ** (whole - 1), widths[whole - 1]
    for channels in widths[whole:]:
        area *= 4
        rows = 2 ** (len(widths) - 1) * height
        strip = area * min(1.0, (max(LEAST, rows / COUNT) + 5) / rows)
        walk.held = x * area / 4 + channels * area  # what is read and what is written
        walk.upsample(x, strip / 4)
        walk.held += 2 * x * strip
        walk.resnet(x, channels, strip)
        x = channels
    return math.ceil(walk.most)


def vae_encode(config: Config, height: int, width: int, workspace: bool = True) -> int:
    """Return the numbers alive at the peak of encoding one picture whose latent is height x width."""
    walk = _Walk(workspace)
    widths = list(config["block_out_channels"])
    area = float(height * width) * 4 ** (len(widths) - 1)
    x = widths[0]
    for i, channels in enumerate(widths):
        for _ in range(config["layers_per_block"]):
            walk.held = 2 * x * area  # the block's input stays a variable of the encoder's forward
            walk.resnet(x, channels, area)
            x = channels
        walk.attention(config["down_block_types"][i], x, area)
        if i < len(widths) - 1:
            walk.conv(1.1 * x * area, x * area / 4)  # padded by a row and a column first
            area /= 4
    walk.held = x * area
    walk.attention("Attn", x, area)
    return math.ceil(walk.most)


def clip_row(config: Config) -> int:
    """Return the numbers alive in a CLIP transformer's layer for one text or picture."""
    side = config["image_size"] // config["patch_size"] if "patch_size" in config else 0
    tokens = side * side + 1 if side else config["max_position_embeddings"]
    pixels = 3 * config["image_size"] ** 2 * 4 if side else 0  # resized in float32, at most four times over
    return tokens * (CLIP_LAYER * config["hidden_size"] + 2 * config["intermediate_size"]) + pixels
