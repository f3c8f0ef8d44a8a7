"""Drawing images to files: a folder of PNG files with its manifest, an archive of them, and an animation.

`options` holds the flags that `sample` and `evaluate` share, loads the model and draws batches.
"""
