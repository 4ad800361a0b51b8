"""The reference of all config keys, as Markdown from the schema: python -m distill.config_reference > configs/REFERENCE.md"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from distill.config import RunConfig
from distill.run.config import Section, section_of

PREFACE = """# Every key of a config

Made by `python -m distill.config_reference > configs/REFERENCE.md`; a test checks that it is up to date. A config is a YAML
file with these keys; `base: other.yaml` takes another file's keys as defaults. On the command line any key is
`section.key=value`, with the value in YAML: `ckd.lr=1e-4`, `"ckd.weights={ckd: 1}"`. An unknown key is an error that names the
nearest known one.
"""
BOUNDS = ((Gt, ">", "gt"), (Ge, ">=", "ge"), (Lt, "<", "lt"), (Le, "<=", "le"), (MinLen, "length >=", "min_length"))
HEADER = "| key | type | default | allowed | what it is |\n|---|---|---|---|---|"


def reference() -> str:
    """The page."""
    parts = [PREFACE, f"## The run\n\n{_docstring(RunConfig)}\n", _table(RunConfig, "")]
    for name, field in RunConfig.model_fields.items():
        if section := section_of(field.annotation):
            parts += [
                f"## {name}\n\n{_docstring(section)}\n",
                _table(section, f"{name}.", None if field.is_required() else field.default),
            ]
    return "\n".join(parts)


def _table(section: type[Section], prefix: str, defaults: Any = None) -> str:
    return "\n".join([HEADER, *_rows(section, prefix, defaults), ""])


def _rows(section: type[Section], prefix: str, defaults: Any) -> Iterator[str]:
    """defaults: the section's default value; None for a required section."""
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner and not prefix:
            continue  # has its own heading
        value = field.default if defaults is None else getattr(defaults, name)
        if inner and typing.get_origin(field.annotation) is None:
            yield from _rows(inner, f"{prefix}{name}.", value)
            continue
        yield _row(f"{prefix}{name}", _type(field.annotation), field, value)
        if inner and not issubclass(section, inner):  # its keys are listed already
            mark = "[]" if typing.get_origin(field.annotation) is list else ""
            yield from _rows(inner, f"{prefix}{name}{mark}.", None)


def _row(key: str, kind: str, field: FieldInfo, value: Any) -> str:
    assert field.description, f"{key} has no description"
    default = "**required**" if field.is_required() else f"`{_yaml(value)}`"
    cells = [f"`{key}`", kind, default, _allowed(field), field.description]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


def _type(annotation: Any) -> str:
    """The type of a key in words: `whole number or null`, `list of text`, ..."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_type, arguments)))
    if origin is Literal:
        return "word"
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} {_type(arguments[0])}"
    if origin is dict:
        return f"map to {_type(arguments[1])}"
    names = {types.NoneType: "null", Path: "path", bool: "true or false", float: "number", int: "whole number", str: "text"}
    return names.get(annotation, "map")


def _allowed(field: FieldInfo) -> str:
    parts = [
        f"{sign} {getattr(bound, name)}" for bound in field.metadata for kind, sign, name in BOUNDS if isinstance(bound, kind)
    ]
    parts += [f"`{bound.pattern}`" for bound in field.metadata if hasattr(bound, "pattern")]
    return ", ".join([*parts, *_words(field.annotation)])


def _words(annotation: Any) -> list[str]:
    """The words of a Literal, wherever it is in the annotation."""
    if typing.get_origin(annotation) is Literal:
        return [f"`{word}`" for word in typing.get_args(annotation)]
    return [word for part in typing.get_args(annotation) for word in _words(part)]


def _docstring(section: type[Section]) -> str:
    assert section.__doc__, f"{section.__name__} has no docstring"
    return "\n".join(line.strip() for line in section.__doc__.strip().splitlines())


if __name__ == "__main__":
    print(reference(), end="")
