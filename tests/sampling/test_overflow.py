"""A VAE that overflows in half precision: those pictures are done again in float32, and no other thread notices."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from genkit.sampling.codec import Codec


class Overflowing(torch.nn.Module):
    """A VAE whose decode goes through 2000 times the latent: above 32, more than float16 holds."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"scaling_factor": 1.0}
        self.weight = torch.nn.Parameter(torch.tensor(2000.0, dtype=torch.float16), requires_grad=False)
        self.calls: list[tuple[torch.dtype, int]] = []
        self.before: Callable[[torch.dtype], Any] = lambda dtype: None

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def decode(self, z: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        self.calls.append((z.dtype, len(z)))
        self.before(z.dtype)
        assert z.dtype == self.weight.dtype
        return ((z * self.weight) / 2000,)

    def encode(self, x: torch.Tensor) -> Any:
        raise NotImplementedError


def latents(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 2, 2)


def test_only_the_rows_that_overflow_are_done_again() -> None:
    vae = Overflowing()
    z = latents(0.3, 100.0, 0.7, -50.0, float("nan"))
    out = Codec(vae).decode(z)
    assert torch.allclose(out[:4], z[:4], rtol=1e-3) and bool(out[4].isnan().all())
    assert vae.calls == [(torch.float16, 5), (torch.float32, 2)], "a latent that is NaN is not the VAE's fault"
    assert vae.dtype == torch.float16 and vae.weight.item() == 2000


def test_another_thread_goes_on_in_half_precision_meanwhile() -> None:
    vae = Overflowing()
    codec = Codec(vae)
    overflowed, ended = threading.Event(), threading.Event()
    waited: list[bool] = []

    def encode(x: torch.Tensor) -> Any:
        assert overflowed.wait(120)
        ended.wait(0.2)  # the other thread gets as far as it can
        assert vae.weight.dtype == x.dtype
        ended.set()
        moments = torch.cat([x * vae.weight / 2000, torch.full_like(x, -30.0)], dim=1)
        return type("Encoded", (), {"latent_dist": type("Moments", (), {"parameters": moments})})

    def before(dtype: torch.dtype) -> None:
        overflowed.set()
        if dtype == torch.float32:
            waited.append(ended.wait(120))

    vae.encode, vae.before = encode, before  # type: ignore[method-assign]
    found: list[torch.Tensor] = []
    thread = threading.Thread(
        target=lambda: found.append(codec.encode(torch.full((3, 2, 2), 0.5), torch.Generator().manual_seed(0)))
    )
    thread.start()
    while not codec._running:  # until it holds the weights
        pass
    out = codec.decode(latents(100.0))
    thread.join()
    assert waited == [True] and torch.allclose(found[0], torch.tensor(0.5), atol=1e-3)
    assert torch.allclose(out, torch.tensor(100.0)) and vae.dtype == torch.float16


def test_weights_come_back_when_there_is_no_memory_for_float32() -> None:
    vae = Overflowing()

    def before(dtype: torch.dtype) -> None:
        if dtype == torch.float32:
            raise torch.OutOfMemoryError("no room")

    vae.before = before
    with pytest.raises(torch.OutOfMemoryError):
        Codec(vae).decode(latents(100.0, 0.5))
    assert vae.dtype == torch.float16
    vae.before = lambda dtype: None
    assert torch.allclose(Codec(vae).decode(latents(100.0)), torch.tensor(100.0)), "and the next one may have it"
