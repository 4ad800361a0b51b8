"""The prompt put before a text, by its role in retrieval, from the prompts that a sentence-transformers model names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Role = Literal["query", "document"]
"""What a text is in retrieval: a model may have a prompt for each role."""

ROLE_PROMPTS: dict[Role, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Names of a role's prompt, in the order in which they are looked for."""


def role_prompt(prompts: Mapping[str, str | None], default_name: str | None, role: Role | None) -> str:
    """The prompt of a role, "" if it has none; without a role, the default prompt.

    A role's prompt is the first of its names that is not empty. sentence-transformers takes the first that is there, and saves
    an empty one for those that are not, so that the prompt "passage" is never put before a document.
    """
    if role is None:
        return (prompts.get(default_name) if default_name is not None else None) or ""
    return next((prompt for name in ROLE_PROMPTS[role] if (prompt := prompts.get(name))), "")
