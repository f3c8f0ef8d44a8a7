"""All patches of images and back, written independently of `gather` and `scatter`."""

from einops import rearrange


def split(images, N):
    """Cut images (b, c, H, W) into N x N patches (N*N*b, c, h, w), patch-major."""
    return rearrange(images, "b c (i h) (j w) -> (i j b) c h w", i=N, j=N)


def merge(patches, N):
    """Join patches to images: the inverse of `split`."""
    return rearrange(patches, "(i j b) c h w -> b c (i h) (j w)", i=N, j=N)
