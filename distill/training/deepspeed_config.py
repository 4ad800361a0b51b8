"""Where a run's DeepSpeed configuration lies. DeepSpeed itself, which takes seconds to import, is not needed for that."""

from __future__ import annotations

from pathlib import Path

import distill


def find_deepspeed_config(path: Path) -> Path:
    """`path` from here, or from the root of the project. Raises ValueError naming those there are."""
    shipped = Path(distill.__file__).parents[1]
    for candidate in (path, shipped / path):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(p.name for p in (shipped / "configs" / "deepspeed").glob("*.json")))
    raise ValueError(f"engine.deepspeed: no DeepSpeed configuration at {path}; configs/deepspeed has {known}")
