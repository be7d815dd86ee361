//! Grids: the cells of a grid laid out as one picture, and pictures as PNG.

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder};
use takuma_core::event::{CellShape, Grid};

/// Black pixels around every cell, as torchvision's `make_grid` draws them.
const PADDING: usize = 2;

/// A picture: uint8 `[height, width, 3]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Rows.
    pub height: u32,
    /// Columns.
    pub width: u32,
    /// Row by row, RGB.
    pub pixels: Vec<u8>,
}

/// The picture of a grid, as square as its number of cells allows: 64 cells make 8 rows of 8.
///
/// # Shapes
/// `[rows * (height + 2) + 2, columns * (width + 2) + 2, 3]`; grey cells become RGB.
#[must_use]
pub fn stitch(grid: &Grid) -> Picture {
    let CellShape { height, width, channels } = grid.cell;
    let (height, width, channels) = (height as usize, width as usize, channels as usize);
    let cells = grid.cells as usize;
    let columns = (cells as f64).sqrt().ceil() as usize;
    let rows = cells.div_ceil(columns.max(1));
    let picture_width = columns * (width + PADDING) + PADDING;
    let picture_height = rows * (height + PADDING) + PADDING;
    let mut pixels = vec![0u8; picture_height * picture_width * 3];
    for (cell, image) in grid.pixels.chunks_exact(height * width * channels).enumerate() {
        let top = PADDING + cell / columns * (height + PADDING);
        let left = PADDING + cell % columns * (width + PADDING);
        for (y, row) in image.chunks_exact(width * channels).enumerate() {
            let start = ((top + y) * picture_width + left) * 3;
            for (to, from) in
                pixels[start..start + width * 3].chunks_exact_mut(3).zip(row.chunks_exact(channels))
            {
                let last = channels - 1;
                to.copy_from_slice(&[from[0], from[last.min(1)], from[last.min(2)]]);
            }
        }
    }
    Picture { height: picture_height as u32, width: picture_width as u32, pixels }
}

/// The picture as a PNG file.
///
/// # Errors
/// In words; only if the picture's sizes do not match its pixels.
pub fn png(picture: &Picture) -> Result<Vec<u8>, String> {
    let mut file = Vec::new();
    PngEncoder::new_with_quality(&mut file, CompressionType::Fast, FilterType::Adaptive)
        .write_image(&picture.pixels, picture.width, picture.height, ExtendedColorType::Rgb8)
        .map_err(|error| format!("the picture cannot be encoded: {error}"))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use takuma_core::event::{Fence, GridKind};
    use takuma_core::ids::Generation;

    use super::*;

    fn grid(cells: u32, channels: u32) -> Grid {
        let pixels = (0..cells).flat_map(|cell| vec![cell as u8 + 1; 4 * channels as usize]).collect();
        Grid {
            fence: Fence { run: "r".into(), generation: Generation(1) },
            kind: GridKind::Generated,
            step: 0,
            cells,
            cell: CellShape { height: 2, width: 2, channels },
            pixels,
        }
    }

    #[test]
    fn sixty_four_cells_make_eight_rows_of_eight() {
        let picture = stitch(&grid(64, 3));
        assert_eq!((picture.height, picture.width), (34, 34));
        let at = |y: usize, x: usize| picture.pixels[(y * 34 + x) * 3];
        assert_eq!((at(2, 2), at(2, 6), at(6, 2), at(31, 31)), (1, 2, 9, 64));
        assert_eq!((at(0, 0), at(4, 4), at(33, 33)), (0, 0, 0));
    }

    #[test]
    fn grey_cells_and_an_odd_count_make_a_colour_picture() {
        let picture = stitch(&grid(3, 1));
        assert_eq!((picture.height, picture.width, picture.pixels.len()), (10, 10, 300));
        assert_eq!(&picture.pixels[(6 * 10 + 2) * 3..][..3], [3, 3, 3]);
    }

    #[test]
    fn png_reads_back_equal() {
        let picture = stitch(&grid(64, 3));
        let read = image::load_from_memory(&png(&picture).unwrap()).unwrap().to_rgb8();
        assert_eq!(read.into_raw(), picture.pixels);
    }
}
