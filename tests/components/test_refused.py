"""Every way that a model folder can be wrong: one line that names file, key and value; no code run, no torch."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from genkit.components import inspect_model
from genkit.errors import InputError
from tests.tiny import tiny_clip, tiny_ddpm, tiny_stable_diffusion

ROOT = Path(__file__).parents[2]
UNET = "unet/diffusion_pytorch_model.safetensors"
CANARY = "import pathlib\npathlib.Path(__file__).with_name('RAN').touch()\n"
Harm = Callable[[Path], Any]
MAKERS: dict[str, Callable[[Path], Path]] = {"sd": tiny_stable_diffusion, "ddpm": tiny_ddpm, "clip": tiny_clip}


def change(file: str, **keys: Any) -> Harm:
    """Set keys of a JSON file; `...` removes one."""

    def apply(folder: Path) -> None:
        config = json.loads((folder / file).read_text()) | keys
        (folder / file).write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    return apply


def inside(file: str, *path: str, **keys: Any) -> Harm:
    """Set keys of an object inside a JSON file."""

    def apply(folder: Path) -> None:
        config = json.loads((folder / file).read_text())
        target = config
        for key in path:
            target = target[key]
        target.update(keys)
        (folder / file).write_text(json.dumps(config))

    return apply


def write(file: str, data: bytes | str) -> Harm:
    def apply(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_bytes(data if isinstance(data, bytes) else data.encode())

    return apply


def prepend(file: str, text: str) -> Harm:
    return lambda folder: write(file, text + (folder / file).read_text())(folder)


def both(*steps: Harm) -> Harm:
    def apply(folder: Path) -> None:
        for step in steps:
            step(folder)

    return apply


def remove(file: str) -> Harm:
    """Remove a file, or with "." the model's whole folder."""
    return lambda folder: shutil.rmtree(folder) if file == "." else (folder / file).unlink()


def sparse(file: str, size: int) -> Harm:
    return lambda folder: os.truncate(folder / file, size)


def link(file: str, target: str) -> Harm:
    return both(remove(file), lambda folder: (folder / file).symlink_to(target))


def fifo(file: str) -> Harm:
    return both(remove(file), lambda folder: os.mkfifo(folder / file))


def rename(file: str, to: str) -> Harm:
    return lambda folder: (folder / file).rename(folder / to)


def header(file: str, edit: Callable[[dict[str, Any]], Any], tail: bytes = b"") -> Harm:
    """Rewrite the header of a safetensors file as `edit` leaves it, or as it returns it."""

    def apply(folder: Path) -> None:
        raw = (folder / file).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        content = json.loads(raw[8 : 8 + length])
        edited = edit(content)
        text = edited if isinstance(edited, bytes) else json.dumps(content if edited is None else edited).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :] + tail)

    return apply


def entry(**keys: Any) -> Harm:
    """Set fields of the header's entry of conv_in.weight, which has shape [8, 4, 3, 3] and 1,152 bytes."""
    return header(UNET, lambda content: content["conv_in.weight"].update(keys))


def overlap(content: dict[str, Any]) -> None:
    first, second, *_ = (v for k, v in content.items() if k != "__metadata__")
    second["data_offsets"] = [
        first["data_offsets"][0],
        first["data_offsets"][0] + second["data_offsets"][1] - second["data_offsets"][0],
    ]


def twice(content: dict[str, Any]) -> bytes:
    text = json.dumps(content)
    return (text[:-1] + ', "conv_in.weight": ' + json.dumps(content["conv_in.weight"]) + "}").encode()


def sharded(**shards: str) -> Harm:
    """Turn the UNet's file into one shard with an index; `shards` overrides entries of its weight_map."""

    def apply(folder: Path) -> None:
        raw = (folder / UNET).read_bytes()
        names = [k for k in json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]) if k != "__metadata__"]
        shutil.move(folder / UNET, folder / "unet" / "shard.safetensors")
        given = {k.replace("__", "."): v for k, v in shards.items()}
        weight_map = {k: v for k, v in (dict.fromkeys(names, "shard.safetensors") | given).items() if v}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{UNET}.index.json").write_text(json.dumps(index))

    return apply


