"""The troubleshooting guide quotes messages that the code can print."""

from __future__ import annotations

import re

from commands import ROOT
from messages import all_strings

PAGE = ROOT / "launcher/guides/troubleshooting.md"
SHORTEST = 10  # characters that a message must share with the code, or it would be found anywhere


def quoted() -> list[str]:
    """The messages in the first column of every table."""
    rows = [line.split(" | ")[0] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row)]


def test_every_quoted_message_is_in_the_code():
    code = all_strings()
    messages = quoted()
    assert len(messages) > 30
    absent = []
    for message in messages:
        parts = [part for part in message.split("…") if part.strip()]
        assert max(map(len, parts)) >= SHORTEST or len(parts) > 1, f"{message} would be found anywhere"
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        if not any(pattern.search(text) for text in code):
            absent.append(message)
    assert not absent
