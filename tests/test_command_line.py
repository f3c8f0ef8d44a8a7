import pytest

from patch_based_ddpm import command_line
from patch_based_ddpm.errors import InputError


def test_both_spellings_of_a_flag_and_values_untouched():
    parser = command_line.Parser()
    parser.add_argument("--out-dir")
    for words in (["--out-dir", "a_b"], ["--out_dir", "a_b"], ["--out_dir=a_b"]):
        assert parser.parse_args(words).out_dir == "a_b"


def test_input_errors_are_printed_and_bugs_are_not_hidden(capsys):
    def refuse():
        raise InputError("FILE: the field is 3; it must be 4.")

    def bug():
        raise ValueError("internal")

    with pytest.raises(SystemExit) as ended:
        command_line.run(refuse)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: FILE: the field is 3; it must be 4.\n"
    with pytest.raises(ValueError, match="internal"):
        command_line.run(bug)
