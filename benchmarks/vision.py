"""Pictures a second of genkit's vision models beside transformers' own pipelines, at the same batch size.

    python benchmarks/vision.py [--pictures 24] [--rounds 3] [--side 1024] [--batch 8] [--only segment caption]
    python benchmarks/vision.py --pictures 1000 --small [--rounds 1]
    python benchmarks/vision.py --pictures 400 --batch 32 --device cuda

Networks have random weights and the shapes of the published ones: OWL-ViT B/32 at 768 pixels with two words, CLIPSeg
ViT-B/16 at 352 with two texts, BLIP base at 384, Florence-2 base at 768 (captions of 8 tokens, three beams), Depth
Anything small at 518, ViT-B/16 at 224 with 1000 labels. --small: of a quarter of the width and a third of the depth, at
the same size of pictures and with heads as wide, so that 1,000 pictures take minutes (decoding and preparing weigh more
than in real ones). Both sides read the same JPEG files, at most 50 different ones, and let results go. Peers are the
pipelines of transformers, the one for detection of which looks at a picture once for each word. It has none for
CLIPSeg, for which each batch is what its documentation shows, a picture for every text, and none for captions: there it
is the processor and `generate`.

Each side runs in a process of its own, after one picture to warm up, in turns; the table has the medians. CPU
seconds are of all threads, which other work on the machine lengthens less than the time by the clock. Memory is the
process's peak, weights and warming up included. With --device cuda both compute in float16, and memory is the peak that
torch took on the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

Work = Callable[[list[Path]], Iterable[Any]]
SIDES = ("transformers", "genkit")
WORDS = ["a fox", "the sky"]
TOKENS = 8
DIFFERENT = 50  # pictures; the others are links to them
SENSES = ("detect", "segment", "classify", "caption", "florence", "depth")


def make(folder: Path, sense: str, tiny: bool, small: bool = False) -> Path:
    """Write a model folder: tiny, or of the published shape, or small: in its proportions."""
    from tests import captioners, classifiers, depths, detectors, senses

    write = {"segment": senses.tiny_clipseg, "caption": senses.tiny_blip,
             "florence": captioners.tiny_florence, "depth": depths.tiny_depth_anything,
             "detect": detectors.tiny_owlvit, "classify": classifiers.tiny_classifier}[sense]  # fmt: skip
    path = write(folder / sense)
    if tiny:
        return path
    network, side = {"segment": _clipseg, "caption": _blip, "florence": _florence, "depth": _depth,
                     "detect": _owl, "classify": _vit}[sense](path, 4 if small else 1)  # fmt: skip
    network.save_pretrained(path)
    processor = json.loads((path / "preprocessor_config.json").read_text())
    size = {"height": side, "width": side}
    (path / "preprocessor_config.json").write_text(json.dumps({**processor, "size": size}))
    return path


def _scaled(divide: int, width: int = 768, layers: int = 12) -> dict[str, int]:
    """Return width, depth and heads of a transformer, of which the width is divided."""
    width //= divide
    layers = layers if divide == 1 else layers // 3
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
            "num_attention_heads": max(1, width // 64)}  # fmt: skip


def _clipseg(path: Path, divide: int) -> tuple[Any, int]:
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    from tests import tiny

    text = {**tiny.TOKENS, "max_position_embeddings": 77, **_scaled(divide, 512)}
    vision = {"image_size": 352, "patch_size": 16, **_scaled(divide)}
    read = [3, 6, 9] if divide == 1 else [1, 2, 3]
    return CLIPSegForImageSegmentation(CLIPSegConfig(text_config=text, vision_config=vision, extract_layers=read)), 352


def _blip(path: Path, divide: int) -> tuple[Any, int]:
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {**_scaled(divide), "encoder_hidden_size": 768 // divide}
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=_scaled(divide))), 384


def _florence(path: Path, divide: int) -> tuple[Any, int]:
    from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration

    stated = json.loads((path / "config.json").read_text())  # its tokens, and which of them is a picture's
    width, layers = 768 // divide, 6 if divide == 1 else 2
    text = BartConfig(
        vocab_size=51290, d_model=width, encoder_layers=layers, decoder_layers=layers, max_position_embeddings=4096,
        encoder_attention_heads=width // 64, decoder_attention_heads=width // 64, encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
    )  # fmt: skip
    vision: dict[str, Any] = {"projection_dim": width}
    if divide > 1:
        vision |= {"depths": [1, 1, 3, 1], "embed_dim": [32, 64, 128, 256], "num_heads": [1, 2, 4, 8],
                   "num_groups": [1, 2, 4, 8]}  # fmt: skip
    config = Florence2Config(text_config=text.to_dict(), vision_config=vision, image_token_id=stated["image_token_id"])
    processor = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps({**processor, "image_seq_length": 577}))
    generation = (path / "generation_config.json").read_text()
    network: Any = Florence2ForConditionalGeneration(config)
    network.generation_config.update(**json.loads(generation))
    return network, 768


def _depth(path: Path, divide: int) -> tuple[Any, int]:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    if divide == 1:
        return DepthAnythingForDepthEstimation(DepthAnythingConfig()), 518
    dino: Any = Dinov2Config(  # type: ignore[call-arg]
        hidden_size=128, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=4, image_size=518, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    heads: dict[str, Any] = {"neck_hidden_sizes": [16, 32, 64, 64], "fusion_hidden_size": 16, "head_hidden_size": 8}
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(backbone_config=dino, reassemble_hidden_size=128, **heads)
    ), 518


def _owl(path: Path, divide: int) -> tuple[Any, int]:
    import torch
    from transformers import OwlViTConfig, OwlViTForObjectDetection

    from tests import tiny

    text = {**tiny.TOKENS, "max_position_embeddings": 16, "pad_token_id": 0, **_scaled(divide, 512)}
    network: Any = OwlViTForObjectDetection(
        OwlViTConfig(text_config=text, vision_config=_scaled(divide), projection_dim=512 // divide)
    )
    torch.nn.init.constant_(network.class_head.logit_shift.bias, -3.0)  # else every patch is a box
    return network, 768


def _vit(path: Path, divide: int) -> tuple[Any, int]:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=1000, **_scaled(divide))), 224


def in_parts(files: list[Path], batch: int) -> list[list[Path]]:
    """Return the files, `batch` at a time."""
    return [files[start : start + batch] for start in range(0, len(files), batch)]


def ours(sense: str, model: Path, batch: int, device: str) -> Work:
    """Return genkit's work on the pictures, as its commands do it."""
    from genkit.studies.detect import read_levels
    from genkit.studies.senses import looked_at, read_ahead
    from genkit.vision.captioner import Captioner
    from genkit.vision.classifier import Classifier
    from genkit.vision.depth import Depth
    from genkit.vision.detector import Detector
    from genkit.vision.segmenter import Segmenter, enlarged

    if sense == "segment":
        segmenter = Segmenter.from_pretrained(model, device=device)
        segmenter.batch = batch

        def maps(pixels: Any, sizes: list[tuple[int, int]]) -> list[Any]:
            found = segmenter.maps(pixels, WORDS)
            return [enlarged(one[None], size)[0] for one, size in zip(found, sizes, strict=True)]

        return lambda files: looked_at(files, segmenter, maps)
    if sense == "depth":
        depth = Depth.from_pretrained(model, device=device)
        depth.batch = batch

        def values(pixels: Any, sizes: list[tuple[int, int]]) -> list[Any]:
            found = depth.maps(pixels)
            return [depth.at_size(one[None], size)[0] for one, size in zip(found, sizes, strict=True)]

        return lambda files: looked_at(files, depth, values)
    if sense == "detect":
        detector = Detector.from_pretrained(model, device=device)
        detector.batch = batch
        return lambda files: (
            boxes
            for part in read_ahead(files, read_levels, batch)
            for boxes in detector.detect([picture for _, picture in part], WORDS)
        )
    if sense == "classify":
        classifier = Classifier.from_pretrained(model, device=device)
        classifier.batch = batch
        return lambda files: looked_at(
            files, classifier, lambda x, _: [classifier.best(p, 5) for p in classifier.odds(x)]
        )
    captioner = Captioner.from_pretrained(model, device=device)
    captioner.batch = batch
    return lambda files: looked_at(files, captioner, lambda x, _: captioner.captions(x, None, TOKENS))


