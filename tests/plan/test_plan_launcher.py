"""launcher/plan.py: every shipped config without a hub; a table and JSON with the same values; errors that say what to do."""

from __future__ import annotations

import json
import re

import pytest
from commands import ROOT, launch
from conftest import write_config
from plan.plans import cluster_of, inputs_of

from distill.config import load_config
from distill.plan.devices import load_devices
from distill.plan.planner import make_plan
from launcher.plan import main

CLUSTER = ["--nodes", "2", "--gpus-per-node", "8", "--gpu", "H100"]
OF_THE_USERS_TEXT = ("own", "compress", "simcse")
SHIPPED = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if path.stem not in OF_THE_USERS_TEXT]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_is_planned_without_a_hub(path):
    plan = make_plan(inputs_of(load_config(path), cluster_of("H100", 1, 8, is_bf16=True)))
    assert plan.seconds > 0 and plan.dollars > 0
    for name, stage in plan.stages.items():
        assert stage.chosen.largest_micro_batch > 0, (name, stage.chosen.memory_bytes)


def test_the_command_prints_a_table_and_writes_the_same_values(capsys, tmp_path, tiny_encoder):
    config, out = write_config(tmp_path, tiny_encoder), tmp_path / "plan.json"
    overrides = ["ckd.global_batch=64", "finetune.global_batch=32"]
    assert main(["--config", str(config), *CLUSTER, "--json", str(out), *overrides]) == 0
    printed, plan = capsys.readouterr().out, json.loads(out.read_text())
    assert "H100" in printed and "zero3_offload" in printed and "assumptions:" in printed
    assert f"ckd: {plan['stages']['ckd']['parameters'] / 1e6:,.1f}M parameters" in printed
    assert set(plan["stages"]) == {"ckd", "finetune", "hpd"}
    received = plan["stages"]["ckd"]["variants"]["zero1"]["bytes_received_per_step"]
    assert received["keys"] == 64 * (2 * 32 + 8) * 15 / 16
    assert received["total"] == pytest.approx(sum(received[name] for name in ("keys", "gradients", "parameters")))


def test_an_unknown_model_is_one_line_that_says_what_to_do(tmp_path, tiny_encoder):
    done = launch("plan.py", "--config", write_config(tmp_path, tiny_encoder), *CLUSTER, "student.init=nobody/has-this")
    assert done.returncode == 2 and "encoders.yaml" in done.stdout and "Traceback" not in done.stdout


def test_what_cannot_be_planned_is_an_error_that_names_the_key(tmp_path, tiny_encoder, capsys):
    config = ["--config", str(write_config(tmp_path, tiny_encoder))]
    for options, message in (
        (
            ["--nodes=2", "--gpus-per-node=8", "--gpu", _other_gpu(), "--calibrate"],
            r"--calibrate measures this machine.* not H",
        ),
        (["--nodes=100", "--gpus-per-node=8", "--gpu=H100"], "global_batch 32 is smaller than 800 ranks"),
        (["--gpu=X9"], "no device 'X9'"),
    ):
        assert main([*config, *options]) == 2
        assert re.search(message, capsys.readouterr().err)


def _other_gpu() -> str:
    from distill.plan.devices import local_devices

    return "H200" if "H100" in local_devices()[0] else "H100"


@pytest.mark.parametrize("option", ["--nodes=0", "--gpus-per-node=-1", "--sentences=0"])
def test_a_count_is_one_or_more(option, capsys, tmp_path, tiny_encoder):
    with pytest.raises(SystemExit, match="2"):
        main(["--config", str(write_config(tmp_path, tiny_encoder)), option])
    assert "is not 1 or more" in capsys.readouterr().err


def test_a_table_of_the_user_replaces_the_shipped_one(tmp_path):
    shipped = (ROOT / "configs/plan/devices.yaml").read_text()
    own = tmp_path / "own.yaml"
    own.write_text(shipped.replace("dollars: 3.00", "dollars: 5.00"))
    assert load_devices(own).find("NVIDIA H100 80GB HBM3")[1].dollars == 5.0
    own.write_text(shipped.replace("dollars: 3.00", "cents: 3"))
    with pytest.raises(ValueError, match=r"devices\.H100"):
        load_devices(own)
