"""Which precision is chosen, and why, on processors and GPUs with and without bf16 instructions."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from commands import ROOT

from distill.run.precision import autocast_dtype, describe_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=[CPU, GPU], ids=str)
def device(request):
    return request.param


def set_bf16(monkeypatch, is_native, is_emulated=False):
    """What torch finds out about the processor and the GPU of this machine."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_native or is_emulated)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_native)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: is_native or (is_emulated and including_emulation)
    )


def test_with_bf16_instructions_it_is_bf16_unless_the_config_says_fp32(monkeypatch, device):
    set_bf16(monkeypatch, is_native=True)
    kind = "processor" if device == CPU else "GPU"
    assert autocast_dtype("auto", device) == autocast_dtype("bf16", device) == torch.bfloat16
    assert autocast_dtype("fp32", device) is None
    assert describe_precision("auto", device) == f"bf16 (auto: this {kind} has bf16 instructions)"
    assert describe_precision("bf16", device) == "bf16 (as configured)"
    assert describe_precision("fp32", device) == "fp32 (as configured)"


@pytest.mark.parametrize("is_emulated", [False, True])
def test_without_bf16_instructions_it_is_fp32_and_bf16_is_refused(monkeypatch, device, is_emulated):
    set_bf16(monkeypatch, is_native=False, is_emulated=is_emulated)
    kind = "processor" if device == CPU else "GPU"
    assert autocast_dtype("auto", device) is None
    assert describe_precision("auto", device) == f"fp32 (auto: this {kind} has no bf16 instructions)"
    with pytest.raises(ValueError, match=f"this {kind} has no bf16 instructions; use fp32 or auto"):
        autocast_dtype("bf16", device)


def test_a_processor_limited_to_avx2_has_no_bf16():
    """oneDNN reads the limit itself, so this is what a processor with AVX2 alone reports."""
    code = "import torch, distill.run.precision as p; print(p.describe_precision('auto', torch.device('cpu')))"
    limit = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | limit, cwd=ROOT)
    assert done.stdout == "fp32 (auto: this processor has no bf16 instructions)\n", done.stderr
