"""A table of a run of which workers left parts reads them too."""

from __future__ import annotations

import json
from pathlib import Path

from genkit.durable import json_line
from genkit.runs.columns import Wanted
from genkit.runs.records import RESULTS, part_of, read_results
from genkit.runs.table import Table, read_row_table
from genkit.studies.filter import refilter
from tests.judged_run import judged_run


def test_parts_are_decided_on_with_the_rest(tmp_path: Path) -> None:
    folder = judged_run(tmp_path / "run", lambda n, k: {"clip": 0.1 * n - 0.05 * k, "nan": False})
    whole = refilter(folder, "clip > 0", "clip", 1)
    selection = (folder / "selection.json").read_bytes()
    lines = (folder / RESULTS).read_text().splitlines(keepends=True)
    (folder / RESULTS).write_text("".join(lines[: len(lines) // 2]))
    part_of(folder, "w0000").write_text("".join(lines[len(lines) // 2 :]) + lines[-1][:20])
    assert refilter(folder, "clip > 0", "clip", 1) == whole
    assert json.loads((folder / "selection.json").read_bytes()) == json.loads(selection)
    table = Table(folder, read_row_table(folder), Wanted())
    found = {(r.id, r.index): json_line(r.to_json()) for r in table.whole(range(len(table)))}
    assert found == {(r.id, r.index): json_line(r.to_json()) for r in read_results(folder)}
