"""What clients of AUTOMATIC1111 ask for, as fields of a row; what genkit lacks is refused by name unless off."""

from __future__ import annotations

import dataclasses
import math
import re
import secrets
from collections.abc import Collection, Mapping
from typing import Any

from genkit.errors import InputError, nearest, shown
from genkit.rows.found import Draft
from genkit.rows.infotext import read_infotext
from genkit.rows.plans import scheduler_options
from genkit.rows.request import SEED_LIMIT
from genkit.serve.a1111control import control_of
from genkit.serve.openaifields import not_served
from genkit.serve.rows import inline, limited, number_of

OFF: tuple[Any, ...] = (None, False, 0, "", "None", "none", [], {})
ANCESTRAL = ("euler_ancestral", "dpm2_ancestral")
# Parameters that never change a picture; those that begin with hr_ matter only with enable_hr, which is refused.
IDLE = (
    "do_not_save_samples", "do_not_save_grid", "save_images", "send_images", "override_settings_restore_afterwards",
    "force_task_id", "include_init_images", "comments", "image_cfg_scale", "s_tmin", "s_tmax", "disable_extra_networks",
    "hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y", "hr_checkpoint_name",
    "hr_sampler_name", "hr_scheduler", "hr_prompt", "hr_negative_prompt", "refiner_switch_at", "script_args",
    "inpaint_full_res_padding", "subseed",
)  # fmt: skip
# Parameters of what genkit lacks, each with the values besides OFF that leave it off; any other value is refused.
REFUSED: dict[str, tuple[Any, ...]] = {
    "enable_hr": (), "restore_faces": (), "tiling": (), "styles": (), "subseed_strength": (),
    "seed_resize_from_h": (-1,), "seed_resize_from_w": (-1,), "firstphase_width": (), "firstphase_height": (),
    "s_churn": (), "s_noise": (1,), "s_min_uncond": (), "script_name": (), "refiner_checkpoint": (),
    "firstpass_image": (), "controlnet_units": (), "latent_mask": (), "initial_noise_multiplier": (1,),
    "mask_round": (True,), "seed_enable_extras": (True,),
}  # fmt: skip
READ = (
    "prompt", "negative_prompt", "seed", "sampler_name", "sampler_index", "scheduler", "batch_size", "n_iter", "steps",
    "cfg_scale", "width", "height", "eta", "denoising_strength", "override_settings", "alwayson_scripts", "infotext",
    "init_images", "resize_mode", "mask", "mask_blur", "mask_blur_x", "mask_blur_y", "inpainting_fill",
    "inpaint_full_res", "inpainting_mask_invert",
)  # fmt: skip
NUMBERS = {"steps": "num_inference_steps", "cfg_scale": "guidance_scale", "width": "width", "height": "height"}
# By field of a row, the parameter that sets it
SENT = {field: name for name, field in NUMBERS.items()} | {
    "num_images": "batch_size", "strength": "denoising_strength", "clip_skip": "CLIP_stop_at_last_layers",
}  # fmt: skip
MOST_BLUR = 64


@dataclasses.dataclass
class Asked:
    """What a request asks for: fields of a row, and how its pictures are finished.

    start, soft: the picture and the soft mask with which a result is blended. send: whether the answer has pictures.
    model: the name of the model that is asked for, if any. units: those of ControlNet that are on.
    """

    fields: dict[str, Any]
    notes: list[str]
    start: Any = None
    soft: Any = None
    send: bool = True
    model: str | None = None
    units: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)

    def steered(self, width: int, height: int) -> dict[str, Any]:
        """Return the fields with those of the units of ControlNet. width, height: what is drawn where none is stated.

        Raises InputError.
        """
        if not self.units:
            return self.fields
        start = self.start or self.fields.get("image")
        usual = (width, height) if start is None else start.size
        size = self.fields.get("width", usual[0]), self.fields.get("height", usual[1])
        if not all(8 <= side <= 8192 for side in size):
            raise InputError(f"width: {size[0]}x{size[1]} is no size of a picture")
        controls = limited(self.units, lambda unit: control_of(unit, size, start))
        return {**self.fields, "width": size[0], "height": size[1], "controls": controls}


