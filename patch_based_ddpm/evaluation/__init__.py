"""How good are samples? Figures that compare them with real images.

`image_sets` opens the images, `metrics` takes statistics of two sets and computes the figures from them; each of the
other modules holds one measure.
"""
