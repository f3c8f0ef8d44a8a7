"""Images: where they come from, how they become training batches, and how they are written to PNG files.

A `Source` gives numbered PIL images: a folder, an LMDB database (`sources.py`) or drawn faces (`faces.py`).
`dataset.py` resizes, crops and mirrors them, turns them into float32 (c, H, W) in [-1, 1], shuffles them and loads
batches in worker processes. `cache.py` keeps the resized images in a file. `pictures.py` turns tensors back into
pictures.
"""
