import os
import pickle
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest

from patch_based_ddpm.data import lsun
from patch_based_ddpm.data.decoding import UnreadableImage
from patch_based_ddpm.data.lsun import open_lmdb
from patch_based_ddpm.errors import InputError
from support.lmdb_folders import BLUE, GREEN, IMAGES, RED, corner, encoded, write_lmdb

# LMDB keeps keys sorted; they are bytes of any length, that may end in zero.


class TestLMDB:
    def test_reads_what_was_written(self, tmp_path):
        write_lmdb(tmp_path / "bedroom_train_lmdb", IMAGES)
        source = open_lmdb(tmp_path / "bedroom_train_lmdb", None)
        assert source.size == 4
        assert [corner(source, index) for index in range(3)] == [RED, GREEN, BLUE]
        with pytest.raises(UnreadableImage, match=r"bedroom_train_lmdb' key b'broken\\n' cannot be read: Pillow finds"):
            source.read(3)
        assert [path.name for path in tmp_path.iterdir()] == ["bedroom_train_lmdb"]

    def test_index_is_reused(self, tmp_path, monkeypatch):
        write_lmdb(tmp_path / "db", IMAGES)
        cache = tmp_path / "log" / "keys.npz"
        first = open_lmdb(tmp_path / "db", cache)
        assert [path.name for path in cache.parent.iterdir()] == ["keys.npz"]

        def fail(_):
            raise AssertionError("the keys were listed again")

        monkeypatch.setattr(lsun, "_list_keys", fail)
        again = open_lmdb(tmp_path / "db", cache)
        assert np.array_equal(again.keys, first.keys)
        assert np.array_equal(again.ends, first.ends)
        assert [corner(again, index) for index in range(3)] == [RED, GREEN, BLUE]

    def test_index_is_rebuilt_for_a_changed_database(self, tmp_path):
        cache = tmp_path / "keys.npz"
        write_lmdb(tmp_path / "db", IMAGES)
        open_lmdb(tmp_path / "db", cache)
        write_lmdb(tmp_path / "db", {b"00": encoded(BLUE, "png")})
        for _ in range(2):
            source = open_lmdb(tmp_path / "db", cache)
            assert source.size == 5
            assert [corner(source, index) for index in (0, 1, 2)] == [RED, GREEN, BLUE]
            assert source.name(2).endswith("b'00'")

    def test_index_of_another_database_is_rebuilt(self, tmp_path):
        cache = tmp_path / "keys.npz"
        write_lmdb(tmp_path / "db", IMAGES)
        write_lmdb(tmp_path / "other", dict(zip([b"1", b"2", b"3", b"4"], IMAGES.values(), strict=True)))
        stamp = (tmp_path / "db" / "data.mdb").stat()
        os.utime(tmp_path / "other" / "data.mdb", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        open_lmdb(tmp_path / "db", cache)
        assert open_lmdb(tmp_path / "other", cache).name(0).endswith("b'1'")

    @pytest.mark.parametrize("keep", [0, 10, 200, -30])
    def test_damaged_index_is_rebuilt(self, tmp_path, keep):
        cache = tmp_path / "keys.npz"
        write_lmdb(tmp_path / "db", IMAGES)
        open_lmdb(tmp_path / "db", cache)
        whole = cache.read_bytes()
        cache.write_bytes(whole[:keep])
        assert corner(open_lmdb(tmp_path / "db", cache), 2) == BLUE
        assert cache.stat().st_size == len(whole)

    def test_cache_folder_that_cannot_be_written(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise PermissionError(13, "Permission denied")

        write_lmdb(tmp_path / "db", IMAGES)
        (tmp_path / "log").mkdir()
        (tmp_path / "file").write_text("")
        assert open_lmdb(tmp_path / "db", tmp_path / "file" / "keys.npz").size == 4
        monkeypatch.setattr(Path, "replace", refuse)
        assert open_lmdb(tmp_path / "db", tmp_path / "log" / "keys.npz").size == 4
        assert list((tmp_path / "log").iterdir()) == []

    def test_key_that_vanished(self, tmp_path):
        write_lmdb(tmp_path / "db", IMAGES)
        source = open_lmdb(tmp_path / "db", None)
        lsun._environment.cache_clear()
        with lmdb.open(str(tmp_path / "db")) as environment, environment.begin(write=True) as transaction:
            transaction.delete(b"\0\0")
        with pytest.raises(UnreadableImage, match=r"key b'\\x00\\x00' cannot be read: the database no longer"):
            source.read(1)

    def test_stamp_tells_what_changed(self, tmp_path):
        write_lmdb(tmp_path / "db", IMAGES)
        stamp = open_lmdb(tmp_path / "db", None).stamp()
        assert open_lmdb(tmp_path / "db", tmp_path / "keys.npz").stamp() == stamp
        os.utime(tmp_path / "db" / "data.mdb", ns=(0, 10**18))
        assert open_lmdb(tmp_path / "db", None).stamp() != stamp

    def test_travels_to_other_processes(self, tmp_path):
        write_lmdb(tmp_path / "db", IMAGES)
        source = open_lmdb(tmp_path / "db", None)
        assert corner(pickle.loads(pickle.dumps(source)), 2) == BLUE

    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    def test_survives_a_fork_while_open(self, tmp_path):
        write_lmdb(tmp_path / "db", IMAGES)
        source = open_lmdb(tmp_path / "db", None)
        assert corner(source, 2) == BLUE
        child = os.fork()
        if child == 0:
            os._exit(0 if corner(source, 0) == RED else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert corner(source, 1) == GREEN

    def test_empty_database(self, tmp_path):
        write_lmdb(tmp_path / "db", {})
        with pytest.raises(InputError, match=r"the LMDB folder '.*db' holds no image: it has no entries\.$"):
            open_lmdb(tmp_path / "db", None)

    def test_file_that_is_no_database(self, tmp_path):
        (tmp_path / "data.mdb").write_bytes(b"x" * 10000)
        with pytest.raises(InputError, match=r"the LMDB folder '.*' cannot be opened: .*not an LMDB file\.$"):
            open_lmdb(tmp_path, None)

    def test_without_the_package_says_how_to_install_it(self, tmp_path, monkeypatch):
        write_lmdb(tmp_path / "db", IMAGES)
        monkeypatch.setitem(sys.modules, "lmdb", None)
        with pytest.raises(InputError, match='run `pipenv install --categories "packages lsun"`'):
            open_lmdb(tmp_path / "db", None)
