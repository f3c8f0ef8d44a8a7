"""LMDB folders such as LSUN is published in."""

from io import BytesIO

import lmdb
from PIL import Image

from patch_based_ddpm.data import sources

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def write_lmdb(directory, images):
    sources._environment.cache_clear()  # LMDB opens an environment but once in a process
    with lmdb.open(str(directory), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for key, data in images.items():
            transaction.put(key, data)


def encoded(colour, extension):
    file = BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, extension, **({"lossless": True} if extension == "webp" else {}))
    return file.getvalue()


def corner(source, index):
    return source.read(index).getpixel((0, 0))


IMAGES = {
    b"\0": encoded(RED, "webp"),
    b"\0\0": encoded(GREEN, "png"),
    b"0a5f" * 10: encoded(BLUE, "webp"),
    b"broken\n": b"RIFF no image",
}
