# ruff: noqa: E501  # a table of command lines
"""Two versions of genkit side by side: commands and snippets, their outputs, exit codes and pictures compared.

    python benchmarks/versions.py OLD_TREE NEW_TREE [--only NAME ...]

Each case runs in a fresh folder, once with each tree first on PYTHONPATH (both with the Python that runs this). Compared
are exit code, standard output and error, the SHA-256 of every picture, and every text file of the folder; times, rates,
temporary paths, versions and dates are masked. Of `--help` only the names of commands and options are compared. Every
generate states scheduler and steps, so that a changed default plan does not matter. Prints a table, then what differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

Q = "--scheduler ddim --steps 3 --device cpu"  # quick and explicit
TXT = "a red fox\n# a comment\n\na green apple on a yellow background\n"
JSONL = """\
{"prompt": "a red fox", "id": "fox", "seed": 4, "num_images": 2, "steps": 3, "cfg_scale": 4, "sampler": "dpmpp_2m_karras"}
{"prompt": "an owl", "negative_prompt": "red", "steps": 4, "scheduler": "sde-dpmpp_2m", "guidance_interval": [0.2, 0.9]}
{"prompt": "a pizza", "seed": [1, 9], "scheduler": {"solver": "unipc", "spacing": "trailing"}, "steps": 3, "meta": {"a": [1]}}
{"prompt": "a cat", "scheduler": "pc", "steps": 5, "labels": ["a cat", "a dog"], "num_images": 3, "keep": 1}
{"prompt": "a star", "scheduler": "tuned", "steps": 8}
{"prompt": "a blue fox", "image": "in.png", "strength": 0.6, "scheduler": "ddim", "steps": 4}
{"prompt": "a blue fox", "image": "in.png", "mask_image": "mask.png", "scheduler": "euler", "steps": 4}
"""
CSV = 'prompt,seed,steps,sampler,size\n"a red fox, sitting",3,3,ddim,128x128\na tree,,4,heun,128X128\n'
YAML = "defaults:\n  scheduler: ddim\n  steps: 3\nrequests:\n  - prompt: a red fox\n  - {prompt: a tree, seed: 5}\n"
GATED = '{"prompt": "a red fox", "keep": 2, "gate": "clip > 0.5", "max_images": 4, "scheduler": "ddim", "steps": 3}\n'
PRUNED = (
    '{"prompt": "a red fox", "num_images": 4, "prune": {"after": 0.5}, "scheduler": "ddim", "steps": 4, "seed": 1}\n'
)
RECIPE = """\
task: text-to-image
model: emoji
data: {path: pictures, missing_captions: error, validation: 0.25, resolution: 128}
train: {steps: 2, batch_size: 2}
evaluate: {every: 0, num_inference_steps: 2, prompts: [a red square]}
"""
DRAW = """\
import hashlib
from pathlib import Path
from PIL import Image, ImageDraw
def picture(path, colour, size=128):
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).ellipse((size // 5, size // 4, size - 20, size - 10), fill=colour)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
picture("in.png", "orange"); picture("photos/a cat/1.png", "brown"); picture("photos/a dog/2.png", "black")
mask = Image.new("L", (128, 128)); mask.paste(255, (0, 0, 64, 128)); mask.save("mask.png")
for i, colour in enumerate(("red", "green", "blue", "yellow", "purple", "orange", "red", "pink")):
    picture(f"pictures/{i}.png", colour); Path(f"pictures/{i}.txt").write_text(f"a {colour} circle")
"""
SNIPPET = """\
import hashlib
from genkit import ClipScorer, ImageToImage, InputError, Request, TextToImage, Unconditional, generate
def show(images): print([hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in images])
"""
EMOJI = SNIPPET + 'gen = TextToImage.from_pretrained("emoji", device="cpu")\n'
RUN = [f"generate p.txt -o run -n 2 {Q}"]  # what most of the cases that look back need


@dataclasses.dataclass
class Case:
    """Command lines of genkit, or Python code (with a newline in it), run one after the other in one folder."""

    steps: list[str]
    files: dict[str, str] = dataclasses.field(default_factory=lambda: {"p.txt": TXT})


CASES: dict[str, Case] = {
    "help": Case(["--help"]),
    **{f"help {c}": Case([f"{c} --help"]) for c in (
        "generate", "tune", "filter", "score", "classify", "inspect", "env", "study", "label", "calibrate", "compare",
        "train", "doctor",
    )},
    "prompt": Case([f'generate --prompt "a red fox" -n 2 --seed 7 -o run --json {Q}']),
    "txt, resumed": Case([*RUN, *RUN]),
    "jsonl, every field": Case(["generate p.jsonl -o run --device cpu"], {"p.jsonl": JSONL}),
    "csv": Case(["generate p.csv -o run --device cpu --num-images 2 --keep 1"], {"p.csv": CSV}),
    "yaml": Case(["generate p.yaml -o run --device cpu --clip none"], {"p.yaml": YAML}),
    "gate until two pass": Case(["generate p.jsonl -o run --device cpu --json"], {"p.jsonl": GATED}),
    "prune": Case(["generate p.jsonl -o run --device cpu --json"], {"p.jsonl": PRUNED}),
    "webp and jpeg": Case([f"generate p.txt -o a --format webp {Q}", f"generate p.txt -o b --format jpeg --quality 80 {Q}"]),
    "dry run": Case([f"generate p.txt -o run --dry-run --json {Q}", f"generate p.txt -o run --dry-run {Q}"]),
    "other seed refused, new run": Case([*RUN, f"generate p.txt -o run --seed 3 {Q}", f"generate p.txt -o run --new-run {Q}"]),
    "changed row": Case([*RUN, "from pathlib import Path\nPath('p.txt').write_text('a red fox\\na pizza\\n')", *RUN]),
    "diverse, dedupe": Case([f"generate p.txt -o run -n 3 --keep 2 --diverse 0.5 --dedupe 0.99 {Q}"]),
    "budget": Case([f"generate p.txt -o run -n 3 --max-total-images 2 {Q}"]),
    "filter": Case([*RUN, 'filter run --where "clip > 0.1 and not nan" --rank-by sharpness --keep 1 --json',
                    "filter run --keep 1 -o best", "filter run -o tar --format webdataset", "filter run -o pq --format parquet"]),
    "score": Case([*RUN, 'score photos --prompt "a cat" --labels "a cat,a dog" --device cpu', "score run --device cpu"]),
    "classify": Case(["classify photos --device cpu", 'classify photos --labels "a cat,a dog" --json --device cpu']),
    "compare, study": Case([*RUN, "generate p.txt -o two -n 2 --scheduler euler --steps 3 --device cpu",
                            "compare run two --json", "compare run two", "study run --json"]),
    "calibrate": Case([f"generate p.txt -o run -n 14 {Q}", "import json\nfrom pathlib import Path\nrows = [json.loads(x) for x in open('run/results.jsonl')]\n"
                       "rows.sort(key=lambda r: r['scores']['clip'])\nnames = [Path(r['file']).stem for r in rows]\n"
                       "Path('v.csv').write_text('image,vote\\n' + ''.join(f'{n},{int(i > 9)}\\n' for i, n in enumerate(names)))",
                       "calibrate run --labels v.csv --precision 0.9 --score clip", "filter run --where @calibrated --json"]),
    "inspect, env": Case(["inspect emoji", "inspect emoji-clip --json", "inspect nowhere"]),
    "doctor": Case(["doctor pictures", "doctor pictures --json", "doctor --recipe r.yaml --json"], {"r.yaml": RECIPE}),
    "train, resume, generate": Case(
        ["train r.yaml -o t --device cpu", "train r.yaml -o t --device cpu", f'generate --prompt "a red circle" --model t -o run {Q}'],
        {"r.yaml": RECIPE},
    ),
    "bad rows": Case([f"generate {name} -o run" for name in ("a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl", "e.csv", "gone.txt")], {
        "a.jsonl": '{"promt": "a fox"}\n', "b.jsonl": '{"prompt": "a", "scheduler": "dppm"}\n', "c.jsonl": '{"prompt": "a", "gate": "clipp > 1"}\n',
        "d.jsonl": '{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n', "e.csv": "prompt,seed\na,4294967296\n",
    }),
    "bad options": Case(["generate p.txt -o run --stepz 3", "generate p.txt -o run --steps 0", "generate p.txt -o run --model nowhere/",
                         "generate p.txt -o run --device tpu", 'filter nowhere --where "clip > 0"', "tune emoji --steps 2",
                         "train r.yaml train.stepz=3", "score photos"], {"p.txt": TXT, "r.yaml": RECIPE}),
    "python": Case([EMOJI + 'show(gen("a red fox", num_images=2, seed=0, num_inference_steps=3, guidance_scale=5).images)\n'
                    'fast = gen.with_scheduler("dpmpp_2m", spacing="karras")\n'
                    'requests = [Request(prompt="a pizza", seed=1, num_inference_steps=3), Request(prompt="an owl", seed=3, num_inference_steps=4)]\n'
                    'show([r.image for r in sorted(fast.stream(requests), key=lambda r: r.seed)])\n'
                    'from PIL import Image\nblue = ImageToImage.from_generator(gen)("a blue fox", image=Image.open("in.png"), strength=0.6,\n'
                    '    seed=2, num_inference_steps=4, guidance_scale=5)\nshow(blue.images)\n'
                    'scorer = ClipScorer.from_pretrained("emoji-clip", device="cpu")\n'
                    'print([round(x, 5) for x in scorer.score(blue.images, "a blue fox")], scorer.classify(blue.images, ["a fox", "a cat"]))']),
    "python errors": Case([EMOJI + 'for bad in ({"guidance_scale": 200.0}, {"width": 100}, {"num_inference_steps": 0}, {"seed": -1}):\n'
                           '    try: gen("a fox", **bad)\n    except InputError as error: print(error)']),
    "python generate": Case([SNIPPET + 'print(generate("p.txt", out="run", defaults={"num_inference_steps": 3, "scheduler": "ddim"}, quiet=True).images)']),
    "schedulers": Case(["import hashlib\nfrom genkit.schedulers import SOLVERS, SPACINGS, Scheduler\nfor solver in SOLVERS:\n"
                        "    for spacing in ('trailing', 'karras', 'linspace'):\n"
                        "        plan = Scheduler(noise='scaled_linear', spacing=spacing, prediction='v_prediction', solver=solver, zero_snr=True).plan(7)\n"
                        "        print(solver, spacing, hashlib.sha256(plan.table.tobytes()).hexdigest()[:12])\nprint(SPACINGS)"]),
}  # fmt: skip
MASKS = [
    (r"\d+(\.\d+)? (images/s|images a second|a second|s\b|seconds|MiB|GiB|GFLOP\S*|min\b|h\b)", "N U"),
    (r'"(seconds|images_per_second|started|machine|genkit|python|slots_full|free|took|images_a_second)": [^,}\n]+', r'"\1": N'),
    (r"(seconds|images_per_second|slots_full|memory_gib.\S+|free)  +\S+", r"\1 N"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?Z?", "DATE"), (r"\b\d+:\d\d(:\d\d)?\b", "CLOCK"), (r"about [\d,.]+", "about N"),
    (r"at the [\d,.]+|[\d,.]+ free|[\d,]+ N U", "N"), (r'"memory": "[^"]*"|"time": "[^"]*"', "ESTIMATE"),
]  # fmt: skip
TEXTS = {".json", ".jsonl", ".csv", ".html", ".yaml", ".txt", ".md"}


def masked(text: str, tree: Path, folder: Path) -> str:
    text = text.replace(str(folder), "HERE").replace(str(tree), "TREE")
    for pattern, word in MASKS:
        text = re.sub(pattern, word, text)
    return text


def run(case: Case, tree: Path) -> tuple[list[str], float]:
    """Return what the case leaves behind on a tree, as lines, and the seconds that it took."""
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    lines: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "here"
        folder.mkdir()
        env |= {"XDG_CACHE_HOME": str(folder.parent / "cache")}
        subprocess.run([sys.executable, "-c", DRAW], cwd=folder, check=True)
        for name, text in case.files.items():
            (folder / name).write_text(text)
        for step in case.steps:
            command = (
                ["-c", step] if "\n" in step or step.startswith("import") else ["-m", "genkit", *shlex.split(step)]
            )
            done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)
            output = done.stdout + done.stderr
            if step.endswith("--help"):
                names = re.findall(r"^  +(-{1,2}[\w-]+(?:, --[\w-]+)*|[a-z]+(?= {2,}[A-Z]))", output, re.MULTILINE)
                output = "\n".join(sorted({n for name in names for n in name.split(", ")}))
            lines += [f"$ {step.splitlines()[0]} -> {done.returncode}", *masked(output, tree, folder).splitlines()]
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"):
            name, data = path.relative_to(folder).as_posix(), path.read_bytes()
            if path.suffix in TEXTS:
                rows = masked(data.decode(), tree, folder).splitlines()
                rows = sorted(rows) if path.name == "results.jsonl" else rows
                lines += [f"# {name}", *rows]
            elif path.suffix in (".png", ".webp", ".jpg"):
                lines.append(f"# {name} {hashlib.sha256(data).hexdigest()[:16]}")
            else:
                lines.append(f"# {name}")
    return lines, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs=2, type=lambda path: Path(path).resolve())
    parser.add_argument("--only", nargs="*", default=list(CASES))
    arguments = parser.parse_args()
    different: dict[str, list[str]] = {}
    with ThreadPoolExecutor(2) as pool:
        for name in arguments.only:
            (old, before), (new, after) = pool.map(lambda tree, name=name: run(CASES[name], tree), arguments.trees)
            if old != new:
                different[name] = list(difflib.unified_diff(old, new, "old", "new", lineterm="", n=1))
            print(
                f"{name:<30} {'DIFFERENT' if old != new else 'same':<10} {len(old):>5} lines {before:6.1f} s {after:6.1f} s",
                flush=True,
            )
    for name, lines in different.items():
        print(f"\n== {name}", *(line[:300] for line in lines[:60]), sep="\n")
    print(f"\n{len(arguments.only) - len(different)} of {len(arguments.only)} cases are the same")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
