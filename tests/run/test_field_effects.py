"""Every config field declares what a change of it does, and stages name only fields that there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic.fields import FieldInfo

from distill.config import STAGES, RunConfig, load_config, stage_of
from distill.run.config import Effect, Section, effect_of, result, section_of


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("{name: tiny, text: {sources: [text.txt]}, teacher: {model: encoder}}")
    return load_config(path)


def fields_of(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The dotted path of each field and the field, those of sections and of lists of sections included."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if (inner := section_of(field.annotation)) is not None:
            yield from fields_of(inner, f"{prefix}{name}.")


def is_section(field: FieldInfo) -> bool:
    """Whether the field is a section, whose own fields declare their effects."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def undeclared(section: type[Section]) -> list[str]:
    return [path for path, field in fields_of(section) if not is_section(field) and effect_of(field) not in get_args(Effect)]


def test_every_field_declares_an_effect():
    paths = {path for path, _ in fields_of(RunConfig)}
    assert {"seed", "text.sources.path", "ckd.temperature.scale", "hpd.whitening", "evaluate.sts"} < paths
    assert undeclared(RunConfig) == []


def test_a_field_without_an_effect_is_found():
    class Inner(Section):
        lr: float = 1.0
        steps: int = result(1)

    class Outer(Section):
        inner: Inner = Inner()
        several: list[Inner] = result([])
        weights: dict[str, float] = {}  # noqa: RUF012

    assert undeclared(Outer) == ["inner.lr", "several.lr", "weights"]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_names_only_fields_that_there_are(config, name):
    stage, fields = type(stage_of(config, name)), dict(fields_of(RunConfig))
    assert {*stage.reads, *stage.covered_by_inputs, *stage.effects} <= fields.keys()
    assert not any(is_section(fields[path]) for path in stage.effects)
    assert not set(stage.reads) & set(stage.covered_by_inputs)


def has_field(tree: Any, path: str) -> bool:
    """Whether a JSON tree has a dotted path, in any item of a list."""
    if isinstance(tree, list):
        return any(has_field(each, path) for each in tree)
    name, _, rest = path.partition(".")
    return isinstance(tree, dict) and name in tree and (not rest or has_field(tree[name], rest))


@pytest.mark.parametrize("name", STAGES)
def test_a_stages_own_effects_replace_those_of_the_fields(config, name):
    stage = stage_of(config, name)
    for path, effect in type(stage).effects.items():
        assert [each for each in get_args(Effect) if has_field(stage.settings(each), path)] == [effect], path


def test_every_section_belongs_to_a_stage_or_is_read_by_one(config):
    kinds = {name: type(stage_of(config, name)) for name in STAGES}
    paths = [path for name, kind in kinds.items() for path in (name, *kind.reads, *kind.covered_by_inputs)]
    sections = {name for name, field in RunConfig.model_fields.items() if is_section(field)}
    assert not sections - {path.partition(".")[0] for path in paths}
