"""Images: where they come from, how they become training batches, and how they are written to PNG files.

A `Source` gives numbered PIL images: a folder (`sources.py`), an LMDB database (`lsun.py`) or drawn faces (`faces.py`).
`decoding.py` reads, converts, resizes and crops them; `dataset.py` makes float32 (c, H, W) tensors in [-1, 1] of them,
shuffled, mirrored and batched by worker processes; `cache.py` keeps the resized images in a file; `loading.py` puts
all of this together for a training process. `pictures.py` is the way back, from tensors to pictures.
"""
