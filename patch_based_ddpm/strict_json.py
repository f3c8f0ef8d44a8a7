"""Frozen dataclasses read from JSON: pydantic checks keys, types and bounds; its first error becomes one sentence."""

import dataclasses
import difflib
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import ConfigDict, Field, StrictInt, StringConstraints, TypeAdapter

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.files import write_json

MAX_SHOWN = 60  # characters of a wrong value that a message repeats
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most", "exclusiveMaximum": "less than"}
TYPE_NAMES = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}

Positive = Annotated[StrictInt, Field(ge=1)]
NonNegative = Annotated[StrictInt, Field(ge=0)]
Text = Annotated[str, StringConstraints(strict=True, pattern=r"^[^\x00]*$")]
Folder = Annotated[Text, Field(min_length=1)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**63)]

T = TypeVar("T", bound=type)
C = TypeVar("C", bound="ConfigFile")


def key(default: Any, meaning: str, **rules: Any) -> Any:
    """A key of a section: its default, or `...` where it is required; its meaning, for the docs; pydantic's rules."""
    return Field(default, description=meaning, **rules)


def section(name: str) -> Callable[[T], T]:
    """Make a class a frozen dataclass whose constructor, and so `dataclasses.replace`, raises InputError.

    Args:
        name: the section's name in messages; "" for a class made of sections.
    """

    def decorate(cls: T) -> T:
        config = ConfigDict(extra="forbid", allow_inf_nan=False)
        cls = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)
        validate = cls.__init__

        def __init__(self: Any, /, **values: Any) -> None:  # noqa: N807
            try:
                validate(self, **values)
            except pydantic.ValidationError as error:
                raise InputError(_sentence(error, cls, name, values)) from None

        cls.__init__ = __init__
        return cls

    return decorate


def _sentence(error: pydantic.ValidationError, kind: type, name: str, data: dict[str, Any]) -> str:
    problem = min(error.errors(), key=lambda problem: problem["type"] != "unexpected_keyword_argument")
    refusal = problem.get("ctx", {}).get("error")
    if isinstance(refusal, InputError):  # of a `__post_init__`
        return str(refusal)
    key, *inner = problem["loc"]
    if inner and dataclasses.is_dataclass(section := kind.__pydantic_fields__[key].annotation):
        kind, name, data = section, key, data[key]
        key, *inner = inner
    place, fields = name or "the configuration", kind.__pydantic_fields__
    if key not in fields:
        near = difflib.get_close_matches(key, fields, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"the known ones are {', '.join(fields)}."
        return f"{place} has an unknown key {_short(key)}; {hint}"
    if key not in data:
        return f'{place} lacks the required key "{key}".'
    rule = "an object" if dataclasses.is_dataclass(fields[key].annotation) else allowed(kind, key)
    return f"{f'{name}.' if name else ''}{key} is {_short(data[key])}; it must be {rule}."


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


@functools.cache
def allowed(kind: type, key: str) -> str:
    """The values that a key of a section takes, in words: for the messages and for docs/configuration.md."""
    return _in_words(TypeAdapter(kind).json_schema()["properties"][key])


def _in_words(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(map(_in_words, schema["anyOf"]))
    if "enum" in schema:
        return "one of " + ", ".join(map(json.dumps, schema["enum"]))
    if schema["type"] == "array":
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        open_count = f"at least {least}" if least else "any number of"
        count = open_count if most is None else most if least == most else f"{least} to {most}"
        return f"a list of {count} values, each {_in_words(schema.get('items') or schema['prefixItems'][0])}"
    if schema["type"] == "object":
        return "an object"
    if schema["type"] == "string":
        return f"{'non-empty ' if 'minLength' in schema else ''}text without NUL characters"
    if "minimum" in schema and "maximum" in schema:
        return f"{TYPE_NAMES[schema['type']]} from {schema['minimum']} to {schema['maximum']}"
    bounds = " and ".join(f"{words} {schema[bound]}" for bound, words in BOUNDS.items() if bound in schema)
    return TYPE_NAMES[schema["type"]] + (f" of {bounds}" if bounds else "")


class ConfigFile:
    """The base of a `section("")`: such a class is read from a JSON file and written to one."""

    @classmethod
    def load(cls: type[C], path: str | os.PathLike[str]) -> C:
        """Read a configuration file. Raises InputError."""
        try:
            return cls.from_dict(parse(Path(path).read_text(encoding="utf-8")))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None

    @classmethod
    def from_dict(cls: type[C], data: Any) -> C:
        """Build the configuration from plain JSON data. Raises InputError."""
        if not isinstance(data, dict):
            raise InputError(f"the configuration is {_short(data)}; it must be an object.")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, every default filled in."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration as JSON, every default filled in."""
        write_json(Path(path), self.to_dict())


def parse(text: str) -> Any:
    """Parse JSON in which no object repeats a key. Raises InputError."""
    if not text.strip():
        raise InputError("is empty; it must hold a JSON object.")
    try:
        return json.loads(text, object_pairs_hook=_distinct_keys)
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.") from None
    except InputError:
        raise
    except ValueError:
        raise InputError("holds a number of too many digits.") from None
    except RecursionError:
        raise InputError("is nested too deeply to be a configuration.") from None


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = {}
    for key, value in pairs:
        if key in data:
            raise InputError(f"has the key {_short(key)} twice.")
        data[key] = value
    return data
