"""Words of prompts that stand for textual inversions: found as whole words in any case, and replaced by tokens."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from genkit.components.embeddingfile import PICTURE_MARK, EmbeddingFile, check_fit, is_embedding, read_embedding
from genkit.components.single import kind_of
from genkit.components.weights import PICKLES, read_header
from genkit.errors import InputError, nearest, shown
from genkit.files import place, user_path

Configs = Mapping[str, Mapping[str, Any]]
FILES = (".safetensors", *PICKLES, ".png")
MOST_FILES = 100_000  # names in a folder
PREFIX = "embedding:"  # before a word, the syntax of ComfyUI
_NAMED = re.compile(rf"(?<!\w){PREFIX}([^\s,:()\[\]{{}}|]+)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Embedding:
    """A word of prompts, and the file whose vectors it stands for."""

    word: str
    file: EmbeddingFile

    def line(self) -> str:
        """Return the message for the user when a run begins."""
        width = " and ".join(map(str, self.file.widths))
        several = "s" if self.file.vectors > 1 else ""
        return f"{place(self.file.path)}: {shown(self.word)} is {self.file.vectors} vector{several} of width {width}"


def as_word(word: str) -> str:
    """Return a regular expression that matches a learned word as a whole word: not the sks in "asks"."""
    before, after = (r"\b" if re.match(r"\w", character) else "" for character in (word[0], word[-1]))
    return f"{before}{re.escape(word)}{after}"


class Words:
    """The words of textual inversion files, and the tokens that stand for their vectors.

    As in diffusers, word_1 is the second vector of a word of several, and the word alone is all of them. Case does not
    matter, as it does not to CLIP's tokenizer. The tokens are of characters that no prompt has, so that a word may be
    one that the tokenizer knows. vectors: how many each word has. refused: words whose file cannot be used, and why.
    """

    def __init__(self, vectors: Mapping[str, int], refused: Mapping[str, str] | None = None) -> None:
        self.refused = dict(refused or {})
        self.tokens = {
            word: [f"\ue000{number}.{i}\ue001" for i in range(count)]
            for number, (word, count) in enumerate(vectors.items())
        }
        several = {f"{word}_{i}": (word, i) for word, tokens in self.tokens.items() for i in range(1, len(tokens))}
        self._names: dict[str, tuple[str, list[str]]] = {
            **{name.lower(): (word, [self.tokens[word][i]]) for name, (word, i) in several.items()},
            **{word.lower(): (word, []) for word in self.refused},
            **{word.lower(): (word, tokens) for word, tokens in self.tokens.items()},
        }

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        names = sorted(self._names, key=len, reverse=True)  # the longest first
        alone = "|".join(as_word(name) + ("(?!_[0-9])" if len(self._names[name][1]) > 1 else "") for name in names)
        file = rf"(?<!\w){PREFIX}(?:[^\s,:()]*[/\\])?(?P<file>{'|'.join(map(re.escape, names))})(?!\w)"
        return re.compile(rf"{file}(?:\.safetensors\b|\.pt\b|\.bin\b)?|(?P<alone>{alone})", re.IGNORECASE)

    def found(self, text: str) -> list[str]:
        """Return the words that a prompt uses, each once."""
        return list(dict.fromkeys(word for word, _, _ in self._matches(text)))

    def expanded(self, text: str) -> str:
        """Return the prompt with tokens in place of the words."""
        parts, end = [], 0
        for _, tokens, match in self._matches(text):
            parts += [text[end : match.start()], " ".join(tokens)]
            end = match.end()
        return "".join([*parts, text[end:]])

    def check(self, text: str, others: Iterable[str] = ()) -> None:
        """Raise InputError for a word whose file is refused, and for embedding:NAME that is no word.

        others: names that may have been meant.
        """
        for word in self.found(text) if self.refused else ():
            if word in self.refused:
                raise InputError(self.refused[word])
        if PREFIX not in text.lower():
            return
        known = {match.start() for _, _, match in self._matches(text)}
        for match in _NAMED.finditer(text):
            if match.start() not in known:
                hint = nearest(match[1], [*self.tokens, *self.refused, *others])
                hint = hint or ": give its file with --embedding, or its folder with --embedding-dir"
                raise InputError(f"{shown(match[0])}: there is no such embedding{hint}")

    def _matches(self, text: str) -> Iterator[tuple[str, list[str], re.Match[str]]]:
        """Yield each word, the tokens that it stands for here, and where it is."""
        for match in self._pattern.finditer(text) if self._names else ():
            written = match["file"] or match["alone"]
            name = written.lower()
            if name not in self._names:  # letters whose lower case the regular expression knows better
                name = next(name for name in self._names if re.fullmatch(re.escape(name), written, re.IGNORECASE))
            word, tokens = self._names[name]
            following = re.compile(rf"\s+{re.escape(name)}_1(?!\w)", re.IGNORECASE)
            # The prompt lists all of its tokens itself
            listed = len(tokens) > 1 and following.match(text, match.end()) is not None
            yield word, tokens[:1] if listed else tokens, match


def given_embeddings(given: Iterable[Any], configs: Configs) -> list[Embedding]:
    """Return the embeddings of files, each FILE, FILE:WORD, or (file, word).

    The word is the file's own, or its name without suffix, unless it is stated. configs: of the model's networks.
    Raises InputError for a file that is none or does not fit the model, and for two files with one word.
    """
    found: dict[str, Embedding] = {}
    for entry in given:
        path, word = _file_and_word(entry)
        one = _read(path, word, configs)
        other = found.setdefault(one.word.lower(), one)
        if other is not one and not _alike(one, other):
            raise InputError(_twice(other.file.path, one.file.path, one.word))
    return list(found.values())


def used_embeddings(
    given: Iterable[Any], folder: str | Path | None, texts: Iterable[str], configs: Configs
) -> list[Embedding]:
    """Return the embeddings that are given, and those of a folder whose name is a word of `texts`.

    No other file of the folder is opened. Raises InputError as `given_embeddings` does.
    """
    found = {one.word.lower(): one for one in given_embeddings(given, configs)}
    inside = {} if folder is None else names_in(folder)
    names = Words({one.word: 1 for one in found.values()} | {files[0].stem: 1 for files in inside.values()})
    for name in dict.fromkeys(name.lower() for text in texts for name in names.found(text)):
        try:
            path = _one_of(inside.get(name, []))
            one = None if path is None else _read(path, path.stem, configs)
            if one is not None and not _alike(one, found.setdefault(name, one)):
                raise InputError(_twice(found[name].file.path, one.file.path, one.word))
        except InputError as error:
            raise InputError(f"--embedding-dir: for the word {shown(name)}: {error}") from None
    return list(found.values())


def all_embeddings(
    given: Iterable[Any], folder: str | Path | None, configs: Configs
) -> tuple[list[Embedding], dict[str, str]]:
    """Return the embeddings that are given, and all of a folder that fit; and {word: why not} of its others.

    For generators, which know no prompts yet. Raises InputError for those that are given, as `given_embeddings` does.
    """
    found = {one.word.lower(): one for one in given_embeddings(given, configs)}
    refused = {}
    for name, files in ({} if folder is None else names_in(folder)).items():
        try:
            path = _one_of(files)
            one = None if path is None else _read(path, path.stem, configs)
            if one is not None and not _alike(one, found.setdefault(name, one)):
                raise InputError(_twice(found.pop(name).file.path, files[0], one.word))
        except InputError as error:
            refused[files[0].stem] = str(error)
    return list(found.values()), refused


def embedding_in(name: str) -> EmbeddingFile | None:
    """Return the textual inversion that is called so, a path, or None for anything else."""
    path = user_path(name)
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return None
    return read_embedding(path, kind_of) if is_embedding({t.key: t for t in read_header(path)}) else None


def _read(path: Path, word: str | None, configs: Configs) -> Embedding:
    file = read_embedding(path, kind_of)
    word = word if word is not None else file.name or path.stem
    where = f"{place(path)}: word {shown(word)}"
    if not word.strip() or word != word.strip() or len(word) > 200 or not word.isprintable():
        raise InputError(f"{where}: is no word: give one after the file, as in FILE:WORD")
    if re.fullmatch(r"<\|.*\|>", word):
        raise InputError(f"{where}: is a token with which the tokenizer marks start and end: give another, FILE:WORD")
    check_fit(file, configs)
    _ = file.values  # raises if they are not finite
    return Embedding(word, file)


def _file_and_word(entry: Any) -> tuple[Path, str | None]:
    """Return a file with its absolute path, and the word that is stated for it or None."""
    if isinstance(entry, tuple | list) and len(entry) == 2 and isinstance(entry[1], str | None):
        file, word = entry
    else:
        file, word = entry, None
    if not isinstance(file, str | Path) or not str(file) or "\0" in str(file):
        raise InputError(f"embedding: {shown(entry)} is not FILE, FILE:WORD, or in Python a pair of file and word")
    if isinstance(entry, str) and not os.path.exists(user_path(entry)):
        head, colon, tail = entry.rpartition(":")
        if colon and head and not re.search(r"[/\\]", tail) and not tail.lower().endswith(FILES):
            file, word = head, tail
    return Path(os.path.abspath(user_path(file))), word


def names_in(folder: str | Path) -> dict[str, list[Path]]:
    """Return {file name without suffix, in lower case: files} of a folder and those in it. Raises InputError."""
    top = user_path(folder)
    if not top.is_dir():
        raise InputError(f"--embedding-dir: {place(top)} is {'no folder' if top.exists() else 'absent'}")
    found: dict[str, list[Path]] = {}
    for place_, folders, files in os.walk(os.path.abspath(top)):
        folders.sort()
        for name in sorted(files):
            path = Path(place_, name)
            if path.suffix.lower() in FILES and path.stem.strip() and not name.startswith("."):
                found.setdefault(path.stem.lower(), []).append(path)
        if len(found) > MOST_FILES:
            raise InputError(f"--embedding-dir: {place(top)} holds more than {MOST_FILES} files: is it the right one?")
    return found


def _one_of(files: list[Path]) -> Path | None:
    """Return the embedding file among the files of one name, or None; preview pictures are not embeddings.

    Raises InputError for two .safetensors files.
    """
    safe = [path for path in files if path.suffix.lower() == ".safetensors"]
    if len(safe) > 1:
        raise InputError(_twice(safe[0], safe[1], safe[0].stem))
    others = (path for path in files if path.suffix.lower() != ".png" or PICTURE_MARK in path.read_bytes())
    return safe[0] if safe else next(others, None)


def _alike(one: Embedding, other: Embedding) -> bool:
    return one is other or one.file.sha256 == other.file.sha256


def _twice(one: Path, other: Path, word: str) -> str:
    return f"{place(other)}: stands for the word {shown(word)}, and so does {place(one)}: give one another, FILE:WORD"
