"""Settings: frozen dataclasses ⇄ JSON, typed dotted overrides, fingerprints.

A settings class lives beside the code it configures.  A field declared with `speed(default)` changes only how fast the
work is done, never the bytes that come out, and is left out of `fingerprint`.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tinyvlm.errors import ConfigError

T = TypeVar("T")


def speed(default: T) -> T:
    """Declare a field that changes speed only; it is not fingerprinted."""
    field: Any = dataclasses.field(default=default, metadata={"speed": True})
    return typing.cast(T, field)


def to_dict(config: Any, *, with_speed: bool = True) -> Any:
    """A dataclass (nested, with tuples and mappings) as plain JSON types."""
    if _is_settings(config):
        return {
            field.name: to_dict(getattr(config, field.name), with_speed=with_speed)
            for field in dataclasses.fields(config)
            if with_speed or not field.metadata.get("speed")
        }
    if isinstance(config, Mapping):
        return {str(key): to_dict(value, with_speed=with_speed) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value, with_speed=with_speed) for value in config]
    return str(config) if isinstance(config, Path) else config


def fingerprint(value: Any) -> str:
    """64 hex digits over the byte-changing settings in `value` (dataclasses or plain JSON types)."""
    plain = _canonical(to_dict(value, with_speed=False))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def from_dict(cls: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """Rebuild a settings class from `to_dict`'s output; names that are absent keep their defaults.

    Raises:
        ConfigError: an unknown name, one that is missing, or a value of the wrong type, with its dotted path.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path.rstrip('.') or cls.__name__} wants an object of settings, but got {data!r}.")
    fields = _fields(cls)
    for name in data:
        if name not in fields:
            raise ConfigError(_unknown(f"{path}{name}", [f"{path}{known}" for known in fields]))
    values = {name: _convert(value, fields[name], f"{path}{name}") for name, value in data.items()}
    absent = [f"{path}{field.name}" for field in _required(cls) if field.name not in data]
    if absent:
        raise ConfigError(f"{', '.join(absent)} must be given: there is no default.")
    return cls(**values)


def override(config: T, assignments: Iterable[str]) -> T:
    """Apply `a.b=value` assignments together, so that two which only fit each other may come in any order.

    Values are JSON where possible, else text; a list may be written `a,b,c`; of two for the same name the last counts.

    Raises:
        ConfigError: no `=`, an unknown name (with the nearest valid one), a wrong type, or a value the class refuses.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        steps = name.strip().split(".")
        if not equals:
            raise ConfigError(f"--set wants name=value, for example --set train.seed=1, but got {assignment!r}.")
        _check_name(config, steps)
        group = changes
        for step in steps[:-1]:
            group = group.setdefault(step, {})
            if not isinstance(group, dict):
                raise ConfigError(f"--set gives {step} as a whole and by part ({name.strip()}); use one of the two.")
        group[steps[-1]] = text.strip()
    return typing.cast(T, _apply(config, changes, "")) if changes else config


def names(config: Any, prefix: str = "") -> list[str]:
    """All dotted names that `override` accepts for this settings object."""
    found: list[str] = []
    for name, value in _members(config).items():
        found.append(f"{prefix}{name}")
        if _is_settings(value):
            found[-1:] = names(value, f"{prefix}{name}.")
        elif isinstance(value, Mapping):
            found += [f"{prefix}{name}.{key}" for key in value]
    return found


def _is_settings(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _canonical(value: Any) -> Any:
    """1.0 as 1: a whole number means the same however it was written."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _members(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _check_name(root: Any, steps: list[str]) -> None:
    value = root
    for step in steps:
        members = _members(value) if _is_settings(value) or isinstance(value, Mapping) else {}
        if step not in members:
            raise ConfigError(_unknown(".".join(steps), names(root)))
        value = members[step]
    if _is_settings(value):
        inner = names(value, ".".join(steps) + ".")
        raise ConfigError(f"{'.'.join(steps)} is a group of settings; set one of {', '.join(inner)}.")


