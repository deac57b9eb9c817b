"""timm for tests, also beside a torch that torchvision does not fit; tiny networks of it in its layout on the hub."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

LABELS = ("tabby", "dog", "red fox", "house", "green apple")
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
CONVNEXT: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
RESNET: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}
# Of each architecture: its arguments, and how pictures are prepared for it
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vit_tiny_patch16_224": (VIT, {"input_size": (3, 32, 32), "crop_pct": 0.9, "mean": (0.5,) * 3, "std": (0.5,) * 3}),
    "convnext_atto": (CONVNEXT, {"input_size": (3, 48, 48), "crop_pct": 1.0, "crop_mode": "squash"}),
    "resnet18": (RESNET, {"input_size": (3, 33, 33), "crop_pct": 0.875, "interpolation": "bilinear"}),
}


class _Names(type):
    """Anything of torchvision that timm names when it is imported, and no classifier uses."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Stub(ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _Names(name, (), {})
        setattr(self, name, found)
        return found


@contextmanager
def _stubs() -> Iterator[None]:
    """Have modules of torchvision without content for a while."""
    parts = ("", ".models", ".models.feature_extraction", ".ops", ".ops.misc", ".transforms",
             ".transforms.functional", ".datasets", ".utils")  # fmt: skip
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "torchvision"}
    for name in before:
        del sys.modules[name]
    for part in parts:
        module = _Stub("torchvision" + part)
        sys.modules["torchvision" + part] = module
        parent, _, last = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules.update(before)


def import_timm() -> Any:
    """Return timm; the test is skipped where it is not installed."""
    if "timm" not in sys.modules and importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    try:
        import timm
    except (ImportError, RuntimeError):  # no torchvision, or none that fits this torch
        for name in [n for n in sys.modules if n.partition(".")[0] == "timm"]:
            del sys.modules[name]
        with _stubs():
            import timm
    return timm


def tiny_timm(folder: Path, name: str = "vit_tiny_patch16_224", **fields: Any) -> Path:
    """Write a tiny network of timm with LABELS as timm writes it for the hub. fields: of its config.json."""
    timm = import_timm()
    arguments, prepared = CASES[name]
    torch.manual_seed(13)
    model = timm.create_model(name, num_classes=len(LABELS), pretrained_cfg_overlay=prepared, **arguments)
    with torch.no_grad():  # as drawn it says the same of every picture
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 2 / weight[0].numel() ** 0.5)
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        model.train()(torch.randn(16, 3, 64, 64))  # statistics of noise, or every logit is huge
    config = {"label_names": list(LABELS), "model_args": arguments, **fields}
    timm.models.save_for_hf(model.eval(), folder, model_config=config, safe_serialization=True)
    return folder
