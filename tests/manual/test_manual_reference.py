"""configs/REFERENCE.md is that of the schema, and every key has a description."""

from __future__ import annotations

from commands import ROOT

from distill.config import RunConfig
from distill.config_reference import reference
from distill.run.config import Section


def test_the_page_is_that_of_the_schema():
    page = (ROOT / "configs/REFERENCE.md").read_text()
    assert page == reference(), "run: python -m distill.config_reference > configs/REFERENCE.md"


def test_every_key_and_section_is_described():
    sections = [RunConfig, *(section for section in Section.__subclasses__() if section.__module__.startswith("distill"))]
    page = reference()
    for section in sections:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                assert field.annotation.__doc__, field.annotation
            else:
                assert field.description and name in page, f"{section.__name__}.{name}"
