"""What was found in another tool's settings: fields of a row, what else it says, and what genkit lacks for it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from genkit.errors import InputError, shown
from genkit.rows.plans import NAMED, is_schedule, is_tuned, scheduler_options, with_schedule
from genkit.rows.request import SEED_LIMIT
from genkit.rows.typed import COUNTS, typed, whole

_OPTIONS = {"refiner": "--refiner"}  # settings that are options of a run, not fields of a row
_GIVEN = {"ControlNet": "its picture is not in the settings: give control and control_image"}


@dataclasses.dataclass(frozen=True)
class Found:
    """Settings as found: `fields` are a row for `canonical`, the rest is for the reader.

    about: `form` (infotext, genkit, comfyui, invokeai, json) and, where they are told, model, model_hash, vae,
    vae_hash, controls (of ControlNets: weight, range, preprocess), lora_hashes, ti_hashes, clip_skip (counted from the
    last layer, which is 1), version, sampler (as written, where genkit has none of that name). notes: one line each on
    what was assumed or left out. lacking: what the
    settings ask for and a row drawn from `fields` will not have.
    """

    fields: dict[str, Any]
    about: dict[str, Any]
    notes: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()


class Draft:
    """A `Found` under construction."""

    def __init__(self, form: str) -> None:
        self.fields: dict[str, Any] = {}
        self.about: dict[str, Any] = {"form": form}
        self.notes: list[str] = []
        self.lacking: list[str] = []

    def done(self) -> Found:
        """Return what was found."""
        return Found(self.fields, self.about, tuple(dict.fromkeys(self.notes)), tuple(dict.fromkeys(self.lacking)))

    def lack(self, name: str, note: str | None = None) -> None:
        """Record that the settings ask for `name`, which the row will not have."""
        self.lacking.append(name)
        usual = f"is an option of a run, {_OPTIONS[name]}" if name in _OPTIONS else _GIVEN.get(name, "genkit has none")
        self.notes.append(note or f"{name}: {usual}; the row is without it")

    def put(self, field: str, value: Any) -> None:
        """Set a field of numbers, from text or JSON. None sets nothing. Raises InputError for what is no number."""
        if value is not None:
            self.fields[field] = number(field, value)

    def text(self, field: str, value: Any) -> None:
        """Set a prompt, unless it is blank."""
        if not isinstance(value, str):
            raise InputError(f"{field}: {shown(value)} is not text")
        if value.strip():
            self.fields[field] = value

    def tell(self, name: str, value: Any) -> None:
        """Set an entry of `about`, unless the value is empty."""
        if value not in (None, "", {}):
            self.about[name] = value

    def seed(self, value: Any) -> None:
        """Set the seed; one that torch's CPU generator reduces to 32 bits is reduced, since the noise is the same."""
        seed = None if value is None else number("seed", value)
        if isinstance(seed, int) and seed != -1 and not 0 <= seed < SEED_LIMIT:
            self.notes.append(f"seed: {seed} is taken modulo 2**32, as torch's CPU generator takes it")
            seed %= SEED_LIMIT
        if seed is not None:
            self.fields["seed"] = seed

    def clip_skip(self, value: Any) -> None:
        """Record which layer of the text encoder is used, counted from the last, which is 1."""
        self.put("clip_skip", value)

    def scheduler(self, sampler: Any, schedule: Any = None, others: dict[str, Any] | None = None) -> None:
        """Set the solver and its spacing from the names of a sampler and a schedule of noise in another tool.

        others: further options of the solver. A name that genkit lacks is recorded as such. Raises InputError for names
        that contradict each other, and for options that the solver lacks.
        """
        if not isinstance(sampler, str) or not sampler.strip():
            raise InputError(f"scheduler: {shown(sampler)} is not the name of a sampler")
        if is_tuned(sampler):  # as genkit writes it
            self.fields["scheduler"] = sampler
            return
        try:
            options = scheduler_options(sampler)
        except InputError:
            self.about["sampler"] = sampler
            self.lack(f"sampler {shown(sampler)}")
            return
        if schedule is not None:
            plain = str(schedule).strip().lower()
            plain = "ddim_uniform" if plain == "ddim" else plain
            if is_schedule(plain):
                options = scheduler_options(with_schedule(options, plain).get("scheduler", options))
            elif plain in NAMED:  # as genkit writes it
                options = {**options, "spacing": plain}
            else:
                self.lack(f"schedule {shown(schedule)}")
        options = scheduler_options({**options, **others}) if others else options
        self.fields["scheduler"] = options["solver"] if list(options) == ["solver"] else options

    def strength(self, value: Any, picture: Any = None) -> None:
        """Set the strength of image-to-image, and ask for its picture, of which settings hold a name at most."""
        self.put("strength", value)
        name = "" if picture is None else f" {shown(base_name('image', picture))}"
        self.lack(
            "image", f"image: the settings start from a picture{name}, which they do not hold; give it as `image`"
        )


def number(field: str, value: Any) -> Any:
    """Return text or a JSON value as the number that `field` takes. Raises InputError naming the field."""
    count = field in (*COUNTS, "seed")
    if isinstance(value, str):
        digits = field == "clip_skip" and re.fullmatch(r"[0-9]{1,3}", value.strip())
        value = int(value) if digits else typed(field, value.strip())
    value = whole(value)
    if isinstance(value, bool) or not isinstance(value, int if count else int | float):
        raise InputError(f"{field}: {shown(value)} is not a {'whole ' if count else ''}number")
    return value if count else float(value)


def base_name(field: str, path: Any) -> str:
    """Return the file's name of a path of any system: folders of another machine say nothing. Raises InputError."""
    name = path.replace("\\", "/").rsplit("/", 1)[-1] if isinstance(path, str) else ""
    if name in ("", ".", ".."):
        raise InputError(f"{field}: {shown(path)} is not the name of a file")
    return name
