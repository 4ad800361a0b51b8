"""The Hugging Face hub: whether it can be reached, and commits of datasets there."""

from __future__ import annotations

from functools import cache

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
def _was_reachable() -> bool:
    """Of this process's first try, so that several datasets do not wait for a missing network one after the other."""
    return is_hub_reachable()
