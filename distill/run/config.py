"""Config sections, and the loader that validates a YAML file with its base and overrides. Knows no particular section.

    base: other.yaml            at most one, relative to this file; its keys are the defaults of this one's
    key.subkey=value            on the command line, parsed as YAML, over both

A section is a frozen pydantic model. Each field declares the effect of a change on the stages that read it:

    result       decides what is computed: a finished stage is run again, an unfinished one with another value is refused
    selection    decides what is measured or chosen: a finished stage is kept, an unfinished one continues with the new value
    speed        neither: ignored
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

Effect = Literal["result", "selection", "speed"]
Model = TypeVar("Model", bound="StrictModel")
Name = TypeVar("Name", Path, str)


class ConfigError(ValueError):
    """A config that cannot be run; the message names the key, what is allowed and the fix."""


class StrictModel(BaseModel):
    """Keys of a file, for `validate`; an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)


class Section(StrictModel):
    """One section of a run's config."""


def expand_home(path: Name) -> Name:
    """A path whose leading ~ or ~USER is the home folder; any other name as it is. Raises ValueError for an unknown user."""
    if not str(path).startswith("~"):
        return path
    try:
        return type(path)(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}; write the whole path, or ./{path} for a name that begins with ~") from None


FilePath = Annotated[Path, AfterValidator(expand_home)]
FileName = Annotated[str, AfterValidator(expand_home)]  # or what is no path, such as hub:OWNER/NAME


def result(default: Any = ..., *, omit_default: bool = False, **options: Any) -> Any:
    """A pydantic field that decides what a stage computes. `options` are those of pydantic.Field.

    omit_default: leave it out of `settings` while it has its default, so that what was recorded before there was such a field
    is still valid.
    """
    return Field(default, json_schema_extra={"effect": "result", "omit_default": omit_default}, **options)


def selection(default: Any = ..., **options: Any) -> Any:
    """A pydantic field that decides what a stage measures during training, and which student it keeps."""
    return Field(default, json_schema_extra={"effect": "selection"}, **options)


def speed(default: Any = ..., **options: Any) -> Any:
    """A pydantic field that changes time, memory or what is logged, and no result beyond rounding."""
    return Field(default, json_schema_extra={"effect": "speed"}, **options)


def effect_of(field: FieldInfo) -> Effect | None:
    """The declared effect of a field; None if it declares none."""
    extra = field.json_schema_extra
    return extra.get("effect") if isinstance(extra, dict) else None  # type: ignore[return-value]


def effects_of(section: type[Section], prefix: str = "") -> dict[str, Effect | None]:
    """The effect of each field by its dotted path; a section inside a section declares its fields itself."""
    found: dict[str, Effect | None] = {}
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None and isinstance(field.annotation, type):
            found |= effects_of(inner, f"{prefix}{name}.")
        else:
            found[prefix + name] = effect_of(field)
    return found


def settings(
    section: Section, effect: Effect, prefix: str = "", overrides: Mapping[str, Effect] | None = None
) -> dict[str, Any]:
    """The fields of a section that have this effect, as a JSON tree. overrides: dotted path -> another effect."""
    tree: dict[str, Any] = {}
    dumped = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value, path = getattr(section, name), prefix + name
        has_effect = (overrides or {}).get(path, effect_of(field)) == effect
        if isinstance(value, Section):
            if inner := settings(value, effect, f"{path}.", overrides):
                tree[name] = inner
        elif _is_omitted(field, value):
            continue
        elif isinstance(value, list) and all(isinstance(each, Section) for each in value):
            items = [settings(each, effect, f"{path}.", overrides) for each in value]
            if has_effect or any(items):
                tree[name] = items
        elif has_effect:
            tree[name] = dumped[name]
    return tree


def _is_omitted(field: FieldInfo, value: Any) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("omit_default")) and value == field.default


def load_tree(path: str | Path, overrides: list[str] | None = None, over: Path | None = None) -> dict[str, Any]:
    """The keys of `path` over those of its base; over them those of the YAML `over`, and `overrides`. Raises ConfigError."""
    tree = _read_yaml(expand_home(Path(path)))
    if over is not None:
        tree = _merge(tree, _read_yaml(over))
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not key=value, e.g. ckd.lr=1e-4")
        _set(tree, key.split("."), _parse_value(value, override))
    return tree


def validate(model: type[Model], tree: dict[str, Any], source: str | Path) -> Model:
    """The tree as `model`. Raises ConfigError with `source`, the key, what is allowed and, for an unknown key, the nearest."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(problem, model) for problem in error.errors())) from None


def dump_config(config: Section) -> str:
    """The resolved config as YAML; loading it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, alone or in a list; None for a field that holds none."""
    found = _model_in(annotation)
    return found if found is not None and issubclass(found, Section) else None


def _model_in(annotation: Any) -> type[StrictModel] | None:
    candidates = (annotation, *get_args(annotation))
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, StrictModel)), None)


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base` leads back to this file")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else f"; {path.parent} has no such file"
        raise ConfigError(f"no config at {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from None
    tree = _parse_yaml(text, f"{path} is not YAML")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no keys; a run needs at least name, text and teacher")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base is {base!r}; it must be the name of another config file")
    return _merge(_read_yaml(path.parent / expand_home(Path(base)), (*seen, path.resolve())), tree)


def _parse_yaml(text: str, problem: str) -> Any:
    """The value of a YAML text. Raises ConfigError that begins with `problem`."""
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ConfigError(f"{problem}: its brackets are nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise ConfigError(f"{problem}: {error}") from None


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both and key != "weights" else value
    return merged


def _parse_value(text: str, override: str) -> Any:
    shown = override if len(override) <= 80 else f"{override[:80]}..."
    value = _parse_yaml(text, f"override {shown!r}: the value is not YAML")
    if isinstance(value, str) and value == text.strip():  # not quoted
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as a string
        except ValueError:
            return value
    return value


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    *parents, last = keys
    for key in parents:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[last] = value


def _explain(problem: Any, model: type[StrictModel]) -> str:
    location = [str(part) for part in problem["loc"]]
    where = ".".join(location) or "config"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], model)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.4)
        return f"unknown key {where}" + (f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(known))}")
    if problem["type"] == "missing":
        return f"{where} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) or given is None else ""
    if problem["type"] == "string_type" and given is not None and shown:
        quoted = f'"{_as_written(given)}"'
        shown += f"; quote it: {location[-1]}: {quoted}, or on the command line '{where}={quoted}'"
    return f"{where}: {message}{shown}"


def _as_written(value: Any) -> str:
    """A YAML scalar as it may stand in the file."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _known_keys(location: list[str], model: type[StrictModel]) -> list[str]:
    section: type[StrictModel] = model
    for part in location:
        if part.isdigit():
            continue
        inner = _model_in(section.model_fields[part].annotation)
        assert inner is not None, location
        section = inner
    return list(section.model_fields)
