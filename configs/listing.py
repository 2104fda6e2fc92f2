"""The list of all settings, made from the schema."""

import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from duet.configs.schema import RunConfig


@dataclass(frozen=True)
class Listed:
    """One setting, as a line of the list tells it."""

    name: str  # dotted
    kind: str  # its type, or the values to choose from
    default: str
    range: str
    meaning: str


def settings(section: type = RunConfig, where: str = "") -> Iterator[Listed]:
    """Of a section and those below it, in the schema's order."""
    hints = get_type_hints(section)
    for known in fields(section):
        name, hint = where + known.name, hints[known.name]
        items = get_args(hint)[0] if get_origin(hint) is tuple else None
        optional = [part for part in get_args(hint) if items is None and is_dataclass(part)]
        if is_dataclass(hint):
            if where.endswith("[]."):
                yield Listed(name, "section", "the run's", "", known.metadata["meaning"])
            else:
                yield from settings(hint, f"{name}.")
            continue
        default = "required" if known.default is MISSING else _value(known.default)
        if known.default_factory is not MISSING:
            default = _value(known.default_factory())
        told = known.metadata
        yield Listed(name, _kind(hint), default, str(told["range"]), told["meaning"])
        if is_dataclass(items) and not where:
            yield from settings(items, f"{name}[].")
        for section in optional:
            yield from settings(section, f"{name}.")


def _kind(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(map(_value, get_args(hint)))
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        named = item.__name__.removesuffix("Config").lower() + "s" if is_dataclass(item) else ""
        return f"list of {named or _kind(item)}"
    if hint is NoneType:
        return "null"
    if is_dataclass(hint):
        return "section"
    if parts := [part for part in get_args(hint) if get_origin(hint) is not dict]:
        return " | ".join(map(_kind, parts))
    return {str: "text", dict: "mapping"}.get(
        get_origin(hint) or hint, getattr(hint, "__name__", "")
    )


def _value(value: Any) -> str:
    """As YAML writes it."""
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case str():
            return value or '""'
        case tuple():
            return "[]"
        case _:
            return str(value)


def text() -> str:
    """A paragraph a setting: name, type, default and range in a line, its meaning below."""
    lines = []
    for one in settings():
        ends = f", {one.range}" if one.range else ""
        default = one.default if one.default == "required" else f"default {one.default}"
        lines.append(f"{one.name}  ({one.kind}{ends}; {default})")
        lines += textwrap.wrap(one.meaning, 92, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)
