"""Which students a study has."""

from __future__ import annotations

from pathlib import Path

from distill.config import ConfigError, RunConfig, load_config
from distill.stages import differences, stage_of

BASE = "base.yaml"


def configs_of(folder: Path, over: Path | None = None, overrides: list[str] | None = None) -> list[RunConfig]:
    """The config of each student, in the order of their names, with `over` (a YAML file) and `overrides` laid over all of them.

    Raises ConfigError if they do not share their shards, or lack what a study measures.
    """
    paths = sorted(path for path in folder.glob("*.yaml") if path.name != BASE)
    if not paths:
        raise ConfigError(f"no study in {folder}: it holds no .yaml but {BASE}, which is what its students share")
    configs = [load_config(path, overrides, over) for path in paths]
    first = configs[0]
    for path, config in zip(paths, configs, strict=True):
        if config.name != path.stem:
            raise ConfigError(f"{path}: name is {config.name}; a student of a study is named like its file, {path.stem}")
        if config.shards_from is None or config.shards_dir != first.shards_dir:
            raise ConfigError(f"{path}: all students of a study name the same shards_from and runs_dir; put them into {BASE}")
        if changes := differences(stage_of(first, "precompute").config, stage_of(config, "precompute").config):
            raise ConfigError(f"{path} wants other shards than {paths[0]}: {'; '.join(changes)}; put these keys into {BASE}")
        if config.evaluate != first.evaluate:
            raise ConfigError(f"{path} is measured otherwise than {paths[0]}: put `evaluate` into {BASE}")
    if first.teacher.model is None or first.teacher.placement != "device":
        raise ConfigError(f"{folder}: a study measures its teacher too: a teacher.model that fits one device")
    if not first.text.held_out:
        raise ConfigError(f"{folder}: text.held_out is 0, and a study measures fidelity on held-out sentences: leave it out")
    if first.evaluate.sts is None:
        raise ConfigError(f"{folder}: evaluate.sts is missing, on which a study measures: a folder with STS sets, or hub")
    return configs
