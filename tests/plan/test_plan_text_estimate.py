"""The text of a run, counted where it has been prepared."""

from __future__ import annotations

import pytest
from conftest import write_config

from distill.config import load_config
from distill.corpus import prepare_text
from distill.plan.devices import load_devices
from distill.plan.text_estimate import estimate_text


def test_text_is_counted_in_bytes_and_not_in_characters(tmp_path, tiny_encoder):
    (tmp_path / "text.txt").write_text("".join(f"Der {number}. Fluß fließt übers Länderdreieck.\n" for number in range(500)))
    config = load_config(write_config(tmp_path, tiny_encoder))
    text = config.precompute_dir / "text"
    prepare_text(config.text, text, rows_per_chunk=200)
    estimate = estimate_text(config, load_devices().assumed)
    kept = [line for file in sorted(text.glob("0*.txt")) for line in file.read_bytes().split(b"\n")[:-1]]
    assert estimate.num_texts == estimate.num_samples == len(kept)
    assert estimate.bytes_per_text == pytest.approx(sum(map(len, kept)) / len(kept))
    assert estimate.bytes_per_text > sum(len(line.decode()) for line in kept) / len(kept) + 3
