"""Recipes: all settings of a training run, checked key by key before anything heavy is imported."""

from __future__ import annotations

import glob
import json
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from genkit.datasets.config import Background, Data, Section, Share, Some, Text
from genkit.errors import InputError, nearest, shown
from genkit.files import place, read_text
from genkit.pictures.edges import COMPUTED
from genkit.rows.yamltext import parse_yaml

Positive = Annotated[float, Field(gt=0, le=1e6)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Network = str | dict[str, Any]


class Prior(Section):
    """DreamBooth's prior preservation (Ruiz et al. 2023, section 3.2): half of each batch are pictures of the class.

    path: a folder of them; without one, `count` are drawn with the untrained model. prompt: their caption. weight: of
    their loss.
    """

    prompt: Text
    path: str | None = None
    count: Some = 100
    weight: Positive = 1.0


class Objective(Section):
    """The training objective: what the network predicts, at which noise levels, and how errors are weighted.

    prediction: default, that of the scheduler. snr_gamma: min-SNR weighting (Hang et al. 2023), usually 5. debiased:
    weight by the square root of the SNR (Yu et al. 2024). density: of the timesteps, "uniform" or "logit_normal" (Esser
    et al. 2024, section 3.1) with `mean` and `std`. offset_noise: noise that is constant over each channel (Guttenberg
    2023), usually 0.05. input_perturbation: extra noise in the input only (Ning et al. 2023), usually 0.1. zero_snr:
    rescale the schedule to zero terminal SNR (Lin et al. 2024), where sampling then starts.
    """

    prediction: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] | None = None
    snr_gamma: Positive | None = None
    debiased: bool = False
    density: Literal["uniform", "logit_normal"] = "uniform"
    mean: Annotated[float, Field(ge=-10, le=10)] = 0.0
    std: Positive = 1.0
    offset_noise: Share = 0.0
    input_perturbation: Share = 0.0
    zero_snr: bool | None = None


class Autoencoder(Section):
    """Weights of the KL autoencoder's losses; that of |x - x'| is 1. coarse: of |x - x'| at 3 downscaled sizes."""

    kl: Annotated[float, Field(ge=0, le=1)] = 1e-6
    coarse: Annotated[float, Field(ge=0, le=100)] = 1.0


class Scenes(Section):
    """Scenes that a detector learns from: drawings of the data set on a background, each with its box.

    most: things in one; as many scenes have one as have any other number. alike: the share whose things are all of one
    kind, so that counting is learnt. absent: words looked for that are not there. near: a field of the metadata; half
    of the absent words are of drawings that have the same value there, and are easily taken for the thing.
    """

    most: Annotated[int, Field(ge=1, le=20)] = 5
    alike: Share = 0.6
    absent: Annotated[int, Field(ge=1, le=64)] = 8
    near: Text | None = None


