"""Names of solvers and spacings as AUTOMATIC1111 spells them, which model sites read; others keep genkit's own."""

from __future__ import annotations

SAMPLERS = {
    "ddim": "DDIM", "ddpm": "DDPM", "euler": "Euler", "euler_ancestral": "Euler a", "heun": "Heun", "lms": "LMS",
    "dpm2": "DPM2", "dpm2_ancestral": "DPM2 a", "pndm": "PLMS", "ipndm": "IPNDM", "deis": "DEIS",
    "dpmpp_2m": "DPM++ 2M", "dpmpp_3m": "DPM++ 3M", "dpmpp_2s": "DPM++ 2S", "dpmpp_sde": "DPM++ SDE",
    "sde-dpmpp_2m": "DPM++ 2M SDE", "sde-dpmpp_3m": "DPM++ 3M SDE", "unipc": "UniPC", "sa": "SA Solver",
    "lcm": "LCM", "tcd": "TCD",
}  # fmt: skip
# AUTOMATIC1111 calls trailing timesteps Simple or SGM Uniform, and leading ones DDIM.
SCHEDULE_TYPES = {
    "karras": "Karras", "exponential": "Exponential", "beta": "Beta", "trailing": "SGM Uniform", "leading": "DDIM",
    "align_your_steps": "Align Your Steps", "gits": "Align Your Steps GITS",
}  # fmt: skip
