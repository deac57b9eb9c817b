"""The `data` section of a recipe: pictures and captions, their sources and augmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from genkit.pictures.edges import COMPUTED

Share = Annotated[float, Field(ge=0, le=1)]
Some = Annotated[int, Field(ge=1, le=10**9)]
Side = Annotated[int, Field(ge=8, le=8192)]
Text = Annotated[str, Field(min_length=1, max_length=10_000)]


class Section(BaseModel):
    """A section of a recipe: unknown keys are errors, text is not converted to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Recolour(Section):
    """Change a picture's hue to a named colour and mention it in the caption, so that colours can be prompted.

    share: of the pictures whose caption names no colour. caption: a template with {colour} and {caption}. where: a
    field of the metadata that must be true for a picture to be changed.
    """

    share: Share = 0.3
    caption: Text = "{colour} {caption}"
    where: str | None = None


class Background(Section):
    """The background of transparent pictures: `colour`, or for a `share` of them a random colour, named in the caption.

    colour: a name, "#rrggbb", or "random" (not named in the caption). caption: a template with {caption} and
    {background}.
    """

    colour: Text = "white"
    share: Share = 0.0
    caption: Text = "{caption} on a {background} background"


class Data(Section):
    """Pictures and captions: their sources and augmentation.

    path: folder, .tar shards (WebDataset) or .parquet files; wildcards allowed, relative to the recipe. caption:
    the column or key of the metadata that holds captions. captions: templates with {caption} and any field of the
    metadata, of which one is drawn for each picture and epoch; templates with an empty field are not drawn.
    caption_dropout: share of captions replaced by the empty prompt. caption_shuffle: shuffle the parts between
    commas. missing_captions: "error", or "empty" to train pictures without a caption on the empty prompt.
    resolution: side, or [width, height], in pixels. buckets: train at each picture's own aspect ratio; sides are
    multiples of bucket_step, and the area is at most that of `resolution`. crop: position of the crop. flip: share
    of pictures that are mirrored, except where the caption says left or right. zoom: pictures are shrunk by a random
    factor down to this, on their background. validation: share of the pictures held out, by the hash of
    `validation_by` (a field of the metadata; default the picture's name), or the path of a data set. cache: number
    of variants of each picture whose latents and embeddings are cached on disk; 0 computes them every time.
    conditioning: what a ControlNet reads: "canny" or "invert", computed from each picture, or the column, key or suffix
    of a picture beside it. cache_folder: default RUN/cache. broken: the share of samples that may lack a readable
    picture: they are reported and left out; more are an error. repeat: how often a picture is used in an epoch, with
    new augmentation each time. limit: use only the first so many pictures. workers: number of loader processes.
    """

    path: Text | Annotated[list[Text], Field(min_length=1)]
    caption: Text = "caption"
    captions: list[Text] = Field(["{caption}"], min_length=1)
    caption_dropout: Share = 0.0
    caption_shuffle: bool = False
    missing_captions: Literal["error", "empty"] = "error"
    resolution: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    buckets: bool = False
    bucket_step: Annotated[int, Field(ge=8, le=512)] = 64
    crop: Literal["center", "random"] = "center"
    flip: Share = 0.0
    zoom: Annotated[float, Field(gt=0, le=1)] = 1.0
    background: Background = Background()
    recolour: Recolour | None = None
    validation: Share | Text = 0.05
    validation_by: str | None = None
    conditioning: Text | None = None
    cache: Annotated[int, Field(ge=0, le=1000)] = 0
    cache_folder: str | None = None
    broken: Share = 0.01
    repeat: Some = 1
    limit: Some | None = None
    workers: Annotated[int, Field(ge=0, le=64)] = 0

    @property
    def beside(self) -> str | None:
        """The column, key or suffix of conditioning that lies beside the pictures; None where it is computed."""
        return None if self.conditioning in COMPUTED else self.conditioning