class Lora(Section):
    """LoRA (Hu et al. 2022): rank and alpha. targets: suffixes of layer names. text_encoder: adapt that too."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    alpha: Positive | None = None
    targets: list[Text] = Field(["to_q", "to_k", "to_v", "to_out.0"], min_length=1)
    text_encoder: bool = False


class Token(Section):
    """Textual inversion (Gal et al. 2022): the new word, the word to initialise it from, and its number of vectors."""

    placeholder: Text
    initializer: Text
    vectors: Annotated[int, Field(ge=1, le=32)] = 1

    @property
    def names(self) -> list[str]:
        """The new tokens, named as diffusers names them: <cat>, <cat>_1, …"""
        return [self.placeholder, *(f"{self.placeholder}_{i}" for i in range(1, self.vectors))]


class Train(Section):
    """Settings of the optimizer. Training ends after `steps` optimizer steps or max_seconds, whichever is first.

    batch_size: pictures for each device and pass; a step has gradient_accumulation_steps passes, and all its pictures
    have equal weight. lr_scheduler: constant, or falling to zero, after lr_warmup_steps. ema: decay of the averaged
    weights, which are evaluated and saved; 0 uses the weights themselves. text_encoder: train the text encoder too, for
    SDXL both. sharding: "full" shards weights, gradients, EMA and Adam's moments over the processes (FSDP).
    """

    steps: Some = 1000
    max_seconds: Positive | None = None
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 4
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65536)] = 1
    gradient_checkpointing: bool = False
    mixed_precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    learning_rate: Positive = 1e-4
    lr_scheduler: Literal["constant", "cosine", "linear"] = "constant"
    lr_warmup_steps: Count = 0
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 1e-2
    max_grad_norm: Positive = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    text_encoder: bool = False
    compile: bool = False
    sharding: Literal["none", "full"] = "none"


class Evaluate(Section):
    """Evaluation during training, every `every` steps (0: only at the end).

    pictures: maximum number of validation pictures. prompts, num_images, num_inference_steps, guidance_scale: of the
    sample grid, drawn with fixed seeds. metrics: of the samples, besides the loss: "clip", "fid", "kid", "cmmd". clip:
    the CLIP model of metrics. features: the feature network of distances: "clip", "inception", or an installed one.
    best: the metric by which the best checkpoint is chosen. patience: stop after so many evaluations without
    improvement.
    """

    every: Count = 500
    pictures: Some = 256
    prompts: list[Text] = Field(default=[])
    num_images: Annotated[int, Field(ge=1, le=10_000)] = 1
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 20
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    metrics: list[Literal["clip", "fid", "kid", "cmmd"]] = Field(default=[])
    clip: Text = "emoji-clip"
    features: Text = "clip"
    best: Literal["loss", "clip", "fid", "kid", "cmmd"] = "loss"
    patience: Some | None = None


class Save(Section):
    """Checkpoints: written every `every` steps, of which the newest keep_last and the best keep_best are kept.

    keep_every: also keep those of every so many steps (0: none). dtype: of the final model.
    """

    every: Some = 500
    keep_last: Some = 1
    keep_best: Count = 1
    keep_every: Count = 0
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    tensorboard: bool = False


Task = Literal[
    "unconditional", "text-to-image", "lora", "dreambooth", "textual-inversion", "controlnet", "autoencoder", "clip",
    "detector",
]  # fmt: skip
TASKS = typing.get_args(Task)
SMALL = ("textual-inversion", "clip", "detector")  # few trained weights, or a scalar, which cannot be sharded
# Section -> the tasks that read it; the others are read by all.
READ_BY = {
    "lora": ("lora", "dreambooth"), "token": ("textual-inversion",), "prior": ("dreambooth",),
    "autoencoder": ("autoencoder",), "scenes": ("detector",),
    "objective": tuple(t for t in TASKS if t not in ("autoencoder", "clip", "detector")),
}  # fmt: skip
# Key -> the tasks that do not use it, for which it is refused.
UNREAD = {
    "data.cache": ("autoencoder", "clip", "detector"), "data.buckets": ("clip", "detector"),
    "data.caption_dropout": ("autoencoder", "clip", "unconditional", "detector"),
    "data.conditioning": tuple(t for t in TASKS if t != "controlnet"),
    "evaluate.prompts": ("autoencoder", "clip", "unconditional", "detector"),
    # Scenes have an augmentation of their own.
    **{f"data.{key}": ("detector",) for key in ("flip", "caption_shuffle")},
}  # fmt: skip


class Recipe(Section):
    """A training run. model: the model to start from; networks: replace parts of it, or make up a new model.

    A network is a folder (or a model that contains it), or a config for a new network with random weights; keys that
    the config does not state are taken from the network of `model`. controlnet among them: one to go on training, by
    its folder, hub id or file, instead of a copy of the UNet's first half. scheduler: a diffusers scheduler config;
    default, that of the model.
    """

    task: Task
    model: Text | None = None
    networks: Mapping[Literal["unet", "vae", "text_encoder", "tokenizer", "clip", "controlnet"], Network] = {}
    scheduler: dict[str, Any] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: Data
    objective: Objective = Objective()
    autoencoder: Autoencoder = Autoencoder()
    scenes: Scenes = Scenes()
    lora: Lora | None = None
    token: Token | None = None
    prior: Prior | None = None
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    save: Save = Save()

    @model_validator(mode="after")
    def _check_together(self) -> Recipe:
        for section, tasks in READ_BY.items():
            if section in self.model_fields_set and getattr(self, section) is not None and self.task not in tasks:
                raise ValueError(f"{section}: has no effect in task {self.task}; it belongs to {', '.join(tasks)}")
        if self.task == "lora" and self.lora is None:
            raise ValueError("lora: is missing; `lora: {rank: 8}` will do")
        if self.task == "textual-inversion" and self.token is None:
            raise ValueError("token: is missing: it names the new word")
        if self.model is None and not self.networks:
            raise ValueError("model: is missing; it names what to start from, or `networks` what to build")
        if self.model is None and self.task in ("lora", "dreambooth", "textual-inversion"):
            raise ValueError(f"model: is missing, which {self.task} changes")
        if self.model is None and self.task == "controlnet":
            raise ValueError("model: is missing, which the ControlNet steers")
        if self.data.conditioning is None and self.task == "controlnet":
            raise ValueError(f"data.conditioning: is missing: {', '.join(COMPUTED)}, or the column of its pictures")
        if self.evaluate.best not in ("loss", *self.evaluate.metrics):
            raise ValueError(f"evaluate.best: {self.evaluate.best!r} is not among evaluate.metrics")
        self._check_unread()
        if self.train.lr_warmup_steps >= self.train.steps:
            raise ValueError(f"train.lr_warmup_steps: {self.train.lr_warmup_steps} of only {self.train.steps} steps")
        return self

    def _check_unread(self) -> None:
        """Refuse settings that the task does not use."""
        goal, told, full = self.objective, f"has no effect in task {self.task}", self.train.sharding == "full"
        for key, tasks in UNREAD.items():
            section, name = key.split(".")
            if (value := getattr(getattr(self, section), name)) and self.task in tasks:
                raise ValueError(f"{key}: {value}: {told}")
        whole = self.task in ("text-to-image", "dreambooth") and self.lora is None
        place = "; it is lora.text_encoder" if self.lora is not None else ""
        for wrong, complaint in (
            (self.train.text_encoder and not whole, f"train.text_encoder: {told}{place}"),
            (self.prior is not None and self.data.buckets, "data.buckets: not with prior: a batch has one shape"),
            (full and self.train.mixed_precision == "fp16", "train.sharding: full is not with fp16; take bf16"),
            (full and self.train.compile, "train.compile: not with train.sharding full"),
            (
                full and self.task in SMALL,
                f"train.sharding: full is not for task {self.task}: it is small",
            ),
            ("controlnet" in self.networks and self.task != "controlnet", f"networks.controlnet: {told}"),
            (isinstance(self.networks.get("controlnet"), dict), "networks.controlnet: is a folder, a hub id or a file"),
            (goal.debiased and goal.snr_gamma, "objective: snr_gamma and debiased are two weights; take one"),
            (self.task == "detector" and self.data.zoom != 1, f"data.zoom: {self.data.zoom}: {told}"),
            (self.task == "detector" and self.data.crop != "center", f"data.crop: {self.data.crop}: {told}"),
            (self.task == "detector" and self.data.background != Background(), f"data.background: {told}"),
            (
                "cmmd" in self.evaluate.metrics and self.evaluate.features != "clip",
                f"evaluate.metrics: cmmd is a distance of CLIP's features, and evaluate.features is "
                f"{self.evaluate.features}; take kid",
            ),
            (goal.density == "uniform" and (goal.mean, goal.std) != (0, 1), "objective.mean, std: are of logit_normal"),
        ):
            if wrong:
                raise ValueError(complaint)

    @property
    def plain(self) -> dict[str, Any]:
        """All settings including defaults, as JSON values."""
        return json.loads(self.model_dump_json())


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with "key=value" overrides: `train.steps=100`, or `steps=100` where only one section has it.

    Paths in it are made relative to its folder, those in overrides to the working directory. Raises InputError naming
    the file, the key, its value and the nearest known key.
    """
    where = place(path)
    own = Path(__file__).parent / "recipes" / f"{path.stem}.yaml"
    if own.is_file() and not os.path.exists(path):
        raise InputError(f"{where}: is absent; genkit's own lies in {place(own)}")
    raw = parse_yaml(read_text(path), where, exponents=True)
    if not isinstance(raw, dict):
        raise InputError(f"{where}: holds {shown(raw)}, not a recipe; it begins with `task:`")
    found = _plain(raw)
    _resolve(found, path.parent)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{shown(text)}: is not like train.steps=1000")
        _set(found, key, _plain(parse_yaml(value, key, exponents=True)))
    _resolve(found, Path())
    return make_recipe(found, where)


