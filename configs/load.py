"""YAML and dotted overrides -> RunConfig. Unknown keys are refused with the nearest name."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from duet.configs import strict_yaml
from duet.configs.best_metric import best_metric
from duet.configs.errors import UserError
from duet.configs.schema import RunConfig
from duet.configs.setting import shown
from duet.configs.turns import inherit

_MOST_BYTES = 2**17  # of a config
_LISTS = "a list is given whole, as rewards='[{name: ocr, weight: 0.5}]'"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML; an override is `section.key=value`, its value YAML; the last one wins.

    Raises UserError for a missing file, broken YAML, an unknown key, a wrong type
    or a value out of range.
    """
    tree = read_tree(path)
    for override in overrides:
        _apply(tree, override)
    config = build(RunConfig, inherit(tree), "")
    best_metric(config)  # and what turns have to agree in
    return config


def read_tree(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises UserError for a missing file, broken YAML, and for anything but a mapping.
    """
    tree = parse(f"config {str(path)!r}", _text(path))
    if not isinstance(tree, dict):
        raise UserError(f"config {str(path)!r} holds no mapping: begin with `stage: ar`")
    return tree


def parse(name: str, text: str) -> Any:
    """The value of YAML that a user wrote; `name` says where. Raises UserError."""
    try:
        return strict_yaml.read(text)
    except ValueError as error:
        raise UserError(f"{name} is not YAML that Duet reads: {error}") from error


def _text(path: str | Path) -> str:
    name = f"config {shown(str(path))}"
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"{name} is no file: name a YAML file")
        with Path(path).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise UserError(f"{name} is larger than {_MOST_BYTES:,} bytes: no config is")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8: byte {error.start} cannot be read") from error
    except ValueError as error:  # a NUL in the name
        raise UserError(f"{name} cannot be read: {error}") from error


def _apply(tree: dict, override: str) -> None:
    name, equals, text = override.partition("=")
    *sections, key = name.split(".")
    if not equals or not all((*sections, key)):
        raise UserError(f"override {shown(override)} is not section.key=value")
    if "[" in name:
        raise UserError(f"override {shown(override)}: {_LISTS}")
    for section in sections:
        if not isinstance(tree, dict):
            break
        tree = tree.setdefault(section, {})
    if not isinstance(tree, dict):
        raise UserError(f"override {shown(name)} reaches into a value that has no keys; {_LISTS}")
    tree[key] = parse(f"override {shown(override)}", text)


def build(kind: type, tree: Any, where: str) -> Any:
    """A dataclass from nested mappings; `where` is the dotted name for messages."""
    if not isinstance(tree, dict):
        raise UserError(f"{where or 'the config'} = {shown(tree)} must be a mapping of keys")
    known = {f.name: f for f in fields(kind)}
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise UserError(
                f"unknown key {shown(_join(where, key))}: did you mean {near[0]!r}? "
                f"Allowed are {', '.join(known)}"
            )
    hints = get_type_hints(kind)
    for name, known_field in known.items():
        required = known_field.default is MISSING and known_field.default_factory is MISSING
        if required and name not in tree:
            raise UserError(f"missing key {_join(where, name)!r}: it has no default")
    return kind(**{k: _convert(hints[k], v, _join(where, k)) for k, v in tree.items()})


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if is_dataclass(hint):
        return build(hint, value, where)
    if origin in (Union, UnionType):  # typing makes the first of `Literal[...] | None`
        if value is None and NoneType in get_args(hint):
            return None
        return _convert(next(h for h in get_args(hint) if h is not NoneType), value, where)
    if origin is Literal:
        # YAML 1.1 reads a bare `no` as False
        value = "no" if value is False and "no" in get_args(hint) else value
        if not any(value == known and type(value) is type(known) for known in get_args(hint)):
            allowed = ", ".join(map(repr, get_args(hint)))
            raise UserError(f"{where} = {shown(value)} is not allowed: choose one of {allowed}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{where} = {shown(value)} must be a list")
        return tuple(_convert(get_args(hint)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        return _plain(dict, value, where)
    if hint is float:
        return _number(value, where)
    return _plain(hint, value, where)


def _plain(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where} = {shown(value)} must be of type {kind.__name__}")
    return value


def _number(value: Any, where: str) -> float:
    # YAML 1.1 reads 1e-4 as a string
    if not isinstance(value, int | float | str) or isinstance(value, bool):
        raise UserError(f"{where} = {shown(value)} must be of type float")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except ValueError as error:
        raise UserError(f"{where} = {shown(value)} must be of type float") from error
    if not math.isfinite(number):
        raise UserError(f"{where} = {shown(value)} must be finite")
    return number
