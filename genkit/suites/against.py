"""Distances between the pictures of a run and those of a folder, as distributions of features: FID, KID, CMMD."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genkit.errors import InputError, shown
from genkit.options import Options
from genkit.pictures.images import list_images, read_image
from genkit.progress import Progress
from genkit.rows.result import Result
from genkit.runs.embeddings import read_embeddings
from genkit.runs.records import RESULTS
from genkit.scoring.plugins import find_features

if TYPE_CHECKING:
    import torch

    from genkit.components import ModelInfo

FEWEST = 4  # pictures on each side, for a distance and its standard error
BATCH = 32
CLIP = "clip"


@dataclasses.dataclass(frozen=True)
class Against:
    """The reference pictures of a folder, and the features to compare: "clip", or the name of a feature network."""

    folder: Path
    files: list[Path]
    features: str = CLIP


def find_against(folder: Path, features: str, clip: ModelInfo | None, drawn: int) -> Against:
    """Return the reference pictures of a folder or a run. drawn: how many pictures the evaluated run will have.

    Raises InputError for too few pictures, and where CLIP features are asked for without a CLIP model.
    """
    if not folder.is_dir():
        raise InputError(f"--against: {shown(str(folder))} is not a folder of pictures")
    if features != CLIP and (features != "inception" or find_spec("torch_fidelity") is None):
        find_features(features, "--features", None)  # raises where it is not installed
    files = list_images(folder / "images" if (folder / RESULTS).is_file() else folder)
    if min(len(files), drawn) < FEWEST:
        what = f"{shown(str(folder))} holds {len(files)} pictures" if len(files) < FEWEST else f"the run draws {drawn}"
        raise InputError(f"--against: {what}; a distance needs {FEWEST} on both sides")
    if features == CLIP and clip is None:
        raise InputError("--against: compares features of CLIP, and there is no CLIP model: give --clip or --features")
    return Against(folder, files, features)


def distances(
    against: Against, run: Path, results: Sequence[Result], options: Options, clip: ModelInfo | None
) -> dict[str, Any]:
    """Return {"folder", "features", "images", "pictures", "notes", "fid", "kid", "cmmd": [value, low, high]}.

    CMMD is computed for CLIP features only. Intervals are 1.96 standard errors, from random halves of both sides.
    Raises InputError for pictures that cannot be read.
    """
    import torch

    from genkit.device.devices import pick_device
    from genkit.scoring.distances import DISTANCES, halved

    device, dtype = pick_device(options.device, options.dtype)
    quiet = options.quiet
    done = [r for r in results if r.status == "done"]
    if len(done) < FEWEST:
        raise InputError(f"--against: {len(done)} pictures were drawn; a distance needs {FEWEST} on both sides")
    with torch.inference_mode():
        if against.features == CLIP:
            assert clip is not None
            a, b = _by_clip(against, run, done, clip, device, dtype, quiet)
        else:
            a, b = _by_network(against, run, done, device, quiet)
    names = [name for name in DISTANCES if name != "cmmd" or against.features == CLIP]
    found: dict[str, Any] = {"folder": str(against.folder), "features": against.features}
    found |= {"images": len(a), "pictures": len(b), "notes": _notes(against.features, a, b)}
    for name in names:
        value, error = DISTANCES[name](a, b), halved(DISTANCES[name], a, b)
        found[name] = [round(x, 6) for x in (value, value - 1.96 * error, value + 1.96 * error)]
    return found


def _notes(features: str, a: torch.Tensor, b: torch.Tensor) -> list[str]:
    fewest, width = min(len(a), len(b)), a.shape[1]
    notes = [] if features != CLIP else ["fid and kid are of features of CLIP: comparable with each other only"]
    if fewest <= width:
        notes.append(f"fid of {fewest} pictures means nothing: more than {width} are needed; kid and cmmd do with less")
    return notes


def _by_clip(against: Against, run: Path, done: Sequence[Result], clip: ModelInfo, device: Any, dtype: Any,
             quiet: bool) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the CLIP features of both sides; the run's from its stored embeddings, where it has them."""
    import torch

    from genkit.components import load_components
    from genkit.scoring.clip import ClipScorer, as_tensor
    from genkit.scoring.panel import half

    scorer = ClipScorer.from_components(load_components(clip, device=device, dtype=dtype))

    def embedded(files: Sequence[Path]) -> list[np.ndarray]:
        return [
            half(scorer.embed_pixels(torch.cat([scorer.preprocess(as_tensor(read_image(file))) for file in part])))
            for part in _parts(files, quiet)
        ]

    place, vectors = read_embeddings(run, done)
    stored = [np.array(vectors[place[r.id, r.index]])[None] for r in done if (r.id, r.index) in place]
    missing = [run / str(r.file) for r in done if (r.id, r.index) not in place]
    sides = [*stored, *embedded(missing)], embedded(against.files)
    one, two = (torch.from_numpy(np.concatenate(side).astype(np.float64)) for side in sides)
    return torch.nn.functional.normalize(one), torch.nn.functional.normalize(two)


def _by_network(against: Against, run: Path, done: Sequence[Result], device: Any,
                quiet: bool) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return both sides' features by an installed network, picture by picture if sizes in a batch differ."""
    import torch

    from genkit.scoring.clip import as_tensor

    network = find_features(against.features, "--features", device)

    def read(files: Sequence[Path]) -> torch.Tensor:
        found = []
        for part in _parts(files, quiet):
            pictures = [as_tensor(read_image(file)).to(device) for file in part]
            alike = len({picture.shape for picture in pictures}) == 1
            names = [shown(str(file), 200) for file in part]
            if alike:
                found.append(network(torch.cat(pictures), names))
            else:
                found += [network(picture, [name]) for picture, name in zip(pictures, names, strict=True)]
        return torch.cat(found)

    return read([run / str(r.file) for r in done]), read(against.files)


def _parts(files: Sequence[Path], quiet: bool) -> Iterator[Sequence[Path]]:
    with Progress(len(files), quiet=quiet) as progress:
        for i in range(0, len(files), BATCH):
            part = files[i : i + BATCH]
            yield part
            for _ in part:
                progress.advance(False, True, len(files))
