"""The parts of parameters and of Adam's state that a rank holds, under every ZeRO stage; to files and back.

A fragment is a run of elements of one flattened parameter. Who holds which follows from the ZeRO stage and the world size; what
is in it does not, so that any ranks read what any others wrote. Padding belongs to no parameter and is never written.

    ZeRO 0       each rank holds every parameter, and writes each W-th; what is frozen, rank 0 (as under ZeRO 1 and 2)
    ZeRO 1, 2    each rank holds one part of each group's parameters, laid end to end
    ZeRO 3       each rank holds a W-th of every parameter
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distill.run.collectives import rank, world_size

FROM_MODEL = "student.encoder."  # what is frozen in here is as in the model that training began from


@dataclass(frozen=True)
class Fragment:
    """Elements from `start` of a flattened parameter, as views [n] of what the optimizer works on.

    tensors: `master`, the fp32 values, and of what is trained `exp_avg` and `exp_avg_sq`. is_owned: this rank writes them.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]
    is_owned: bool = True


def stored_parameters(engine: Any) -> dict[str, nn.Parameter]:
    """What a checkpoint holds: all that is trained, and what is frozen but did not come with the encoder."""
    named = engine.module.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad or not name.startswith(FROM_MODEL)}


def shapes(engine: Any) -> dict[str, list[int]]:
    """The whole shape of each stored parameter, by name."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in stored_parameters(engine).items()}


def fragments(engine: Any) -> Iterator[Fragment]:
    """This rank's fragments. Before the first step, Adam's state is made as the first step would make it."""
    stage = engine.zero_optimization_stage()
    adam = _adam(engine)
    for tensor in _optimized(engine):
        if not adam.state.get(tensor):
            step = torch.zeros((), dtype=torch.float32, device=tensor.device)
            adam.state[tensor] = {"step": step, "exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}
    for number, (name, parameter) in enumerate(stored_parameters(engine).items()):
        if stage == 3:
            yield from _sliced(engine, name, parameter)
        elif stage == 0 or not parameter.requires_grad:
            tensors = _with_state(adam, parameter) if parameter.requires_grad else {"master": parameter.detach()}
            views = {kind: tensor.view(-1) for kind, tensor in tensors.items()}
            writer = number % world_size() if parameter.requires_grad else 0  # every rank reads rank 0's file
            yield Fragment(name, 0, views, is_owned=writer == rank())
        else:
            yield from _partitioned(engine, name, parameter)


def _partitioned(engine: Any, name: str, parameter: Any) -> Iterator[Fragment]:
    mapping, zero = parameter._hp_mapping, engine.optimizer
    if mapping is None:
        return
    here = mapping.hp_fragment_address
    tensors = _with_state(zero.optimizer, zero.single_partition_of_fp32_groups[mapping.param_group_index])
    views = {kind: tensor.narrow(0, here.start, here.numel) for kind, tensor in tensors.items()}
    yield Fragment(name, mapping.lp_fragment_address.start, views)


def _sliced(engine: Any, name: str, parameter: Any) -> Iterator[Fragment]:
    zero, numel = engine.optimizer, parameter.ds_tensor.ds_numel
    start = rank() * numel
    count = min(numel, parameter.ds_numel - start)
    if count <= 0:
        return
    tensors, offset = {"master": parameter.ds_tensor.detach()}, 0
    if parameter.requires_grad:
        group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        tensors = _with_state(zero.optimizer, zero.fp32_partitioned_groups_flat[group])
    yield Fragment(name, start, {kind: tensor.narrow(0, offset, count) for kind, tensor in tensors.items()})


def file_name(number: int) -> str:
    """The file of a rank in a checkpoint."""
    return f"rank-{number:05d}.safetensors"


def steps_taken(engine: Any) -> int:
    """Adam's own count of steps, which leaves out those that were skipped."""
    counts = {int(state["step"]) for state in _adam(engine).state.values()}
    assert len(counts) <= 1, f"parameters differ in the number of their steps: {counts}"
    return counts.pop() if counts else 0


def copy_owned(engine: Any) -> dict[str, Tensor]:
    """Copies on the host of what this rank writes, by kind/start/name."""
    return {
        f"{kind}/{fragment.start}/{fragment.name}": tensor.to("cpu", torch.float32, copy=True)
        for fragment in fragments(engine)
        if fragment.is_owned
        for kind, tensor in fragment.tensors.items()
    }


def write_tensors(file: BinaryIO, tensors: dict[str, Tensor]) -> None:
    """Writes fp32 tensors of the host in the safetensors format, one after the other and without a second copy."""
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.numpy().data)


def load_fragments(engine: Any, files: list[Path], steps: int) -> None:
    """Sets parameters, Adam's state and its count of steps to what `files` hold; all ranks call it.

    Reads what this rank holds and no more; from the files of a rank of its number and of rank 0, which have all of it where
    ZeRO 1 to 3 and the number of ranks are the same, and only then from the others. Raises ValueError if it is not all there.
    """
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        zero._partition_all_parameters()  # what is gathered now would be used as it is
    left = [(fragment, kind, tensor) for fragment in fragments(engine) for kind, tensor in fragment.tensors.items()]
    first = [path for path in files if path.name in (file_name(rank()), file_name(0))]
    with torch.no_grad():
        for paths in (first, files):
            with ExitStack() as stack:
                parts = _parts([stack.enter_context(safe_open(path, framework="pt")) for path in paths])
                left = [
                    (fragment, kind, tensor)
                    for fragment, kind, tensor in left
                    if _fill(tensor, fragment.start, parts[kind, fragment.name]) < len(tensor)
                ]
            if not left:
                break
    if left:
        fragment, kind, _ = left[0]
        raise ValueError(f"{files[0].parent} does not hold all of {kind} of {fragment.name}")
    for state in _adam(engine).state.values():
        state["step"].fill_(steps)
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)


def _parts(files: list[Any]) -> dict[tuple[str, str], list[tuple[int, Any]]]:
    """(kind, name) -> the parts of it in open files: the first element of each, and the part."""
    parts: dict[tuple[str, str], list[tuple[int, Any]]] = defaultdict(list)
    for file in files:
        for key in file.keys():  # noqa: SIM118 - it is no mapping
            kind, start, name = key.split("/", 2)
            parts[kind, name].append((int(start), file.get_slice(key)))
    return parts


def _fill(tensor: Tensor, start: int, parts: list[tuple[int, Any]]) -> int:
    """Copies into tensor [n], the elements from `start`, what the parts have of them; returns how many that is."""
    filled, end = 0, start + len(tensor)
    for first, part in parts:
        low, high = max(start, first), min(end, first + part.get_shape()[0])
        if low < high:
            tensor[low - start : high - start].copy_(part[low - first : high - first])
            filled += high - low
    return filled


def _adam(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def _optimized(engine: Any) -> list[Tensor]:
    """The tensors that Adam keeps state for."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        return [parameter for group in zero.param_groups for parameter in group["params"]]
    return zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups


def _with_state(adam: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    state = adam.state[tensor]
    return {"master": tensor.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
