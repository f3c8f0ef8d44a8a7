"""Strict JSON into frozen dataclasses: unknown keys, wrong types and values out of range are sentences, not surprises.

It knows nothing of what the fields mean; `config.py` declares them.
"""

import dataclasses
import difflib
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patch_based_ddpm.errors import InputError

MAX_SHOWN = 60  # characters of a wrong value that a message repeats

RULES = {
    "least": ("at least {}", lambda value, bound: value >= bound),
    "most": ("at most {}", lambda value, bound: value <= bound),
    "above": ("more than {}", lambda value, bound: value > bound),
    "below": ("less than {}", lambda value, bound: value < bound),
    "choices": ("one of {}", lambda value, bound: value in bound),
}

TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def field(default: Any, doc: str, **bounds: Any) -> Any:
    """A field of a dataclass for `build`, with its line in the README's table and its bounds."""
    return dataclasses.field(default=default, metadata={"doc": doc, **bounds})


def required(doc: str, **bounds: Any) -> Any:
    """The same without a default."""
    return field(dataclasses.MISSING, doc, **bounds)


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 file.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text (byte {error.start}).") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def parse(text: str) -> Any:
    """Parse JSON, without its common extensions: no NaN or Infinity, no key twice.

    Raises:
        InputError: the text is empty or is not JSON (with line and column).
    """
    if not text.strip():
        raise InputError("is empty; it must hold a JSON object.")
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_distinct_keys)
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.") from None
    except InputError:
        raise
    except ValueError:
        raise InputError("holds a number of too many digits.") from None
    except RecursionError:
        raise InputError("is nested too deeply to be a configuration.") from None


def _refuse_constant(constant: str) -> None:
    raise InputError(f"holds {constant}, which is not a JSON number.")


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = {}
    for key, value in pairs:
        if key in data:
            raise InputError(f"has the key {_short(key)} twice.")
        data[key] = value
    return data


def build(kind: type, data: Any, where: str) -> Any:
    """Build a dataclass from plain JSON data, checking every key, type and bound.

    Args:
        kind: a dataclass whose fields are bool, int, float, str, tuples of int, dataclasses, or unions of these; a
            field's metadata may hold `least`, `most`, `above`, `below` or `choices`, for each item of a tuple too.
        data: what `json` made of a file.
        where: the name of this object in messages.

    Raises:
        InputError: a key or value does not fit, or the dataclass itself refuses the combination.
    """
    if not isinstance(data, dict):
        raise InputError(f"{where} is {_short(data)}; it must be an object.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"the known ones are {', '.join(fields)}."
            raise InputError(f"{where} has an unknown key {_short(key)}; {hint}")
    for name, field in fields.items():
        if name not in data and field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f'{where} lacks the required key "{name}".')
    hints = typing.get_type_hints(kind)
    return kind(**{key: _value(value, hints[key], fields[key], where) for key, value in data.items()})


def _value(value: Any, hint: Any, field: dataclasses.Field, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, field.name)
    value = _typed(value, hint, f"{where}.{field.name}")
    found = f"{where}.{field.name} is {_short(value)}"
    for part in value if isinstance(value, tuple) else (value,):
        if part is not None:
            _check_bounds(part, field.metadata, found)
    return value


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Match a JSON value with a field's annotation; lists become tuples, whole numbers may stand for floats."""
    for option in _options(hint):
        if typing.get_origin(option) is tuple:
            items = typing.get_args(option)
            fits = isinstance(value, list) and all(type(item) is items[0] for item in value)
            if fits and (len(value) >= 1 if items[-1] is ... else len(value) == len(items)):
                return tuple(value)
        elif type(value) is option and value not in (math.inf, -math.inf):  # 1e400 is how infinity slips in
            return value
        elif option is float and type(value) is int:
            try:
                return float(value)
            except OverflowError:
                break
    raise InputError(f"{where} is {_short(value)}; it must be {' or '.join(map(_describe, _options(hint)))}.")


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _describe(option: Any) -> str:
    if typing.get_origin(option) is tuple:
        items = typing.get_args(option)
        return "a list of whole numbers" if items[-1] is ... else f"a list of {len(items)} whole numbers"
    return TYPE_NAMES[option]


def _check_bounds(value: Any, metadata: Mapping[str, Any], found: str) -> None:
    for rule, (words, holds) in RULES.items():
        if rule in metadata and not holds(value, metadata[rule]):
            bound = metadata[rule]
            shown = ", ".join(map(json.dumps, bound)) if rule == "choices" else bound
            raise InputError(f"{found}; it must be {words.format(shown)}.")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