def slow_tokenizer(vocab: Any = None, merges: str | None = None) -> Harm:
    """Replace tokenizer.json by vocab.json and merges.txt, changed as told."""

    def apply(folder: Path) -> None:
        fast = folder / "tokenizer" / "tokenizer.json"
        model = json.loads(fast.read_text())["model"]
        text = "#version: 0.2\n" + "\n".join(" ".join(m) for m in model["merges"]) + "\n"
        (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocab(model["vocab"]) if vocab else model["vocab"]))
        (folder / "tokenizer" / "merges.txt").write_text(text if merges is None else text + merges)
        fast.unlink()

    return apply


INDEX, CONFIG, TEXT, VAE = "model_index.json", "unet/config.json", "text_encoder/config.json", "vae/config.json"
TOKENS, TOKENIZER = "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"
DEEP = '{"in_channels": ' + "[" * 100_000 + "]" * 100_000 + "}"
MANY = "{" + ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(100_000)) + "}"


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    model: str
    harm: Harm
    words: tuple[str, ...]


def case(name: str, model: str, harm: Harm, *words: str) -> Case:
    return Case(name, model, harm, words)


CASES = [
    # The folder itself.
    case("empty folder", "sd", both(remove("."), Path.mkdir), "holds no model", "model_index.json"),
    case("a file", "sd", both(remove("."), Path.touch), "no safetensors"),
    case("folder is a link to itself", "sd", both(remove("."), lambda f: f.symlink_to(f)), "broken link"),
    case("no scheduler", "sd", remove("scheduler/scheduler_config.json"), "scheduler_config.json", "absent"),
    case("no index, foreign class", "sd", both(remove(INDEX), change(CONFIG, _class_name="Flux")), CONFIG, "'Flux'"),
    # JSON.
    case("config missing", "sd", remove(CONFIG), CONFIG, "absent"),
    case("config empty", "sd", write(CONFIG, ""), CONFIG, "is empty"),
    case("config a list", "sd", write(CONFIG, "[1]"), CONFIG, "not a JSON object"),
    case("config 100 MB", "sd", sparse(CONFIG, 10**8), CONFIG, "100000000 bytes"),
    case("index 100 MB", "sd", sparse(INDEX, 10**8), INDEX, "100000000 bytes"),
    case("repeated key", "sd", write(CONFIG, '{"in_channels": 4, "in_channels": 4}'), CONFIG, "'in_channels'", "twice"),
    case("comment", "sd", prepend(CONFIG, "// mine\n"), CONFIG, "line 1 column 1", "not JSON"),
    case("trailing comma", "sd", write(CONFIG, '{"in_channels": 4,\n}'), CONFIG, "not JSON"),
    case("NaN", "sd", write(CONFIG, '{"dropout": NaN}'), CONFIG, "NaN"),
    case("1e400", "sd", write(CONFIG, '{"dropout": 1e400}'), CONFIG, "1e400"),
    case("5,000 digits", "sd", write(CONFIG, '{"in_channels": ' + "1" * 5000 + "}"), CONFIG, "5000 digits"),
    case("nested 100,000 deep", "sd", write(CONFIG, DEEP), CONFIG, "nested"),
    case("not UTF-8", "sd", write(CONFIG, b'{"act_fn": "\xff"}'), CONFIG, "byte 12", "UTF-8"),
    case("UTF-16", "sd", write(CONFIG, '{"act_fn": "silu"}'.encode("utf-16")), CONFIG, "UTF-8"),
    # Keys and their types.
    case("mistyped component", "sd", change(INDEX, text_encodr=["transformers", "CLIPTextModel"]), "'text_encoder'"),
    case(
        "a list for an option", "sd", change(INDEX, requires_safety_checker=[]), INDEX, "requires_safety_checker", "[]"
    ),
    case("text for a number", "sd", change(CONFIG, in_channels="4"), CONFIG, "in_channels", "'4'", "whole number"),
    case("true for a number", "sd", change(CONFIG, in_channels=True), CONFIG, "in_channels", "True"),
    case("number for a flag", "sd", change(CONFIG, flip_sin_to_cos=1), CONFIG, "flip_sin_to_cos", "true or false"),
    case("null for a list", "sd", change(CONFIG, block_out_channels=None), CONFIG, "block_out_channels"),
    case("long list", "sd", change(CONFIG, block_out_channels=[8] * 10_000), CONFIG, "block_out_channels"),
    case("unknown activation", "sd", change(CONFIG, act_fn="eval"), CONFIG, "act_fn", "'eval'"),
    case("no bicubic", "clip", change("preprocessor_config.json", resample=0), "resample", "is not 2 or 3"),
    # Classes.
    case("os.system", "sd", change(INDEX, unet=["os", "system"]), INDEX, "unet", "'os.system'", "UNet2DConditionModel"),
    case("builtins.eval", "sd", change(INDEX, scheduler=["builtins", "eval"]), "scheduler", "'eval'"),
    case(
        "eval in both",
        "sd",
        both(
            change(INDEX, scheduler=["builtins", "eval"]), change("scheduler/scheduler_config.json", _class_name="eval")
        ),
        "scheduler",
        "eval",
    ),
    case(
        "a path for a class", "sd", change(INDEX, vae=["../x", "AutoencoderKL"]), INDEX, "vae", "'../x.AutoencoderKL'"
    ),
    case(
        "another part's class",
        "sd",
        change(INDEX, vae=["transformers", "CLIPTextModel"]),
        INDEX,
        "vae",
        "CLIPTextModel",
    ),
    case("class of config and index differ", "sd", change(CONFIG, _class_name="UNet2DModel"), CONFIG, "'UNet2DModel'"),
    case(
        "unsafe safety checker", "sd", change(INDEX, safety_checker=["os", "system"]), "safety_checker", "'os.system'"
    ),
    case("three words", "sd", change(INDEX, unet=["a", "b", "c"]), INDEX, "unet"),
    case("a number as class", "sd", change(INDEX, unet=["diffusers", 3]), INDEX, "unet"),
    case("text encoder is another", "sd", change(TEXT, architectures=["T5EncoderModel"]), TEXT, "architectures"),
    case(
        "Flux", "sd", change(INDEX, _class_name="FluxPipeline"), "class 'FluxPipeline' is not supported", "DDPMPipeline"
    ),
    case("SD3", "sd", change(INDEX, _class_name="StableDiffusion3Pipeline"), "'StableDiffusion3Pipeline'"),
    case(
        "SDXL without its parts",
        "sd",
        change(INDEX, _class_name="StableDiffusionXLPipeline"),
        "text_encoder_2: is missing",
    ),
    case(
        "SDXL's UNet",
        "sd",
        change(CONFIG, addition_embed_type="text_time"),
        CONFIG,
        "addition_embed_type",
        "'text_time'",
    ),
    case("no class", "sd", change(INDEX, _class_name=...), INDEX, "_class_name"),
    case("class is a list", "sd", change(INDEX, _class_name=["StableDiffusionPipeline"]), INDEX, "_class_name"),
    case("part missing", "sd", change(INDEX, tokenizer=...), INDEX, "tokenizer", "missing"),
    case("wrong UNet for the pipeline", "ddpm", change(INDEX, _class_name="StableDiffusionPipeline"), INDEX, "missing"),
    case("other model than CLIP", "clip", change("config.json", model_type="altclip"), "model_type", "'altclip'"),
    case("CLIP as SigLIP", "clip", change("config.json", model_type="siglip"), "architectures", "'SiglipModel'"),
    # Code.
    case("auto_map", "sd", change(CONFIG, auto_map={"AutoModel": "model.Evil"}), CONFIG, "auto_map", "never run"),
    case("auto_map, text", "sd", change(TEXT, auto_map={"AutoModel": "model.Evil"}), TEXT, "auto_map", "never run"),
    case("padding past the table", "sd", change(TOKENIZER, pad_token="<pad>"), TOKENIZER, "pad_token", "'<pad>'"),
    case("no padding", "sd", change(TOKENIZER, pad_token=None), TOKENIZER, "pad_token", "None"),
    case("auto_map, tokenizer", "sd", change(TOKENIZER, auto_map={}), TOKENIZER, "auto_map", "never run"),
    case("auto_map, CLIP", "clip", inside("config.json", "vision_config", auto_map={}), "vision_config", "auto_map"),
    case("custom_pipeline", "sd", change(INDEX, custom_pipeline="model.py"), INDEX, "custom_pipeline", "never run"),
    case("trust_remote_code", "sd", change(INDEX, trust_remote_code=True), INDEX, "trust_remote_code", "never run"),
    case("code of the hub", "sd", change(TEXT, _attn_implementation_internal="x/y"), TEXT, "never run"),
    # Sizes.
    case("2^31 channels", "sd", change(CONFIG, in_channels=2**31), CONFIG, "in_channels", "2147483648"),
    case("negative channels", "sd", change(CONFIG, block_out_channels=[8, -16]), CONFIG, "block_out_channels", "-16"),
    case("no channels", "sd", change(VAE, latent_channels=0), VAE, "latent_channels"),
    case("4.5 channels", "sd", change(CONFIG, out_channels=4.5), CONFIG, "out_channels", "4.5"),
    case("10^6 layers", "sd", change(CONFIG, layers_per_block=10**6), CONFIG, "layers_per_block", "1000000"),
    case("10^6 layers of text", "sd", change(TEXT, num_hidden_layers=10**6), TEXT, "num_hidden_layers"),
    case("64 layers that are not there", "sd", change(CONFIG, layers_per_block=64), "resnets.63", "is missing"),
    case(
        "widths that are not there", "sd", change(CONFIG, block_out_channels=[8, 16000]), "16x16x3x3", "16000x16000x3x3"
    ),
    case("heads", "sd", change(CONFIG, attention_head_dim=3), CONFIG, "attention_head_dim", "divide"),
    case("head width", "ddpm", change(CONFIG, attention_head_dim=3), CONFIG, "attention_head_dim", "divide"),
    case("heads of text", "sd", change(TEXT, num_attention_heads=3), TEXT, "num_attention_heads", "divide"),
    case("groups", "sd", change(VAE, norm_num_groups=3), VAE, "norm_num_groups", "divide"),
    case("rows of blocks", "sd", change(CONFIG, up_block_types=["UpBlock2D"]), CONFIG, "up_block_types"),
    case("even kernel", "sd", change(CONFIG, conv_in_kernel=2), CONFIG, "conv_in_kernel: 2 is not 1 or 3 or 5 or 7"),
    case("extra inputs", "sd", change(CONFIG, in_channels=8), CONFIG, "in_channels is 8"),
    case("classes", "ddpm", change(CONFIG, num_class_embeds=1000), CONFIG, "num_class_embeds", "1000"),
    # The scheduler's own checks surface under its file's name.
    case(
        "betas reversed",
        "sd",
        change("scheduler/scheduler_config.json", beta_start=0.5),
        "scheduler_config.json",
        "beta",
    ),
    case("unknown prediction", "sd", change("scheduler/scheduler_config.json", prediction_type="banana"), "banana"),
    # Weights.
    case("weights absent", "sd", remove(UNET), UNET, "absent"),
    case("weights empty", "sd", write(UNET, ""), UNET, "0 bytes"),
    case("weights cut short", "sd", lambda f: os.truncate(f / UNET, 30_000), UNET, "bytes of weights"),
    case("header cut short", "sd", lambda f: os.truncate(f / UNET, 300), UNET, "300 bytes"),
    case("header of 2^63", "sd", write(UNET, struct.pack("<Q", 2**63) + b"{}"), UNET, "9223372036854775808"),
    case(
        "header of 200 MB",
        "sd",
        both(write(UNET, struct.pack("<Q", 2 * 10**8) + b"{"), sparse(UNET, 3 * 10**8)),
        UNET,
        "200000000",
    ),
    case("header a list", "sd", header(UNET, lambda c: b"[]"), UNET, "not a JSON object"),
    case("header not UTF-8", "sd", header(UNET, lambda c: b'{"\xff": 1}'), UNET, "UTF-8"),
    case("header of no tensors", "sd", header(UNET, lambda c: b"{}"), UNET, "0 tensors"),
    case(
        "header of 100,000 tensors",
        "sd",
        write(UNET, struct.pack("<Q", len(MANY)) + MANY.encode()),
        UNET,
        "100000 tensors",
    ),
    case("overlap", "sd", header(UNET, overlap), UNET, "gap or overlap"),
    case("gap", "sd", header(UNET, lambda c: c.pop("conv_in.weight") and c), UNET, "gap or overlap"),
    case("trailing bytes", "sd", header(UNET, lambda c: None, tail=b"\0" * 7), UNET, "bytes of weights"),
    case("repeated tensor", "sd", header(UNET, twice), UNET, "'conv_in.weight'", "twice"),
    case("2^60 numbers in none", "sd", entry(shape=[2**30, 2**30, 0]), UNET, "'conv_in.weight'"),
    case("size of 2^60", "sd", entry(shape=[2**60]), UNET, "shape"),
    case("negative size", "sd", entry(shape=[-8, 4, 3, 3]), UNET, "shape", "-8"),
    case("fractional size", "sd", entry(shape=[8.0, 4, 3, 3]), UNET, "shape"),
    case("BF16 for F32", "sd", entry(dtype="BF16"), UNET, "BF16", "1152 bytes"),
    case("unknown dtype", "sd", entry(dtype="F4"), UNET, "dtype", "'F4'"),
    case("dtype a list", "sd", entry(dtype=["F32"]), UNET, "dtype"),
    case("offsets of one", "sd", entry(data_offsets=[0]), UNET, "data_offsets"),
    case("offsets backwards", "sd", entry(data_offsets=[1152, 0]), UNET, "1152"),
    case("strange field", "sd", entry(device="cuda"), UNET, "'conv_in.weight'"),
    case("metadata of numbers", "sd", header(UNET, lambda c: c.update(__metadata__={"a": 1})), UNET, "__metadata__"),
    case("transposed", "sd", entry(shape=[3, 3, 4, 8]), UNET, "conv_in.weight", "3x3x4x8 (transposed)", "8x4x3x3"),
    case(
        "renamed and not",
        "ddpm",
        header(
            UNET,
            lambda c: c.update(
                {"down_blocks.1.attentions.0.query.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
            ),
        ),
        UNET,
        "query.weight",
        "twice",
    ),
    # Pickles.
    case(
        ".bin",
        "sd",
        rename(UNET, "unet/diffusion_pytorch_model.bin"),
        "'diffusion_pytorch_model.bin' is refused",
        "save_pretrained",
    ),
    case(".ckpt", "sd", rename(UNET, "unet/model.ckpt"), "'model.ckpt' is refused"),
    case("pickle under another name", "sd", write(UNET, b"\x80\x02}q\x00." * 99), UNET, "pickle"),
    case("zip under another name", "sd", write(UNET, b"PK\x03\x04" * 99), UNET, "pickle or archive"),
    case("variant only", "sd", rename(UNET, UNET.replace(".saf", ".fp16.saf")), "variant", ".fp16.safetensors"),
    # Shards.
    case(
        "shard outside",
        "sd",
        sharded(conv_in__weight="../../x.safetensors"),
        "index.json",
        "'conv_in.weight'",
        "../../x",
    ),
    case("shard of another kind", "sd", sharded(conv_in__weight="x.bin"), "index.json", "'x.bin'"),
    case("shard absent", "sd", sharded(conv_in__weight="two.safetensors"), "two.safetensors", "absent"),
    case("shard that holds less", "sd", sharded(extra__weight="shard.safetensors"), "index.json", "'extra.weight'"),
    case(
        "shard that holds more",
        "sd",
        sharded(conv_in__weight=""),
        "index.json",
        "'conv_in.weight'",
        "not in weight_map",
    ),
    case(
        "shard that is a loop", "sd", both(sharded(), link("unet/shard.safetensors", "shard.safetensors")), "leads back"
    ),
    case(
        "single file and shards",
        "sd",
        both(sharded(), lambda f: shutil.copy(f / "unet/shard.safetensors", f / UNET)),
        "both there",
    ),
    # Tokenizer.
    case("no tokenizer", "sd", remove(TOKENS), TOKENS, "absent", "vocab.json"),
    case("tokenizer of 1 GB", "sd", sparse(TOKENS, 2**30), TOKENS, "1073741824 bytes"),
    case("tokenizer not UTF-8", "sd", write(TOKENS, b'{"model": "\xff"}'), TOKENS, "UTF-8"),
    case("tokenizer not BPE", "sd", inside(TOKENS, "model", type="Unigram"), TOKENS, "BPE"),
    case("token too many", "sd", inside(TOKENS, "model", "vocab", more=5000), TOKENS, "5001 tokens", "4096"),
    case("token twice", "sd", inside(TOKENS, "model", "vocab", more=7), TOKENS, "'more'", "id 7"),
    case("token id a text", "sd", inside(TOKENS, "model", "vocab", more="7"), TOKENS, "'more'"),
    case("merge of nothing", "sd", inside(TOKENS, "model", merges=[["qqq", "zzz"]]), TOKENS, "merge 0", "'qqq'"),
    case(
        "vocabulary of another", "sd", slow_tokenizer(lambda v: {k: i for k, i in v.items() if i < 2000}), "merges.txt"
    ),
    case("no merges", "sd", both(slow_tokenizer(), remove("tokenizer/merges.txt")), "merges.txt", "absent"),
    case("merge twice", "sd", slow_tokenizer(merges="i n\n"), "merges.txt", "'i n'", "twice"),
    case("merge of three", "sd", slow_tokenizer(merges="a b c\n"), "merges.txt", "two tokens"),
    case("vocabulary a list", "sd", both(slow_tokenizer(), write("tokenizer/vocab.json", "[]")), "vocab.json"),
    case("id twice", "sd", slow_tokenizer(lambda v: {**v, "more": 0}), "vocab.json", "'more'", "id 0"),
    case("table of another model", "sd", change(TEXT, vocab_size=49408), "4096 tokens", "49408"),
    # Parts that do not fit each other.
    case("text width", "sd", change(TEXT, hidden_size=32), CONFIG, "cross_attention_dim: 16", TEXT, "hidden_size 32"),
    case("latent channels", "sd", change(VAE, latent_channels=8), CONFIG, "in_channels: 4", VAE, "latent_channels 8"),
    case(
        "VAE of another depth",
        "sd",
        change(
            VAE, block_out_channels=[8], down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"]
        ),
        "vae",
        "encoder.conv_out.weight",
    ),
    case(
        "latents without a VAE", "ddpm", change(CONFIG, in_channels=4, out_channels=4), CONFIG, "in_channels", "no vae"
    ),
    case(
        "picture size", "clip", change("preprocessor_config.json", crop_size=8, do_center_crop=True), "crop_size", "16"
    ),
    # Files that are none.
    case("config a folder", "sd", both(remove(CONFIG), lambda f: (f / CONFIG).mkdir()), CONFIG, "a folder"),
    case("config a pipe", "sd", fifo(CONFIG), CONFIG, "pipe"),
    case("weights a pipe", "sd", fifo(UNET), UNET, "pipe"),
    case("config endless", "sd", link(CONFIG, "/dev/zero"), CONFIG, "device"),
    case("weights endless", "sd", link(UNET, "/dev/zero"), UNET, "device"),
    case("config a loop", "sd", link(CONFIG, "config.json"), CONFIG, "leads back"),
    case("weights a loop", "sd", link(UNET, "diffusion_pytorch_model.safetensors"), UNET, "leads back"),
    case("broken link", "sd", link(UNET, "nowhere"), UNET, "absent"),
]

JUDGE = """
import json, re, sys
from pathlib import Path
from genkit.components import inspect_model
def peak():
    status = Path("/proc/self/status")  # getrusage would count the parent's peak as ours
    return int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) if status.exists() else 0
start, found = peak(), {}
for name, folder in json.load(sys.stdin).items():
    try:
        found[name] = "accepted", inspect_model(folder).kind
    except Exception as error:
        found[name] = type(error).__name__, str(error)
loaded = [m for m in ("torch", "diffusers", "transformers", "huggingface_hub", "safetensors") if m in sys.modules]
print(json.dumps({"found": found, "loaded": loaded, "grown_mb": (peak() - start) // 1024}))
"""


@dataclasses.dataclass(frozen=True)
class Verdicts:
    folder: Path
    found: dict[str, tuple[str, str]]
    loaded: list[str]
    grown_mb: int


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verdicts]:
    """What a process of its own, without torch, says of every broken folder, and of each whole one."""
    top = tmp_path_factory.mktemp("refused")
    whole = {name: maker(top / f"whole-{name}") for name, maker in MAKERS.items()}
    for folder in whole.values():
        for file in ("model.py", "__init__.py", "pipeline.py", "unet/unet.py", "unet/__init__.py", "sitecustomize.py"):
            if (folder / file).parent.is_dir():
                (folder / file).write_text(CANARY)
    folders = {name: str(folder) for name, folder in whole.items()}
    for number, c in enumerate(CASES):
        folder = top / f"{number:03d}"
        shutil.copytree(whole[c.model], folder)
        c.harm(folder)
        folders[c.name] = str(folder)
    assert len(folders) == len(CASES) + len(MAKERS), "two cases of one name"
    result = subprocess.run(
        [sys.executable, "-c", JUDGE],
        input=json.dumps(folders),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    yield Verdicts(top, {k: tuple(v) for k, v in answer["found"].items()}, answer["loaded"], answer["grown_mb"])
    shutil.rmtree(top, ignore_errors=True)


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_refused_in_one_line(verdicts: Verdicts, c: Case) -> None:
    kind, message = verdicts.found[c.name]
    assert kind == "InputError", message
    assert "\n" not in message and len(message) < 700
    for word in c.words:
        assert word in message


@pytest.mark.parametrize(("name", "kind"), [("sd", "text-to-image"), ("ddpm", "unconditional"), ("clip", "clip")])
def test_whole_folders_are_accepted(verdicts: Verdicts, name: str, kind: str) -> None:
    assert verdicts.found[name] == ("accepted", kind)


def test_nothing_of_a_folder_is_run(verdicts: Verdicts) -> None:
    assert list(verdicts.folder.rglob("*.py")) and not list(verdicts.folder.rglob("RAN"))
    assert not list(verdicts.folder.rglob("__pycache__"))


def test_checks_need_neither_torch_nor_memory(verdicts: Verdicts) -> None:
    assert verdicts.loaded == []
    assert verdicts.grown_mb < 100


NAMES = [
    ("emojii", "did you mean 'emoji'"),
    ("emoji_clip", "did you mean 'emoji-clip'"),
    ("", "''"),
    ("a\0b", "\\x00"),
    ("no/such/folder", "no such folder"),
    ("../x", "no such folder"),
    ("owner/../x", "no such folder"),
    ("https://example.org/model", "no such folder"),
    ("a/" + "b" * 300, "no such folder"),
    ("\n", "no such folder"),
]


@pytest.mark.parametrize(("name", "words"), NAMES, ids=lambda v: ascii(v)[:20])
def test_names_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        inspect_model(name)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_is_never_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        inspect_model(Path("emoji"))


@pytest.mark.parametrize("file", ["model.ckpt", "model.pt", "model.bin", "model.pkl"])
def test_a_pickle_for_a_model(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(InputError, match="is refused: weights that unpickle can run code"):
        inspect_model(tmp_path / file)


@pytest.mark.parametrize("variant", ["../x", "", "a b", "x" * 40, "fp16\n"])
def test_a_variant_is_a_word(variant: str) -> None:
    with pytest.raises(InputError, match="variant"):
        inspect_model("emoji", variant=variant)


def test_a_variant_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"fp16.safetensors: is absent: no variant 'fp16' here, only"):
        inspect_model("emoji", variant="fp16")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take the part of someone who may not read")
@pytest.mark.parametrize("file", [CONFIG, UNET, TOKENS, "."])
def test_unreadable(file: str) -> None:
    folder = Path(tempfile.mkdtemp())  # not under tmp_path, whose parents are closed to others
    tiny_stable_diffusion(folder)
    folder.chmod(0o755)
    (folder / file).chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(InputError, match="cannot be read"):
            inspect_model(folder)
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)
