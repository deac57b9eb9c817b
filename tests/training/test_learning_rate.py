"""The learning rate of every step: warm-up, decay, and the end."""

from __future__ import annotations

from typing import Literal

import pytest

from genkit.training.recipe import Train
from genkit.training.state import learning_rate


def test_it_rises_from_the_first_step_to_the_whole_rate() -> None:
    train = Train(steps=20, learning_rate=1.0, lr_warmup_steps=4, lr_scheduler="constant")
    assert [learning_rate(train, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("curve", ["cosine", "linear"])
def test_it_falls_to_nothing(curve: Literal["cosine", "linear"]) -> None:
    train = Train(steps=10, learning_rate=2.0, lr_warmup_steps=0, lr_scheduler=curve)
    rates = [learning_rate(train, step) for step in range(10)]
    assert rates[0] == 2.0 and rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.25
    assert learning_rate(train, 5) == pytest.approx(1.0)
