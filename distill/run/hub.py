"""The Hugging Face hub: whether it can be reached, and commits of models and datasets there."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from distill.run.temporary import hub_error

MODEL_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
OTHER_FORMATS = ["onnx/*", "openvino/*", "consolidated*"]  # the same weights again
SECONDS = 10  # the library's own retries take more than a minute without a network


def is_hub_reachable() -> bool:
    """One short try."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # the hub's client may be requests, httpx or httpx2, and has no common error
        return False
    return True


@cache
def dataset_commit(name: str) -> str:
    """The commit of a dataset's main branch; '' if the hub has no such dataset or cannot be reached."""
    from huggingface_hub import HfApi

    if not _was_reachable():
        return ""
    try:
        return HfApi().dataset_info(name, timeout=SECONDS).sha or ""
    except Exception:  # see above
        return ""


@cache
def model_commit(name: str, revision: str | None = None) -> str:
    """The commit of a model's revision, on the hub or, where that is out of reach, in its cache here; '' if neither has it."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if _was_reachable():
            return HfApi().model_info(name, revision=revision, timeout=SECONDS).sha or ""
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except Exception:  # see above
        return ""
    return Path(config).parent.name if isinstance(config, str) else ""  # snapshots/COMMIT/config.json


def model_snapshot(name: str, revision: str | None = None) -> Path:
    """The folder of a hub model, downloaded unless it is in the cache here. Raises ValueError or TemporaryError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES, ignore_patterns=OTHER_FORMATS))
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise hub_error(f"no model {name}: neither a folder, nor on the hub or in its cache here ({why})", error) from None


@cache
def _was_reachable() -> bool:
    """Of this process's first try, so that several datasets do not wait for a missing network one after the other."""
    return is_hub_reachable()
