from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import distill
from distill.run.private_apis import PRIVATE_APIS


@pytest.mark.parametrize("api", PRIVATE_APIS, ids=lambda api: api.where)
def test_a_private_api_that_we_rely_on_is_still_there(api):
    name, _, path = api.where.partition(":")
    owner, _, set_by_instances = path.partition("@")
    found = importlib.import_module(name)
    message = f"{api.library} no longer has {api.where}, which {api.used_by} uses (last checked with {api.version})"
    for part in owner.split("."):
        assert hasattr(found, part), message
        found = getattr(found, part)
    if set_by_instances:
        source = inspect.getsource(importlib.import_module(name))
        assert re.search(rf"\b{set_by_instances}\b\s*(:[^=\n]+)?=", source), message


def test_each_private_attribute_of_deepspeed_that_the_code_reads_is_in_the_table():
    source = Path(distill.__file__).with_name("training").joinpath("fragments.py").read_text()
    read = set(re.findall(r"\b(?:zero|parameter|p)\.((?:_|ds_)\w+)", source))
    listed = {re.split(r"[.@:]", api.where)[-1] for api in PRIVATE_APIS} | {"_hp_mapping"}  # set by link_hp_params
    assert read and read <= listed
