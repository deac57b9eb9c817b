"""Picture encoders: CPU time and bytes of genkit's beside Pillow's and, where it is installed, OpenCV's.

    python benchmarks/encoders.py [--repeat 5] [--json FILE]

Pictures: a sheet of pictures of the embedded model as they are; two of them enlarged, with the grain that larger models
leave; matplotlib's sample photograph, at 1024 enlarged with grain too. Milliseconds are of the process's CPU time, all
threads together. `time` and `bytes` are ratios to Pillow's default for the same picture, median (largest). Every PNG,
and whatever else claims to keep every bit, is decoded and compared.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import time
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genkit.pictures.encoders import encoding

Pixels = np.ndarray
Encoder = Callable[[Pixels], bytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    drawn = draw()
    print(f"{machine()}; zlib-ng {version('zlib-ng')}, Pillow {version('pillow')}")
    found: dict[str, dict[str, list[tuple[float, int]]]] = {}
    for side in (512, 1024):
        pictures = pictures_of(side, drawn)
        found[str(side)] = {name: timed(*way, pictures, given.repeat) for name, way in encoders().items()}
        table(side, found[str(side)])
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "encoders": found}, indent=1) + "\n")


def encoders() -> dict[str, tuple[Encoder, bool]]:
    """Return each encoder by name, with whether it must keep every bit."""
    found: dict[str, tuple[Encoder, bool]] = {
        "png: Pillow, default": (pillow(), True),
        "png: Pillow, level 1": (pillow(compress_level=1), True),
        "png: Pillow, run lengths": (pillow(compress_level=1, compress_type=zlib.Z_RLE), True),
    }
    if find_spec("cv2"):
        found |= {"png: OpenCV, default": (opencv(), True)}
    found["png: genkit"] = encoding("png").encode, True
    for name, quality in (("webp", 90), ("webp", 100), ("jpeg", 90), ("jpeg", 100), ("jxl", 90), ("jxl", 100)):
        if name != "jxl" or find_spec("pillow_jxl"):
            how = encoding(name, quality)
            found[f"{how.name}: genkit, quality {quality}"] = how.encode, quality == 100 and name != "jpeg"
    return found


def pillow(**options: Any) -> Encoder:
    def encode(pixels: Pixels) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", **options)
        return buffer.getvalue()

    return encode


def opencv() -> Encoder:
    import cv2

    cv2.setNumThreads(1)
    return lambda pixels: cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()


def timed(encode: Encoder, exact: bool, pictures: list[Pixels], repeat: int) -> list[tuple[float, int]]:
    """Return (CPU seconds, bytes) of each picture: the median of `repeat`, after one that is not counted."""
    found = []
    for pixels in pictures:
        data, times = encode(pixels), []
        for _ in range(repeat):
            began = time.process_time()
            encode(pixels)
            times.append(time.process_time() - began)
        if exact and not np.array_equal(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), pixels):
            raise SystemExit("a picture that should keep every bit decodes to another")
        found.append((statistics.median(times), len(data)))
    return found


def table(side: int, found: dict[str, list[tuple[float, int]]]) -> None:
    print(f"\n{side}x{side:<26}{'ms':>8}{'kB':>8}{'time':>16}{'bytes':>16}")
    base = next(iter(found.values()))
    for name, each in found.items():
        ms, size = (statistics.median(column) for column in zip(*each, strict=True))
        times = [mine / own for (mine, _), (own, _) in zip(each, base, strict=True)]
        sizes = [mine / own for (_, mine), (_, own) in zip(each, base, strict=True)]
        print(f"{name:30}{1e3 * ms:8.1f}{size / 1e3:8.0f}{spread(times):>16}{spread(sizes):>16}")


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({max(ratios):.3f})"


def draw() -> list[Image.Image]:
    """Return 16 pictures of the embedded model."""
    from genkit import TextToImage

    generator = TextToImage.from_pretrained("emoji", device="cpu")
    prompts = ("a red fox", "a slice of pizza", "a blue castle", "a sunflower on a black background")
    return [p for text in prompts for p in generator(text, num_images=4, seed=0, num_inference_steps=8).images]


def pictures_of(side: int, drawn: list[Image.Image]) -> list[Pixels]:
    sheet = Image.new("RGB", (side, side))
    for k in range((side // 128) ** 2):  # a sheet of more than 16 shows them again, turned
        place = 128 * (k % (side // 128)), 128 * (k // (side // 128))
        sheet.paste(drawn[k % 16].rotate(90 * (k // 16)), place)
    return [np.asarray(sheet), grainy(drawn[0], side), grainy(drawn[4], side), photograph(side)]


def grainy(picture: Image.Image, side: int) -> Pixels:
    large = np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS), np.int16)
    return (large + np.random.default_rng(0).integers(-1, 2, large.shape)).clip(0, 255).astype(np.uint8)


def photograph(side: int) -> Pixels:
    from matplotlib.cbook import get_sample_data

    with get_sample_data("grace_hopper.jpg") as file:
        picture = Image.open(file).convert("RGB").crop((0, 0, 512, 512))
    return np.asarray(picture) if side == 512 else grainy(picture, side)


def version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line for line in lines if line.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
