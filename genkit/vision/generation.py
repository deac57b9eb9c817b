"""How captioners generate text: generation_config.json as transformers reads it, and the tasks of Florence-2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from genkit.components.rules import ANYTHING, FLAG, Key, Rule, check_config, either, many, optional, real, whole
from genkit.errors import InputError, nearest, shown
from genkit.files import place, read_json

FLORENCE = "Florence2ForConditionalGeneration"
TOKENS = 50  # maximum length of a caption
DETAILS: Mapping[str, tuple[str, int]] = MappingProxyType({  # Florence-2's prompt, and the maximum number of tokens
    "caption": ("What does the image describe?", TOKENS),
    "detailed": ("Describe in detail what is shown in the image.", 200),
    "more-detailed": ("Describe with a paragraph what is shown in the image.", 1000),
})  # fmt: skip

_ID = optional(whole(0, 2**24))
_IDS = either(_ID, many(whole(0, 2**24), 1, 100))
_FOLLOWED = {
    **dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id"), Key(_ID, None)),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), Key(_IDS, None)),
    "num_beams": Key(optional(whole(1, 64)), None),
    **{name: Key(optional(whole(0, 1000)), None) for name in ("no_repeat_ngram_size", "min_length", "min_new_tokens")},
    "early_stopping": Key(optional(FLAG), None),
    "length_penalty": Key(optional(real(-100, 100)), None),
    "repetition_penalty": Key(optional(real(0, 100, above=True)), None),
}
_REFUSED = {  # unless they have no effect: they would change the text
    name: Key(Rule(text, lambda v, plain=plain: v in (None, plain)), None)  # type: ignore[misc]
    for text, plain, names in (
        ("null", None, "bad_words_ids suppress_tokens begin_suppress_tokens sequence_bias penalty_alpha dola_layers"),
        ("null", None, "prompt_lookup_num_tokens stop_strings watermarking_config"),
        ("1 or null", 1, "num_beam_groups num_return_sequences encoder_repetition_penalty guidance_scale"),
        ("0 or null", 0, "diversity_penalty encoder_no_repeat_ngram_size"),
    )
    for name in names.split()
}
_SAMPLES = {"do_sample": Key(optional(FLAG), None)}
_UNUSED = dict.fromkeys(  # the length is --tokens; the others concern sampling, or do not change the text
    ("max_length", "max_new_tokens", "max_time", "temperature", "top_k", "top_p", "typical_p", "min_p", "use_cache",
     "epsilon_cutoff", "eta_cutoff", "cache_implementation", "cache_config", "_from_model_config", "output_scores",
     "output_attentions", "output_hidden_states", "output_logits", "remove_invalid_values", "renormalize_logits",
     "return_dict_in_generate"),
    ANYTHING,
)  # fmt: skip


def read_generation(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    """Return the settings of generation_config.json that are used, or None if there is no such file.

    Text is never sampled, so that a picture always gets the same caption; a note says so if the file asks for
    sampling. Raises InputError for a value that is not supported.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return None
    found = check_config(read_json(path), _FOLLOWED | _REFUSED | _SAMPLES, place(path), _UNUSED, notes)
    if found["do_sample"]:
        notes.append(f"{place(path)}: do_sample: is left out: the most probable text is taken")
    return {key: value for key, value in found.items() if value is not None and key in _FOLLOWED}


def detail_of(kind: str, name: str, detail: str | None, option: str = "detail") -> tuple[str | None, int]:
    """Return the prompt of a captioner of class `kind`, None for one without, and the maximum number of tokens.

    name: of the model, for messages. Raises InputError for an unknown detail, and for a model without details.
    """
    if detail is not None and detail not in DETAILS:
        raise InputError(f"{option}: {shown(detail)} is not {' or '.join(DETAILS)}{nearest(detail, DETAILS)}")
    if kind == FLORENCE:
        return DETAILS[detail or "caption"]
    if detail is not None:
        raise InputError(f"{option}: {shown(detail)}: {name} captions in one way only; {FLORENCE} has such details")
    return None, TOKENS