def make_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Return a recipe of plain values. Raises InputError as `read_recipe` does."""
    try:
        return Recipe(**values)
    except ValidationError as error:
        raise InputError(f"{where}: {_explained(error)}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _resolve(values: dict[str, Any], folder: Path) -> None:
    """Make paths relative to `folder` where the joined path exists; other values, such as hub ids, stay."""

    def at(value: Any) -> Any:
        if isinstance(value, list):
            return [at(item) for item in value]
        if not isinstance(value, str) or not value or "\0" in value:
            return value
        value = os.path.expanduser(value)
        near = os.path.join(folder, value)
        return near if os.path.exists(near) or (glob.has_magic(near) and glob.glob(near, recursive=True)) else value

    data, prior, networks = (values.get(name) for name in ("data", "prior", "networks"))
    for mapping, keys in ((data, ("path", "validation")), (prior, ("path",)), (values, ("model",))):
        if isinstance(mapping, dict):
            mapping.update({key: at(mapping[key]) for key in keys if key in mapping})
    if isinstance(networks, dict):
        networks.update({key: at(value) for key, value in networks.items()})
    if isinstance(data, dict) and isinstance(data.get("cache_folder"), str):  # which is written to
        data["cache_folder"] = os.path.expanduser(data["cache_folder"])


def _sections(of: Any = Recipe) -> dict[str, Any]:
    """Return {key of a section: its class if it is a section itself, else None}."""
    found = {}
    for name, field in of.model_fields.items():
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        found[name] = next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)
    return found


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Apply an override "key=value" to the values of a recipe."""
    path = key.strip().split(".")
    if not all(path):
        raise InputError(f"{shown(key)}: is not like train.steps=1000")
    known = _sections()
    inside: Any = values
    if len(path) == 1 and path[0] not in known:
        homes = [name for name, section in known.items() if section is not None and path[0] in _sections(section)]
        if len(homes) != 1:
            every = [*known, *(f"{n}.{k}" for n, s in known.items() if s is not None for k in _sections(s))]
            hint = f": say {' or '.join(f'{h}.{key}' for h in homes)}" if homes else nearest(key, every)
            raise InputError(f"{shown(key)}: {'is in several sections' if homes else 'unknown key'}{hint}")
        path = [homes[0], *path]
    for name in path[:-1]:
        inside = inside.setdefault(name, {})
        if not isinstance(inside, dict):
            raise InputError(f"{key}: {name} is {shown(inside)}, which has no parts")
    inside[path[-1]] = value


