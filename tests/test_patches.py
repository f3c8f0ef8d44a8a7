import pytest
import torch

from patch_based_ddpm.patches import global_content, merge, one_hot_positions, patch_batch, put, split, take

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


@each_size
def test_taking_patches_is_splitting_and_choosing(b, c, H, W, N):
    images = numbered(b, c, H, W)
    rows = torch.randint(N * N * b, (7,))
    assert torch.equal(take(images, N, rows), split(images, N)[rows])


@each_size
def test_put_undoes_take(b, c, H, W, N):
    images, canvas = numbered(b, c, H, W), torch.full((b, c, H, W), -1.0)
    rows = torch.randperm(N * N * b)
    first, rest = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    put(canvas, N, rest, take(images, N, rest))
    assert torch.equal(canvas == images, canvas >= 0)
    assert torch.equal(take(canvas, N, first), torch.full((len(first), c, H // N, W // N), -1.0))
    put(canvas, N, first, take(images, N, first))
    assert torch.equal(canvas, images)


def test_patch_batch_holds_what_belongs_to_each_patch():
    N, images, t = 3, torch.randn(2, 3, 6, 12), torch.tensor([7, 4])
    pooled = global_content(images, N)
    for rows in (torch.arange(18), torch.tensor([5, 0, 17])):
        batch = patch_batch(images, pooled, t, N, rows)
        for place, row in enumerate(rows.tolist()):
            number, k, patch = list(cut(images, N))[row]
            assert torch.equal(batch.patches[place], patch)
            assert torch.equal(batch.content[place], pooled[k])
            assert batch.position[place].tolist() == [float(other == number) for other in range(N * N)]
            assert batch.t[place] == t[k]
        assert batch.t.dtype == torch.int64
