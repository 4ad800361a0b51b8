"""A DeepSpeed configuration: an allow-list of keys; the rest is refused by file and key."""

from __future__ import annotations

import json

import pytest
from commands import ROOT

from distill.plan.zero_partition import ZeroSettings
from distill.training.deepspeed_config import read_deepspeed_config
from distill.training.engine import build_engine
from distill.training.train_config import EngineConfig, TrainConfig

SHIPPED = sorted((ROOT / "configs/deepspeed").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_files_are_read_as_they_are(path):
    assert read_deepspeed_config(path) == json.loads(path.read_text())


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"zero_optimization": {"stage": "auto"}}', 'zero_optimization.stage is "auto"'),
        ('{"train_micro_batch_size_per_gpu": "auto"}', "train_micro_batch_size_per_gpu is not read.*a stage's micro_batch"),
        ('{"bf16": {"enabled": true}}', "bf16 is not read from this file; engine.precision"),
        ('{"fp16": {"enabled": true}}', "fp16 is not read from this file; engine.precision"),
        ('{"scheduler": {"type": "WarmupLR"}}', "scheduler is not read"),
        ('{"optimizer": {"type": "Adam"}}', "optimizer is not read"),
        ('{"gradient_clipping": 1.0}', "gradient_clipping is not read from this file; a stage's clip"),
        ('{"zero_optimization": {"stagee": 1}}', "unknown key zero_optimization.stagee; did you mean stage?"),
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage: Input should be 0, 1, 2 or 3"),
        ('{"zero_optimization": true}', "zero_optimization: "),
        ('{"zero_optimization": {"offload_optimizer": {"device": "disk"}}}', "offload_optimizer.device: "),
        ('{"zero_optimization": {"zero_quantized_gradients": true}}', "unknown key zero_optimization.zero_quantized_gradients"),
        ('{"zero_force_ds_cpu_optimizer": true}', "zero_force_ds_cpu_optimizer: "),
        ('{"zero_optimization": {}} // comment', r"is not JSON \(.*no comments"),
        ('{"zero_optimization": {},}', "is not JSON"),
        ("[" * 3000, "is not JSON"),
        ("[]", "is JSON, but no object"),
    ],
)
def test_what_a_file_may_not_have_is_refused_by_file_and_key(tmp_path, text, message):
    path = tmp_path / "own.json"
    path.write_text(text)
    for read in (read_deepspeed_config, ZeroSettings.load, lambda path: engine_of(path)):
        with pytest.raises(ValueError, match=rf"^{path}.*{message}") as raised:
            read(path)
        assert "\n" not in str(raised.value)


def engine_of(path):
    import torch

    return build_engine(torch.nn.Linear(1, 1), TrainConfig(), EngineConfig(deepspeed=path), num_micro=1, temperature_lr=0.1)


def test_offload_without_the_cpu_optimizer_s_key_takes_torch_s_adamw(tmp_path):
    path = tmp_path / "own.json"
    path.write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    assert read_deepspeed_config(path)["zero_force_ds_cpu_optimizer"] is False