def _explained(error: ValidationError) -> str:
    """Return the first error of pydantic as a line: key, value, and what is allowed or the nearest known key."""
    errors = error.errors()  # for a union there is one for each branch, of which the most specific is used
    same = [e for e in errors if e["loc"][:2] == errors[0]["loc"][:2] and not e["type"].endswith("_type")]
    first = (same or errors)[0]
    names = [str(part) for part in first["loc"] if not str(part).startswith(("function-", "constrained-"))]
    section: Any = Recipe
    for name in names[:-1]:
        section = _sections(section).get(name) if isinstance(section, types.UnionType | type) else None
    names = [n for i, n in enumerate(names) if i == 0 or n not in ("str", "int", "float", "list", "dict")]
    key = ".".join(n for n in names if "[" not in n)
    if first["type"] == "extra_forbidden":
        known = _sections(section) if section is not None else ()
        return f"{key}: unknown key{nearest(names[-1], known)}"
    message = re.sub(r"dictionary or instance of \w+", "mapping", first["msg"].removeprefix("Value error, "))
    if first["type"] == "missing":
        return f"{key}: is missing"
    if first["type"] == "literal_error":
        message += nearest(first["input"], re.findall("'([^']*)'", first["ctx"]["expected"]))
    return f"{key}: {shown(first['input'])}: {message[0].lower()}{message[1:]}" if key else message
