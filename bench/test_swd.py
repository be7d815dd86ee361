"""Known cases of bench/swd.py:  bench/.venv/bin/python -m unittest discover bench"""

import math
import pathlib
import struct
import tempfile
import unittest
import zlib

import numpy as np

import swd


def noise(seed, count=24, amplitude=40):
    """Grey noise around 128."""
    rng = np.random.default_rng(seed)
    return np.clip(128 + amplitude * rng.standard_normal((count, 64, 64, 3)), 0, 255).astype(np.uint8)


def smooth(seed, count=24):
    """Noise without its finest detail."""
    return np.clip(swd.blur(noise(seed, count).astype(np.float32)), 0, 255).astype(np.uint8)


def write_png(path, image, filters):
    """An RGB PNG whose row y has the filter filters[y % len(filters)], written from the standard's definition."""
    height, width, channels = image.shape
    stride, rows = width * channels, image.reshape(height, -1).astype(int)
    packed = bytearray()
    for y in range(height):
        kind = filters[y % len(filters)]
        packed.append(kind)
        for x in range(stride):
            left = rows[y, x - channels] if x >= channels else 0
            above = rows[y - 1, x] if y else 0
            corner = rows[y - 1, x - channels] if y and x >= channels else 0
            guess = left + above - corner
            near = sorted([(abs(guess - left), 0, left), (abs(guess - above), 1, above), (abs(guess - corner), 2, corner)])
            taken = [0, left, above, (left + above) // 2, near[0][2]][kind]
            packed.append((rows[y, x] - taken) % 256)
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(swd.PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(packed))) + chunk(b"IEND", b""))


class SlicedWasserstein(unittest.TestCase):
    def test_shift_in_one_dimension_is_the_distance(self):
        rng = np.random.default_rng(0)
        a = rng.standard_normal((1000, 1)).astype(np.float32)
        self.assertAlmostEqual(swd.sliced_wasserstein(a, a[::-1] + 3, 64, rng), 3, places=4)

    def test_shift_in_many_dimensions_is_its_mean_projection(self):
        rng = np.random.default_rng(1)
        dims = 20
        a = rng.standard_normal((500, dims)).astype(np.float32)
        shift = np.zeros(dims, np.float32)
        shift[3] = 10
        # The mean of |cos| between a fixed direction and a random one.
        share = math.gamma(dims / 2) / (math.sqrt(math.pi) * math.gamma((dims + 1) / 2))
        self.assertAlmostEqual(swd.sliced_wasserstein(a, a + shift, 8192, rng) / (10 * share), 1, delta=0.03)


class Distance(unittest.TestCase):
    def test_one_distribution_is_near_to_itself_and_far_from_another(self):
        floor = swd.distance(noise(0), noise(1))
        other = swd.distance(noise(0), smooth(1))
        self.assertEqual(list(floor), [64, 32, 16])
        self.assertLess(floor[64], 60)
        # Blurring takes the correlation of neighbours from none to much: the finest level must see it.
        self.assertGreater(other[64], 2 * floor[64])

    def test_more_damage_is_more_distance(self):
        faint, strong = (
            np.clip(smooth(1).astype(int) + noise(2, amplitude=a).astype(int) - 128, 0, 255).astype(np.uint8) for a in (4, 16)
        )
        clean = smooth(0)
        self.assertLess(swd.distance(clean, faint)[64], swd.distance(clean, strong)[64])

    def test_seed_decides_everything_and_sizes_may_differ(self):
        a, b = noise(0, 12), smooth(1, 8)
        self.assertEqual(swd.distance(a, b, seed=5), swd.distance(a, b, seed=5))

    def test_images_of_other_sizes_are_refused(self):
        with self.assertRaises(swd.SwdError):
            swd.distance(noise(0, 2), noise(0, 2)[:, :32])

    def test_pyramid_keeps_what_it_takes_apart(self):
        images = smooth(0, 2).astype(np.float32)
        levels = swd.pyramid(images)
        back = levels[-1]
        for level in reversed(levels[:-1]):
            larger = np.zeros_like(level)
            larger[:, ::2, ::2] = back
            back = level + swd.blur(larger, 2.0)
        np.testing.assert_allclose(back, images, atol=1e-3)


class Reading(unittest.TestCase):
    def test_every_filter_of_a_png_and_every_tile_of_a_grid(self):
        image = np.random.default_rng(3).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "grid.png"
            write_png(path, image, [0, 1, 2, 3, 4])
            np.testing.assert_array_equal(swd.read_png(path), image)
            found = swd.read_images(path, 10)
            np.testing.assert_array_equal(found[4], image[10:, 10:20])
            self.assertEqual(len(swd.read_images(pathlib.Path(folder), 10)), 6)
            with self.assertRaises(swd.SwdError):
                swd.read_images(path, 64)

    def test_lines_between_the_tiles_of_takumas_grids_are_left_out(self):
        cells = np.random.default_rng(4).integers(0, 256, (6, 10, 10, 3), dtype=np.uint8)
        grid = np.zeros((2 * 12 + 2, 3 * 12 + 2, 3), np.uint8)
        for n, cell in enumerate(cells):
            top, left = 2 + n // 3 * 12, 2 + n % 3 * 12
            grid[top : top + 10, left : left + 10] = cell
        np.testing.assert_array_equal(swd.tiles(grid, 10), cells)

    def test_arrays_are_read_as_they_are(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "images.npy"
            np.save(path, noise(0, 2))
            np.testing.assert_array_equal(swd.read_images(path, 64), noise(0, 2))
            np.save(path, noise(0, 2).astype(np.float32))
            with self.assertRaises(swd.SwdError):
                swd.read_images(path, 64)


if __name__ == "__main__":
    unittest.main()
