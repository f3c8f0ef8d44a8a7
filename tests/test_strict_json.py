import dataclasses
import json
import re
from typing import Annotated, Literal

import pytest
from pydantic import Field, StrictBool, StrictFloat, StrictInt

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.strict_json import ConfigFile, Folder, Positive, Seed, Text, allowed, key, parse, section

Digit = Annotated[StrictInt, Field(ge=1, le=9)]


@section("inner")
class Inner:
    size: Digit | tuple[Digit, Digit] = key(3, "Size.")
    items: tuple[Positive, ...] = key((1,), "Items.", min_length=1)
    more: tuple[Positive, ...] = key((), "More items.")


@section("it")
class Outer(ConfigFile):
    name: Folder = key(..., "Name.")
    note: Text = key("", "Note.")
    count: Positive = key(1, "Count.")
    rate: Annotated[StrictFloat, Field(gt=0, le=1)] = key(0.5, "Rate.")
    flag: StrictBool = key(False, "Flag.")
    mode: Literal["fast", "slow"] | None = key(None, "Mode.")
    seed: Seed = key(0, "Seed.")
    inner: Inner = Field(default_factory=Inner)

    def __post_init__(self):
        if self.name == "forbidden":
            raise InputError("it.name is forbidden.")


def refusal(data):
    with pytest.raises(InputError) as error:
        Outer.from_dict(data)
    message = str(error.value)
    assert re.fullmatch(r"[^\n]*[^.][.?]", message)
    return message


def test_parse_reads_json():
    assert parse(' {"a": [1, 2.5, null, true, "ü"], "b": {}}\n') == {"a": [1, 2.5, None, True, "ü"], "b": {}}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{\n  "a": 1\n  "b": 2\n}', "line 3, column 3"),
        ("{'a': 1}", "line 1, column 2"),
        ('{"a": 1} x', "line 1, column 10"),
        ('{"a": 01}', "line 1, column 8"),
        ('{"a": "\n"}', "line 1, column 8"),
        ('\ufeff{"a": 1}', "line 1, column 1"),
        ("[1, 2", "line 1, column 6"),
        ('{\n// comment\n"a": 1}', "line 2, column 1"),
    ],
)
def test_parse_says_where_it_is_not_json(text, place):
    with pytest.raises(InputError, match=rf"^is not JSON: .+ at {place}\.$"):
        parse(text)


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_parse_refuses_nothing(text):
    with pytest.raises(InputError, match=r"^is empty; it must hold a JSON object\.$"):
        parse(text)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_only_python_calls_json_are_refused(constant):
    for name, rule in (("rate", RATE), ("count", WHOLE), ("name", TEXT), ("mode", 'one of "fast", "slow" or null')):
        data = {"name": "x", **parse(f'{{"{name}": {constant}}}')}
        assert refusal(data) == f"it.{name} is {constant}; it must be {rule}."


def test_parse_refuses_a_key_twice():
    with pytest.raises(InputError, match=r'^has the key "b" twice'):
        parse('{"a": {"b": 1, "c": 2, "b": 1}}')
    assert parse('{"a": {"b": 1}, "b": 1}') == {"a": {"b": 1}, "b": 1}


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_parse_refuses_bottomless_nesting(opening):
    with pytest.raises(InputError, match="nested too deeply"):
        parse(opening * 200_000)


