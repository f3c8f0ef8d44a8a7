import subprocess
import sys

import pytest

from patch_based_ddpm.file_lock import file_lock

HOLDER = """
import sys, time
from pathlib import Path
from patch_based_ddpm.file_lock import file_lock
with file_lock(Path(sys.argv[1]), wait=False) as held:
    print(held, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a file whose folder was not there."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "locks" / "one")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_one_process_holds_it_and_lets_go_even_when_killed(holder, tmp_path):
    path = tmp_path / "locks" / "one"
    with file_lock(path, wait=False) as held:
        assert not held
    with file_lock(tmp_path / "locks" / "other", wait=False) as held:
        assert held
    holder.kill()
    with file_lock(path, wait=True) as held:
        assert held
    with file_lock(path, wait=False) as held:
        assert held


def test_a_failure_within_lets_go(tmp_path):
    with pytest.raises(KeyError), file_lock(tmp_path / "one", wait=False):
        raise KeyError
    with file_lock(tmp_path / "one", wait=False) as held:
        assert held
