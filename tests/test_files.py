import os

import pytest

from patch_based_ddpm.files import atomic_write


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")
    with atomic_write(path) as file:
        file.write(b"after")
        file.flush()
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("before")

    def write():
        with atomic_write(path) as file:
            file.write(b"after")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "before"
    assert names(tmp_path) == ["a"]


def test_bytes_are_on_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    """A power cut must not leave a name without its bytes; the order of the calls shows it."""
    calls, path = [], tmp_path / "a"
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: calls.append((os.readlink(f"/proc/self/fd/{descriptor}"), path.exists()))
    )
    with atomic_write(path) as file:
        file.write(b"x" * 10**6)
    assert calls == [(f"{path}.unfinished", False), (str(tmp_path), True)]


def test_two_processes_can_write_the_same_file(tmp_path, monkeypatch):
    """The other process begins and ends while this one writes; a patched process number stands for it."""
    path = tmp_path / "a"
    with atomic_write(path, shared=True) as file:
        file.write(b"from here")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            with atomic_write(path, shared=True) as other:
                other.write(b"from there")
        assert path.read_bytes() == b"from there"
    assert path.read_bytes() == b"from here"
    assert names(tmp_path) == ["a"]
