"""The precompute command: what the ranks of a sharded teacher do before they meet."""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
from conftest import write_config

from distill.config import load_config
from launcher import precompute as module


def test_text_and_teacher_are_read_before_the_ranks_wait_in_a_collective(tmp_path, tiny_encoder, monkeypatch):
    """Both may take longer than the timeout of a collective."""
    config = load_config(write_config(tmp_path, tiny_encoder), ["teacher.placement=zero3"])
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setitem(os.environ, name, value)

    def start_process_group(timeout: float) -> None:
        assert timeout == config.engine.timeout
        assert (config.precompute_dir / "text/manifest.json").exists() and (config.precompute_dir / "teacher.json").exists()
        raise TimeoutError("the 2 ranks did not all join")

    monkeypatch.setattr(module, "RankLog", lambda *arguments: nullcontext())
    monkeypatch.setattr(module, "start_process_group", start_process_group)
    with pytest.raises(TimeoutError):
        module.precompute(config, text_only=False)
