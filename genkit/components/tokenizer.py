"""Checks of a CLIP tokenizer's files before transformers reads them: byte-pair encoding (Sennrich et al. 2016)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from genkit.components.rules import ANYTHING, FLAG, TEXT, Key, Rule, check_config, either, many, optional, real
from genkit.errors import InputError, shown
from genkit.files import place, read_json, read_text

TOKENIZER_LIMIT = 2**25  # bytes; CLIP's tokenizer.json has 2.2 million
VOCAB_LIMIT = 2**24
TOKEN = either(TEXT, Rule("a token object", lambda v: isinstance(v, dict) and isinstance(v.get("content"), str)))
_SPECIAL = {"bos_token": "<|startoftext|>", **dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")}

CONFIG = {
    **{name: Key(TOKEN, default) for name, default in _SPECIAL.items()},
    "model_max_length": Key(optional(real(3, 1e31)), 77),
}
CONFIG_UNUSED = {
    "tokenizer_class": optional(Rule("'CLIPTokenizer'", lambda v: v in ("CLIPTokenizer", "CLIPTokenizerFast"))),
    "add_prefix_space": FLAG,
    "do_lower_case": FLAG,
    "clean_up_tokenization_spaces": FLAG,
    "additional_special_tokens": optional(many(TOKEN, 0, 10_000)),
    "extra_special_tokens": ANYTHING,
    "added_tokens_decoder": Rule("an object", lambda v: isinstance(v, dict)),
    **dict.fromkeys(
        ("backend", "errors", "is_local", "local_files_only", "max_length", "name_or_path", "padding_side"),
        ANYTHING,
    ),
    **dict.fromkeys(("processor_class", "special_tokens_map_file", "tokenizer_file", "truncation_side"), ANYTHING),
}


def check_tokenizer(folder: Path, text: Mapping[str, Any], text_config: str, notes: list[str] | None = None) -> int:
    """Check the files of a CLIP tokenizer; return the number of tokens that it and its text encoder read of a prompt.

    text: config of the text encoder, with vocab_size above every token id; text_config: its name for messages. Raises
    InputError naming file and entry.
    """
    path = folder / "tokenizer_config.json"
    config = check_config(read_json(path) if path.exists() else {}, CONFIG, place(path), CONFIG_UNUSED, notes)
    vocab_size = text["vocab_size"]
    fast, vocab_file = folder / "tokenizer.json", folder / "vocab.json"
    added_file = folder / "added_tokens.json"
    added = _check_vocab(read_json(added_file), place(added_file)) if added_file.exists() else {}
    if not fast.exists() and not vocab_file.exists():
        raise InputError(f"{place(fast)}: is absent, and so is vocab.json with merges.txt")
    known = set(added)
    if fast.exists():
        known |= _check_fast(fast, vocab_size, text_config).keys()
    if vocab_file.exists():
        vocab = _check_vocab(read_json(vocab_file, VOCAB_LIMIT), place(vocab_file))
        lines = read_text(folder / "merges.txt", VOCAB_LIMIT).split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        _check_merges(pairs, vocab, place(folder / "merges.txt"))
        _check_size({**vocab, **added}, vocab_size, place(vocab_file), text_config)
        known |= vocab.keys()
    for name in _SPECIAL:  # transformers would add a missing one, with an id past the encoder's token embedding
        token = config[name] if isinstance(config[name], str) else config[name]["content"]
        if token not in known:
            raise InputError(f"{place(path)}: {name}: {shown(token)} is not in the vocabulary")
    return int(min(config["model_max_length"] or CONFIG["model_max_length"].default, text["max_position_embeddings"]))


def known_tokens(folder: Path) -> frozenset[str]:
    """Return the tokens of a tokenizer that was checked; one that ends a word is written with </w>."""
    fast, vocab_file, added_file = (folder / n for n in ("tokenizer.json", "vocab.json", "added_tokens.json"))
    if fast.exists():
        content = read_json(fast, TOKENIZER_LIMIT)
        return frozenset(content["model"]["vocab"]) | {t["content"] for t in content.get("added_tokens", [])}
    added = read_json(added_file) if added_file.exists() else {}
    return frozenset(read_json(vocab_file, VOCAB_LIMIT)) | frozenset(added)


def _check_fast(path: Path, vocab_size: int, text_config: str) -> dict[str, int]:
    """Check a tokenizer.json (format of the tokenizers library) and return its {token: id}."""
    content = read_json(path, TOKENIZER_LIMIT)
    where = place(path)
    model, added = content.get("model"), content.get("added_tokens", [])
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise InputError(f"{where}: model: is not a byte-pair (BPE) model")
    vocab = _check_vocab(model.get("vocab"), f"{where}: vocab")
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise InputError(f"{where}: merges: {shown(merges)} is not a list")
    _check_merges((m.split(" ") if isinstance(m, str) else m for m in merges), vocab, f"{where}: merges")
    if not isinstance(added, list) or not all(isinstance(t, dict) and type(t.get("id")) is int for t in added):
        raise InputError(f"{where}: added_tokens: is not a list of tokens with ids")
    tokens = {**vocab, **{str(t.get("content")): t["id"] for t in added}}
    _check_size(tokens, vocab_size, f"{where}: vocab", text_config)
    return tokens


def _check_vocab(vocab: Any, where: str) -> dict[str, int]:
    """Return {token: id}, which has no id twice."""
    if not isinstance(vocab, dict) or not vocab:
        raise InputError(f"{where}: {shown(vocab)} is not an object of tokens and ids")
    owner: dict[int, str] = {}
    for token, number in vocab.items():
        if type(number) is not int or number < 0:
            raise InputError(f"{where}: {shown(token)}: {shown(number)} is not an id")
        if number in owner:
            raise InputError(f"{where}: {shown(token)}: id {number} is also that of {shown(owner[number])}")
        owner[number] = token
    return vocab


def _check_merges(pairs: Iterable[Any], vocab: Mapping[str, int], where: str) -> None:
    """Check that each merge joins two tokens of the vocabulary to a third."""
    seen: set[tuple[str, str]] = set()
    for number, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise InputError(f"{where}: merge {number}: {shown(pair)} is not two tokens")
        left, right = pair
        if (left, right) in seen:
            raise InputError(f"{where}: merge {number}: {shown(' '.join(pair))} is there twice")
        seen.add((left, right))
        for token in (left, right, left + right):
            if token not in vocab:
                raise InputError(f"{where}: merge {number}: {shown(token)} is not in the vocabulary")


def _check_size(tokens: Mapping[str, int], vocab_size: int, where: str, text_config: str) -> None:
    """Refuse ids past the token embedding, and an embedding twice as long as the vocabulary: another model's."""
    count = max(tokens.values()) + 1
    if count > vocab_size or count * 2 <= vocab_size:
        raise InputError(f"{where}: has {count} tokens, but {text_config} has vocab_size {vocab_size}")
