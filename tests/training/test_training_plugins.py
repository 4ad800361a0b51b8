"""An installed package adds a training task, and another a loss term: trained by name from a config, killed and resumed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from commands import command, kill_group_when, launch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.config import load_config
from distill.run.config import ConfigError

PLUGINS = Path(__file__).parent / "plugins"
NUM_STEPS = 40


def install(site: Path, module: str, group: str, name: str, entry: str) -> None:
    """Lays out the package as pip does: its module, and beside it the metadata that names its entry point."""
    metadata = site / f"{module}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:{entry}\n")
    shutil.copy(PLUGINS / f"{module}.py", site)


def train_killed_and_resumed(run: Path, stage: str, arguments: list[str]) -> EventAccumulator:
    """The TensorBoard events of a stage that was killed after a checkpoint and finished by the same command."""
    kill_group_when(command("train.py", *arguments), lambda: (run / stage / "checkpoints/step-00000012").exists())
    assert not (run / stage / "DONE.json").exists()
    resumed = launch("train.py", *arguments)
    assert resumed.returncode == 0 and f"{stage}: continuing after step" in resumed.stdout, resumed.stdout
    assert (run / stage / "DONE.json").exists()
    return EventAccumulator(str(run / "tensorboard" / stage), size_guidance={"scalars": 0}).Reload()


def assert_learns_in_every_step(events: EventAccumulator, tag: str) -> None:
    points = events.Scalars(tag)
    assert [point.step for point in points] == list(range(1, NUM_STEPS + 1)), tag
    assert points[-1].value < points[0].value, tag


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder of installed packages that every process started in the test sees."""
    folder = tmp_path / "site-packages"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    return folder


def steps(stage: str) -> list[str]:
    return [f"stage={stage}", f"{stage}.max_steps={NUM_STEPS}", f"{stage}.epochs=9", f"{stage}.log_every=1",
            f"{stage}.save_every=4", f"{stage}.dev_every=20", f"{stage}.lr=1e-3"]  # fmt: skip


@pytest.mark.slow
def test_a_package_adds_a_training_task(embedded_copy, site):
    config, run = embedded_copy
    with pytest.raises(ConfigError, match="no stage is called 'align'"):
        load_config(config, ["stage=align"])
    install(site, "distill_align", "distill.tasks", "align", "AlignStage")
    sizes = ["align.global_batch=32", "align.micro_batch=8", "align.power=2"]
    events = train_killed_and_resumed(run, "align", ["--config", config, *steps("align"), *sizes])
    assert_learns_in_every_step(events, "loss/align")
    assert [point.value for point in events.Scalars("reference_loss")] == [0.0] * NUM_STEPS
    assert [point.step for point in events.Scalars("dev/score")] == [0, 20, 40]


@pytest.mark.slow
def test_a_package_adds_a_loss_term(embedded_copy, site):
    config, run = embedded_copy
    weights = "ckd.weights={ckd: 1.0, l1: 0.5}"
    with pytest.raises(ConfigError, match=r"weights\.l1: no loss term of this name in ckd"):
        load_config(config, [weights])
    install(site, "distill_l1", "distill.loss_terms", "l1", "L1")
    events = train_killed_and_resumed(run, "ckd", ["--config", config, *steps("ckd"), weights])
    assert_learns_in_every_step(events, "loss/l1")
    assert {"loss/ckd", "reference_loss/ckd", "reference_loss"} < set(events.Tags()["scalars"])
