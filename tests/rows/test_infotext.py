"""Settings read from pictures and infotext of other tools, field by field; what is damaged or lacking is told."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

from genkit import InputError, Request
from genkit.pictures import written
from genkit.pictures.encoders import encoding
from genkit.pictures.metadata import Origin, texts
from genkit.rows.comfyui import read_graph
from genkit.rows.found import Found
from genkit.rows.infotext import pairs, read_infotext, read_picture_settings
from genkit.rows.invokeai import read_dream
from genkit.rows.plans import NAMED, scheduler_options
from genkit.rows.records import read_record
from genkit.rows.request import canonical
from genkit.rows.result import Result
from genkit.runs.writers import texts_of
from genkit.schedulers import SOLVERS

KARRAS = {"solver": "dpmpp_2m", "spacing": "karras"}
PIXELS = np.zeros((48, 64, 3), np.uint8)

# As AUTOMATIC1111 writes them, of 2022 to 1.10 and Forge: (text, fields, part of about, lacking).
INFOTEXTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "2022": (
        "girl with an artist's beret, ((eyeshadow)), detailed, intricate\n"
        "Negative prompt: ugly, fat, (((deformed))), [blurry]\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: 45dee52b",
        {
            "prompt": "girl with an artist's beret, ((eyeshadow)), detailed, intricate",
            "negative_prompt": "ugly, fat, (((deformed))), [blurry]", "num_inference_steps": 20,
            "guidance_scale": 7.0, "seed": 965400086, "width": 512, "height": 512, "scheduler": "euler_ancestral",
        },
        {"model_hash": "45dee52b"},
        (),
    ),
    "schedule-in-name": (
        "1 girl\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 0, Size: 512x512, Model hash: dfe73aa42d, "
        "Model: LEOSAM_HelloWorld_新世界_v3.2, Denoising strength: 0.7, Hires upscale: 2, Hires upscaler: Latent, "
        "Version: 1.8.0-RC",
        {
            "prompt": "1 girl", "num_inference_steps": 20, "guidance_scale": 7.0, "seed": 0, "width": 512,
            "height": 512, "scheduler": KARRAS,
        },
        {"model": "LEOSAM_HelloWorld_新世界_v3.2", "version": "1.8.0-RC"},
        ("hires fix",),
    ),
    "1.9-lora": (
        "1girl on a stage.,, <lora:LCM_15:1>\nNegative prompt: MajicNegative_V2,badhandv4,\n"
        "Steps: 6, Sampler: LCM, Schedule type: Automatic, CFG scale: 1.5, Seed: 3748719078, Size: 768x1024, "
        "Model hash: 19bbe9faa4, Model: fantasticmix_k2, VAE hash: 07af11b95c, VAE: vae-ft-mse.safetensors, "
        'Clip skip: 2, Lora hashes: "LCM_15: aaebf6360f7d, ip-adapter: a95a0f4bdcb9", '
        'TI hashes: "MajicNegative_V2: a53884ef726b", Downcast alphas_cumprod: True, Version: v1.9.4',
        {
            "prompt": "1girl on a stage.,, <lora:LCM_15:1>", "negative_prompt": "MajicNegative_V2,badhandv4,",
            "num_inference_steps": 6, "guidance_scale": 1.5, "seed": 3748719078, "width": 768, "height": 1024,
            "scheduler": "lcm", "clip_skip": 2,
        },
        {
            "lora_hashes": {"LCM_15": "aaebf6360f7d", "ip-adapter": "a95a0f4bdcb9"}, "vae": "vae-ft-mse.safetensors",
            "ti_hashes": {"MajicNegative_V2": "a53884ef726b"}, "vae_hash": "07af11b95c",
        },
        (),
    ),
    "img2img": (
        "perfume bottle in sand\nNegative prompt: incomplete figures\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 8, Seed: 1659960289, Size: 984x1264, "
        "Model hash: b513c6287d, Model: realism_engine, Denoising strength: 0.91, Mask blur: 2, Version: v1.9.4",
        {
            "prompt": "perfume bottle in sand", "negative_prompt": "incomplete figures", "num_inference_steps": 20,
            "guidance_scale": 8.0, "seed": 1659960289, "width": 984, "height": 1264, "scheduler": KARRAS,
            "strength": 0.91,
        },
        {"model": "realism_engine"},
        ("image", "mask_image"),
    ),
    "lines-and-quotes": (
        'a sign saying "Steps: 3, open",\nred: light, Size: big\n\nlast\nNegative prompt: text,\nblurry: 1\n'
        "Steps: 30, Sampler: Euler, Schedule type: SGM Uniform, CFG scale: 7.5, Seed: 5, Size: 640x512, "
        'Model: "my, model: \\"v2\\" \\\\ x", Hires prompt: "1girl, ...\\nmore", Hires upscale: 1.5, Version: f2.0.1',
        {
            "prompt": 'a sign saying "Steps: 3, open",\nred: light, Size: big\n\nlast',
            "negative_prompt": "text,\nblurry: 1", "num_inference_steps": 30, "guidance_scale": 7.5, "seed": 5,
            "width": 640, "height": 512, "scheduler": {"solver": "euler", "spacing": "trailing"},
        },
        {"model": 'my, model: "v2" \\ x'},
        ("hires fix",),
    ),
    "variation": (
        "lake ness monster\nSteps: 50, Sampler: DDIM, CFG scale: 7, Seed: 76682, Size: 512x512, Model hash: 38b5677b, "
        "Variation seed: 458188939, Variation seed strength: 0.06, Face restoration: CodeFormer, ENSD: 31337",
        {
            "prompt": "lake ness monster", "num_inference_steps": 50, "guidance_scale": 7.0, "seed": 76682,
            "width": 512, "height": 512, "scheduler": "ddim",
        },
        {},
        ("variation seed", "face restoration", "ENSD"),
    ),
    "controlnet": (
        "a house\nSteps: 25, Sampler: UniPC, CFG scale: 6, Seed: -1, Size: 512x512, "
        'ControlNet 0: "Module: canny, Model: control_v11p [d14c016b], Weight: 1", Version: v1.6.0',
        {
            "prompt": "a house", "num_inference_steps": 25, "guidance_scale": 6.0, "seed": -1, "width": 512,
            "height": 512, "scheduler": "unipc",
        },
        {},
        ("ControlNet",),
    ),
    "first-pass": (
        "a castle\nSteps: 20, Sampler: PLMS, CFG scale: 7, Seed: 1, Size: 1024x1024, Model hash: 7460a6fa, "
        "Denoising strength: 0.7, First pass size: 512x640",
        {
            "prompt": "a castle", "num_inference_steps": 20, "guidance_scale": 7.0, "seed": 1, "width": 512,
            "height": 640, "scheduler": "pndm",
        },
        {},
        ("hires fix",),
    ),
    "other-sampler": (
        "Negative prompt: x\nSteps: 20, Sampler: DPM adaptive, Schedule type: Karras, CFG scale: 7, Seed: 2, "
        "Size: 512x512, RNG: CPU, Model: a, Version: v1.10.1",
        {
            "negative_prompt": "x", "num_inference_steps": 20, "guidance_scale": 7.0, "seed": 2, "width": 512,
            "height": 512,
        },
        {"sampler": "DPM adaptive"},
        ("sampler 'DPM adaptive'",),
    ),
    "civitai": (
        "cat\nSteps: 30, Sampler: DPM++ 3M SDE, Schedule type: KL Optimal, CFG scale: 5, Seed: 2480865251, "
        'Size: 1152x896, Hashes: {"model": "c379", "lora:x": "b4, 6"}, Civitai resources: [{"weight": 1, "a": ","}], '
        "dynthres_enabled: True\nTemplate: cat",
        {
            "prompt": "cat", "num_inference_steps": 30, "guidance_scale": 5.0, "seed": 2480865251, "width": 1152,
            "height": 896, "scheduler": "sde-dpmpp_3m",
        },
        {},
        ("schedule 'KL Optimal'", "dynamic thresholding"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INFOTEXTS)
def test_infotext_field_by_field(name: str) -> None:
    text, fields, about, lacking = INFOTEXTS[name]
    found = read_infotext(text)
    assert found.fields == fields
    assert about.items() <= found.about.items()
    assert found.lacking == lacking
    assert all("\n" not in note for note in found.notes)
    if "strength" not in fields:
        Request(**canonical(found.fields))


def test_what_was_assumed_is_told() -> None:
    def notes(settings: str) -> str:
        return " ".join(read_infotext(f"a\nSteps: 20, Sampler: Euler, Seed: 1{settings}").notes)

    assert "drawn on a GPU" in notes("") and "GPU" not in notes(", RNG: CPU")
    assert "not used: 'Foo bar: 3'" in notes(", Foo bar: 3")
    assert "lines below" in notes("\nTemplate: x")
    assert "modulo" in notes("99999999999")
    assert "prompt alone" in read_infotext("a cat, blue: sky, red: roof, x: y").notes[0]
    assert read_infotext("a cat").fields == {"prompt": "a cat"}


def test_genkits_own_infotext_is_read_alike() -> None:
    request = Request(prompt="a,\nb", num_inference_steps=9, scheduler=KARRAS, guidance_scale=7.5)
    text = texts(request.to_json(), drawn().to_json(), Origin("my, model: 2", "0.1.0"))["parameters"]
    found = read_infotext(text)
    assert found.fields == {
        "prompt": "a,\nb", "num_inference_steps": 20, "scheduler": KARRAS, "guidance_scale": 7.5, "seed": 9,
        "width": 64, "height": 48,
    }  # fmt: skip
    assert (found.about["model"], found.about["version"], found.notes) == ("my, model: 2", "genkit 0.1.0", ())


ODD = (
    "a fox", 'a sign: "Steps: 3, open", 7:30', "one,\ntwo\n\nthree", "C:\\fox \\(x\\) {a|b} (b:1.2)", "日本, 🦊 — ‘x’",
    "<lora:x:1> is text", 'ends with a quote"', "a, b: c, d: e, f: g",
)  # fmt: skip


@pytest.mark.parametrize("prompt", ODD)
def test_what_genkit_writes_is_read_back(prompt: str, tmp_path: Path) -> None:
    """Both texts: the infotext alone, as it survives a site that drops the record, and the record."""
    schedulers: list[Any] = [
        *SOLVERS, "dpmpp_2m_karras", "tuned", {"spacing": "karras"}, {"solver": "ddim", "eta": 0.3, "spacing": "beta"},
        *({"solver": "euler", "spacing": spacing} for spacing in NAMED if spacing != "lcm"),
        {"solver": "euler", "timesteps": [900, 500, 100]},
    ]  # fmt: skip
    loras = []
    for name in ("style, v2", "b"):
        save_file({"x": np.zeros(3, np.float32)}, tmp_path / f"{name}.safetensors")
        loras.append({"file": str(tmp_path / f"{name}.safetensors"), "weight": 0.75, "text_weight": -0.5})
    loras[1]["text_weight"] = loras[1]["weight"] = 1e-05
    for n, scheduler in enumerate(schedulers):
        row = Request(
            id="a", prompt=prompt, negative_prompt=ODD[n % len(ODD)], num_inference_steps=20, guidance_scale=1.2345678,
            scheduler=scheduler, width=64, height=48, seed=9, loras=loras[1:] if n % 2 else None,
            guidance_interval=[None, [0.1, 0.75], {"sigma": [0.3, 5]}][n % 3],
        )  # fmt: skip
        text = texts_of(row, drawn(fingerprint=row.fingerprint()), Origin("my, model: 2.safetensors", "0.1.0", "euler"))
        found = read_infotext(text["parameters"])
        back = Request(**canonical({**found.fields, "id": "a"}))
        assert (back.prompt, back.negative_prompt, back.seed) == (row.prompt, row.negative_prompt, 9)
        assert (back.guidance_scale, back.width, back.height) == (row.guidance_scale, 64, 48)
        assert back.guidance_interval == row.guidance_interval
        assert [{**lora, "file": str(tmp_path / lora["file"])} for lora in back.loras or ()] == (row.loras or [])
        if scheduler == "tuned":
            assert back.scheduler == "tuned"
        else:
            own = {"solver": "euler"}
            assert scheduler_options(back.scheduler or {}) == {**own, **scheduler_options(scheduler)}, text[
                "parameters"
            ]
        assert found.lacking == () and found.notes == () and found.about["model"] == "my, model: 2"
        record = read_record(text["genkit"])
        assert {**record.fields, "loras": None} == {**row.to_json(), "loras": None}


def test_fields_without_words_in_infotext_travel_as_json() -> None:
    for value, fields, lacking in (("b, c", {"later": "b, c"}, ()), ("x" * 3000, {}, ("row",))):
        request = {**Request(prompt="a", keep=1, meta={"k": 1}).to_json(), "later": value}
        found = read_infotext(texts(request, drawn().to_json(), Origin("m", "0.1.0", "ddim"))["parameters"])
        assert {k: v for k, v in found.fields.items() if k in ("later", "keep", "meta")} == fields
        assert found.lacking == lacking


def test_hashes_as_model_sites_know_them(tmp_path: Path) -> None:
    """AutoV2 of the model and the VAE, AutoV3 of LoRAs and textual inversions."""
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "style.safetensors", {"a": "b"})
    data = (tmp_path / "style.safetensors").read_bytes()
    own = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    origin = Origin(
        "dream.safetensors", "0.1.0", "pndm", weights={"checkpoint": "ab" * 32, "vae/v.safetensors": "cd" * 32},
        vae="v.safetensors",
    )  # fmt: skip
    row = Request(prompt="a", loras=[{"file": str(tmp_path / "style.safetensors"), "weight": 0.8}])
    text = texts(row.to_json(), drawn().to_json(), origin, learned={"ugly": "ef" * 32, "fox": "01" * 32})
    assert text["parameters"] == (
        "a <lora:style:0.8>\nSteps: 20, Sampler: PLMS, Seed: 9, Size: 64x48, Model hash: ababababab, Model: dream, "
        f'VAE hash: cdcdcdcdcd, VAE: v.safetensors, Lora hashes: "style: {own[:12]}", '
        'TI hashes: "ugly: efefefefefef, fox: 010101010101", Version: genkit 0.1.0'
    )
    about = read_infotext(text["parameters"]).about
    assert about["lora_hashes"] == {"style": own[:12]} and about["ti_hashes"]["fox"] == "0101" * 3
    assert (about["model_hash"], about["vae_hash"], about["vae"]) == ("ab" * 5, "cd" * 5, "v.safetensors")
    record = json.loads(text["genkit"])
    assert record["inputs"] == {"style.safetensors": hashlib.sha256(data).hexdigest()}
    assert record["weights"] == origin.weights and str(tmp_path) not in str(text)


@pytest.mark.parametrize(
    ("text", "message"),
    {
        " \n": "the infotext is empty",
        "a\nSteps: 2, Sampler: Euler, Seed: x1": "seed: 'x1' is not a whole number",
        "a\nSteps: 20, Sampler: Euler, CFG scale: seven, Seed: 1": "guidance_scale: 'seven' is not a number",
        "a\nSteps: 20, Sampler: Euler, Seed: 1, Size: big": "size: 'big' is not like 512x768",
        "a\nSteps: 20, Sampler: Euler, Seed: 1, Clip skip: two": "clip_skip: 'two' is not a whole number",
        "a\nSteps: 20, Sampler: DPM++ 2M Karras, Schedule type: Exponential, Seed: 1": "two schedules of noise",
    }.items(),
)
def test_bad_values(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        read_infotext(text)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line", [",:" * 20_000, 'a: "' * 10_000, "a: [" * 10_000, "a" * 50_000, "a: {" + "[" * 50_000, " ," * 30_000]
)
def test_hostile_lines_are_split_in_time(line: str) -> None:
    pairs(line)
    read_infotext(f"x\nSteps: 1, Sampler: Euler, Seed: 1, {line}")
    assert read_dream(f"a fox{' ' * 200_000}-S 3 {line}").fields["seed"] == 3


# -- ComfyUI -----------------------------------------------------------------------------------------------------------


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def sd15(**sampler: Any) -> dict[str, Any]:
    """The default graph of ComfyUI."""
    settings = {
        "seed": 156680208700286, "steps": 20, "cfg": 8, "sampler_name": "euler", "scheduler": "normal", "denoise": 1,
        "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0], **sampler,
    }  # fmt: skip
    return {
        "3": node("KSampler", **settings),
        "4": node("CheckpointLoaderSimple", ckpt_name="SD1.5\\v1-5-pruned-emaonly.ckpt"),
        "5": node("EmptyLatentImage", width=512, height=768, batch_size=1),
        "6": node("CLIPTextEncode", text="beautiful scenery, purple galaxy bottle", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="text, watermark", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
    }


def sdxl() -> dict[str, Any]:
    """Two LoRAs, one on the network alone, a clip layer, a seed from a node, a second pass, a VAE of its own."""
    graph = sd15(model=["11", 0], seed=["13", 0], sampler_name="dpmpp_2m", scheduler="karras", cfg=6.5)
    encode = {"width": 1024, "height": 1024, "crop_w": 0, "crop_h": 0, "target_width": 1024, "target_height": 1024}
    return graph | {
        "4": node("CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors"),
        "5": node("EmptyLatentImage", width=1024, height=["14", 0], batch_size=2),
        "6": node("CLIPTextEncodeSDXL", text_g="a fox", text_l="a fox", clip=["12", 0], **encode),
        "7": node("CLIPTextEncodeSDXL", text_g="blurry", text_l="blurry", clip=["12", 0], **encode),
        "10": node(
            "LoraLoader", lora_name="xl/style.safetensors", strength_model=0.8, strength_clip=0.6, model=["4", 0],
            clip=["4", 1],
        ),
        "11": node("LoraLoaderModelOnly", lora_name="detail.safetensors", strength_model=1, model=["10", 0]),
        "12": node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["10", 1]),
        "13": node("PrimitiveInt", value=42),
        "14": node("PrimitiveInt", value=1024),
        "15": node("VAELoader", vae_name="sdxl_vae.safetensors"),
        "16": node("LatentUpscaleBy", samples=["3", 0], scale_by=1.5),
        "17": node("KSampler", **{**graph["3"]["inputs"], "latent_image": ["16", 0], "denoise": 0.5}),
    }  # fmt: skip


def test_the_default_graph() -> None:
    found = read_graph(sd15())
    assert found.fields == {
        "prompt": "beautiful scenery, purple galaxy bottle", "negative_prompt": "text, watermark",
        "seed": 156680208700286 % 2**32, "num_inference_steps": 20, "guidance_scale": 8.0, "width": 512,
        "height": 768, "scheduler": "euler",
    }  # fmt: skip
    assert found.about == {"form": "comfyui", "model": "v1-5-pruned-emaonly.ckpt"}
    assert found.lacking == () and "modulo" in found.notes[0]


def test_a_graph_of_sdxl_with_loras() -> None:
    found = read_graph(sdxl())
    assert found.fields == {
        "prompt": "a fox", "negative_prompt": "blurry", "seed": 42, "num_inference_steps": 20, "guidance_scale": 6.5,
        "width": 1024, "height": 1024, "scheduler": KARRAS, "clip_skip": 2,
        "loras": [
            {"file": "style.safetensors", "weight": 0.8, "text_weight": 0.6},
            {"file": "detail.safetensors", "weight": 1.0, "text_weight": 0.0},
        ],
    }  # fmt: skip
    assert found.about == {
        "form": "comfyui", "model": "sd_xl_base_1.0.safetensors", "vae": "sdxl_vae.safetensors",
        "batch_size": 2,
    }  # fmt: skip
    assert found.lacking == ("second pass",)
    Request(**canonical(found.fields))


def test_two_prompts_and_sizes_of_sdxl() -> None:
    graph = sdxl()
    graph["6"]["inputs"] |= {"text_g": "ink drawing", "crop_h": 128, "width": 2048, "target_height": 768}
    fields = read_graph(graph).fields
    assert (fields["prompt"], fields["prompt_2"], fields["negative_prompt"]) == ("a fox", "ink drawing", "blurry")
    assert "negative_prompt_2" not in fields
    assert (fields["original_size"], fields["crop"], fields["target_size"]) == ([2048, 1024], [0, 128], [1024, 768])
    negative = [fields[f"negative_{name}"] for name in ("original_size", "crop", "target_size")]
    assert negative == [[1024, 1024], [0, 0], [1024, 1024]]
    Request(**canonical(fields))
    graph["6"]["inputs"]["text_l"] = ""
    assert "two prompts" in read_graph(graph).lacking
    for node_ in ("6", "7"):
        graph[node_]["inputs"] |= {
            "width": 512,
            "height": 512,
            "crop_h": 0,
            "target_width": 1024,
            "target_height": 1024,
        }
    assert not any(name.startswith("negative_o") for name in read_graph(graph).fields)


def test_image_to_image_and_parts_of_the_steps() -> None:
    graph = sd15(denoise=0.5, latent_image=["20", 0])
    graph |= {"20": node("VAEEncode", pixels=["21", 0], vae=["4", 2]), "21": node("LoadImage", image="in/cat.png")}
    found = read_graph(graph)
    assert (found.fields["num_inference_steps"], found.fields["strength"], found.lacking) == (40, 0.5, ("image",))
    advanced = sd15(noise_seed=5, start_at_step=0, end_at_step=10000, add_noise="enable")
    advanced["3"]["class_type"] = "KSamplerAdvanced"
    del advanced["3"]["inputs"]["seed"], advanced["3"]["inputs"]["denoise"]
    found = read_graph(advanced)
    assert (found.fields["seed"], found.lacking) == (5, ())
    advanced["3"]["inputs"]["end_at_step"] = 10
    assert read_graph(advanced).lacking == ("part of the steps",)
    control = sd15(positive=["30", 0], negative=["30", 1])
    control["30"] = node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], strength=1)
    found = read_graph(control)
    assert (found.fields["negative_prompt"], found.lacking) == ("text, watermark", ("ControlNet",))
    assert found.about["controls"] == [{"weight": 1.0}]
    control["30"]["inputs"] |= {"strength": 0.6, "start_percent": 0.0, "end_percent": 0.5}
    found = read_graph(control)
    assert found.about["controls"] == [{"weight": 0.6, "start": 0.0, "end": 0.5}]
    assert any("parts of the noise schedule" in note for note in found.notes)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({"nodes": [], "links": []}, "workflow of ComfyUI's editor"),
        ({}, "has 0 nodes"),
        ({"3": 1}, "node '3': has no class_type"),
        ({"3": {"class_type": "KSampler"}}, "inputs: None is not an object"),
        ({"3": node("SamplerCustomAdvanced")}, "it samples with 'SamplerCustomAdvanced', which is not read"),
        (sd15(positive=["6"]), "is not a link to a node"),
        (sd15(positive=["60", 0]), "links to a node that the graph lacks"),
        (sd15(positive="a cat"), "prompt: comes from nothing that is read"),
        (sd15(latent_image=["3", 0]), "latent_image comes from nothing that is read"),
        (sd15(seed=["6", 0], steps=["4", 0]), "seed: 'beautiful scenery"),
        (sd15(steps=["4", 0]), "node '3' (KSampler): steps comes from node '4' (CheckpointLoaderSimple)"),
        (sd15(steps=2.5), "num_inference_steps: 2.5 is not a whole number"),
        (sd15(cfg=True), "guidance_scale: True is not a number"),
        (sd15(sampler_name=3), "scheduler: 3 is not the name of a sampler"),
        (sd15() | {"6": node("ConditioningCombine")}, "combined prompts are not read"),
        (sd15() | {"6": node("CLIPTextEncode", text=["6", 0])}, "which is not read"),
        (sd15() | {"6": node("CLIPTextEncode", text=3)}, "prompt: 3 is not text"),
        (sd15() | {"30": sd15()["3"]}, "has 2 samplers that start a picture"),
        (
            sd15(model=["10", 0]) | {"10": node("LoraLoader", lora_name="..", strength_model=1)},
            "not the name of a file",
        ),
    ],
)
def test_graphs_that_are_refused(graph: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        read_graph(graph)
    assert message in str(error.value) and "\n" not in str(error.value)


# -- pictures ----------------------------------------------------------------------------------------------------------


def drawn(**fields: Any) -> Result:
    return Result("fox", 2, 9, width=64, height=48, steps=20, nfe=40, **{"fingerprint": "ab", **fields})


def png(folder: Path, packed: bool = False, **chunks: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for key, text in chunks.items():
        info.add_text(key.replace("_META", "-metadata"), text, zip=packed)
    Image.fromarray(PIXELS).save(folder / "a.png", pnginfo=info)
    return folder / "a.png"


@pytest.mark.parametrize("name", ["png", "jpeg", "webp", "jxl"])
def test_a_picture_of_genkit_comes_back_as_its_row(name: str, tmp_path: Path) -> None:
    if name == "jxl":
        pytest.importorskip("pillow_jxl")
    request = Request(
        id="fox", prompt="a fox,\n日本 \u2028 <b>", negative_prompt="text", num_images=4, num_inference_steps=20,
        seed=7, guidance_scale=7.0, scheduler=KARRAS, meta={"a": [1, None]}, keep=2, gate="clip > 0.2",
    )  # fmt: skip
    text = texts(request.to_json(), drawn().to_json(), Origin("emoji", "0.1.0"))
    (tmp_path / "a").write_bytes(encoding(name).encode(PIXELS, text))
    found = read_picture_settings(tmp_path / "a")
    assert Request(**canonical(found.fields)) == request
    assert found.about == {
        "form": "genkit", "model": "emoji", "version": "0.1.0", "id": "fox", "index": 2, "seed": 9, "steps": 20,
        "width": 64, "height": 48, "fingerprint": "ab",
    }  # fmt: skip
    assert (found.notes, found.lacking) == ((), ())
    del text["genkit"]
    (tmp_path / "a").write_bytes(encoding(name).encode(PIXELS, {"genkit": "", **text}))
    if name != "png":  # where the record is empty, the infotext beside it is read
        assert read_picture_settings(tmp_path / "a").fields["prompt"] == request.prompt


def test_a_record_that_was_cut_is_completed_from_the_infotext(tmp_path: Path) -> None:
    def back(**fields: Any) -> Found:
        request = Request(**fields)
        text = texts(request.to_json(), drawn().to_json(), Origin("m", "0.1.0"))
        (tmp_path / "a.png").write_bytes(encoding().encode(PIXELS, text))
        return read_picture_settings(tmp_path / "a.png")

    found = back(prompt="a fox " * 1000, meta={"x": "y" * 90_000})
    assert found.fields["prompt"] == ("a fox " * 1000).strip() and found.lacking == () and found.notes
    found = back(prompt="ab" * 40_000)
    assert "prompt" not in found.fields and found.lacking == ("prompt",)
    found = back(prompt="a", image="/home/me/x.png", strength=0.5)
    assert found.fields["image"] == "x.png" and found.lacking == ("image",)
    found = back(prompt="a", image=Image.fromarray(PIXELS))
    assert "image" not in found.fields and found.lacking == ("image",)


@pytest.mark.parametrize("kind", ["be", "le", "ascii", "none", "description"])
def test_infotext_in_exif_as_other_tools_write_it(kind: str, tmp_path: Path) -> None:
    text = "a 猫\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x48, Version: v1.9.4"
    exif = Image.Exif()
    if kind == "description":
        exif[0x010E] = text = text.replace("猫", "cat")
    else:
        code = {"be": "UNICODE\0", "le": "UNICODE\0", "ascii": "ASCII\0\0\0", "none": ""}[kind].encode()
        exif.get_ifd(0x8769)[0x9286] = code + text.encode(f"utf-16-{kind}" if kind in ("be", "le") else "utf-8")
    for suffix in ("jpg", "webp", "png"):
        Image.fromarray(PIXELS).save(tmp_path / f"a.{suffix}", exif=exif.tobytes())
        found = read_picture_settings(tmp_path / f"a.{suffix}")
        assert found.fields == read_infotext(text).fields, suffix


def test_pictures_of_comfyui(tmp_path: Path) -> None:
    graph = {**sd15(), "x": {**node("Note"), "is_changed": [float("nan")]}}  # as it writes it
    for packed in (False, True):
        path = png(tmp_path, packed, prompt=json.dumps(graph), workflow="{}")
        assert read_picture_settings(path) == read_graph(sd15())
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "workflow:{}", "prompt:" + json.dumps(sd15())
    Image.fromarray(PIXELS).save(tmp_path / "a.webp", exif=exif)
    assert read_picture_settings(tmp_path / "a.webp") == read_graph(sd15())


def test_pictures_of_invokeai(tmp_path: Path) -> None:
    model = {"key": "k", "hash": "blake3:ab", "name": "Dreamshaper 8", "base": "sd-1", "type": "main"}
    data = {
        "generation_mode": "txt2img", "positive_prompt": "a fox", "negative_prompt": "", "width": 512, "height": 640,
        "seed": 7, "rand_device": "cpu", "cfg_scale": 7.5, "cfg_rescale_multiplier": 0, "steps": 30,
        "scheduler": "dpmpp_2m_k", "clip_skip": 1, "model": model, "controlnets": [{"control_weight": 1}],
        "loras": [{"model": {**model, "name": "ink"}, "weight": 0.5}], "app_version": "5.6.0", "seamless_x": False,
    }  # fmt: skip
    found = read_picture_settings(png(tmp_path, invokeai_metadata=json.dumps(data)))
    assert found.fields == {
        "prompt": "a fox", "width": 512, "height": 640, "seed": 7, "guidance_scale": 7.5, "num_inference_steps": 30,
        "clip_skip": 2, "scheduler": KARRAS, "loras": [{"file": "ink.safetensors", "weight": 0.5, "text_weight": 0.5}],
    }  # fmt: skip
    assert found.about == {
        "form": "invokeai", "model": "Dreamshaper 8", "model_hash": "blake3:ab", "version": "5.6.0",
    }  # fmt: skip
    assert found.lacking == ("ControlNet",)
    data |= {"positive_style_prompt": "ink", "refiner_model": model}
    found = read_picture_settings(png(tmp_path, invokeai_metadata=json.dumps(data)))
    assert found.fields["prompt_2"] == "ink" and found.lacking == ("ControlNet", "refiner")
    assert "refiner: is an option of a run, --refiner; the row is without it" in found.notes
    image = {
        "prompt": [{"prompt": "a ((dog)) [blurry, text] running", "weight": 1.0}], "steps": 50, "cfg_scale": 7.5,
        "height": 512, "width": 512, "seed": 3561693215, "sampler": "k_lms", "type": "txt2img", "hires_fix": True,
        "variations": [], "postprocessing": None, "threshold": 0,
    }  # fmt: skip
    old = {"model_weights": "stable-diffusion-1.5", "model_hash": "cc6c", "app_version": "v2.2.0", "image": image}
    found = read_picture_settings(png(tmp_path, sd_META=json.dumps(old), Dream='"x" -s 3'))
    assert found.fields == {
        "prompt": "a ((dog))  running", "negative_prompt": "blurry, text", "num_inference_steps": 50,
        "guidance_scale": 7.5, "width": 512, "height": 512, "seed": 3561693215, "scheduler": "lms",
    }  # fmt: skip
    assert found.about["model"] == "stable-diffusion-1.5" and found.lacking == ("hires fix",)
    dream = '"Underwater -s city" -s 50 -S 916798825 -W512 -H 576 -C7.5 -A k_euler_a -G 0.8'
    found = read_picture_settings(png(tmp_path, Dream=dream))
    assert found.fields == {
        "prompt": "Underwater -s city", "num_inference_steps": 50, "seed": 916798825, "width": 512, "height": 576,
        "guidance_scale": 7.5, "scheduler": "euler_ancestral",
    }  # fmt: skip
    assert found.notes == ("not used: '-G 0.8'",)


def test_json_of_fields(tmp_path: Path) -> None:
    data = {"prompt": "a", "steps": 20, "guidance_scale": 7.5, "seed": 3, "scheduler": "DDIMScheduler", "foo": 1}
    data |= {"image": "/home/me/x.png", "width": None}
    found = read_picture_settings(png(tmp_path, parameters=json.dumps(data)))
    assert canonical(found.fields) == {
        "prompt": "a", "num_inference_steps": 20, "guidance_scale": 7.5, "seed": 3, "scheduler": "ddim",
        "image": "x.png",
    }  # fmt: skip
    assert found.notes[0] == "not used: 'foo: 1'" and found.lacking == ("image",)


def test_no_pixel_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = png(tmp_path, parameters="a\nSteps: 20, Sampler: Euler, Seed: 1")
    data = path.read_bytes()
    at = data.index(b"IHDR") + 4
    huge = struct.pack(">II", 200_000, 200_000) + data[at + 8 : at + 13]
    path.write_bytes(data[:at] + huge + struct.pack(">I", zlib.crc32(b"IHDR" + huge)) + data[at + 17 :])
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("pixels were decoded"))
    assert read_picture_settings(path).fields["seed"] == 1


BAD: dict[str, tuple[dict[str, str], str]] = {
    "nothing": ({}, "it has no metadata"),
    "others": ({"Software": "GIMP", "Author": "me"}, "its metadata is 'Software, Author'"),
    "workflow": ({"workflow": "{}"}, "holds a workflow of ComfyUI's editor"),
    "cut-record": ({"genkit": '{"version": "0.1.0", "req'}, "genkit: record: line 1 column 22: not JSON"),
    "no-row": ({"genkit": '{"request": 3}'}, "genkit: request: 3 is not a row"),
    "cut-graph": ({"prompt": '{"3": {"class_type": "KSa'}, "prompt: graph: line 1"),
    "cut-invoke": ({"invokeai_metadata": "{"}, "invokeai_metadata: JSON: line 1"),
    "array": ({"invokeai_metadata": "[1]"}, "not a JSON object"),
    "twice": ({"invokeai_metadata": '{"a": 1, "a": 2}'}, "key is given twice"),
    "deep": ({"prompt": "[" * 100_000}, "nested too deeply"),
    "no-image": ({"sd_META": '{"image": 3}'}, "sd-metadata: image: 3 is not an object"),
    "value": ({"invokeai_metadata": '{"steps": "x"}'}, "invokeai_metadata: num_inference_steps: 'x' is not a whole"),
    "lora": ({"invokeai_metadata": '{"loras": 3}'}, "loras: 3 is not a list"),
    "json": ({"parameters": '{"foo": 3}'}, "JSON without a field that genkit knows"),
    "empty": ({"parameters": ""}, "parameters: the infotext is empty"),
    "large": ({"parameters": "a" * 2_000_001}, "more than 2000000 bytes of metadata"),
    "many": ({f"k{i}": "a" * 300_000 for i in range(7)}, "more than 2000000 bytes of metadata"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", BAD)
def test_pictures_that_are_refused(kind: str, packed: bool, tmp_path: Path) -> None:
    chunks, message = BAD[kind]
    with pytest.raises(InputError) as error:
        read_picture_settings(png(tmp_path, packed, **chunks))
    assert str(error.value).startswith(f"{tmp_path / 'a.png'}: ")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_refused(tmp_path: Path) -> None:
    def refused(message: str, data: bytes | None = None) -> None:
        if data is not None:
            (tmp_path / "b").write_bytes(data)
        with pytest.raises(InputError, match=message) as error:
            read_picture_settings(tmp_path / "b")
        assert str(error.value).startswith(f"{tmp_path / 'b'}: ") and "\n" not in str(error.value)

    refused("is absent")
    refused("is empty", b"")
    refused("is not a PNG, JPEG, WebP or JPEG XL", b"a cat\nSteps: 20, Sampler: Euler, Seed: 1")
    whole = png(tmp_path, parameters="a\nSteps: 20, Sampler: Euler, Seed: 1").read_bytes()
    refused("is truncated", whole[:-20])
    refused("the checksum of its tEXt chunk is wrong", whole.replace(b"Euler", b"euler"))
    head = whole.index(b"IHDR") + 21
    bomb = zlib.compress(bytes(50_000_000), 9)
    for name, block in {
        "more than 2000000 bytes": bomb,
        "is cut": zlib.compress(b"a" * 99)[:-6],
        "is damaged": b"\0\1\2",
    }.items():
        refused(name, whole[:head] + chunk(b"zTXtparameters\0\0" + block) + whole[head:])
    refused("is not UTF-8", whole[:head] + chunk(b"iTXtparameters\0\0\0\0\0\xff") + whole[head:])
    picture = io.BytesIO()
    Image.fromarray(PIXELS).save(picture, "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff" + bytes(40))
    refused("it has no metadata|its metadata is damaged", picture.getvalue())
    camera = Image.Exif()
    camera[0x010E], camera[0x010F] = "OLYMPUS DIGITAL CAMERA", "OLYMPUS"
    Image.fromarray(PIXELS).save(picture := io.BytesIO(), "JPEG", exif=camera)
    refused("its metadata is 'ImageDescription, Make'", picture.getvalue())
    assert written.TEXT_BYTES == 2_000_000


def chunk(part: bytes) -> bytes:
    return struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
