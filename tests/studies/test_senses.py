"""Pictures are read ahead of the network: in order, a part ahead, and no further when nobody asks for more."""

from __future__ import annotations

import threading
from pathlib import Path

from genkit.studies.senses import read_ahead

FILES = [Path(f"{n}.png") for n in range(11)]


def test_parts_come_in_order_and_the_next_one_is_read_meanwhile() -> None:
    seen: list[str] = []
    ahead = threading.Event()

    def read(file: Path) -> int:
        seen.append(file.stem)
        if file.stem == "7":
            ahead.set()
        return int(file.stem)

    parts = read_ahead(FILES, read, 4)
    first = next(parts)
    assert ahead.wait(120), "the second part is read while the first one is looked at"
    assert "8" not in seen
    assert [n for part in (first, *parts) for _, n in part] == list(range(11))
    assert [file for file, _ in first] == FILES[:4] and list(read_ahead([], read, 4)) == []


def test_what_nobody_asks_for_is_not_read() -> None:
    seen: list[str] = []
    parts = read_ahead(FILES, lambda file: seen.append(file.stem), 2)
    next(parts)
    parts.close()  # type: ignore[attr-defined]
    assert len(seen) <= 4
