"""launcher/plan.py as a user meets it: every shipped config without a hub, one line for what it cannot know."""

from __future__ import annotations

import json

import pytest
from commands import ROOT, launch
from conftest import write_config

from distill.config import load_config
from distill.plan.corpus import look_at_corpus
from distill.plan.devices import load_devices
from distill.plan.plan import make_plan, models_of
from distill.plan.time import Cluster

CLUSTER = ["--nodes", 2, "--gpus-per-node", 8, "--gpu", "H100"]


OF_THE_USERS_TEXT = ("own", "compress", "simcse")
SHIPPED = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if path.stem not in OF_THE_USERS_TEXT]


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_is_planned_without_a_hub(path):
    config, table = load_config(path), load_devices()
    cluster = Cluster(1, 8, "H100", table.devices["H100"], table.assumed, is_bf16=True)
    plan = make_plan(config, cluster, look_at_corpus(config, table.assumed), models_of(config))
    assert plan.seconds > 0 and plan.dollars > 0
    for stage in plan.stages:
        assert stage.chosen.fits > 0, (stage.name, stage.chosen.memory)


def test_the_command_prints_a_table_and_writes_the_same_figures(tmp_path, tiny_encoder):
    config = write_config(tmp_path, tiny_encoder)
    out = tmp_path / "plan.json"
    done = launch("plan.py", "--config", config, *CLUSTER, "--json", out, "ckd.global_batch=64", "finetune.global_batch=32")
    assert done.returncode == 0, done.stdout
    figures = json.loads(out.read_text())
    assert "H100" in done.stdout and "zero3_offload" in done.stdout and "assumed:" in done.stdout
    assert set(figures["stages"]) == {"ckd", "finetune", "hpd"}
    received = figures["stages"]["ckd"]["variants"]["zero1"]["received"]
    assert received["keys and ids"] == 64 * (2 * 32 + 8) * 15 / 16


@pytest.mark.slow
def test_what_is_not_known_is_one_line_that_says_what_to_do(tmp_path, tiny_encoder):
    config = write_config(tmp_path, tiny_encoder)
    unknown = launch("plan.py", "--config", config, *CLUSTER, "student.init=nobody/has-this")
    assert unknown.returncode == 2 and "encoders.yaml" in unknown.stdout and "Traceback" not in unknown.stdout
    elsewhere = launch("plan.py", "--config", config, *CLUSTER, "--calibrate")
    assert elsewhere.returncode == 2 and "not H100" in elsewhere.stdout and "Traceback" not in elsewhere.stdout
    table = load_devices()
    many = Cluster(100, 8, "H100", table.devices["H100"], table.assumed, is_bf16=True)
    run = load_config(config)
    with pytest.raises(ValueError, match="global_batch"):
        make_plan(run, many, look_at_corpus(run, table.assumed), models_of(run))


@pytest.mark.parametrize("option", ["--nodes=0", "--gpus-per-node=-1", "--sentences=0"])
def test_a_number_of_things_is_one_or_more(option, tmp_path, tiny_encoder):
    done = launch("plan.py", "--config", write_config(tmp_path, tiny_encoder), option)
    assert done.returncode == 2 and "is not 1 or more" in done.stdout


def test_a_table_of_the_users_own_takes_the_place_of_the_shipped_one(tmp_path):
    shipped = (ROOT / "configs/plan/devices.yaml").read_text()
    own = tmp_path / "own.yaml"
    own.write_text(shipped.replace("dollars: 3.00", "dollars: 5.00"))
    assert load_devices(own).named("NVIDIA H100 80GB HBM3")[1].dollars == 5.0
    own.write_text(shipped.replace("dollars: 3.00", "cents: 3"))
    with pytest.raises(ValueError, match=r"devices\.H100"):
        load_devices(own)