def _apply(config: Any, changes: Mapping[str, Any], path: str) -> Any:
    fields = _fields(type(config))
    values: dict[str, Any] = {}
    for name, change in changes.items():
        now = getattr(config, name)
        if not isinstance(change, Mapping):
            values[name] = _from_text(change, fields[name], f"{path}{name}")
        elif isinstance(now, Mapping):
            hint = _strip_none(fields[name])
            item = (typing.get_args(hint) or (str, Any))[1]
            new = {key: _from_text(text, item, f"{path}{name}.{key}") for key, text in change.items()}
            values[name] = {**now, **new}
        else:
            values[name] = _apply(now, change, f"{path}{name}.")
    return dataclasses.replace(config, **values)


def _strip_none(hint: Any) -> Any:
    options = [option for option in typing.get_args(hint) if option is not types.NoneType]
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return options[0] if is_union and len(options) == 1 else hint


def _from_text(text: str, hint: Any, path: str) -> Any:
    """A value from the command line: what was typed counts, so that a name like 1e5 stays a name."""
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError:
        parsed = {"True": True, "False": False, "None": None}.get(text, text)
    wanted = _strip_none(hint)
    if parsed is None and wanted is not hint:
        return None
    if wanted is str and not isinstance(parsed, str):
        parsed = text
    if typing.get_origin(wanted) is tuple and not isinstance(parsed, list):
        item = (typing.get_args(wanted) or (str,))[0]
        parsed = [_from_text(piece.strip(), item, path) for piece in text.split(",")] if text else []
    return _convert(parsed, hint, path)


def _unknown(name: str, known: list[str]) -> str:
    leaf = name.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    leaves = {full.rsplit(".", 1)[-1]: full for full in reversed(known)}
    near = near or [leaves[found] for found in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.6)]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(known)}."
    return f"There is no setting {name!r}; {hint}"


def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _required(cls: type) -> list[dataclasses.Field[Any]]:
    missing = dataclasses.MISSING
    return [f for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]


def _convert(value: Any, hint: Any, path: str) -> Any:
    """`value`, made of JSON types, as the type that a field declares."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_dict(hint, value, f"{path}.")
    if origin is typing.Literal:
        return _convert_choice(value, typing.get_args(hint), path)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, hint, path)
    if (origin or hint) in (tuple, list, dict, collections.abc.Mapping, collections.abc.Sequence):
        return _convert_many(value, hint, path)
    return _convert_one(value, hint, path)


def _refuse(value: Any, hint: Any, path: str) -> ConfigError:
    plain = isinstance(hint, type) and typing.get_origin(hint) is None
    wanted = hint.__name__ if plain else str(hint).replace("typing.", "")
    also = ", true or false," if hint is bool else ""
    return ConfigError(f"{path} wants {wanted}{also} but got {value!r} ({type(value).__name__}).")


def _convert_choice(value: Any, choices: tuple[Any, ...], path: str) -> Any:
    if any(type(value) is type(choice) and value == choice for choice in choices):
        return value
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ConfigError(f"{path} must be one of {', '.join(map(repr, choices))}, not {value!r}{hint}")


def _convert_union(value: Any, hint: Any, path: str) -> Any:
    options = typing.get_args(hint)
    if value is None and types.NoneType in options:
        return None
    options = tuple(option for option in options if option is not types.NoneType)
    if len(options) == 1:
        return _convert(value, options[0], path)
    if type(value) in options:
        return _convert(value, type(value), path)
    for option in options:
        try:
            return _convert(value, option, path)
        except ConfigError:
            continue
    raise _refuse(value, hint, path)


def _convert_many(value: Any, hint: Any, path: str) -> Any:
    origin, kinds = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (dict, collections.abc.Mapping):
        if not isinstance(value, Mapping):
            raise _refuse(value, hint, path)
        item = kinds[1] if kinds else Any
        return {str(key): _convert(inner, item, f"{path}.{key}") for key, inner in value.items()}
    if not isinstance(value, (list, tuple)):
        raise _refuse(value, hint, path)
    if origin is tuple and kinds and kinds[-1] is not ...:
        if len(kinds) != len(value):
            raise ConfigError(f"{path} wants {len(kinds)} values, but got {len(value)}: {list(value)!r}.")
        return tuple(_convert(item, kind, path) for item, kind in zip(value, kinds, strict=True))
    # A list is kept as a tuple: settings are frozen, and equal after a trip through JSON.
    return tuple(_convert(item, kinds[0] if kinds else Any, path) for item in value)


def _convert_one(value: Any, hint: Any, path: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} wants a finite number, but got {value!r}.")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and is_number:
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise _refuse(value, hint, path)
