"""The page of all keys is the schema's, and every key says what it is."""

from __future__ import annotations

from commands import ROOT

from distill.config import RunConfig, Section
from distill.reference import reference


def test_the_page_is_that_of_the_schema():
    assert (ROOT / "configs/REFERENCE.md").read_text() == reference(), "run: python -m distill.reference > configs/REFERENCE.md"


def test_every_key_and_section_is_described():
    sections = [RunConfig, *Section.__subclasses__()]
    page = reference()
    for section in sections:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                assert field.annotation.__doc__, field.annotation
            else:
                assert field.description and name in page, f"{section.__name__}.{name}"