def theirs(sense: str, model: Path, batch: int, device: str) -> Work:
    """Return the same by transformers' model and processor."""
    import torch
    import transformers
    from PIL import Image

    if sense == "segment":
        net = loaded(transformers.CLIPSegForImageSegmentation, model, device)
        prepare = transformers.ViTImageProcessor.from_pretrained(model)
        tokens = transformers.CLIPTokenizer.from_pretrained(model)(WORDS, padding=True, return_tensors="pt")

        @torch.inference_mode()
        def maps(files: list[Path]) -> Iterator[Any]:
            for part in in_parts(files, batch):
                pictures = [Image.open(file).convert("RGB") for file in part]
                pixels = prepare([p for p in pictures for _ in WORDS], return_tensors="pt").to(device, net.dtype)
                told = {name: value.repeat(len(part), 1).to(device) for name, value in tokens.items()}
                logits = net(**told, **pixels).logits.sigmoid().float().cpu()
                logits = logits.view(len(part), len(WORDS), *logits.shape[1:])
                for picture, one in zip(pictures, logits, strict=True):
                    yield torch.nn.functional.interpolate(one[None], picture.size[::-1], mode="bilinear")[0]

        return maps
    return {"caption": _blip_captions, "florence": _florence_captions, "depth": _depth_pipeline,
            "detect": _owl_pipeline, "classify": _vit_pipeline}[sense](model, batch, device)  # fmt: skip


