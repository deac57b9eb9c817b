"""Which textual inversion files a job needs, and which of its rows use them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from genkit.components.tokenizer import known_tokens
from genkit.components.words import Embedding, Words, names_in, used_embeddings
from genkit.errors import InputError, shown
from genkit.options import Options
from genkit.rows.request import Request
from genkit.rows.sdxl import stated_prompts

if TYPE_CHECKING:
    from genkit.components import ModelInfo

LISTED = 20  # rows that --dry-run names


@dataclasses.dataclass(frozen=True)
class Inversions:
    """The textual inversions of a job.

    used: those whose words rows use, which alone are loaded; unused: others that were asked for. rows: for each word
    the ids of the rows that use it.
    """

    used: tuple[Embedding, ...] = ()
    unused: tuple[Embedding, ...] = ()
    rows: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return what `--dry-run` prints: of each word file, vectors, width and rows."""
        return {one.word: self._facts(one) for one in (*self.used, *self.unused)}

    def _facts(self, one: Embedding) -> dict[str, Any]:
        rows = list(self.rows.get(one.word, ()))
        more = [f"… and {len(rows) - LISTED} more"] if len(rows) > LISTED else []
        width = " and ".join(map(str, one.file.widths))
        facts = {"file": str(one.file.path), "vectors": one.file.vectors, "width": width}
        return {**facts, "rows": ", ".join([*rows[:LISTED], *more]) or "none"}

    def binding(self, recorded: Mapping[str, Any], rows: Sequence[Request]) -> dict[str, Any]:
        """Return the textual inversions for run.json: those in use, and recorded ones whose word no row uses any more.

        recorded: those of earlier starts. One whose word rows still use, but that is not given now, is left out, and so
        the run is refused.
        """
        spelt = {word.lower(): word for word in recorded}
        found = {
            spelt.get(one.word.lower(), one.word): {"sha256": one.file.sha256, "file": str(one.file.path)}
            for one in self.used
        }
        gone = recorded.keys() - {word for _, word in recorded_words(recorded, rows)}
        return {word: one for word, one in recorded.items() if word in gone} | found

    def of_rows(self) -> dict[str, dict[str, str]]:
        """Return {row id: {word: SHA-256 of its file}}."""
        found: dict[str, dict[str, str]] = {}
        for one in self.used:
            for row_id in self.rows[one.word]:
                found.setdefault(row_id, {})[one.word] = one.file.sha256
        return found


def find_inversions(rows: Sequence[Request], options: Options, info: ModelInfo) -> tuple[Inversions, list[str]]:
    """Return the textual inversions of a job, and notes on them, a line each; rows get those of their words.

    Raises InputError for a file that cannot be used, and, naming the row, for embedding:NAME of no file.
    """
    texts = dict.fromkeys(text for row in rows for _, text in stated_prompts(row))
    found = used_embeddings(options.embeddings, options.embedding_dir, texts, info.configs)
    words = Words({one.word: one.file.vectors for one in found})
    folder = () if options.embedding_dir is None else names_in(options.embedding_dir)
    hashes = {one.word: one.file.sha256 for one in found}
    users: dict[str, list[str]] = {}
    for row in rows:
        for field, text in stated_prompts(row):
            try:
                words.check(text, folder)
            except InputError as error:
                raise InputError(f"{row.source or f'row {row.id}'}: {field}: {error}") from None
        for word in dict.fromkeys(word for _, text in stated_prompts(row) for word in words.found(text)):
            users.setdefault(word, []).append(str(row.id))
            row._words[word.lower()] = hashes[word]
    used = tuple(one for one in found if one.word in users)
    unused = tuple(one for one in found if one.word not in users)
    lines = [f"{one.line()}; used by {_rows(len(users[one.word]))}" for one in used]
    lines += [f"{one.line()}; no row uses it" for one in unused]
    known = known_tokens(info.tokenizer) if used and info.tokenizer is not None else frozenset()
    lines += [
        f"{shown(one.word)}: is a word of the model, too: the vectors of {one.file.path.name} are used in its place"
        for one in used
        if {one.word, f"{one.word.lower()}</w>"} & known
    ]
    return Inversions(used, unused, users), lines


def recorded_words(recorded: Mapping[str, Any], rows: Sequence[Request]) -> tuple[tuple[str, str], ...]:
    """Return (file, word) of the textual inversions in run.json whose word rows have."""
    words = Words(dict.fromkeys(recorded, 1))
    used = {word for row in rows for _, text in stated_prompts(row) for word in words.found(text)}
    return tuple((recorded[word]["file"], word) for word in recorded if word in used)


def _rows(count: int) -> str:
    return f"{count} row{'s' if count > 1 else ''}"