def asked(given: Mapping[str, Any], models: Collection[str], from_picture: bool) -> Asked:
    """Return what a body of txt2img, or of img2img, asks for. models: the names of those that are served.

    Raises InputError naming the parameter.
    """
    for name, value in given.items():
        if name in REFUSED and value not in (*OFF, *REFUSED[name]):
            raise InputError(f"{name}: {shown(value)}: genkit has no such thing; leave it out")
        if name not in (*REFUSED, *IDLE, *READ):
            raise InputError(f"{shown(name)}: unknown parameter{nearest(name, (*READ, *REFUSED))}")
    draft = Draft("a1111-api")
    if given.get("infotext"):
        _from_infotext(draft, given)
    for name in ("prompt", "negative_prompt"):
        if given.get(name) is not None:
            draft.text(name, given[name])
        if name in draft.fields:  # braces and underscores are text to AUTOMATIC1111
            draft.fields[name] = re.sub("[{}]|_(?=_)", r"\\\g<0>", draft.fields[name])
    for name, field in NUMBERS.items():
        draft.put(field, given.get(name))
    draft.seed(given.get("seed"))
    if draft.fields.get("seed", -1) == -1:
        draft.fields["seed"] = secrets.randbits(32) % SEED_LIMIT
    draft.fields["num_images"] = math.prod(_count(name, given.get(name)) for name in ("batch_size", "n_iter"))
    _sampler(draft, given)
    model = _settings(draft, given.get("override_settings") or {}, models)
    units = _scripts(given.get("alwayson_scripts") or {})
    if given.get("save_images"):
        draft.notes.append("save_images: this server sends pictures and saves none")
    found = Asked(
        {"syntax": "a1111", **draft.fields}, draft.notes, send=given.get("send_images") is not False, model=model
    )
    if from_picture:
        _picture(found, given)
    elif given.get("init_images"):
        raise InputError("init_images: are of img2img")
    found.units = units
    return found


def as_sent(message: str) -> str:
    """Return an error that names a field of a row with the name of the parameter that clients send for it."""
    field, colon, rest = message.partition(":")
    return f"{SENT.get(field, field)}{colon}{rest}"


def _count(name: str, value: Any) -> int:
    count: int = 1 if value is None else number_of(name, value, "num_images")
    if count < 1:
        raise InputError(f"{name}: {count} must be at least 1")
    return count


def _from_infotext(draft: Draft, given: Mapping[str, Any]) -> None:
    """Take from an infotext what the body does not state."""
    if not isinstance(given["infotext"], str):
        raise InputError(f"infotext: {shown(given['infotext'])} is not text")
    found = read_infotext(given["infotext"])
    if found.lacking:
        raise InputError(f"infotext: asks for {found.lacking[0]}, which genkit lacks")
    draft.fields |= {name: value for name, value in found.fields.items() if name != "loras"}
    draft.notes += found.notes


def _sampler(draft: Draft, given: Mapping[str, Any]) -> None:
    """Set the solver and `eta`, which is DDIM's; of the other solvers that draw noise it is always 1 here."""
    name = given.get("sampler_name") or given.get("sampler_index")
    schedule, eta = given.get("scheduler") or None, given.get("eta")
    if isinstance(name, int):
        raise InputError(f"sampler_index: {name} counts the samplers of one version; send sampler_name")
    if name is not None:
        if isinstance(name, str):
            scheduler_options(name)  # raises, with the nearest name
        draft.scheduler(name, schedule)
    elif schedule is not None and str(schedule).lower() != "automatic":
        draft.fields["schedule"] = schedule
    missing = next((lack for lack in draft.lacking if lack.startswith(("schedule ", "sampler "))), None)
    if missing is not None:
        raise InputError(f"scheduler: asks for {missing}, which genkit lacks")
    solver = draft.fields.get("scheduler")
    options = solver if isinstance(solver, dict) else {"solver": solver}
    if eta is None:
        return
    eta = number_of("eta", eta)
    if solver is None and eta:
        raise InputError(f"eta: {eta:g}: needs sampler_name, say DDIM")
    if options.get("solver") == "ddim" and eta:
        draft.fields["scheduler"] = {**options, "eta": eta}
    elif eta != 1 and (options.get("solver") in ANCESTRAL or str(options.get("solver")).startswith("sde-")):
        raise InputError(f"eta: {eta:g}: {options['solver']} has 1; genkit has no other of it")


def _settings(draft: Draft, settings: Any, models: Collection[str]) -> str | None:
    """Read override_settings, and the body of POST /options; return the name of the model, if they state one."""
    model = None
    if not isinstance(settings, Mapping):
        raise InputError(f"override_settings: {shown(settings)} is no object of settings")
    for name, value in settings.items():
        if name == "CLIP_stop_at_last_layers":
            if value != 1:
                draft.clip_skip(value)
        elif name == "sd_model_checkpoint":
            stem = str(value).split(" [")[0].rsplit("/", 1)[-1].removesuffix(".safetensors")
            if value and stem not in models:
                raise InputError(not_served("sd_model_checkpoint", value, models))
            model = stem if value else model
        elif name == "sd_vae":
            if value not in (*OFF, "Automatic"):
                raise InputError(f"sd_vae: {shown(value)}: the VAE is the one that the server was started with")
        elif name == "eta_noise_seed_delta" and value in OFF:
            continue
        elif name.startswith(
            ("samples_", "grid_", "save_", "return_", "live_preview", "show_progress", "enable_pnginfo")
        ):
            draft.notes.append(f"{name}: is not used")
        else:
            raise InputError(f"{shown(name)[1:-1]}: {shown(value)}: is no setting that this server changes")
    return model


