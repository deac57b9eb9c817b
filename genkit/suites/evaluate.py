"""`genkit evaluate`: draw a suite into a run folder, judge its pictures, and report accuracies with intervals."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit.durable import disk, sync_folder, write_whole
from genkit.errors import EXIT_SIGINT, EXIT_SIGTERM, InputError
from genkit.files import run_path, user_path
from genkit.job.plan import Job, plan_job
from genkit.job.run import Summary, run_job
from genkit.options import Options
from genkit.pages.evaluation import evaluation_page
from genkit.runs.destination import check_folder, run_seed
from genkit.runs.records import read_config, read_results
from genkit.scoring.senses import NAMES as SENSES
from genkit.suites import pixels
from genkit.suites.against import CLIP, Against, distances, find_against
from genkit.suites.suite import Suite, as_verify, read_suite
from genkit.suites.verdicts import judge_rows, mean_score, overall, pictures_hash, task_table
from genkit.version import __version__

EVALUATION, PAGE = "evaluation.json", "evaluation.html"
NUM_IMAGES = 4  # for each prompt, as in GenEval
_SETTINGS = ("num_images", "num_inference_steps", "guidance_scale", "scheduler", "width", "height")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked evaluation: the suite, the job that draws it, and the reference pictures for distances."""

    suite: Suite
    job: Job
    against: Against | None = None

    def describe(self) -> dict[str, Any]:
        """Return what `--dry-run` prints."""
        tasks = {task: self.suite.tasks.count(task) for task in dict.fromkeys(self.suite.tasks)}
        told: dict[str, Any] = {"suite": self.suite.name, "suite_sha256": self.suite.sha256, "tasks": tasks}
        if self.against is not None:
            told["against"] = {"folder": str(self.against.folder), "pictures": len(self.against.files)}
        return {**told, **self.job.describe()}


def evaluate(
    model: str,
    suite: str | Path | Sequence[Mapping[str, Any]],
    out: str | Path | None = None,
    *,
    num_images: int = NUM_IMAGES,
    defaults: dict[str, Any] | None = None,
    against: str | Path | None = None,
    features: str = CLIP,
    options: Options | None = None,
) -> dict[str, Any]:
    """Evaluate a model on a suite in the run folder `out`, as `genkit evaluate` does; return its evaluation.json.

    suite: a file, "geneval", "emoji", or rows as dictionaries with prompt, verify and task. out: default, a
    folder in runs/ that is named after model and suite. defaults: fields for rows that do not state them. against: a
    folder of reference pictures for distances. options: of the run; their model is not used. Raises InputError, before
    anything is loaded, for bad input.
    """
    options = options or Options()
    folder = out_folder(model, suite) if out is None else run_path(out)
    place = None if against is None else run_path(against)
    plan = plan_evaluation(
        model, suite, folder, options, {"num_images": num_images, **(defaults or {})}, place, features
    )
    found, summary = run_evaluation(plan, folder)
    if summary.exit_code == EXIT_SIGINT:
        raise KeyboardInterrupt  # finished pictures are saved; the same call resumes
    if summary.exit_code == EXIT_SIGTERM:
        raise SystemExit(EXIT_SIGTERM)
    if found is None:
        raise InputError(
            f"{folder}: a limit was reached before every picture was drawn; call again with a higher limit"
        )
    return found


