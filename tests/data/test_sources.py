import os
import pickle
import sys
import warnings
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from patch_based_ddpm.data import faces, sources
from patch_based_ddpm.data.sources import FacesSource, UnreadableImage, list_folder, open_lmdb, open_source
from patch_based_ddpm.errors import InputError
from support.lmdb_folders import BLUE, GREEN, IMAGES, RED, corner, encoded, write_lmdb


def save(path, colour=RED, size=(3, 2), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def noise_image(height=64, width=48):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class TestFolder:
    def test_lists_images_of_every_extension_below_the_folder_in_order(self, tmp_path):
        for name in ("b.PNG", "a/z.jpg", "a/y.JpEg", "a-b.webp", "a/c/d.bmp", "a.tif", "A.tiff"):
            save(tmp_path / name)
        for name in ("notes.txt", "a/jpg", "x.gif", "y.png.part"):
            (tmp_path / name).write_text("no image")
        (tmp_path / "folder.png").mkdir()
        source = list_folder(tmp_path)
        assert source.paths == ("A.tiff", "a-b.webp", "a.tif", "a/c/d.bmp", "a/y.JpEg", "a/z.jpg", "b.PNG")
        assert source.size == 7
        assert all(source.read(index).size == (3, 2) for index in range(7))

    def test_reads_the_image_of_the_index(self, tmp_path):
        for name, colour in (("2.png", BLUE), ("0.png", RED), ("1.png", GREEN)):
            save(tmp_path / name, colour)
        source = list_folder(tmp_path)
        assert [source.read(index).getpixel((0, 0)) for index in range(3)] == [RED, GREEN, BLUE]

    @pytest.mark.parametrize("name", ["snö 雪.png", "two  spaces .png", "line\nbreak.png", "'quo\"te.png", "100%.png"])
    def test_odd_names(self, tmp_path, name):
        save(tmp_path / name)
        source = list_folder(tmp_path)
        assert source.read(0).getpixel((0, 0)) == RED
        assert "\n" not in source.name(0)

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse file names that are no UTF-8")
    def test_name_that_is_no_utf8(self, tmp_path):
        save(tmp_path / "ok.png")
        os.rename(tmp_path / "ok.png", os.fsencode(tmp_path) + b"/\xff.png")
        source = list_folder(tmp_path)
        assert source.read(0).getpixel((0, 0)) == RED
        source.name(0).encode()

    def test_links_are_followed_and_loops_end(self, tmp_path):
        root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
        save(root / "a" / "1.png")
        save(elsewhere / "2.png", BLUE)
        (root / "a" / "up").symlink_to(root)
        (root / "self").symlink_to(root / "self")
        (root / "linked").symlink_to(elsewhere)
        (root / "linked again").symlink_to(elsewhere)
        (elsewhere / "back").symlink_to(root / "a")
        (root / "3.png").symlink_to(elsewhere / "2.png")
        source = list_folder(root)
        assert source.paths == ("3.png", "a/1.png", "linked/2.png")
        assert source.read(0).getpixel((0, 0)) == BLUE

    def test_stamp_tells_what_changed(self, tmp_path):
        def stamp():
            return list_folder(tmp_path).stamp()

        save(tmp_path / "1.png")
        save(tmp_path / "2.png", size=(30, 20))
        os.utime(tmp_path / "1.png", ns=(0, 10**18))
        stamps = [stamp()]
        assert stamp() == stamps[0]
        os.utime(tmp_path / "1.png", ns=(0, 10**18 + 1000))
        stamps.append(stamp())
        (tmp_path / "1.png").rename(tmp_path / "1 (copy).png")
        stamps.append(stamp())
        (tmp_path / "1 (copy).png").write_bytes((tmp_path / "1 (copy).png").read_bytes() + b"more")
        os.utime(tmp_path / "1 (copy).png", ns=(0, 10**18 + 1000))
        stamps.append(stamp())
        (tmp_path / "2.png").unlink()
        stamps.append(stamp())
        assert len(set(stamps)) == 5

    def test_stamp_of_a_file_that_vanished(self, tmp_path):
        save(tmp_path / "1.png")
        source = list_folder(tmp_path)
        before = source.stamp()
        (tmp_path / "1.png").unlink()
        assert source.stamp() != before

    def test_missing_folder(self, tmp_path):
        with pytest.raises(
            InputError, match=r"there is no folder '.*nowhere'; it should hold images, files that end in \.jpg, "
        ):
            list_folder(tmp_path / "nowhere")

    def test_file_in_place_of_a_folder(self, tmp_path):
        save(tmp_path / "1.png")
        with pytest.raises(InputError, match=r"there is no folder '.*1\.png'; "):
            list_folder(tmp_path / "1.png")

    def test_folder_without_images_names_the_extensions(self, tmp_path):
        (tmp_path / "x.gif").write_text("")
        with pytest.raises(InputError, match=r"holds no image: no file ends in \.jpg, .*, \.tiff\.$") as error:
            list_folder(tmp_path)
        assert str(tmp_path) in str(error.value)


class TestReading:
    # Orientation tag -> what the stored picture (red left, blue right; 2 x 1) looks like upright, row by row.
    UPRIGHT = {  # noqa: RUF012
        1: [[RED, BLUE]],
        2: [[BLUE, RED]],
        3: [[BLUE, RED]],
        4: [[RED, BLUE]],
        5: [[RED], [BLUE]],
        6: [[RED], [BLUE]],
        7: [[BLUE], [RED]],
        8: [[BLUE], [RED]],
    }

    @pytest.mark.parametrize("orientation", UPRIGHT)
    @pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
    def test_exif_orientation(self, tmp_path, orientation, extension):
        stored = Image.new("RGB", (32, 16), RED)
        stored.paste(BLUE, (16, 0, 32, 16))
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / f"1.{extension}", exif=exif)
        upright = np.asarray(list_folder(tmp_path).read(0)).astype(int)
        expected = np.array(self.UPRIGHT[orientation])
        assert upright.shape == (expected.shape[0] * 16, expected.shape[1] * 16, 3)
        assert np.abs(upright[8::16, 8::16] - expected).max() <= 3  # jpg and webp are lossy

    @pytest.mark.parametrize("extension", ["jpg", "png", "webp", "bmp", "tif"])
    def test_truncated_image_is_an_error_at_every_length(self, tmp_path, extension):
        path = tmp_path / f"1.{extension}"
        noise_image().save(path)
        data = path.read_bytes()
        source = list_folder(tmp_path)
        whole = np.asarray(source.read(0))
        for length in {0, 1, 10, len(data) // 4, len(data) // 2, len(data) * 9 // 10, len(data) - 40}:
            path.write_bytes(data[:length])
            with pytest.raises(UnreadableImage, match=rf"^'.*1\.{extension}' cannot be read: [^\n]*[^.]\.$"):
                source.read(0)
        path.write_bytes(data)
        assert np.array_equal(np.asarray(source.read(0)), whole)

    def test_file_that_vanished(self, tmp_path):
        save(tmp_path / "1.png")
        source = list_folder(tmp_path)
        (tmp_path / "1.png").unlink()
        with pytest.raises(UnreadableImage, match=r"1\.png' cannot be read: No such file or directory\.$"):
            source.read(0)

    def test_file_that_is_no_image(self, tmp_path):
        (tmp_path / "1.png").write_text("<html>404</html>")
        with pytest.raises(UnreadableImage, match=r"1\.png' cannot be read: Pillow finds no image in it\.$"):
            list_folder(tmp_path).read(0)

    @pytest.mark.parametrize("limit", [700, 400])  # Pillow warns above the limit and raises above its double
    def test_decompression_bomb(self, tmp_path, monkeypatch, limit):
        save(tmp_path / "1.png", size=(30, 30))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UnreadableImage, match=r"1\.png' cannot be read: Image size \(900 pixels\) exceeds"):
            list_folder(tmp_path).read(0)

    def test_odd_metadata_is_no_error(self, tmp_path):
        noise_image().save(tmp_path / "1.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert list_folder(tmp_path).read(0).size == (48, 64)


class TestLMDB:
    """LMDB keeps keys sorted; they are bytes of any length, that may end in zero."""

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

        monkeypatch.setattr(sources, "_list_keys", fail)
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
        sources._environment.cache_clear()
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


class TestFaces:
    def test_draws_what_faces_draws(self):
        source = FacesSource(height=32, width=48, seed=5)
        image = source.read(3)
        assert image.size == (48, 32)
        assert np.array_equal(np.asarray(image), faces.draw(faces.attributes(3, 5), 32, 48))
        assert source.size is None
        assert source.name(3) == source.stamp() + " number 3" == "builtin:faces number 3"


class TestOpenSource:
    def test_builtin_faces_need_some_pixels(self):
        with pytest.raises(
            InputError, match=r"^model\.image_size is 4 x 16; builtin:faces needs at least 8 pixels a side\.$"
        ):
            open_source("builtin:faces", 4, 16, 7, None)

    def test_builtin(self):
        assert open_source("builtin:faces", 16, 24, 7, None) == FacesSource(height=16, width=24, seed=7)

    def test_unknown_builtin(self):
        with pytest.raises(InputError, match=r'is "builtin:face"; the only built-in one is "builtin:faces"\.$'):
            open_source("builtin:face", 16, 16, 7, None)

    def test_folder(self, tmp_path):
        save(tmp_path / "1.png")
        assert open_source(str(tmp_path), 16, 16, 7, None) == list_folder(tmp_path)

    def test_lmdb_folder_keeps_its_index_in_the_cache_folder(self, tmp_path):
        write_lmdb(tmp_path / "bedroom_val_lmdb", IMAGES)
        source = open_source(str(tmp_path / "bedroom_val_lmdb"), 16, 16, 7, tmp_path / "log")
        assert corner(source, 2) == BLUE
        assert [path.name for path in (tmp_path / "log").iterdir()] == ["lmdb_keys-bedroom_val_lmdb.npz"]

    def test_missing_folder(self, tmp_path):
        with pytest.raises(InputError, match=r"there is no folder '.*nowhere'"):
            open_source(str(tmp_path / "nowhere"), 16, 16, 7, None)
