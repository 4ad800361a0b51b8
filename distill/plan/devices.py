"""The table of devices: what one can do, what its links carry, what it costs. One file, which the user can replace."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import distill

TABLES = Path(distill.__file__).parents[1] / "configs" / "plan"


class Device(BaseModel):
    """One device. memory in bytes; bf16, fp32 in operations a second; bandwidth of its memory, and inside, between and host of
    its links, in bytes a second; launch: the least seconds of a layer's forward and backward pass; dollars an hour; teacher,
    student: the share of the rate that encoding and training reach; aliases: other names of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory: float = Field(gt=0)
    bf16: float = Field(gt=0)
    fp32: float = Field(gt=0)
    bandwidth: float = Field(gt=0)
    inside: float = Field(gt=0)
    between: float = Field(gt=0)
    host: float = Field(gt=0)
    launch: float = Field(ge=0)
    dollars: float = Field(ge=0)
    teacher: float = Field(gt=0, le=1.5)
    student: float = Field(gt=0, le=1.5)
    aliases: tuple[str, ...] = ()

    def peak(self, is_bf16: bool) -> float:
        """Operations a second of matrix products."""
        return self.bf16 if is_bf16 else self.fp32


class Assumed(BaseModel):
    """What is taken for granted where nothing can be read or measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    usable: float = Field(gt=0, le=1)
    latency: float = Field(ge=0)
    tokens: float = Field(gt=0)
    chars: float = Field(gt=0)
    padding: float = Field(gt=0, le=1)
    text_kept: float = Field(gt=0, le=1)


class DeviceTable(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    devices: dict[str, Device]
    assumed: Assumed

    def named(self, name: str) -> tuple[str, Device]:
        """The device of a name, or of one that has it as a whole word: "NVIDIA H100 80GB HBM3". Raises ValueError."""
        for known, device in self.devices.items():
            for word in (known, *device.aliases):
                if re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])", name, re.IGNORECASE):
                    return known, device
        raise ValueError(
            f"no device {name!r} in the table of devices ({', '.join(self.devices)}): add a line, or use --devices"
        )


def load_devices(path: Path | None = None) -> DeviceTable:
    """The table in `path`; by default the one that is shipped. Raises ValueError naming the key that is wrong."""
    path = path or TABLES / "devices.yaml"
    try:
        return DeviceTable.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the table of devices {path}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
