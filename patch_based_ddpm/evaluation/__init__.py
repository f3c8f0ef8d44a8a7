"""How good are samples? Figures that compare them with real images.

`image_sets` opens the images, `metrics` computes the figures from statistics of both sets, and each of the other
modules holds one measure.
"""
