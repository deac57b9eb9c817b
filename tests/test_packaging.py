"""The package list, the links and the direction of imports hold as the design says."""

import dataclasses
import inspect
import os
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import genkit
from genkit.options import Options

ROOT = Path(__file__).parent.parent


def test_packages_listed_by_hand_are_those_on_disk() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    outside = [p for name in ("schedulers", "training") for p in (ROOT / name).rglob("__init__.py")]
    on_disk = {".".join(("genkit", *p.parent.relative_to(ROOT).parts)) for p in outside}
    on_disk |= {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "genkit").rglob("__init__.py")}
    assert listed == on_disk


def test_pages_are_part_of_the_package() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert {p.parent.relative_to(ROOT / "genkit").as_posix() for p in (ROOT / "genkit").rglob("*.html")} == {
        "pages", "serve/page"
    }  # fmt: skip
    assert data["genkit.pages"] == ["*.css", "*.html", "*.js"] and data["genkit.serve"] == ["page/*"]


@pytest.mark.parametrize("name", ["schedulers", "training"])
def test_links_point_to_the_top_level(name: str) -> None:
    link = ROOT / "genkit" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"


def test_imports_point_one_way() -> None:
    """The contracts of pyproject.toml: packages import those below them, and there is no circle in any of them."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    found = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert found.returncode == 0, found.stdout


def test_generate_takes_every_option_of_a_run() -> None:
    options = {field.name for field in dataclasses.fields(Options)}
    assert options <= set(inspect.signature(genkit.generate).parameters)


def test_light_modules_do_not_import_torch() -> None:
    """Command line, readers, run folder and schedulers start without torch, diffusers or transformers."""
    modules = (
        "cli job rows.request rows.prompts rows.settings runs.run selection.decide selection.calibrate selection.votes"
        " pages.gallery pages.label pictures.images sampling.draws schedulers scoring.gates components studies.score"
        " studies.study studies.compare datasets.sources training.doctor"
        " serve.server vision.models vision.words vision.preprocess studies.detect rows.detecting"
    )
    code = f"import sys\nfor m in {modules.split()!r}:\n    __import__('genkit.' + m)\n"
    code += "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


def test_constraints_pin_all_that_the_tests_need() -> None:
    """pip would otherwise try releases for minutes, and the set would change from day to day."""
    pinned = {
        canonicalize_name(line.partition("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    left, seen = [("genkit-diffusion", frozenset({"test"}))], set[tuple[str, frozenset[str]]]()
    while left:
        name, extras = left.pop()
        for text in distribution(name).requires or ():
            wanted = Requirement(text)
            needed = (canonicalize_name(wanted.name), frozenset(wanted.extras))
            marker = wanted.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                left += [needed] if needed not in seen else []
                seen.add(needed)
    assert sorted({name for name, _ in seen} - pinned - {"genkit-diffusion"}) == []
