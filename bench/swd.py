"""Sliced Wasserstein distance between two sets of images: how unlike their statistics are, at several scales.

    bench/.venv/bin/python bench/swd.py A B [--tile 64] [--slices 512] [--seed 0]

A and B: a .npy of uint8 [N, H, W, C], a PNG, or a folder of PNGs. A PNG is cut into tiles of --tile pixels, as
takuma's grids are. Sets of unequal size are cut to the smaller one. Prints one JSON line: the distance at each scale
(times 1000) and their mean. Equal distributions do not reach 0: give two halves of one set to see the floor.

After Karras et al., Progressive Growing of GANs, 2018, section 5: each image becomes a Laplacian pyramid down to 16
pixels; of each level, 128 patches of 7x7 an image, normalised by channel; the distance is the mean over random
directions of the Wasserstein-1 distance between the patches' projections.
"""

import argparse
import json
import pathlib
import struct
import sys
import zlib

import numpy as np

PATCH, PATCHES_PER_IMAGE, SMALLEST_LEVEL = 7, 128, 16
# The binomial filter of Burt and Adelson's pyramid.
KERNEL = np.array([1, 4, 6, 4, 1], np.float32) / 16
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Pixels around every image of takuma's grids.
GAP = 2
CHANNELS_OF_COLOUR_TYPE = {0: 1, 2: 3, 4: 2, 6: 4}


class SwdError(Exception):
    """One sentence for the person at the terminal."""


def unfilter(rows, stride, pixel):
    """The bytes of a PNG's rows [height, 1 + stride] without their filters; `pixel` is bytes a pixel."""
    out = np.zeros((len(rows), stride), np.uint8)
    above = np.zeros(stride, np.uint8)
    for y, row in enumerate(rows):
        kind, line = row[0], row[1:].copy()
        if kind == 2:
            line += above
        elif kind in (1, 3, 4):
            left = [0] * pixel
            corner = [0] * pixel
            for x in range(stride):
                a, b, c = left[x % pixel], int(above[x]), corner[x % pixel]
                value = (int(line[x]) + predicted(kind, a, b, c)) & 255
                line[x] = left[x % pixel] = value
                corner[x % pixel] = b
        elif kind != 0:
            raise SwdError(f"row {y} has the unknown filter {kind}")
        out[y] = above = line
    return out


def predicted(kind, left, above, corner):
    """What filters 1, 3 and 4 of the PNG standard subtract."""
    if kind == 1:
        return left
    if kind == 3:
        return (left + above) // 2
    guess = left + above - corner
    return min((abs(guess - left), 0, left), (abs(guess - above), 1, above), (abs(guess - corner), 2, corner))[2]


def read_png(path):
    """A PNG of 8 bits a channel, not interlaced, as uint8 [H, W, C]."""
    data = path.read_bytes()
    if data[:8] != PNG_SIGNATURE:
        raise SwdError(f"{path} is no PNG")
    at, packed, header = 8, b"", None
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            header = struct.unpack(">IIBBBBB", body)
        elif kind == b"IDAT":
            packed += body
        at += 12 + length
    width, height, depth, colour, _, _, interlaced = header
    if depth != 8 or interlaced or colour not in CHANNELS_OF_COLOUR_TYPE:
        raise SwdError(f"{path} is no plain PNG of 8 bits a channel")
    channels = CHANNELS_OF_COLOUR_TYPE[colour]
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + width * channels)
    return unfilter(rows, width * channels, channels).reshape(height, width, channels)


