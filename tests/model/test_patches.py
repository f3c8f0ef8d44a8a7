import pytest
import torch

from patch_based_ddpm.model.patches import (
    blend_weights,
    crop,
    gather,
    global_content,
    inherited_positions,
    pad,
    patch_batch,
    scatter,
)
from support.patches import merge, split

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
    patch_indices = torch.randint(N * N * b, (7,))
    assert torch.equal(gather(images, N, patch_indices), split(images, N)[patch_indices])


@each_size
@pytest.mark.parametrize("halo", [1, 2, 5])
def test_windows_are_patches_with_what_lies_around_them(b, c, H, W, N, halo):
    images = 1 + numbered(b, c, H, W)
    patch_indices = torch.randint(N * N * b, (7,))
    windows = gather(pad(images, halo), N, patch_indices, halo)
    h, w = H // N, W // N
    for window, row in zip(windows, patch_indices.tolist(), strict=True):
        (i, j), image = divmod(row // b, N), images[row % b]
        for y in range(-halo, h + halo):
            for x in range(-halo, w + halo):
                inside = 0 <= i * h + y < H and 0 <= j * w + x < W
                wanted = image[:, i * h + y, j * w + x] if inside else torch.zeros(c)
                assert torch.equal(window[:, y + halo, x + halo], wanted)
    assert torch.equal(crop(windows, halo), gather(images, N, patch_indices))


def test_no_halo_is_the_image_itself():
    images = numbered(2, 3, 4, 4)
    assert pad(images, 0) is images
    assert crop(images, 0).data_ptr() == images.data_ptr()
    assert torch.equal(crop(images, 0), images)


def test_global_content_of_windows_is_the_whole_image():
    """4 x 8 pixels in 2 x 2 patches with a halo of 1: 4 x 6 values, whose blocks reach over 1 and 2 pixels."""
    images = torch.randn(2, 3, 4, 8)
    content = global_content(images, 2, 1)
    columns = [(0, 2), (1, 3), (2, 4), (4, 6), (5, 7), (6, 8)]
    wanted = torch.stack([images[..., left:right].mean(dim=-1) for left, right in columns], dim=-1)
    torch.testing.assert_close(content, wanted)


@each_size
def test_put_undoes_take(b, c, H, W, N):
    images, canvas = numbered(b, c, H, W), torch.full((b, c, H, W), -1.0)
    patch_indices = torch.randperm(N * N * b)
    first, rest = patch_indices[: len(patch_indices) // 2], patch_indices[len(patch_indices) // 2 :]
    scatter(canvas, N, rest, gather(images, N, rest))
    assert torch.equal(canvas == images, canvas >= 0)
    assert torch.equal(gather(canvas, N, first), torch.full((len(first), c, H // N, W // N), -1.0))
    scatter(canvas, N, first, gather(images, N, first))
    assert torch.equal(canvas, images)


def test_patch_batch_holds_what_belongs_to_each_patch():
    N, images, t = 3, torch.randn(2, 3, 6, 12), torch.tensor([7, 4])
    pooled = global_content(images, N)
    for patch_indices in (torch.arange(18), torch.tensor([5, 0, 17])):
        batch = patch_batch(images, pooled, t, N, patch_indices)
        for place, row in enumerate(patch_indices.tolist()):
            number, k, patch = list(cut(images, N))[row]
            assert torch.equal(batch.patches[place], patch)
            assert torch.equal(batch.content[place], pooled[k])
            assert batch.position[place].tolist() == [float(other == number) for other in range(N * N)]
            assert batch.t[place] == t[k]
        assert (batch.position.dtype, batch.t.dtype) == (torch.float32, torch.int64)


def test_patch_batch_holds_windows():
    images, t, patch_indices = torch.randn(2, 3, 6, 12), torch.tensor([7, 4]), torch.tensor([5, 0, 17])
    batch = patch_batch(pad(images, 2), global_content(images, 3, 2), t, 3, patch_indices, 2)
    assert torch.equal(batch.patches, gather(pad(images, 2), 3, patch_indices, 2))
    assert batch.content.shape == batch.patches.shape == (3, 3, 6, 8)


OFFSETS = {0: (0, 0), 1: (1, 1), 2: (1, 0), 3: (0, 1)}  # in half patches, down and to the right


def shifted(images, N, number):
    """Images moved so that the patches of a grid lie where those of grid 0 do."""
    moves = [-halves * (side // N // 2) for halves, side in zip(OFFSETS[number], images.shape[2:])]
    return images.roll(moves, (2, 3))


@pytest.mark.parametrize("number", OFFSETS)
@each_size
def test_a_grid_is_that_of_the_shifted_image(b, c, H, W, N, number):
    images, patch_indices = numbered(b, c, H, W), torch.randperm(N * N * b)
    found = gather(images, N, patch_indices, grid=torch.full((b,), number))
    assert torch.equal(found, gather(shifted(images, N, number), N, patch_indices))


def test_each_image_has_its_own_grid():
    images, grid = numbered(3, 2, 8, 12), torch.tensor([1, 0, 3])
    found = gather(images, 2, torch.arange(12), grid=grid).unflatten(0, (4, 3))
    for image, number in enumerate(grid.tolist()):
        alone = images[image : image + 1]
        assert torch.equal(found[:, image], gather(alone, 2, torch.arange(4), grid=torch.tensor([number])))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_shifted_patch_goes_on_at_the_opposite_edge_and_its_halo_too(number):
    images, halo = numbered(2, 3, 8, 8), 1
    found = gather(pad(images, halo), 2, torch.arange(8), halo, torch.full((2,), number))
    for s in range(4):
        for image in range(2):
            down, right = (halves * 2 for halves in OFFSETS[number])
            rows = [s // 2 * 4 + down - halo + y for y in range(6)]
            columns = [s % 2 * 4 + right - halo + x for x in range(6)]
            for y, row in enumerate(rows):
                for x, column in enumerate(columns):
                    outside = (not down and not 0 <= row < 8) or (not right and not 0 <= column < 8)
                    wanted = torch.zeros(3) if outside else images[image, :, row % 8, column % 8]
                    assert torch.equal(found[2 * s + image, :, y, x], wanted)


@pytest.mark.parametrize("number", OFFSETS)
def test_scatter_undoes_gather_on_every_grid(number):
    images, grid = numbered(2, 3, 8, 12), torch.full((2,), number)
    canvas = torch.zeros_like(images)
    for patch_indices in torch.randperm(8).split(3):
        scatter(canvas, 2, patch_indices, gather(images, 2, patch_indices, grid=grid), grid)
    assert torch.equal(canvas, images)
    for add in (True, False):
        scatter(canvas, 2, torch.arange(8), gather(images, 2, torch.arange(8), grid=grid), grid, add=add)
        assert torch.equal(canvas, 2 * images if add else images)
    repeated = torch.tensor([5, 5])  # as in a padded pass: it counts once
    scatter(canvas, 2, repeated, gather(images, 2, repeated, grid=grid), grid, add=True)
    assert canvas.sum() == images.sum() + gather(images, 2, repeated[:1], grid=grid).sum()


@pytest.mark.parametrize("grids", [(0,), (0, 1), (0, 1, 2, 3), (1, 2)])
@pytest.mark.parametrize(("h", "w"), [(8, 8), (4, 6), (5, 2)])
def test_blend_weights(grids, h, w):
    """They add up to 1 at every pixel, are largest where a patch has its middle, and as defined for two grids."""
    N, weights = 3, blend_weights(h, w, grids, torch.device("cpu"))
    total = torch.zeros(1, 1, N * h, N * w)
    for number, weight in zip(grids, weights, strict=True):
        patches = weight.expand(N * N, 1, h, w)
        scatter(total, N, torch.arange(N * N), patches, torch.tensor([number]), add=True)
        assert weight.max() == weight[h // 2, w // 2] or len(grids) > 2
    torch.testing.assert_close(total, torch.ones_like(total))
    if grids == (0, 1) and (h, w) == (8, 8):
        assert weights[0, 0, 0] == pytest.approx(0.5**2 / (0.5**2 + 3.5**2))  # at a corner of grid 0
        assert weights[0, 0, 4] == 0.5  # at borders of both
        assert torch.equal(weights[0], weights[1])


def test_positions_of_new_grids_are_the_mean_of_what_they_overlap():
    N = 3
    code = torch.eye(9).reshape(9, 3, 3)
    found = inherited_positions(N, 1, 4)
    assert found.shape == (9, 36)
    assert torch.equal(found[:, :9], torch.eye(9))
    for s in range(9):
        i, j = divmod(s, 3)
        below, beside = (i + 1) % 3, (j + 1) % 3
        corners = code[:, [i, i, below, below], [j, beside, j, beside]]
        assert torch.equal(found[:, 9 + s], corners.mean(1))
        assert torch.equal(found[:, 18 + s], code[:, [i, below], j].mean(1))
        assert torch.equal(found[:, 27 + s], code[:, i, [j, beside]].mean(1))
    assert torch.equal(inherited_positions(N, 2, 2), torch.eye(18))
    assert torch.equal(inherited_positions(N, 4, 1), torch.eye(36)[:, :9])
    more = inherited_positions(N, 2, 4)
    assert torch.equal(more[:, :18], torch.eye(18))
    assert torch.equal(more[:9, 18:], found[:, 18:])
    assert not more[9:, 18:].any()
