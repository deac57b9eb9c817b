"""SigLIP's tokenizers: SentencePiece's of the first, Gemma's of the second, read from tokenizer.json.

Zhai et al. 2023 (SigLIP) and Tschannen et al. 2025 (SigLIP 2): texts are lower case, those of the first without
punctuation, and are padded to the length that the network reads, which has no mask.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit.components.rules import ANYTHING, FLAG, Key, check_config, choice, optional, real
from genkit.components.tokenizer import CONFIG_UNUSED, TOKEN
from genkit.errors import InputError, shown
from genkit.files import place, read_json

LIMIT = 2**27  # bytes; that of SigLIP 2 has 34 million
SPARE = 256  # tokens that a tokenizer may have beyond the embedding, as mT5's: they read as unknown
FIRST, GEMMA = ("SiglipTokenizer", "T5Tokenizer", "T5TokenizerFast"), ("GemmaTokenizer", "GemmaTokenizerFast")
OTHERS = ("Siglip2Tokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")
_TOKENS = {"Unigram": {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "bos_token": None}}
_TOKENS["BPE"] = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>"}
_CONFIG = {
    **dict.fromkeys(_TOKENS["BPE"], Key(optional(TOKEN), None)),
    "model_max_length": Key(optional(real(3, 1e31)), 64),
    "padding_side": Key(choice("right", "left"), "right"),
    "add_bos_token": Key(optional(FLAG), None),
    "add_eos_token": Key(optional(FLAG), None),
    "do_lower_case": Key(FLAG, True),
    "tokenizer_class": Key(optional(choice(*FIRST, *GEMMA, *OTHERS)), None),
}
_UNUSED = {
    **{key: rule for key, rule in CONFIG_UNUSED.items() if key not in _CONFIG},
    **dict.fromkeys(
        ("mask_token", "sp_model_kwargs", "spaces_between_special_tokens", "use_default_system_prompt", "extra_ids",
         "legacy", "padding", "pad_to_multiple_of", "pad_token_type_id", "stride", "truncation", "return_tensors",
         "truncation_strategy", "sp_model", "vocab_file", "add_dummy_prefix_space", "model_input_names"),
        ANYTHING,
    ),
}  # fmt: skip


def check_siglip_tokenizer(
    folder: Path, text: Mapping[str, Any], text_config: str, notes: list[str] | None = None
) -> int:
    """Check the tokenizer files of a SiglipModel; return the number of tokens that it reads of a text.

    text: config of its text network; text_config: its name for messages. Raises InputError naming file and entry.
    """
    path, fast = folder / "tokenizer_config.json", folder / "tokenizer.json"
    config = check_config(read_json(path) if path.exists() else {}, _CONFIG, place(path), _UNUSED, notes)
    if not fast.exists():
        only = " (spiece.model alone cannot be read: save the tokenizer as tokenizer.json)"
        raise InputError(f"{place(fast)}: is absent{only if (folder / 'spiece.model').exists() else ''}")
    ids, kind = _vocabulary(fast)
    count, most = max(ids.values()) + 1, text["vocab_size"]
    if count > most + SPARE or count * 2 <= most:
        raise InputError(f"{place(fast)}: model: has {count} tokens, but {text_config} has vocab_size {most}")
    for name, usual in _TOKENS[kind].items():
        token = _text(config[name]) or usual
        needed = name != "bos_token" or config["add_bos_token"]
        if needed and not ids.get(token or "", most) < most:
            raise InputError(f"{place(path)}: {name}: {shown(token)} is not in the vocabulary of {place(fast)}")
    return _length(config, text)


class SiglipTokenizer:
    """Texts to ids, padded: called like a tokenizer of transformers. For a folder that was checked."""

    def __init__(self, folder: Path, text: Mapping[str, Any]) -> None:
        """text: config of the text network. Raises InputError for a file that the library of tokenizers refuses."""
        from tokenizers import Tokenizer

        path, fast = folder / "tokenizer_config.json", folder / "tokenizer.json"
        config = check_config(read_json(path) if path.exists() else {}, _CONFIG, place(path), _UNUSED, [])
        ids, kind = _vocabulary(fast)
        try:
            self.inner = Tokenizer.from_file(str(fast))
        except Exception as error:  # a plain Exception of Rust
            raise InputError(f"{place(fast)}: the tokenizer cannot be read: {shown(str(error), 200)}") from None
        self.inner.no_padding()
        self.inner.no_truncation()
        self.model_max_length, self.vocab_size = _length(config, text), text["vocab_size"]
        self.first = config["tokenizer_class"] in FIRST or kind == "Unigram"
        self.lower, self.side = config["do_lower_case"] or not self.first, config["padding_side"]
        names = {name: _text(config[name]) or usual for name, usual in _TOKENS[kind].items()}
        self.pad, self.unknown = ids[str(names["pad_token"])], ids[str(names["unk_token"])]
        self.before, self.after = self._added()
        if config["add_bos_token"] is not None:
            self.before = [ids[str(names["bos_token"])]] if config["add_bos_token"] else []
        if config["add_eos_token"] is not None or self.first:
            self.after = [ids[str(names["eos_token"])]] if self.first or config["add_eos_token"] else []

    def __call__(
        self, texts: Sequence[str], padding: str = "", max_length: int | None = None, truncation: bool = False,
        verbose: bool = True,
    ) -> dict[str, list[list[int]]]:  # fmt: skip
        """Return input_ids and attention_mask, which the network does not read. padding: "max_length" or none."""
        length = max_length or self.model_max_length
        rows, masks = [], []
        for encoding in self.inner.encode_batch([self.canonical(text) for text in texts], add_special_tokens=False):
            ids = [number if number < self.vocab_size else self.unknown for number in encoding.ids]
            if truncation:
                ids = ids[: length - len(self.before) - len(self.after)]
            ids = [*self.before, *ids, *self.after]
            room = max(0, length - len(ids)) if padding == "max_length" else 0
            pads, ones, zeros = [self.pad] * room, [1] * len(ids), [0] * room
            rows.append(ids + pads if self.side == "right" else pads + ids)
            masks.append(ones + zeros if self.side == "right" else zeros + ones)
        return {"input_ids": rows, "attention_mask": masks}

    def canonical(self, text: str) -> str:
        """Return a text as the model was trained on: lower case, for the first SigLIP also without punctuation."""
        text = text.lower() if self.lower else text
        return " ".join(text.translate(_PUNCTUATION).split()) if self.first else text

    def get_added_vocab(self) -> dict[str, int]:
        """Return no learned words."""
        return {}

    def _added(self) -> tuple[list[int], list[int]]:
        """Return what tokenizer.json adds before and after a text."""
        plain, whole = (self.inner.encode("a", add_special_tokens=special).ids for special in (False, True))
        at = next((n for n in range(len(whole) - len(plain) + 1) if whole[n : n + len(plain)] == plain), 0)
        return whole[:at], whole[at + len(plain) :]


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _vocabulary(path: Path) -> tuple[dict[str, int], str]:
    """Return {token: id} and the kind of model, "Unigram" or "BPE", of a tokenizer.json. Raises InputError."""
    content = read_json(path, LIMIT)
    model, added = content.get("model"), content.get("added_tokens") or []
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind not in _TOKENS:
        raise InputError(f"{place(path)}: model: is neither a Unigram nor a byte-pair (BPE) model")
    vocab: Any = model.get("vocab")
    if kind == "Unigram":
        pairs = isinstance(vocab, list) and all(isinstance(p, list) and p and isinstance(p[0], str) for p in vocab)
        ids = {pair[0]: number for number, pair in enumerate(vocab)} if pairs else {}
    else:
        ids = vocab if isinstance(vocab, dict) and all(type(n) is int and n >= 0 for n in vocab.values()) else {}
    if not ids:
        raise InputError(f"{place(path)}: model: vocab: {shown(vocab)} is no vocabulary of a {kind} model")
    if not isinstance(added, list) or not all(isinstance(t, dict) and type(t.get("id")) is int for t in added):
        raise InputError(f"{place(path)}: added_tokens: is not a list of tokens with ids")
    return {**ids, **{str(token.get("content")): token["id"] for token in added}}, kind


def _length(config: Mapping[str, Any], text: Mapping[str, Any]) -> int:
    """Return how many tokens of a text are read. Gemma's model_max_length is beyond all bounds."""
    return int(min(config["model_max_length"] or 64, text["max_position_embeddings"]))


def _text(token: Any) -> str | None:
    """Return the text of a token, which is one or an object with it."""
    return token["content"] if isinstance(token, dict) else token
