"""Where a run's weights come from: a folder, the hub's cache, a download, or a random checkpoint.

The same folder goes to every engine, and the run records which it was.
"""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from engines.base import InputError
from harness import checkpoints
from harness.config import ModelConf

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
"""What of a hub repository is wanted: config, weights, tokenizer."""
HUB_TIMEOUT_S = 5.0
"""How long the hub may take to answer before this machine counts as offline."""
INDEX = "model.safetensors.index.json"

MUST_MATCH = {
    "model_type": "architecture",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
}
"""Keys of a folder's config.json and the fields of ModelConf that they have to equal."""


@dataclass(frozen=True)
class Weights:
    """A checkpoint folder and where it came from. `notice` is one line for the user, "" if there is nothing to say."""

    path: Path
    source: Literal["local", "hub-cache", "download", "random"]
    notice: str = ""
    seed: int | None = None


def resolve(model: ModelConf, weights: str, seed: int = 0) -> Weights:
    """The checkpoint for `model`.

    `weights` is a folder, `random`, or `auto`: the hub's cache, else a download, else (offline) a random checkpoint
    made from `seed`. InputError for a folder that is no checkpoint of `model`.
    """
    if weights == "random":
        return _random(model, seed, "as asked for")
    if weights != "auto":
        folder = Path(weights).expanduser().resolve()
        check_folder(folder, model)
        return Weights(folder, "local")
    if not model.hub_id:
        return _random(model, seed, f"{model.name} has no published ones")
    if cached := _from_hub_cache(model.hub_id):
        return Weights(cached, "hub-cache")
    try:
        return Weights(_download(model.hub_id), "download")
    except Exception as error:  # the hub's client raises its own, httpx's and OS errors for "no network"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"No room on disk to download {model.hub_id}; `weights=FOLDER` uses a copy.") from error
        return _random(model, seed, _why_not(model.hub_id, error))


def check_folder(folder: Path, model: ModelConf | None = None) -> None:
    """InputError unless `folder` holds a config.json (of `model`, if given) and all its safetensors."""
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder} to take weights from (weights is auto, random or a folder).")
    config = _read_json(folder / "config.json")
    if missing := missing_files(folder):
        raise InputError(f"The folder {folder} is no complete checkpoint: it has no {missing[0]}.")
    for key, field in MUST_MATCH.items() if model else ():
        found, wanted = config.get(key), getattr(model, field)
        if found != wanted:
            name = model.name if model else ""
            raise InputError(f"The checkpoint {folder} is not of model {name}: its {key} is {found}, not {wanted}.")


def missing_files(folder: Path) -> list[str]:
    """The files that `folder` lacks to be a checkpoint."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if (folder / INDEX).is_file():
        shards = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
        return missing + [shard for shard in shards if not (folder / shard).is_file()]
    return missing if any(folder.glob("*.safetensors")) else [*missing, "model.safetensors"]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"The folder {path.parent} is no complete checkpoint: it has no {path.name}.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read {path}: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"Cannot read {path}: it does not hold an object.")
    return content


def _from_hub_cache(hub_id: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True, allow_patterns=HUB_FILES))
    except Exception:  # not in the cache, or the cache is not readable: both mean "go on"
        return None
    return None if missing_files(folder) else folder


def _download(hub_id: str) -> Path:
    """Download `hub_id` into the hub's cache, with the hub client's progress bars."""
    from huggingface_hub import HfApi, snapshot_download

    HfApi().model_info(hub_id, timeout=HUB_TIMEOUT_S)  # fails fast where snapshot_download would retry for minutes
    folder = Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    check_folder(folder)
    return folder


def _why_not(hub_id: str, error: Exception) -> str:
    name = type(error).__name__
    if name == "GatedRepoError":
        return f"{hub_id} needs its license accepted and `hf auth login`"
    return f"{hub_id} is not in the hub's cache and cannot be downloaded: {name}"


def _random(model: ModelConf, seed: int, why: str) -> Weights:
    size = checkpoints.checkpoint_bytes(model)
    with tqdm(total=size, unit="B", unit_scale=True, desc="random weights", leave=False, disable=None) as bar:
        path = checkpoints.random_checkpoint(model, seed, progress=bar.update)
    return Weights(path, "random", f"Random weights with seed {seed} ({why}): {path}", seed)