def test_load_reads_utf_8(tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes('{"name": "ü"}'.encode())
    assert Outer.load(path) == Outer.load(str(path)) == Outer(name="ü")
    path.write_bytes(b'{"name": "\xfc"}')
    with pytest.raises(InputError, match=r"/file\.json: cannot be read: 'utf-8' .* position 10: .+\.$"):
        Outer.load(path)


def test_load_refuses_what_is_no_file(tmp_path):
    with pytest.raises(InputError, match=r"missing\.json: cannot be read: No such file or directory\.$"):
        Outer.load(tmp_path / "missing.json")
    for path in (tmp_path, "nul\0byte"):
        with pytest.raises(InputError, match=r": cannot be read: .+\.$"):
            Outer.load(path)


def test_defaults_are_filled_in():
    assert Outer.from_dict({"name": "x"}) == Outer(name="x", count=1, rate=0.5, inner=Inner(size=3))


def test_every_type():
    data = {
        "name": "x",
        "note": "",
        "count": 7,
        "rate": 1,
        "flag": True,
        "mode": "slow",
        "seed": 7,
        "inner": {"size": [4, 9], "items": [5], "more": []},
    }
    built = Outer.from_dict(data)
    assert dataclasses.asdict(built) == data | {"inner": {"size": (4, 9), "items": (5,), "more": ()}}
    assert built.to_dict() == data
    assert type(built.rate) is float
    assert Outer.from_dict({"name": "x", "mode": None, "inner": {"size": 9}}) == Outer(name="x", inner=Inner(size=9))


WHOLE = "a whole number of at least 1"
SIZE = "a whole number from 1 to 9 or a list of 2 values, each a whole number from 1 to 9"
ITEMS = "a list of at least 1 values, each a whole number of at least 1"
TEXT = "non-empty text without NUL characters"
RATE = "a number of more than 0 and at most 1"
SEED = f"a whole number of at least 0 and less than {2**63}"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", 1, f"it.name is 1; it must be {TEXT}."),
        ("name", None, f"it.name is null; it must be {TEXT}."),
        ("name", "", f'it.name is ""; it must be {TEXT}.'),
        ("name", "a\0", f'it.name is "a\\u0000"; it must be {TEXT}.'),
        ("name", "\ud800", f'it.name is "\\ud800"; it must be {TEXT}.'),
        ("note", "a\0", 'it.note is "a\\u0000"; it must be text without NUL characters.'),
        ("count", 1.0, f"it.count is 1.0; it must be {WHOLE}."),
        ("count", True, f"it.count is true; it must be {WHOLE}."),
        ("count", "1", f'it.count is "1"; it must be {WHOLE}.'),
        ("count", 0, f"it.count is 0; it must be {WHOLE}."),
        ("rate", "0.5", f'it.rate is "0.5"; it must be {RATE}.'),
        ("rate", True, f"it.rate is true; it must be {RATE}."),
        ("rate", 10**400, f"it.rate is 1{'0' * 56}...; it must be {RATE}."),
        ("rate", 0, f"it.rate is 0; it must be {RATE}."),
        ("rate", 1.5, f"it.rate is 1.5; it must be {RATE}."),
        ("rate", float("inf"), f"it.rate is Infinity; it must be {RATE}."),
        ("flag", 1, "it.flag is 1; it must be true or false."),
        ("flag", "true", 'it.flag is "true"; it must be true or false.'),
        ("mode", 3, 'it.mode is 3; it must be one of "fast", "slow" or null.'),
        ("mode", "quick", 'it.mode is "quick"; it must be one of "fast", "slow" or null.'),
        ("seed", 2**63, f"it.seed is {2**63}; it must be {SEED}."),
        ("seed", -1, f"it.seed is -1; it must be {SEED}."),
        ("inner", [], "it.inner is []; it must be an object."),
        ("inner", {"size": [1]}, f"inner.size is [1]; it must be {SIZE}."),
        ("inner", {"size": [1, 2.0]}, f"inner.size is [1, 2.0]; it must be {SIZE}."),
        ("inner", {"size": [3, 0]}, f"inner.size is [3, 0]; it must be {SIZE}."),
        ("inner", {"size": 10}, f"inner.size is 10; it must be {SIZE}."),
        ("inner", {"items": []}, f"inner.items is []; it must be {ITEMS}."),
        ("inner", {"items": [1, True]}, f"inner.items is [1, true]; it must be {ITEMS}."),
        ("inner", {"items": 1}, f"inner.items is 1; it must be {ITEMS}."),
        ("inner", {"items": [3, 0]}, f"inner.items is [3, 0]; it must be {ITEMS}."),
        ("nmae", 1, 'it has an unknown key "nmae"; did you mean "name"?'),
        ("inner", {"sise": 1}, 'inner has an unknown key "sise"; did you mean "size"?'),
        ("inner", {"zzz": 1}, 'inner has an unknown key "zzz"; the known ones are size, items, more.'),
        ("name", "forbidden", "it.name is forbidden."),
    ],
)
def test_one_sentence_says_what_does_not_fit(key, value, message):
    assert refusal({"name": "x", key: value}) == message


def test_a_misspelt_key_is_told_before_the_one_that_it_leaves_out():
    assert refusal({}) == 'it lacks the required key "name".'
    assert refusal({"nam": "x"}) == 'it has an unknown key "nam"; did you mean "name"?'


@pytest.mark.parametrize("data", [None, 1, "text", [], [["name", "x"]], True])
def test_a_configuration_is_an_object(data):
    assert refusal(data) == f"the configuration is {json.dumps(data)}; it must be an object."


def test_long_values_are_cut_short():
    message = refusal({"name": ["x" * 1000]})
    assert message.startswith('it.name is ["xxx')
    assert message.endswith(f"xxx...; it must be {TEXT}.")
    assert len(message) < 150


def test_numbers_beyond_reason_are_refused():
    with pytest.raises(InputError, match=r"^holds a number of too many digits\.$"):
        parse('{"a": ' + "8" * 5000 + "}")
    for infinite in ("1e400", "-1e400"):
        assert "Infinity; it must be a number" in refusal(parse(f'{{"name": "x", "rate": {infinite}}}'))


def test_a_section_checks_what_it_is_built_from_and_is_frozen():
    it = Outer(name="x")
    with pytest.raises(InputError, match=r"^inner\.size is 0; it must be a whole number from 1 to 9 or"):
        dataclasses.replace(it.inner, size=0)
    with pytest.raises(InputError, match=r"^it\.name is forbidden\.$"):
        dataclasses.replace(it, name="forbidden")
    with pytest.raises(dataclasses.FrozenInstanceError):
        it.name = "y"
    assert dataclasses.replace(it, count=2) == Outer(name="x", count=2)


def test_allowed_values_in_words():
    assert allowed(Inner, "more") == "a list of any number of values, each a whole number of at least 1"
    assert allowed(Outer, "seed") == SEED
