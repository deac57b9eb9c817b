"""Weighted prompts of any length, against the text model called by hand and, where it means the same, compel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genkit import InputError
from genkit.components import inspect_model, load_components
from genkit.components.chunks import MAX_CHUNKS, Prompt, cut
from genkit.components.text import Penultimate, TextEncoder, TextEncoderPair
from genkit.rows.syntax import weighted
from tests.tiny import tiny_sdxl, tiny_stable_diffusion

LONG = ", ".join(f"a {c} fox under an old tree" for c in ("red", "green", "blue", "grey", "white", "black", "brown"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_stable_diffusion(tmp_path_factory.mktemp("sd"))
    return load_components(inspect_model(folder), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_sdxl(tmp_path_factory.mktemp("sdxl"))
    return load_components(inspect_model(folder), device=torch.device("cpu"), dtype=torch.float32)


def prompt(text: str, skip: int = 0) -> Prompt:
    return Prompt(text, tuple(tuple(chunk) for chunk in weighted(text)), skip)


def test_plain_text_is_as_without_syntax(parts: Any) -> None:
    encode = TextEncoder(parts.tokenizer, parts.text_encoder)
    for text in ("a red fox", "", "one, two, three"):
        assert torch.allclose(encode([prompt(text)])[0], encode([text])[0], atol=1e-6)


def by_hand(parts: Any, pieces: list[tuple[str, float]]) -> torch.Tensor:
    """One chunk: the model's output times the weights of its tokens, of the mean that it had."""
    tokenizer, ids, weights = parts.tokenizer, [parts.tokenizer.bos_token_id], [1.0]
    for text, weight in pieces:
        new = tokenizer(text, add_special_tokens=False).input_ids
        ids, weights = ids + new, weights + [weight] * len(new)
    length = tokenizer.model_max_length
    ids += [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (length - len(ids) - 1)
    weights += [1.0] * (length - len(weights))
    with torch.inference_mode():
        plain = parts.text_encoder(torch.tensor([ids])).last_hidden_state[0]
        found = plain * torch.tensor(weights)[:, None]
        return found * (plain.mean() / found.mean())


def test_weights_by_hand(parts: Any) -> None:
    encode = TextEncoder(parts.tokenizer, parts.text_encoder)
    (found,) = encode([prompt("a (red:1.3) fox, [smiling] ((happy))")])
    pieces = [("a ", 1.0), ("red", 1.3), (" fox, ", 1.0), ("smiling", 1 / 1.1), (" ", 1.0), ("happy", 1.21)]
    assert torch.allclose(found, by_hand(parts, pieces), rtol=1e-4, atol=1e-5)
    assert (found - encode(["a red fox, smiling happy"])[0]).abs().max() > 1e-3


def test_chunks_are_those_of_their_texts(parts: Any) -> None:
    encode = TextEncoder(parts.tokenizer, parts.text_encoder)
    (both,) = encode([prompt("a red fox BREAK an (old:1.2) tree")])
    one, two = encode([prompt("a red fox"), prompt("an (old:1.2) tree")])
    assert torch.allclose(both, torch.cat([one, two]), atol=1e-5)
    (found,) = encode([prompt(LONG)])
    length = parts.tokenizer.model_max_length
    assert len(found) % length == 0 and len(found) > length and not encode.truncated


def test_long_prompts_are_compels(parts: Any) -> None:
    """Where no comma moves a cut, and without weights, compel means the same."""
    compel = pytest.importorskip("compel")
    text = LONG.replace(",", "")
    theirs = compel.Compel(parts.tokenizer, parts.text_encoder, truncate_long_prompts=False, device="cpu")
    (found,) = TextEncoder(parts.tokenizer, parts.text_encoder)([prompt(text)])
    with torch.inference_mode():
        assert torch.allclose(found, theirs(text)[0], atol=1e-5)


def test_two_encoders_and_the_pooled_embedding(pair: Any) -> None:
    first = TextEncoder(pair.tokenizer, Penultimate(pair.text_encoder))
    second = TextEncoder(pair.tokenizer_2, Penultimate(pair.text_encoder_2, pooled=True))
    encode = TextEncoderPair(first, second)
    (tokens, pooled), (plain, alone), (heavy, same) = encode(
        [prompt("a red fox BREAK a tree"), "a red fox", prompt("a (red:1.5) fox")]
    )
    length = pair.tokenizer.model_max_length
    assert tokens.shape == (2 * length, plain.shape[1]) and torch.allclose(tokens[:length], plain, atol=1e-5)
    assert torch.allclose(pooled, alone, atol=1e-5) and torch.allclose(same, alone, atol=1e-5)
    assert (heavy - plain).abs().max() > 1e-3


def test_layers_from_the_last(parts: Any, pair: Any) -> None:
    model, tokenizer = parts.text_encoder, parts.tokenizer
    ids = tokenizer(["a red fox"], padding="max_length", return_tensors="pt").input_ids
    with torch.inference_mode():
        layers = model(ids, output_hidden_states=True).hidden_states
        inner = getattr(model, "text_model", model)
        (found,) = TextEncoder(tokenizer, model)([Prompt("a red fox", skip=2)])
        assert torch.allclose(found, inner.final_layer_norm(layers[-2])[0], atol=1e-6)
        layers = pair.text_encoder(ids, output_hidden_states=True).hidden_states
        (found,) = TextEncoder(tokenizer, Penultimate(pair.text_encoder))([Prompt("a red fox", skip=3)])
        assert torch.allclose(found, layers[-3][0], atol=1e-6)


def test_where_a_chunk_ends() -> None:
    comma = 9

    def lengths(part: list[int], room: int = 30) -> list[int]:
        return [len(chunk) for chunk in cut([[(token, 1.0) for token in part]], room, comma)]

    assert lengths([1] * 30) == [30] and lengths([1] * 31) == [30, 1] and lengths([]) == [0]
    assert lengths([1] * 24 + [comma] + [1] * 10) == [25, 10]  # the comma is near the end
    assert lengths([1] * 9 + [comma] + [1] * 30) == [30, 10]  # it is not
    assert lengths([1] * 30 + [comma]) == [30, 1]
    parts = [[(1, 1.0)], [], [(1, 1.0)] * 31, []]
    assert [len(chunk) for chunk in cut(parts, 30, comma)] == [1, 0, 30, 1]


def test_too_long(parts: Any) -> None:
    with pytest.raises(InputError, match=f"prompt: takes .* more than {MAX_CHUNKS}"):
        TextEncoder(parts.tokenizer, parts.text_encoder)([prompt("fox " * 1000)])
