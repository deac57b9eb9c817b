"""`genkit replay`: draw pictures again from the settings in them, and report what is identical or has changed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genkit.components import weight_hashes
from genkit.durable import disk, sync_folder, write_whole
from genkit.errors import EXIT_SIGINT, EXIT_SIGTERM, InputError, shown
from genkit.files import place, run_path
from genkit.job.plan import Job, plan_job
from genkit.job.run import Summary, run_job
from genkit.options import Options
from genkit.pictures.metadata import config_hash
from genkit.rows.infotext import read_picture_settings
from genkit.rows.pictures import Pictured, check_apart, find_pictures, other_inputs, read_pictures
from genkit.rows.request import canonical, prepared
from genkit.runs.destination import check_folder, run_seed
from genkit.runs.records import read_config, read_results
from genkit.schedulers import Scheduler
from genkit.studies.modelfound import SAME, check_weights, model_of, vae_note
from genkit.version import __version__

REPORT = "replay.json"
ROUNDED = 3  # of 255: the largest difference explained by rounding in another batch size or kernel


@dataclasses.dataclass(frozen=True)
class Replay:
    """Pictures that can be drawn again: checked, with the job that draws them.

    weights: for each picture "same", "not recorded", or a sentence about the difference.
    """

    shots: list[Pictured]
    job: Job
    weights: list[str]

    def describe(self) -> dict[str, Any]:
        """Return what `--dry-run` prints."""
        told = [f"{place(s.path)}: not the same picture: {text}" for s in self.shots for text in _lacking(s, self.job)]
        pairs = zip(self.shots, self.job.rows, strict=True)
        told += [f"{place(s.path)}: guessed: {text}" for s, row in pairs for text in _guessed(s, row, self.job)]
        found = {**self.job.describe(), "weights": ", ".join(dict.fromkeys(self.weights))}
        return {**found, **({"settings": told} if told else {})}


def replay(
    pictures: str | Path | Sequence[str | Path],
    out: str | Path,
    overrides: dict[str, Any] | None = None,
    *,
    model: str | None = None,
    other_weights: bool = False,
    options: Options | None = None,
) -> dict[str, Any]:
    """Draw pictures again into the run folder `out`, as `genkit replay` does; return what replay.json holds.

    pictures: files, or folders of them. overrides: fields of a row for all of them. model: default, the one that the
    pictures name. other_weights: draw even if the weights differ from those of the picture. options: of the run; their
    model is not used. Raises InputError, before anything is loaded, for pictures without settings, for a model that is
    not found or has other weights, and for input pictures and LoRAs that are not beside the picture.
    """
    options = options or Options()
    places = [pictures] if isinstance(pictures, str | Path) else list(pictures)
    folder = run_path(out)
    checked = prepared(canonical(overrides or {}), Path())
    plan = plan_replay(find_pictures(places), checked, options, model, folder, other_weights)
    report, summary = run_replay(plan, folder)
    if summary.exit_code == EXIT_SIGINT:
        raise KeyboardInterrupt  # finished pictures are saved; the same call resumes
    if summary.exit_code == EXIT_SIGTERM:
        raise SystemExit(EXIT_SIGTERM)
    return report


def plan_replay(
    pictures: Sequence[Path], overrides: dict[str, Any], options: Options, model: str | None, out: Path,
    other_weights: bool = False,
) -> Replay:  # fmt: skip
    """Read the pictures' settings and check everything that needs no torch. Raises InputError as `replay` does."""
    check_apart(pictures, out)
    shots, rows = read_pictures(pictures, overrides, options.lora_dir, control_dir=options.control_dir)
    if model is None:
        model = model_of(shots)
    options = dataclasses.replace(options, model=model, seed=run_seed(options.seed, out))
    job = plan_job(rows, options, {})
    check_folder(out)
    weights = check_weights(shots, job.info, other_weights)
    return Replay(shots, job, weights)


