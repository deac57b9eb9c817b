"""The package list, the links and the direction of imports hold as the design says."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module may import those before it in its line, and of other lines only what ALLOWED adds.
LAYERS = ["errors", "schedulers", "request", "settings", "denoiser", "engine", "stream", "generators", "job", "cli"]


def sources() -> list[Path]:
    found = [*(ROOT / "genkit").rglob("*.py"), *(ROOT / "schedulers").glob("*.py"), *(ROOT / "training").glob("*.py")]
    return sorted({p.resolve() for p in found})


def imports(path: Path, runtime_only: bool = True) -> set[str]:
    """The genkit modules that a file imports, at any depth; those under TYPE_CHECKING left out."""
    tree = ast.parse(path.read_text())
    typing_only: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            typing_only |= {id(n) for n in ast.walk(node)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if runtime_only and id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import on line {node.lineno}"
            names.add(str(node.module))
    return {n for n in names if n.split(".")[0] == "genkit"}


def test_packages_listed_by_hand_are_those_on_disk() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    on_disk = {
        "genkit." + p.parent.name for p in ROOT.glob("*/__init__.py") if p.parent.name in ("schedulers", "training")
    }
    on_disk |= {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "genkit").rglob("__init__.py")}
    assert listed == on_disk


def test_pages_are_part_of_the_package() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert {p.name for p in (ROOT / "genkit").glob("*.html")} <= set(data["genkit"])


@pytest.mark.parametrize("name", ["schedulers", "training"])
def test_links_point_to_the_top_level(name: str) -> None:
    link = ROOT / "genkit" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).with_suffix("").parts
    room = room[1:] if room[0] == "genkit" else room
    wanted = {".".join(n.split(".")[1:]) for n in imports(path)}
    layer = room[0]
    if layer in LAYERS:
        later = set(LAYERS[LAYERS.index(layer) + 1 :])
        assert not {w for w in wanted if w.split(".")[0] in later}
    if layer == "schedulers":
        assert {w.split(".")[0] for w in wanted} <= {"schedulers", "errors", "files"}
    if layer == "components":
        assert not {w for w in wanted if w.split(".")[0] in ("generators", "engine", "job", "run", "scoring")}
    if layer == "scoring":
        rooms = {"scoring", "components", "errors", "files", "device", "text", "outofmemory"}
        assert {w.split(".")[0] for w in wanted} <= rooms
    assert "cli" not in wanted or layer in ("__main__", "commands")


def test_light_modules_do_not_import_torch() -> None:
    """Command line, readers, run folder and schedulers start without torch, diffusers or transformers."""
    modules = (
        "cli job request prompts run selection gallery images settings draws schedulers scoring.gates components judge"
        " commands study sources doctor calibrate label compare votes"
    )
    code = f"import sys\nfor m in {modules.split()!r}:\n    __import__('genkit.' + m)\n"
    code += "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
