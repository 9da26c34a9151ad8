"""Settings: frozen dataclasses ⇄ JSON, typed dotted overrides, fingerprints.

A settings class lives beside the code it configures.  A field declared with `speed(default)` changes only how fast the
work is done, never the bytes that come out, and is left out of `fingerprint`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from tinyvlm.errors import ConfigError

T = TypeVar("T")


def speed(default: T) -> T:
    """Declare a field that changes speed only; it is not fingerprinted."""
    field: Any = dataclasses.field(default=default, metadata={"speed": True})
    return typing.cast(T, field)


def to_dict(config: Any, *, with_speed: bool = True) -> Any:
    """A dataclass (nested, with tuples and mappings) as plain JSON types."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            field.name: to_dict(getattr(config, field.name), with_speed=with_speed)
            for field in dataclasses.fields(config)
            if with_speed or not field.metadata.get("speed")
        }
    if isinstance(config, Mapping):
        return {str(key): to_dict(value, with_speed=with_speed) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value, with_speed=with_speed) for value in config]
    return config


def fingerprint(value: Any) -> str:
    """64 hex digits over the byte-changing settings in `value` (dataclasses or plain JSON types)."""
    canonical = json.dumps(to_dict(value, with_speed=False), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def from_dict(cls: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """Rebuild a settings class from `to_dict`'s output.

    Raises:
        ConfigError: an unknown name or a value of the wrong type, with its dotted path.
    """
    fields = _fields(cls)
    for name in data:
        if name not in fields:
            raise ConfigError(_unknown(f"{path}{name}", [f"{path}{known}" for known in fields]))
    return cls(**{name: _convert(value, fields[name], f"{path}{name}") for name, value in data.items()})


def override(config: T, assignments: Iterable[str]) -> T:
    """Apply `a.b=value` assignments; values are JSON where possible, else text.

    Raises:
        ConfigError: no `=`, an unknown name (with the nearest valid one), a wrong type, or a value the class refuses.
    """
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set wants name=value, for example train.seed=1, but got {assignment!r}.")
        config = _assign(config, name.strip().split("."), text.strip(), name.strip(), config)
    return config


def names(config: Any, prefix: str = "") -> list[str]:
    """All dotted names that `override` accepts for this settings object."""
    found: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += names(value, f"{prefix}{field.name}.")
        else:
            found.append(f"{prefix}{field.name}")
    return found


def _assign(config: Any, steps: list[str], text: str, full_name: str, root: Any) -> Any:
    fields = _fields(type(config))
    if steps[0] not in fields or (len(steps) > 1 and not dataclasses.is_dataclass(getattr(config, steps[0]))):
        raise ConfigError(_unknown(full_name, names(root)))
    if len(steps) > 1:
        value = _assign(getattr(config, steps[0]), steps[1:], text, full_name, root)
    elif dataclasses.is_dataclass(getattr(config, steps[0])):
        inner = [name for name in names(root) if name.startswith(full_name + ".")]
        raise ConfigError(f"{full_name} is a group of settings; set one of {', '.join(inner)}.")
    else:
        value = _convert(_parse(text), fields[steps[0]], full_name)
    return dataclasses.replace(config, **{steps[0]: value})


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _unknown(name: str, known: list[str]) -> str:
    leaf = name.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    near = near or [full for full in known if difflib.get_close_matches(leaf, [full.rsplit(".", 1)[-1]], cutoff=0.6)][:1]
    hint = f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(known)}."
    return f"There is no setting {name!r}; {hint}"


def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _convert(value: Any, hint: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, Mapping):
            return from_dict(hint, value, f"{path}.")
    elif hint is Any:
        return value
    elif origin is typing.Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{path} must be one of {', '.join(map(repr, arguments))}, not {value!r}.")
    elif origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return None if option is types.NoneType and value is None else _convert(value, option, path)
            except ConfigError:
                continue
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            inner = arguments[0] if arguments[1:] == (...,) else None
            kinds = [inner] * len(value) if inner is not None else list(arguments)
            if len(kinds) == len(value):
                return tuple(_convert(item, kind, path) for item, kind in zip(value, kinds, strict=True))
    elif origin in (dict, Mapping) or origin is typing.get_origin(Mapping[str, int]):
        if isinstance(value, Mapping):
            return {key: _convert(item, arguments[1], f"{path}.{key}") for key, item in value.items()}
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = hint.__name__ if isinstance(hint, type) and origin is None else str(hint).replace("typing.", "")
    raise ConfigError(f"{path} wants {wanted}, but got {value!r} ({type(value).__name__}).")
