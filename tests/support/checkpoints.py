"""For tests of checkpoints: check a refusal, compare weights, make a file that holds code."""

import os
import re

import pytest
import torch

from patch_based_ddpm.errors import InputError


def refusal(call, path):
    """The one sentence of a refusal, without the file name at its start."""
    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    assert message.startswith(str(path))
    rest = message.removeprefix(str(path))
    assert re.fullmatch(r"( \(\w+\))?: [^\n]*[^.]\.", rest)
    assert not re.search(r"[.?!] [A-Z]", rest)
    return rest


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)
