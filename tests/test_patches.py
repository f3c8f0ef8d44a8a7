import pytest
import torch

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.patches import global_content, merge, one_hot_positions, patch_batches, split

SIZES = [(2, 3, 8, 8, 2), (1, 1, 4, 4, 4), (3, 2, 6, 12, 3), (2, 3, 8, 4, 1), (2, 3, 8, 4, 4)]
each_size = pytest.mark.parametrize(("b", "c", "H", "W", "N"), SIZES)


def numbered(*shape):
    """Images in which no two values are equal."""
    return torch.arange(torch.Size(shape).numel()).float().reshape(shape)


def cut(images, N):
    """Patches with their number and their image's: row by row in the picture, then image by image."""
    h, w = images.shape[2] // N, images.shape[3] // N
    for i in range(N):
        for j in range(N):
            for k, image in enumerate(images):
                yield i * N + j, k, image[:, i * h : (i + 1) * h, j * w : (j + 1) * w]


@each_size
def test_split_is_the_written_out_loop(b, c, H, W, N):
    images = numbered(b, c, H, W)
    assert torch.equal(split(images, N), torch.stack([patch for _, _, patch in cut(images, N)]))


@each_size
def test_merge_undoes_split(b, c, H, W, N):
    images = numbered(b, c, H, W)
    assert torch.equal(merge(split(images, N), N), images)


@each_size
def test_split_undoes_merge(b, c, H, W, N):
    patches = numbered(N * N * b, c, H // N, W // N)
    assert torch.equal(split(merge(patches, N), N), patches)


def test_merge_by_hand():
    patches = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1, 1).expand(4, 1, 1, 2)
    assert merge(patches, 2).tolist() == [[[[1, 1, 2, 2], [3, 3, 4, 4]]]]


def test_one_hot_positions():
    assert one_hot_positions(torch.tensor([2, 0, 3]), 2).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    assert one_hot_positions(torch.tensor([0]), 1).tolist() == [[1]]
    assert one_hot_positions(torch.tensor([1]), 2).dtype == torch.float32


@each_size
def test_global_content_is_the_mean_of_each_block(b, c, H, W, N):
    images = torch.randn(b, c, H, W)
    content = global_content(images, N)
    assert content.shape == (b, c, H // N, W // N)
    values = images.tolist()
    for k in range(b):
        for channel in range(c):
            for y in range(H // N):
                for x in range(W // N):
                    block = [values[k][channel][N * y + u][N * x + v] for u in range(N) for v in range(N)]
                    assert content[k, channel, y, x].item() == pytest.approx(sum(block) / N**2, abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 5, 7, 18, 100, None])
def test_patch_batches_walk_through_all_patches_in_order(size):
    N, images, t = 3, torch.randn(2, 3, 6, 12), torch.tensor([7, 4])
    batches = list(patch_batches(images, t, N, size))
    wanted = 18 if size is None else size
    assert [len(batch.t) for batch in batches] == [wanted] * (18 // wanted) + [18 % wanted] * (18 % wanted > 0)
    patches, content, position, steps = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(patches, split(images, N))
    pooled = global_content(images, N)
    for row, (number, k, patch) in enumerate(cut(images, N)):
        assert torch.equal(patches[row], patch)
        assert torch.equal(content[row], pooled[k])
        assert position[row].tolist() == [float(place == number) for place in range(N * N)]
        assert steps[row] == t[k]
    assert steps.dtype == torch.int64


def test_content_and_t_belong_to_the_image_of_the_patch():
    """Image k is constant, k everywhere, so patch, content and timestep must all say k."""
    images = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 4, 4)
    for batch in patch_batches(images, 10 * torch.arange(4), 2, 3):
        k = batch.patches[:, 0, 0, 0]
        assert torch.equal(batch.content, batch.patches)
        assert torch.equal(batch.t, (10 * k).long())


@pytest.mark.parametrize("size", [0, -1])
def test_refuses_patch_batches_of_none(size):
    with pytest.raises(InputError, match=f"patch_batch_size is {size}; it must be at least 1"):
        list(patch_batches(torch.zeros(1, 3, 4, 4), torch.tensor([0]), 2, size))