def tiles(image, size):
    """The grid [H, W, C] as [N, size, size, C], row by row; with takuma's lines between the tiles or without."""
    height, width, channels = image.shape
    if (height - GAP) % (size + GAP) == 0 and (width - GAP) % (size + GAP) == 0:
        grid = image[GAP:, GAP:].reshape((height - GAP) // (size + GAP), size + GAP, -1, size + GAP, channels)
        return grid[:, :size, :, :size].swapaxes(1, 2).reshape(-1, size, size, channels)
    if height % size or width % size:
        raise SwdError(f"a picture of {width}x{height} is no grid of tiles of {size}; give --tile")
    grid = image.reshape(height // size, size, width // size, size, channels)
    return grid.swapaxes(1, 2).reshape(-1, size, size, channels)


def read_images(path, tile):
    """The images of a .npy, a PNG or a folder of PNGs, as uint8 [N, H, W, C]."""
    if path.is_dir():
        files = sorted(path.glob("*.png"))
        if not files:
            raise SwdError(f"there is no PNG in {path}")
        return np.concatenate([tiles(read_png(file), tile) for file in files])
    if not path.is_file():
        raise SwdError(f"there is no {path}")
    if path.suffix != ".npy":
        return tiles(read_png(path), tile)
    images = np.load(path)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise SwdError(f"{path} holds {images.dtype} {list(images.shape)}, but must hold uint8 [N, H, W, C]")
    return images


def blur(images, scale=1.0):
    """Images [N, H, W, C] under the binomial filter times `scale`, mirrored at their edges."""
    for axis in (1, 2):
        padding = [(2, 2) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(images, padding, mode="reflect")
        size = images.shape[axis]
        images = sum(k * scale * np.take(padded, range(i, i + size), axis) for i, k in enumerate(KERNEL))
    return images


def pyramid(images):
    """Laplacian levels of float images [N, H, W, C], largest first; the last one is what is left."""
    levels = []
    while images.shape[1] > SMALLEST_LEVEL:
        smaller = blur(images)[:, ::2, ::2]
        larger = np.zeros_like(images)
        larger[:, ::2, ::2] = smaller
        # Twice an axis, since every second row and column holds zeros.
        levels.append(images - blur(larger, 2.0))
        images = smaller
    return levels + [images]


def descriptors(level, rng):
    """Random patches of each image, as rows [N * PATCHES_PER_IMAGE, PATCH * PATCH * C] normalised by channel."""
    count, height, width, channels = level.shape
    n = np.repeat(np.arange(count), PATCHES_PER_IMAGE)
    y = rng.integers(0, height - PATCH + 1, len(n))[:, None, None] + np.arange(PATCH)[:, None]
    x = rng.integers(0, width - PATCH + 1, len(n))[:, None, None] + np.arange(PATCH)
    patches = level[n[:, None, None], y, x]
    patches = patches - patches.mean((0, 1, 2))
    deviation = patches.std((0, 1, 2))
    return (patches / np.where(deviation > 0, deviation, 1)).reshape(len(n), PATCH * PATCH * channels)


def sliced_wasserstein(a, b, slices, rng):
    """Mean over random unit directions of the Wasserstein-1 distance between the projections of rows a and b [n, d]."""
    directions = rng.standard_normal((a.shape[1], slices)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=0)
    return float(np.abs(np.sort(a @ directions, 0) - np.sort(b @ directions, 0)).mean())


def distance(a, b, slices=512, seed=0):
    """Distance times 1000 at each level between two sets of uint8 images [N, H, W, C], by the level's height."""
    if a.shape[1:] != b.shape[1:]:
        raise SwdError(f"images of {list(a.shape[1:])} and {list(b.shape[1:])} cannot be compared")
    if min(a.shape[1:3]) < PATCH:
        raise SwdError(f"images must have {PATCH} pixels a side at least")
    rng = np.random.default_rng(seed)
    count = min(len(a), len(b))
    sets = [images[np.sort(rng.permutation(len(images))[:count])].astype(np.float32) / 127.5 - 1 for images in (a, b)]
    found = {}
    for level_a, level_b in zip(*map(pyramid, sets)):
        rows = [descriptors(level, rng) for level in (level_a, level_b)]
        found[level_a.shape[1]] = 1000 * sliced_wasserstein(*rows, slices, rng)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a", type=pathlib.Path)
    parser.add_argument("b", type=pathlib.Path)
    parser.add_argument("--tile", type=int, default=64, help="side of an image in a PNG, in pixels")
    parser.add_argument("--slices", type=int, default=512, help="random directions")
    parser.add_argument("--seed", type=int, default=0, help="of patches and directions")
    args = parser.parse_args()
    try:
        a, b = (read_images(path, args.tile) for path in (args.a, args.b))
        found = distance(a, b, args.slices, args.seed)
    except SwdError as error:
        sys.exit(f"error: {error}")
    levels = {str(size): round(value, 3) for size, value in found.items()}
    print(json.dumps({"swd_x1000": levels, "mean": round(sum(found.values()) / len(found), 3), "images": min(len(a), len(b))}))


if __name__ == "__main__":
    main()
