"""Devices and what they compute, hold, transfer and cost, from a YAML table; and the cluster that a plan is for."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Annotated

import torch
import yaml
from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

import distill
from distill.config import RunConfig
from distill.run.cores import num_cores
from distill.run.precision import autocast_dtype

TABLES = Path(distill.__file__).parents[1] / "configs" / "plan"
STRICT = ConfigDict(extra="forbid")

Fraction = Annotated[float, Field(gt=0, le=1)]
Utilisation = Annotated[float, Field(gt=0, le=1.5)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Device:
    """A device of the table. Rates are per second; configs/plan/devices.yaml explains each value."""

    memory: PositiveFloat  # bytes
    bf16: PositiveFloat  # FLOPs
    fp32: PositiveFloat
    bandwidth: PositiveFloat  # bytes, as the next three
    inside: PositiveFloat
    between: PositiveFloat
    host: PositiveFloat
    launch: NonNegativeFloat  # seconds
    dollars: NonNegativeFloat  # per hour
    teacher: Utilisation
    student: Utilisation
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Assumptions:
    """Values for what can be neither read nor measured."""

    usable: Fraction  # of a device's memory
    latency: NonNegativeFloat  # seconds per collective
    tokens: PositiveFloat  # per text
    chars: PositiveFloat  # per text
    padding: Fraction  # of the tokens in a batch that are not padding
    text_kept: Fraction  # of the raw texts


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DeviceTable:
    devices: dict[str, Device]
    assumed: Assumptions

    def find(self, name: str) -> tuple[str, Device]:
        """The key and device whose key or alias is a whole word of `name`: "NVIDIA H100 80GB HBM3". Raises ValueError."""
        for key, device in self.devices.items():
            for word in (key, *device.aliases):
                if re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])", name, re.IGNORECASE):
                    return key, device
        raise ValueError(
            f"no device {name!r} in the table of devices ({', '.join(self.devices)}): add a line, or use --devices"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices of one kind, one rank on each. device_name: the device's key in the table; is_bf16: of matrix products."""

    nodes: int
    ranks_per_node: int
    device_name: str
    device: Device
    assumed: Assumptions
    is_bf16: bool

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def peak_flops(self) -> float:
        """FLOPs per second of one device."""
        return self.device.bf16 if self.is_bf16 else self.device.fp32

    @property
    def usable_memory(self) -> float:
        """Bytes of one device."""
        return self.device.memory * self.assumed.usable

    def dollars(self, seconds: float) -> float:
        return seconds / 3600 * self.ranks * self.device.dollars


def load_devices(path: Path | None = None) -> DeviceTable:
    """The table in `path`, by default configs/plan/devices.yaml. Raises ValueError naming the key that is wrong."""
    path = path or TABLES / "devices.yaml"
    try:
        return TypeAdapter(DeviceTable).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the table of devices {path}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def local_devices() -> tuple[str, int]:
    """The name that the driver gives this machine's GPUs, or "cpu", and their number; of a CPU, that of its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.device_count()
    return "cpu", num_cores()


def find_cluster(
    config: RunConfig, table: DeviceTable, *, nodes: int = 1, ranks_per_node: int | None = None, name: str | None = None
) -> Cluster:
    """The requested cluster; by default this machine. Raises ValueError for a device that is not in the table."""
    local_name, num_local = local_devices()
    key, device = table.find(name or local_name)
    ranks = ranks_per_node or (config.engine.num_ranks or 2 if "cpu" in (key, local_name) else num_local)
    is_bf16 = config.engine.precision != "fp32"
    if key == "cpu" and name is None:
        is_bf16 = autocast_dtype(config.engine.precision, torch.device("cpu")) is not None
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        device = dataclasses.replace(device, memory=memory / ranks)
    return Cluster(nodes=nodes, ranks_per_node=ranks, device_name=key, device=device, assumed=table.assumed, is_bf16=is_bf16)