def loaded(kind: Any, model: Path, device: str) -> Any:
    """Return a model of transformers on a device, on a GPU in float16."""
    import torch

    return kind.from_pretrained(model, dtype=torch.float32 if device == "cpu" else torch.float16).eval().to(device)


def _blip_captions(model: Path, batch: int, device: str) -> Work:
    import torch
    import transformers
    from PIL import Image

    blip = loaded(transformers.BlipForConditionalGeneration, model, device)
    tokenizer = transformers.BertTokenizer.from_pretrained(model)
    prepares = transformers.BlipImageProcessor.from_pretrained(model)

    @torch.inference_mode()
    def captions(files: list[Path]) -> Iterator[str]:
        for part in in_parts(files, batch):
            pixels = prepares([Image.open(file).convert("RGB") for file in part], return_tensors="pt")
            ids = blip.generate(**pixels.to(device, blip.dtype), max_new_tokens=TOKENS)
            yield from tokenizer.batch_decode(ids, skip_special_tokens=True)

    return captions


def _florence_captions(model: Path, batch: int, device: str) -> Work:
    import torch
    import transformers
    from PIL import Image

    florence = loaded(transformers.Florence2ForConditionalGeneration, model, device)
    images: Any = transformers.AutoImageProcessor.from_pretrained(model)
    processor = transformers.Florence2Processor(images, transformers.BartTokenizer.from_pretrained(model))

    @torch.inference_mode()
    def captions(files: list[Path]) -> Iterator[str]:
        for part in in_parts(files, batch):
            pictures = [Image.open(file).convert("RGB") for file in part]
            inputs = processor(text=["<CAPTION>"] * len(part), images=pictures, return_tensors="pt")
            ids = florence.generate(**inputs.to(device, florence.dtype), max_new_tokens=TOKENS)
            yield from processor.batch_decode(ids, skip_special_tokens=True)

    return captions


def _owl_pipeline(model: Path, batch: int, device: str) -> Work:
    import transformers

    network = loaded(transformers.AutoModelForZeroShotObjectDetection, model, device)
    images: Any = transformers.AutoImageProcessor.from_pretrained(model)
    words: Any = transformers.CLIPTokenizer.from_pretrained(model)
    pipe: Any = transformers.pipeline(
        "zero-shot-object-detection", model=network, image_processor=images, tokenizer=words, device=device
    )
    return lambda files: pipe(({"image": str(f), "candidate_labels": WORDS} for f in files), batch_size=batch)


