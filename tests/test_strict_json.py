import json
import re
from dataclasses import dataclass, field

import pytest

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.strict_json import build, parse, read_text


@dataclass(frozen=True)
class Inner:
    size: int | tuple[int, int] = field(default=3, metadata={"least": 1, "most": 9})
    list: tuple[int, ...] = field(default=(1,), metadata={"least": 1})


@dataclass(frozen=True)
class Outer:
    name: str
    count: int = field(default=1, metadata={"least": 1})
    rate: float = field(default=0.5, metadata={"above": 0, "most": 1})
    flag: bool = False
    mode: str | None = field(default=None, metadata={"choices": ("fast", "slow")})
    seed: int = field(default=0, metadata={"least": 0, "below": 8})
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        if self.name == "forbidden":
            raise InputError("it.name is forbidden.")


def refusal(data):
    with pytest.raises(InputError) as error:
        build(Outer, data, "it")
    message = str(error.value)
    assert re.fullmatch(r"[^\n]*[^.]\.", message)
    return message


def test_parse_reads_json():
    assert parse(' {"a": [1, 2.5, null, true, "ü"], "b": {}}\n') == {"a": [1, 2.5, None, True, "ü"], "b": {}}


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_parse_refuses_nothing(text):
    with pytest.raises(InputError, match=r"^is empty; it must hold a JSON object\.$"):
        parse(text)


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


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_parse_refuses_what_only_python_calls_json(constant):
    with pytest.raises(InputError, match=f"^holds {constant}, which is not a JSON number"):
        parse(f'{{"a": [1, {constant}]}}')


def test_parse_refuses_a_key_twice():
    with pytest.raises(InputError, match=r'^has the key "b" twice'):
        parse('{"a": {"b": 1, "c": 2, "b": 1}}')
    assert parse('{"a": {"b": 1}, "b": 1}') == {"a": {"b": 1}, "b": 1}


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_parse_refuses_bottomless_nesting(opening):
    with pytest.raises(InputError, match="nested too deeply"):
        parse(opening * 200_000)


def test_read_text(tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes("ü\n".encode())
    assert read_text(path) == read_text(str(path)) == "ü\n"


def test_read_text_refuses_other_encodings(tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(b'{"a": "\xfc"}')
    with pytest.raises(InputError, match=r"^is not UTF-8 text \(byte 7\)\.$"):
        read_text(path)


def test_read_text_refuses_what_is_no_file(tmp_path):
    with pytest.raises(InputError, match=r"^cannot be read: No such file or directory\.$"):
        read_text(tmp_path / "missing.json")
    with pytest.raises(InputError, match=r"^cannot be read: .+\.$"):
        read_text(tmp_path)
    with pytest.raises(InputError, match=r"^cannot be read: .+\.$"):
        read_text("nul\0byte")


def test_build_fills_in_defaults():
    assert build(Outer, {"name": "x"}, "it") == Outer(name="x")


def test_build_takes_every_type():
    data = {
        "name": "x",
        "count": 7,
        "rate": 1,
        "flag": True,
        "mode": "slow",
        "seed": 7,
        "inner": {"size": [4, 9], "list": [5]},
    }
    built = build(Outer, data, "it")
    assert built == Outer("x", 7, 1.0, True, "slow", 7, Inner((4, 9), (5,)))
    assert type(built.rate) is float
    assert build(Outer, {"name": "x", "mode": None, "inner": {"size": 9}}, "it") == Outer("x", inner=Inner(9))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", 1, "it.name is 1; it must be text."),
        ("name", None, "it.name is null; it must be text."),
        ("count", 1.0, "it.count is 1.0; it must be a whole number."),
        ("count", True, "it.count is true; it must be a whole number."),
        ("count", "1", 'it.count is "1"; it must be a whole number.'),
        ("rate", "0.5", 'it.rate is "0.5"; it must be a number.'),
        ("rate", True, "it.rate is true; it must be a number."),
        ("rate", 10**400, f"it.rate is 1{'0' * 56}...; it must be a number."),
        ("flag", 1, "it.flag is 1; it must be true or false."),
        ("flag", "true", 'it.flag is "true"; it must be true or false.'),
        ("mode", 3, "it.mode is 3; it must be text or null."),
        ("inner", [], "inner is []; it must be an object."),
        ("inner", {"size": [1]}, "inner.size is [1]; it must be a whole number or a list of 2 whole numbers."),
        (
            "inner",
            {"size": [1, 2.0]},
            "inner.size is [1, 2.0]; it must be a whole number or a list of 2 whole numbers.",
        ),
        ("inner", {"list": []}, "inner.list is []; it must be a list of whole numbers."),
        ("inner", {"list": [1, True]}, "inner.list is [1, true]; it must be a list of whole numbers."),
        ("inner", {"list": 1}, "inner.list is 1; it must be a list of whole numbers."),
        ("count", 0, "it.count is 0; it must be at least 1."),
        ("rate", 0, "it.rate is 0.0; it must be more than 0."),
        ("rate", 1.5, "it.rate is 1.5; it must be at most 1."),
        ("seed", 8, "it.seed is 8; it must be less than 8."),
        ("seed", -1, "it.seed is -1; it must be at least 0."),
        ("mode", "quick", 'it.mode is "quick"; it must be one of "fast", "slow".'),
        ("inner", {"size": [3, 0]}, "inner.size is [3, 0]; it must be at least 1."),
        ("inner", {"size": 10}, "inner.size is 10; it must be at most 9."),
        ("inner", {"list": [3, 0]}, "inner.list is [3, 0]; it must be at least 1."),
        ("nmae", 1, 'it has an unknown key "nmae"; did you mean "name"?'),
        ("inner", {"sise": 1}, 'inner has an unknown key "sise"; did you mean "size"?'),
        ("inner", {"zzz": 1}, 'inner has an unknown key "zzz"; the known ones are size, list.'),
        ("name", "forbidden", "it.name is forbidden."),
    ],
)
def test_build_says_what_does_not_fit(key, value, message):
    with pytest.raises(InputError) as error:
        build(Outer, {"name": "x", key: value}, "it")
    assert str(error.value) == message


def test_build_wants_required_keys():
    assert refusal({}) == 'it lacks the required key "name".'


@pytest.mark.parametrize("data", [None, 1, "text", [], [["name", "x"]], True])
def test_build_wants_an_object(data):
    assert refusal(data) == f"it is {json.dumps(data)}; it must be an object."


def test_long_values_are_cut_short():
    message = refusal({"name": ["x" * 1000]})
    assert message.startswith('it.name is ["xxx')
    assert message.endswith("xxx...; it must be text.")
    assert len(message) < 100


def test_numbers_beyond_reason_are_refused():
    with pytest.raises(InputError, match=r"^holds a number of too many digits\.$"):
        parse('{"a": ' + "8" * 5000 + "}")

    @dataclass
    class Rates:
        rate: float | None = None

    for infinite in ("1e400", "-1e400"):
        with pytest.raises(InputError, match=r"^rates\.rate is -?Infinity; it must be a number or null"):
            build(Rates, parse(f'{{"rate": {infinite}}}'), "rates")