def run_replay(plan: Replay, out: Path) -> tuple[dict[str, Any], Summary]:
    """Draw what is missing, compare, and write replay.json; return its content, and how the run ended."""
    summary = run_job(plan.job, out)
    config = read_config(out) or {"binding": {}, "info": {}}
    drawn = {r.id: r for r in read_results(out) if r.index == 0}
    found = []
    for shot, row, weights in zip(plan.shots, plan.job.rows, plan.weights, strict=True):
        result = drawn.get(str(row.id))
        entry: dict[str, Any] = {"picture": str(shot.path), "id": row.id}
        now = _now(plan.job, config)
        if result is None or result.status != "done":
            entry["result"] = "not drawn" if result is None else f"{result.status}: {result.reason}"
        else:
            entry |= {"file": result.file, **_compared(shot, out / str(result.file))}
            with contextlib.suppress(InputError):  # for a run without metadata in its pictures
                about = read_picture_settings(out / str(result.file)).about
                now |= {name: about[key] for name, key in _RECORDED.items() if key in about}
        entry |= {"weights": weights, "changed": [*shot.changed, *_changed(shot, now)]}
        entry |= {"guessed": _guessed(shot, row, plan.job), "lacking": _lacking(shot, plan.job)}
        entry["notes"] = [*shot.notes, *_rounding(entry)]
        found.append(entry)
    report = {
        "pictures": found,
        "identical": sum(entry["result"] == "identical" for entry in found),
        "differing": sum(entry["result"] == "differs" for entry in found),
        **{name: getattr(summary, name) for name in ("folder", "new", "failed", "seconds", "exit_code")},
    }
    with disk(out):
        write_whole(out / REPORT, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        sync_folder(out)
    return report, summary


def _rounding(entry: dict[str, Any]) -> list[str]:
    """Return a note on why a picture may differ slightly although nothing that it records has changed."""
    same = entry["result"] == "differs" and entry["weights"] == SAME and not entry["changed"] and not entry["lacking"]
    return ["nothing that the picture records has changed: a batch of another size is rounded differently"] * (
        same and entry["largest"] <= ROUNDED
    )


def _lacking(shot: Pictured, job: Job) -> list[str]:
    """Return the recorded settings that the run lacks: of a row, the VAE, the refiner, textual inversions."""
    note = vae_note(shot, job.options.vae)
    lacking = [text for text in shot.lacking if text != "refiner" or job.refiner is None]
    told = shot.found.about.get("refiner")
    if isinstance(told, dict) and job.refiner is not None:
        now = {"start": job.refiner_start, "weights": weight_hashes(job.refiner)}
        lacking += [f"refiner: another {name}" for name in now if name in told and told[name] != now[name]]
    told = shot.found.about.get("segmenter")
    if told and job.segmenter is not None and told != job.segmenter.hashes:
        lacking.append("segmenter: another one")
    given = {one.word: one.file.sha256 for one in job.inversions.used}
    for word, digest in shot.found.about.get("embeddings", {}).items():
        if given.get(word) != digest:
            lacking.append(
                f"textual inversion {shown(word)}: {'another file' if word in given else 'give --embedding'}"
            )
    return [*lacking, *([] if note is None else [note])]


def _compared(shot: Pictured, drawn: Path) -> dict[str, Any]:
    """Return the result, and the largest and the mean difference of the pixels, 0 to 255."""
    import numpy as np

    from genkit.pictures.images import read_image

    before, after = read_image(shot.path), read_image(drawn)
    if before.size != after.size:
        sizes = [f"{width}x{height}" for width, height in (before.size, after.size)]
        return {"result": "another size", "size": " -> ".join(sizes)}
    form = str(shot.found.about.get("format", ""))
    if form.partition(",")[0] in ("jpeg", "webp", "jxl") and drawn.suffix == ".png":  # compress it in the same way
        with contextlib.suppress(InputError, ValueError):
            after = _encoded(after, form)
    difference = np.abs(np.asarray(before, np.int16) - np.asarray(after, np.int16))
    largest = int(difference.max())
    found = {"result": "differs" if largest else "identical", "largest": largest}
    return {**found, "mean": round(float(difference.mean()), 6)}


def _encoded(picture: Any, form: str) -> Any:
    import numpy as np

    from genkit.pictures.encoders import encoding
    from genkit.pictures.images import read_image

    name, _, quality = form.partition(", quality ")
    return read_image(encoding(name, int(quality)).encode(np.asarray(picture)))


def _now(job: Job, config: dict[str, Any]) -> dict[str, Any]:
    """Return the current versions and settings by their names in the report. config: run.json."""
    binding, info = config["binding"], config["info"]
    return {
        "genkit": __version__, "torch": info.get("torch"), "device": binding.get("device"),
        "dtype": binding.get("dtype"), "attention": info.get("attention"),
        "scheduler config": config_hash(job.info.scheduler_config), "tuned plans": binding.get("tuned"),
    }  # fmt: skip


def _changed(shot: Pictured, now: dict[str, Any]) -> list[str]:
    """Return a line for each recorded version or setting that has changed."""
    about = shot.found.about
    before = {name: about.get(key) for name, key in _RECORDED.items()}
    if about["form"] != "genkit":
        before = {}
    lines = [
        f"{name}: {_short(value)} -> {_short(now[name])}"
        for name, value in before.items()
        if value is not None and value != now[name]
    ]
    return [*lines, *other_inputs(shot)]


def _short(value: Any) -> str:
    return (
        ", ".join(f"{k} {v[:12]}…" for k, v in value.items())
        if isinstance(value, dict)
        else shown(value, 120).strip("'")
    )


def _guessed(shot: Pictured, row: Any, job: Job) -> list[str]:
    found = []
    for name in shot.guessed:
        value = getattr(row, name)
        if name == "scheduler" and value is None:
            value = f"the model's own, {Scheduler.from_config(job.info.scheduler_config).solver}"
        if name == "seed":
            value = f"{row.seed_of(0, job.options.seed)}, derived from --seed"
        if value is not None:
            found.append(f"{name}: {value}")
    return found


def lines_of(report: dict[str, Any]) -> list[str]:
    """Return the report as text: a line for each picture with its notes below, and a summary."""
    names = [place(entry["picture"]) for entry in report["pictures"]]
    width = max(map(len, names), default=0)
    lines = []
    for name, entry in zip(names, report["pictures"], strict=True):
        result = entry["result"]
        if result == "differs":
            result += f": largest difference {entry['largest']} of 255, mean {entry['mean']:g}"
        result += f": {entry['size']}" if "size" in entry else ""
        lines.append(f"{name:<{width}}  {result}")
        lines += [f"  not the same picture: {text}" for text in entry["lacking"]]
        lines += [f"  weights: {entry['weights']}"] if entry["weights"] != "same" else []
        lines += [f"  changed: {text}" for text in entry["changed"]]
        lines += [f"  guessed: {text}" for text in entry["guessed"]]
        lines += [f"  {text}" for text in _rounding(entry)]
    worst = max((entry.get("largest", 0) for entry in report["pictures"]), default=0)
    differing = f"{report['differing']} differ" + (f" by at most {worst} of 255" if worst else "")
    return [*lines, f"{report['identical']} of {len(names)} identical, {differing}"]


_RECORDED = {
    "genkit": "version", "torch": "torch", "device": "device", "dtype": "dtype", "attention": "attention",
    "scheduler config": "config", "tuned plans": "tuned",
}  # fmt: skip