def _vit_pipeline(model: Path, batch: int, device: str) -> Work:
    import transformers

    network = loaded(transformers.AutoModelForImageClassification, model, device)
    images: Any = transformers.AutoImageProcessor.from_pretrained(model)
    pipe: Any = transformers.pipeline("image-classification", model=network, image_processor=images, device=device)
    return lambda files: pipe((str(file) for file in files), batch_size=batch)


def _depth_pipeline(model: Path, batch: int, device: str) -> Work:
    import transformers

    network = loaded(transformers.AutoModelForDepthEstimation, model, device)
    images: Any = transformers.AutoImageProcessor.from_pretrained(model)
    pipe: Any = transformers.pipeline("depth-estimation", model=network, image_processor=images, device=device)
    return lambda files: pipe((str(file) for file in files), batch_size=batch)


def measure(side: str, sense: str, model: Path, files: list[Path], batch: int, device: str) -> None:
    """Print seconds, CPU seconds and peak memory of one side as JSON."""
    import torch

    work = {"genkit": ours, "transformers": theirs}[side](sense, model, batch, device)
    list(work(files[:1]))
    began, cpu = time.perf_counter(), time.process_time()
    assert sum(1 for _ in work(files)) == len(files)
    found = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    gib = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else peak_memory()
    print(json.dumps({**found, "gib": gib}))


def peak_memory() -> float:
    """Return the most memory that this process had, GiB; `ru_maxrss` would be at least that of the one it came from."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def compared(sense: str, folder: Path, pictures: int, batch: int, rounds: int, device: str) -> str:
    """Return the table's line of a sense, of `rounds` processes a side in turns."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            words = [sys.executable, __file__, "--batch", str(batch), "--device", device,
                     "--measure", side, sense, str(folder)]  # fmt: skip
            done = subprocess.run(words, capture_output=True, text=True, env=os.environ)
            if done.returncode:
                sys.exit(done.stderr)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    theirs, ours = ({k: statistics.median(one[k] for one in found[side]) for k in found[side][0]} for side in SIDES)
    rates = pictures / theirs["seconds"], pictures / ours["seconds"], theirs["seconds"] / ours["seconds"]
    cpu = theirs["cpu"] / pictures, ours["cpu"] / pictures, theirs["cpu"] / ours["cpu"]
    cells = [f"{value:.2f}" for value in (*rates, *cpu, theirs["gib"], ours["gib"])]
    return f"| {sense} | {' | '.join(cells)} |"


def main() -> None:
    """Measure each sense on both sides and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", choices=SENSES, nargs="+", default=SENSES)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        side, sense, folder = options.measure
        measure(side, sense, Path(folder) / sense, sorted(Path(folder, "pictures").iterdir()), options.batch,
                options.device)  # fmt: skip
        return
    from tests.senses import noise

    print(f"{options.pictures} pictures of {options.side}x{options.side}, batches of {options.batch}; {options.device}")
    print(f"threads of torch: {os.environ.get('OMP_NUM_THREADS', 'all')}; load before: {os.getloadavg()[0]:.1f}\n")
    print("| sense | transformers, pictures/s | genkit | times | CPU s a picture | genkit | times | GiB | genkit |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temp:
        (Path(temp) / "pictures").mkdir()
        for n in range(options.pictures):
            path, before = (Path(temp, "pictures", f"{k:04d}.jpg") for k in (n, n % DIFFERENT))
            if n < DIFFERENT:
                noise(n, options.side, options.side).save(path, quality=90)
            else:
                path.hardlink_to(before)
        for sense in options.only:
            make(Path(temp), sense, options.tiny, options.small)
            line = compared(sense, Path(temp), options.pictures, options.batch, options.rounds, options.device)
            print(line, flush=True)


if __name__ == "__main__":
    main()