def out_folder(model: str, suite: str | Path | Sequence[Mapping[str, Any]]) -> Path:
    """Return the default run folder of an evaluation."""
    name = Path(suite).stem if isinstance(suite, str | Path) else "suite"
    plain = [re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") for text in (Path(model).name or model, name)]
    return Path("runs") / f"{plain[0]}-on-{plain[1]}"


def plan_evaluation(
    model: str, suite: str | Path | Sequence[Mapping[str, Any]], out: Path, options: Options, defaults: dict[str, Any],
    against: Path | None = None, features: str = CLIP,
) -> Plan:  # fmt: skip
    """Read the suite and check everything that needs no torch. Raises InputError as `evaluate` does."""
    if against is None and features != CLIP:
        raise InputError("--features: says what --against compares, and that is not given")
    asked = read_suite(suite)
    own = isinstance(suite, str) and suite == "emoji" and options.clip == "auto"
    scorers = options.scorers
    if asked.reads & set(pixels.NAMES) and pixels.pixel_scores not in scorers:
        scorers = (*scorers, pixels.pixel_scores)
    options = dataclasses.replace(
        options, model=model, scorers=scorers, clip="emoji-clip" if own else options.clip,
        seed=run_seed(options.seed, out),
    )  # fmt: skip
    try:
        job = plan_job(asked.rows, options, defaults)
    except InputError as error:
        raise InputError(as_verify(str(error))) from None
    if [row.id for row in job.rows] != [row.id for row in asked.rows]:
        raise InputError("prompt: a suite's prompt is one text; of its templates several rows would come")
    check_folder(out, user_path(suite) if isinstance(suite, str | Path) and Path(suite).suffix else None)
    drawn = sum(row.num_images for row in job.rows)
    return Plan(asked, job, None if against is None else find_against(against, features, job.clip, drawn))


def run_evaluation(plan: Plan, out: Path) -> tuple[dict[str, Any] | None, Summary]:
    """Draw what is missing, judge by the stored scores, and write evaluation.json and evaluation.html.

    Return the content of evaluation.json, None if the run stopped before all pictures were drawn, and its summary.
    """
    summary = run_job(plan.job, out)
    if summary.stopped:
        return None, summary
    counts = {str(row.id): row.num_images for row in plan.job.rows}
    results = [r for r in read_results(out) if r.index < counts.get(r.id, 0)]
    config = read_config(out) or {"binding": {}}
    rows = judge_rows(plan.suite, plan.job.rows, results)
    tasks = task_table(rows)
    images = [image for row in rows for image in row["images"]]
    found: dict[str, Any] = {
        "suite": {"name": plan.suite.name, "sha256": plan.suite.sha256, "rows": len(rows)},
        "model": {"name": plan.job.info.name, "weights": config["binding"].get("model", {}).get("weights")},
        "settings": {name: _common([getattr(row, name) for row in plan.job.rows]) for name in _SETTINGS},
        "seed": plan.job.options.seed, "genkit": __version__, "judge": _judge(plan, config["binding"]),
        "pictures": pictures_hash(results), "tasks": tasks, "overall": overall(tasks),
        "clip": mean_score("clip", plan.job.rows, results),
        "failed": sum("failed" in image for image in images), "unknown": sum("unknown" in image for image in images),
    }  # fmt: skip
    if plan.against is not None:
        found["against"] = distances(plan.against, out, results, plan.job.options, plan.job.clip)
    found["rows"] = rows
    with disk(out):
        write_whole(out / PAGE, evaluation_page(found, out.resolve().name).encode("utf-8", "backslashreplace"))
        write_whole(out / EVALUATION, (json.dumps(found, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        sync_folder(out)
    return found, summary


def _judge(plan: Plan, binding: Mapping[str, Any]) -> dict[str, Any]:
    """Return the models and scorers that the verdicts depend on: only evaluations with equal ones are comparable."""
    found: dict[str, Any] = {}
    if plan.suite.needs_clip():
        found["clip"] = (binding.get("clip") or {}).get("weights")
    for name in ("aesthetic", *SENSES):
        if name in binding and (name in SENSES or name in plan.suite.reads):
            found[name] = binding[name]
    found["scorers"] = [plugin.name for plugin in plan.job.scorers if plan.suite.reads & set(plugin.names)]
    return found


def _common(values: Sequence[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else "varies"


def described(found: Mapping[str, Any], folder: Path) -> str:
    """Return an evaluation as text."""
    s, n = found["suite"], found["settings"]["num_images"]
    each = f"{n} picture{'s' * (n != 1)} each" if isinstance(n, int) else "different numbers of pictures"
    lines = [f"{found['model']['name']} on the suite {s['name']}: {s['rows']:,} prompts, {each}"]
    table = [("task", "prompts", "pictures", "right", "(95 %)", "prompts with one right", "(95 %)")]
    for t in found["tasks"]:
        table.append((t["task"], f"{t['prompts']:,}", f"{t['images']:,}", *_cells(t)))
    table.append(("mean of tasks", "", "", *_cells(found["overall"])))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines += ["  ".join(f"{cell:<{wide}}" for cell, wide in zip(row, widths, strict=True)).rstrip() for row in table]
    if found["clip"] is not None:
        ends = found["clip"]["interval"]
        interval = "" if None in ends else f" ({_ends(ends, '.4f')})"  # a single prompt has none
        lines.append(f"clip {found['clip']['mean']:.4f}{interval}")
    for name in ("fid", "kid", "cmmd"):
        if name in found.get("against", {}):
            value, low, high = found["against"][name]
            lines.append(f"{name} {value:.4g} ({low:.4g} to {high:.4g})")
    lines += found.get("against", {}).get("notes", [])
    for name, what in (("failed", "failed"), ("unknown", "lack a score that their expression reads")):
        lines += [f"{found[name]:,} pictures {what}, and count as wrong"] if found[name] else []
    return "\n".join([*lines, f"what went wrong: {folder / PAGE}"])


def _cells(shares: Mapping[str, Any]) -> tuple[str, str, str, str]:
    right, some = (_ends(shares[name], ".1%") for name in ("interval", "any_interval"))
    return f"{shares['right']:.1%}", right, f"{shares['any']:.1%}", some


def _ends(ends: Sequence[float | None], form: str) -> str:
    return " to ".join("?" if x is None else format(x, form) for x in ends)
