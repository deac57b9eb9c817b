"""Prompt files for tests: write one, point it at pictures, get its refusal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from genkit.errors import InputError
from genkit.rows.prompts import read_prompts


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 and message.encode()
    assert message.startswith(str(path))
    return message


def write(folder: Path, name: str, data: str | bytes) -> Path:
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder / name


def row(**fields: Any) -> str:
    return json.dumps(fields) + "\n"


def with_pictures(folder: Path) -> Path:
    """Fill a folder with what rows may point at: a picture, a text, a pipe, a link that leads out."""
    Image.new("RGB", (8, 8)).save(folder / "good.png")
    (folder / "text.png").write_text("no picture")
    os.mkfifo(folder / "fifo")
    (folder / "in").mkdir()
    (folder / "in/out.png").symlink_to("../good.png")
    return folder
