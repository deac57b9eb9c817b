"""Lists of phrases that may describe a picture: those in `phrases` beside this file, or a user's own.

A list is a text file with a phrase a line; lines that start with # are skipped. A phrase is added to a caption behind a
comma, and one with {} takes the caption at that place.
"""

from __future__ import annotations

import re
from pathlib import Path

from genkit.errors import InputError, shown
from genkit.files import place, read_text

SHIPPED = Path(__file__).parent / "phrases"
GENERAL, EMOJI = SHIPPED / "general", SHIPPED / "emoji"  # the second with the words that emoji-clip was trained on
# The order of phrases in a caption; lists of other names follow alphabetically.
ORDER = ("subject", "colours", "medium", "style")
SLOT = "{}"
VOWELS = tuple("aeiou")
MOST, LONG, BYTES = 10_000, 300, 2**22  # phrases of a list, characters of a phrase, bytes of a file


def read_lists(folder: Path) -> dict[str, list[str]]:
    """Return {name of a list: its distinct phrases} of the .txt files of a folder, in the order of a caption.

    Captions begin with a phrase of the first list, `subject` if there is one. Raises InputError naming file and line.
    """
    if not folder.is_dir():
        raise InputError(f"--lists: {place(folder)} is no folder; give one with .txt files, a phrase a line")
    files = {path.stem: path for path in folder.glob("*.txt") if path.is_file()}
    if not files:
        raise InputError(f"--lists: {place(folder)} holds no .txt file; a list has a phrase a line")
    names = sorted(files, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    lists = {name: _phrases(files[name]) for name in names}
    first = names[0]
    for phrase in lists[first]:
        if SLOT in phrase:
            raise InputError(
                f"--lists: {place(files[first])}: {shown(phrase)} has {SLOT}, and is what captions begin with"
            )
    return lists


def _phrases(path: Path) -> list[str]:
    found: dict[str, None] = {}
    for number, line in enumerate(read_text(path, BYTES).splitlines(), 1):
        phrase = " ".join(line.split())
        if not phrase or phrase.startswith("#"):
            continue
        if len(phrase) > LONG or phrase.count(SLOT) > 1:
            what = f"has more than {LONG} characters" if len(phrase) > LONG else f"has {SLOT} twice"
            raise InputError(f"--lists: {place(path)}:{number}: {shown(phrase, 60)} {what}")
        found[phrase] = None
    if not 1 <= len(found) <= MOST:
        raise InputError(f"--lists: {place(path)}: has {len(found)} phrases; a list has 1 to {MOST}")
    return list(found)


def joined(caption: str, phrase: str) -> str:
    """Return a caption with one more phrase; "a {}" is "an {}" before a vowel."""
    if SLOT not in phrase:
        return f"{caption}, {phrase}" if caption else phrase
    if caption[:1].lower() in VOWELS:
        phrase = re.sub(r"\b([Aa]) \{\}", r"\1n {}", phrase)
    return phrase.replace(SLOT, caption)
