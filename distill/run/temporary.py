"""Failures that another start may not meet: a network that does not answer, something that another process holds."""

from __future__ import annotations

# of builtins, httpx, requests and aiohttp, none of which need be installed
NO_ANSWER = {"TimeoutError", "ConnectionError", "TransportError", "Timeout", "ClientConnectionError"}


class TemporaryError(OSError):
    """An error in one line that passes by itself; a Slurm job that ends with it is requeued."""


def hub_error(message: str, error: Exception) -> Exception:
    """What to raise where the hub was asked in vain: TemporaryError if it gave no answer, ValueError if the answer was no."""
    return (TemporaryError if _is_temporary(error) else ValueError)(message)


def _is_temporary(error: BaseException) -> bool:
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    names = {kind.__name__ for each in causes for kind in type(each).__mro__}
    codes = [getattr(getattr(each, "response", None), "status_code", None) for each in causes]
    is_busy = any(isinstance(code, int) and (code == 429 or code >= 500) for code in codes)
    is_offline = any("OfflineModeIsEnabled" in f"{type(each).__name__}: {each}" for each in causes)
    return not is_offline and (is_busy or bool(names & NO_ANSWER))