def check_settings(settings: Any, models: Collection[str]) -> str | None:
    """Return the name of the model, if settings choose one. Raises InputError for others that would change pictures."""
    draft = Draft("a1111-api")
    model = _settings(draft, settings, models)
    if draft.fields:
        raise InputError("CLIP_stop_at_last_layers: is of a request: send it in override_settings")
    return model


def _scripts(scripts: Any) -> list[Mapping[str, Any]]:
    """Return the units of ControlNet. Raises InputError for other scripts that are on."""
    units: list[Mapping[str, Any]] = []
    if not isinstance(scripts, Mapping):
        raise InputError(f"alwayson_scripts: {shown(scripts)} is no object of scripts")
    for name, script in scripts.items():
        args = script.get("args", []) if isinstance(script, Mapping) else script
        args = list(args.values()) if isinstance(args, Mapping) else args
        on = args not in OFF and not (isinstance(args, list) and (args[0] is False or all(map(_is_off, args))))
        stated = [unit for unit in args if not _is_off(unit)] if isinstance(args, list) else [args]
        if on and str(name).lower() == "controlnet" and all(isinstance(unit, Mapping) for unit in stated):
            units += stated
        elif on:
            raise InputError(f"alwayson_scripts: {shown(name)}: genkit has no such script; leave it out")
    return units


def _is_off(unit: Any) -> bool:
    if isinstance(unit, Mapping):
        return any(key in unit and unit[key] in OFF for key in ("enabled", "enable"))
    return unit in OFF


def _picture(found: Asked, given: Mapping[str, Any]) -> None:
    images = given.get("init_images")
    if not isinstance(images, list) or len(images) != 1:
        many = len(images) if isinstance(images, list) else 0
        raise InputError(f"init_images: {many} pictures; send one, in base64")
    fields = found.fields
    start = inline("init_images", images[0]).convert("RGB")
    size = fields.get("width", start.width), fields.get("height", start.height)
    if given.get("resize_mode") not in (None, 0) and size != start.size:
        raise InputError(f"resize_mode: {shown(given['resize_mode'])}: genkit resizes, which is 0")
    if not all(8 <= side <= 8192 for side in size):
        raise InputError(f"width: {size[0]}x{size[1]} is no size of a picture")
    from PIL import Image

    start = start if start.size == size else start.resize(size, Image.Resampling.LANCZOS)
    strength = given.get("denoising_strength")
    strength = 0.75 if strength is None else number_of("denoising_strength", strength)
    if not 0 < strength <= 1:
        raise InputError(f"denoising_strength: {shown(strength)} is not above 0 and at most 1")
    fields |= {"image": start, "strength": strength}
    if given.get("mask"):
        _mask(found, given, start)


def _mask(found: Asked, given: Mapping[str, Any], start: Any) -> None:
    """Set the mask: white is drawn anew. The picture is laid over its start with the mask's soft edge."""
    from PIL import Image, ImageFilter, ImageOps

    if given.get("inpaint_full_res", True) not in (False, 0):
        said = "is true" if "inpaint_full_res" in given else "is true unless it is sent as false"
        raise InputError(f"inpaint_full_res: {said}: genkit draws the whole picture; send false")
    mask = inline("mask", given["mask"])
    painted = mask.mode == "RGBA" and mask.getchannel("A").getextrema()[0] < 255
    mask = mask.getchannel("A") if painted else mask.convert("L")
    mask = ImageOps.invert(mask) if given.get("inpainting_mask_invert") else mask
    mask = mask.resize(start.size, Image.Resampling.LANCZOS)
    blur = [number_of("mask_blur", 4 if (v := given.get(name, given.get("mask_blur"))) is None else v)
            for name in ("mask_blur_x", "mask_blur_y")]  # fmt: skip
    wrong = next((b for b in blur if not 0 <= b <= MOST_BLUR), None)
    if wrong is not None:
        raise InputError(f"mask_blur: {wrong:g} is not from 0 to {MOST_BLUR} pixels")
    soft = mask.filter(ImageFilter.GaussianBlur((blur[0], blur[1])))
    if not soft.getbbox():
        raise InputError("mask: is black: nothing would be drawn anew")
    fill = given.get("inpainting_fill", 0)
    if fill not in (0, 1):
        raise InputError(f"inpainting_fill: {shown(fill)}: there are 0, fill, and 1, original")
    found.start, found.soft = start, soft
    found.fields |= {"mask_image": mask, "image": start if fill == 1 else filled(start, soft)}


def filled(start: Any, mask: Any) -> Any:
    """Return a picture whose masked part has the colours around it, as AUTOMATIC1111 fills it before it draws."""
    from PIL import Image, ImageFilter, ImageOps

    whole = Image.new("RGBA", start.size)
    kept = Image.new("RGBa", start.size)
    kept.paste(start.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    for radius, repeats in ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1)):
        blurred = kept.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(repeats):
            whole.alpha_composite(blurred)
    return whole.convert("RGB")
