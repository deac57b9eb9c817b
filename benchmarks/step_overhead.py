"""What the solvers' arithmetic costs beside the network: the engine's step line, for 16 pictures on 16 solvers.

    python benchmarks/step_overhead.py [REPEATS]

Prints the median of REPEATS (default 15) of one step of a mixed batch, latents 16x16x8, beside one guided call of the
embedded model's UNet on the same batch, and beside the same step taken by 16 diffusers schedulers one after the other.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable

import diffusers
import torch

from genkit import TextToImage
from genkit.schedulers import HISTORY, SOLVERS, Scheduler, step

BATCH, SHAPE = 16, (8, 16, 16)


def median_ms(work: Callable[[], object], repeats: int) -> float:
    work()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return 1000 * statistics.median(seconds)


@torch.inference_mode()
def main(repeats: int = 15) -> None:
    gen = TextToImage.from_pretrained("emoji", device="cpu")
    x = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert gen.text is not None
    cond = torch.stack(gen.text(["a red fox", ""]))
    prompts, empty = (c.expand(BATCH, *c.shape) for c in cond)
    t, scale = torch.full((BATCH,), 500.0), torch.full((BATCH,), 5.0)
    plans = [Scheduler(solver=name).plan(20) for name in [*SOLVERS][:BATCH]]
    lines = torch.stack([torch.from_numpy(p.table[5]).float() for p in plans], dim=1)[:, :, None, None, None]
    history = torch.randn(HISTORY, BATCH, *SHAPE)

    def ours() -> None:
        _, left = step(x, x, lines, history, x)
        torch.cat([left[None], history[:-1]])

    theirs = [diffusers.DPMSolverMultistepScheduler() for _ in range(BATCH)]

    def peers() -> None:
        for scheduler, row in zip(theirs, x, strict=True):
            scheduler.step(row[None], scheduler.timesteps[5], row[None])
            scheduler._step_index = 5

    for scheduler in theirs:
        scheduler.set_timesteps(20)
        scheduler.set_begin_index(5)
    network = median_ms(lambda: gen.denoiser(x, t, prompts, empty, scale), max(3, repeats // 3))
    found, peer = median_ms(ours, repeats), median_ms(peers, repeats)
    print(f"one guided UNet call, {BATCH} pictures: {network:8.2f} ms")
    print(f"genkit's step, {BATCH} solvers at once: {found:8.2f} ms  {100 * found / network:.2f} % of the call")
    print(f"diffusers' step, {BATCH} DPM++ 2M:      {peer:8.2f} ms  {100 * peer / network:.2f} % of the call")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, {platform.system()}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
