"""Probes of attention backends: none is called with what it cannot take, and answers are kept for the next process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from genkit.device import attention, probes
from genkit.device.attention import BACKENDS
from genkit.device.probes import Probe, known

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# (batch, heads, queries, keys, width): widths that no kernel is built for, nothing at all, more rows than a grid has
SHAPES = [(2, 3, 5, 7, 3), (1, 2, 9, 9, 41), (0, 2, 4, 4, 16), (1, 2, 0, 4, 16), (1, 2, 4, 0, 16), (70_000, 1, 2, 2, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "xformers"])
def test_every_backend_computes_or_refuses(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, heads, length, others, width = shape
    q = torch.randn(batch, heads, length, width, device=DEVICE).to(dtype)
    k, v = (torch.randn(batch, heads, others, width, device=DEVICE).to(dtype) for _ in range(2))
    with torch.inference_mode():
        try:
            out = BACKENDS[name](q, k, v)
        except (NotImplementedError, RuntimeError, IndexError, ZeroDivisionError):
            return
    assert out.shape == q.shape
    weights = (q.double() @ k.double().mT / width**0.5).softmax(dim=-1)
    if others:
        assert torch.allclose(out.double(), weights @ v.double(), atol=0.05 if dtype.itemsize == 2 else 1e-2)


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
def test_operators_of_a_gpu_are_asked_before_they_are_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    class Operators:
        def __getattr__(self, operator: str) -> Any:
            called.append(operator)
            return lambda *_: [torch.empty(())]

    monkeypatch.setattr(attention, "aten", Operators())
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(2, 3, 64, 41, device="cuda", dtype=torch.float32)
        with pytest.raises(NotImplementedError):
            BACKENDS[name](q, q, q)
    assert not called


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> torch.device:
    """A machine with a GPU, as far as the probes can see, and an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    probes._answers.cache_clear()
    return torch.device("cuda")


def test_answers_are_kept_for_the_next_process(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    probed: list[Any] = []

    def probe(attend: Any, *given: Any) -> Probe:
        probed.append(given)
        return Probe(ms=1.5) if attend is BACKENDS["flash"] else Probe("no kernel")

    monkeypatch.setattr(probes, "probe", probe)
    for _ in range(3):
        assert known("flash", gpu, torch.float16, 40, False) == Probe(ms=1.5)
        assert known("cudnn", gpu, torch.float16, 40, True) == Probe("no kernel")
        assert len(probed) == 2
        probes._answers.cache_clear()  # as in another process
    assert known("flash", gpu, torch.bfloat16, 40, False) == Probe(ms=1.5) and len(probed) == 3, "another dtype"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another card")
    assert known("flash", gpu, torch.float16, 40, False) == Probe(ms=1.5) and len(probed) == 4
    kept = tmp_path / "genkit" / probes.KEPT
    assert len(json.loads(kept.read_text())) == 3
    machine = probes._machine(gpu, torch.float16)
    for count, text in enumerate(('{"torn', json.dumps({machine: []})), 5):  # is as good as none
        kept.write_text(text)
        probes._answers.cache_clear()
        assert known("flash", gpu, torch.float16, 40, False) == Probe(ms=1.5) and len(probed) == count


def test_without_a_cache_folder_it_goes_on(gpu: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(probes, "probe", lambda *_: Probe(ms=2.0))
    assert known("flash", gpu, torch.float16, 40, False) == Probe(ms=2.0)


DEADLY = """
import os
def memory_efficient_attention(q, k, v):
    os.kill(os.getpid(), 11)
"""
WORKING = """
from torch.nn.functional import scaled_dot_product_attention
def memory_efficient_attention(q, k, v):
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
"""


@pytest.mark.parametrize("code", [DEADLY, WORKING], ids=["deadly", "working"])
def test_xformers_is_tried_in_a_process_that_it_may_bring_down(code: str, tmp_path: Path) -> None:
    """A stand-in for the package: one whose kernel kills the process, as builds for another torch do."""
    package = tmp_path / "site" / "xformers"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "ops.py").write_text(code)
    script = """
import torch
from genkit.device.probes import choose, known
cpu = torch.device("cpu")
print(known("xformers", cpu, torch.float32, 16, False), choose("xformers", cpu, torch.float32, 40, True), sep="|")
"""
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    given = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=given)
    assert done.returncode == 0, done.stderr
    probe, chosen = done.stdout.strip().split("|")
    if code == WORKING:
        assert probe == "Probe(reason=None, ms=None)" and chosen == "('xformers', None)"
    else:
        reason = f"brings the process down (exit code {-signal.SIGSEGV})"
        assert probe == f"Probe(reason={reason!r}, ms=None)" and chosen == f"('sdpa', {reason!r})"


def test_a_probe_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(probes.importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(probes, "CHILD_SECONDS", 0.01)
    probes._answers.cache_clear()
    assert known("xformers", torch.device("cpu"), torch.float32, 16, False).reason == "takes more than 0 s"
    probes._answers.cache_clear()
