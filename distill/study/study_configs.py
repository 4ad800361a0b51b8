"""The students of a study."""

from __future__ import annotations

from pathlib import Path

from distill.config import RunConfig, load_config, stage_of
from distill.run.config import ConfigError
from distill.run.stage import differences

BASE = "base.yaml"


def read_study(folder: Path, over: Path | None = None, overrides: list[str] | None = None) -> list[RunConfig]:
    """The config of each student, in the order of their names, with `over` (a YAML file) and `overrides` over all of them.

    Raises ConfigError if they do not share shards and evaluation, or lack what the table needs.
    """
    paths = sorted(path for path in folder.glob("*.yaml") if path.name != BASE)
    if not paths:
        raise ConfigError(f"no study in {folder}: it holds no .yaml but {BASE}, which the students share")
    configs = [load_config(path, overrides, over) for path in paths]
    first = configs[0]
    for path, config in zip(paths, configs, strict=True):
        if config.name != path.stem:
            raise ConfigError(f"{path}: name is {config.name}; a student of a study is named like its file, {path.stem}")
        if config.shards_from is None or config.shards_dir != first.shards_dir:
            raise ConfigError(f"{path}: all students of a study name the same shards_from and runs_dir; put them into {BASE}")
        shared, own = (stage_of(each, "precompute").settings("result") for each in (first, config))
        if changes := differences(shared, own):
            raise ConfigError(f"{path} needs other shards than {paths[0]}: {'; '.join(changes)}; put these keys into {BASE}")
        if config.evaluate != first.evaluate:
            raise ConfigError(f"{path} is evaluated otherwise than {paths[0]}: put `evaluate` into {BASE}")
        if "evaluate" not in config.stages:
            raise ConfigError(f"{path}: stages lacks evaluate, whose results are the table; add it")
    if first.teacher.model is None or first.teacher.placement == "zero3":
        raise ConfigError(f"{folder}: a study measures its teacher too: a teacher.model that one process can hold")
    if not first.text.held_out:
        raise ConfigError(f"{folder}: text.held_out is 0, and a study measures fidelity on held-out texts: leave it out")
    if first.evaluate.sts is None:
        raise ConfigError(f"{folder}: evaluate.sts is missing, on which a study measures: a folder with STS sets, or hub")
    return configs
