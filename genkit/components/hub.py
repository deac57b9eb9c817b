"""Models on the Hugging Face hub: configs are fetched first, then the weights that they need, of one revision."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from genkit.components.registry import COMPONENTS
from genkit.errors import HostError, InputError, shown

_CONFIGS = [
    *(f"{part}/*.json" for part in (*COMPONENTS, "scheduler")),
    *("model_index.json", "config.json", "scheduler_config.json"),
    *("preprocessor_config.json", "processor_config.json", "generation_config.json"),
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
        "added_tokens.json",
        "special_tokens_map.json",
    ),
    *("tokenizer/merges.txt", "tokenizer_2/merges.txt", "merges.txt"),
    *("model.safetensors.index*.json", "diffusion_pytorch_model.safetensors.index*.json"),
]
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_]|[.-](?![.-]))*"


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a hub id, "owner/name"."""
    return len(name) <= 96 and re.fullmatch(f"{_PART}/{_PART}", name) is not None and not name.endswith((".git", "."))


def fetch_configs(name: str) -> Path:
    """Fetch the configs and tokenizers, without weights, of a hub model's newest revision; return its local folder.

    With HF_HUB_OFFLINE=1 that is the newest revision in the cache. Raises InputError for a model that does not exist,
    HostError where the hub cannot be read.
    """
    return _snapshot(name, None, _CONFIGS)


def fetch_weights(name: str, snapshot: Path, files: Iterable[str]) -> None:
    """Fetch `files`, paths inside the repository, into `snapshot`, the folder of one revision."""
    missing = [file for file in files if not (snapshot / file).exists()]
    if missing:
        _snapshot(name, snapshot.name, missing)


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise HostError(f"{name}: is gated: accept its terms on the hub, then log in with `hf auth login`") from None
    except RepositoryNotFoundError:
        raise InputError(f"{name}: is neither a folder here nor a model on the hub that you may read") from None
    except LocalEntryNotFoundError:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise HostError(f"{name}: is neither a folder here nor in the hub cache, and {why}") from None
    except Exception as error:  # any failure of network, disk or hub becomes one line
        raise HostError(f"{name}: the hub cannot be read: {type(error).__name__}: {shown(str(error), 200)}") from None
