"""Private APIs of libraries that this project relies on, with the versions that they were checked against.

tests/run/test_private_apis.py names the one that is missing when a library changes. `where`: "module:Class.attribute" for what
can be looked up, "module:Class@attribute" for what instances set.
"""

from __future__ import annotations

from typing import NamedTuple


class PrivateApi(NamedTuple):
    library: str
    version: str
    where: str
    used_by: str


_ZERO12 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_ZERO3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_PARTITION = "deepspeed.runtime.zero.partition_parameters"

PRIVATE_APIS = (
    PrivateApi("deepspeed", "0.19.8", f"{_ZERO12}@single_partition_of_fp32_groups", "training/fragments.py"),
    PrivateApi("deepspeed", "0.19.8", f"{_ZERO12}.update_lp_params", "training/fragments.py"),
    PrivateApi("deepspeed", "0.19.8", "deepspeed.utils.mixed_precision_linkage:link_hp_params", "training/fragments.py"),
    PrivateApi("deepspeed", "0.19.8", f"{_ZERO3}@fp32_partitioned_groups_flat", "training/fragments.py"),
    PrivateApi("deepspeed", "0.19.8", f"{_ZERO3}@fp16_groups", "training/fragments.py"),
    PrivateApi("deepspeed", "0.19.8", f"{_ZERO3}@grad_position", "training/fragments.py"),
    PrivateApi("deepspeed", "0.19.8", f"{_ZERO3}.get_param_id", "training/fragments.py"),
    PrivateApi("deepspeed", "0.19.8", f"{_ZERO3}._partition_all_parameters", "training/fragments.py"),
    PrivateApi("deepspeed", "0.19.8", f"{_ZERO3}._reassign_or_swap_out_partitioned_parameters", "training/fragments.py"),
    PrivateApi("deepspeed", "0.19.8", f"{_PARTITION}:Init@ds_tensor", "training/fragments.py"),
    PrivateApi("deepspeed", "0.19.8", f"{_PARTITION}:Init@ds_numel", "training/fragments.py"),
    PrivateApi("deepspeed", "0.19.8", f"{_PARTITION}:Init@ds_shape", "training/fragments.py"),
    PrivateApi("deepspeed", "0.19.8", "deepspeed.ops:__compatible_ops__", "launcher/rendezvous.py"),
    PrivateApi("deepspeed", "0.19.8", "deepspeed.runtime.engine:DeepSpeedEngine.was_step_applied", "training/loop.py"),
    PrivateApi("torch", "2.13.0", "torch.ops:mkldnn._is_mkldnn_bf16_supported", "run/precision.py"),
    PrivateApi("torch", "2.13.0", "torch.cpu:_is_avx512_bf16_supported", "run/precision.py"),
    PrivateApi("torch", "2.13.0", "torch.ops:mkldnn._reorder_linear_weight", "teacher/load.py"),
    PrivateApi("torch", "2.13.0", "torch.ops:mkldnn._linear_pointwise", "teacher/load.py"),
    PrivateApi("torch", "2.13.0", "torch.distributed.distributed_c10d:default_pg_timeout", "launcher/rendezvous.py"),
    PrivateApi("torch", "2.13.0", "torch.distributed.distributed_c10d:default_pg_nccl_timeout", "launcher/rendezvous.py"),
    PrivateApi("torch", "2.13.0", "torch._subclasses.fake_tensor:FakeTensorMode", "plan/"),
    PrivateApi("transformers", "5.23.0", "transformers.initialization:no_init_weights", "plan/architectures.py"),
    PrivateApi("transformers", "5.23.0", "transformers.integrations:HfDeepSpeedConfig", "teacher/load.py"),
    PrivateApi("transformers", "5.23.0", "transformers:PreTrainedModel._supports_sdpa", "student/encoder.py"),
    PrivateApi("transformers", "5.23.0", "transformers:PreTrainedModel._can_set_attn_implementation", "student/encoder.py"),
)
