//! A small vocabulary over the rasteriser: ovals, blobs, strokes and soft shades in one frame of reference.

use tiny_skia::{
    Color, FillRule, GradientStop, LineCap, LineJoin, LinearGradient, Paint, Path, PathBuilder, Pixmap,
    Point, RadialGradient, Rect, Shader, SpreadMode, Stroke, Transform,
};

/// A colour as stored in image files, each channel in `[0, 1]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rgb(pub(crate) [f32; 3]);

impl Rgb {
    pub(crate) const fn of(hex: u32) -> Self {
        Self([channel(hex, 16), channel(hex, 8), channel(hex, 0)])
    }

    /// `share` of `other`, the rest of `self`.
    pub(crate) fn mix(self, other: Self, share: f32) -> Self {
        let mut mixed = self.0;
        for (value, &other) in mixed.iter_mut().zip(&other.0) {
            *value += (other - *value) * share;
        }
        Self(mixed)
    }

    pub(crate) fn darker(self, share: f32) -> Self {
        self.mix(Self([0.05, 0.02, 0.04]), share)
    }

    pub(crate) fn lighter(self, share: f32) -> Self {
        self.mix(Self([1.0, 0.97, 0.92]), share)
    }

    /// Opaque RGBA.
    fn bytes(self) -> [u8; 4] {
        let [r, g, b] = self.0.map(|value| (value * 255.0 + 0.5) as u8);
        [r, g, b, 255]
    }

    fn color(self, alpha: f32) -> Color {
        let [r, g, b] = self.0.map(|value| value.clamp(0.0, 1.0));
        Color::from_rgba(r, g, b, alpha.clamp(0.0, 1.0)).unwrap_or(Color::BLACK)
    }
}

/// One picture in the making. Coordinates go through `place`, so a head is drawn upright around (0, 0).
pub(crate) struct Canvas {
    pixmap: Pixmap,
    pub(crate) place: Transform,
}

impl Canvas {
    pub(crate) fn new(width: u32, height: u32) -> Self {
        let pixmap = Pixmap::new(width, height).expect("a canvas of fixed, small sides");
        Self { pixmap, place: Transform::identity() }
    }

    /// The picture without its alpha: everything is opaque once the background is painted.
    ///
    /// # Shapes
    /// `out`: `[height, width, 3]`, u8.
    pub(crate) fn copy_rgb(&self, out: &mut [u8]) {
        for (pixel, out) in self.pixmap.data().chunks_exact(4).zip(out.chunks_exact_mut(3)) {
            out.copy_from_slice(&pixel[..3]);
        }
    }

    pub(crate) fn fill(&mut self, path: &Path, color: Rgb) {
        self.fill_with(path, Shader::SolidColor(color.color(1.0)));
    }

    pub(crate) fn fill_alpha(&mut self, path: &Path, color: Rgb, alpha: f32) {
        self.fill_with(path, Shader::SolidColor(color.color(alpha)));
    }

    /// A colour that changes along a line.
    pub(crate) fn fill_along(&mut self, path: &Path, from: (f32, f32), to: (f32, f32), colors: [Rgb; 2]) {
        let stops =
            vec![GradientStop::new(0.0, colors[0].color(1.0)), GradientStop::new(1.0, colors[1].color(1.0))];
        let (start, end) = (Point::from_xy(from.0, from.1), Point::from_xy(to.0, to.1));
        let shader = LinearGradient::new(start, end, stops, SpreadMode::Pad, Transform::identity());
        self.fill_with(path, shader.unwrap_or(Shader::SolidColor(colors[0].color(1.0))));
    }

    /// A round shade that fades to nothing at its radius.
    pub(crate) fn glow(&mut self, centre: (f32, f32), radius: f32, color: Rgb, alpha: f32) {
        let stops =
            vec![GradientStop::new(0.0, color.color(alpha)), GradientStop::new(1.0, color.color(0.0))];
        let at = Point::from_xy(centre.0, centre.1);
        let shader = RadialGradient::new(at, 0.0, at, radius, stops, SpreadMode::Pad, Transform::identity());
        if let Some(shader) = shader {
            self.fill_with(&oval(centre, (radius, radius)), shader);
        }
    }

    /// Paints the whole canvas: two colours along a line through its middle, and a bright round spot.
    /// By hand, because it touches every pixel and the rasteriser's gradients are exact but slow.
    pub(crate) fn backdrop(
        &mut self,
        lean: f32,
        colors: [Rgb; 2],
        spot: (f32, f32),
        radius: f32,
        bright: Rgb,
    ) {
        let (width, height) = (self.pixmap.width() as usize, self.pixmap.height() as f32);
        let shades: [Rgb; 256] = std::array::from_fn(|place| colors[0].mix(colors[1], place as f32 / 255.0));
        let plain = shades.map(Rgb::bytes);
        for (y, row) in self.pixmap.data_mut().chunks_exact_mut(4 * width).enumerate() {
            let down = y as f32 / height;
            let dy = (y as f32 - spot.1) / radius;
            for (x, pixel) in row.chunks_exact_mut(4).enumerate() {
                let across = x as f32 / width as f32 - 0.5;
                let shade = ((down + across * lean).clamp(0.0, 1.0) * 255.0) as usize;
                let dx = (x as f32 - spot.0) / radius;
                let near = 1.0 - dx * dx - dy * dy;
                let lit = near > 0.0;
                let color =
                    if lit { shades[shade].mix(bright, 0.5 * near * near).bytes() } else { plain[shade] };
                pixel.copy_from_slice(&color);
            }
        }
    }

    pub(crate) fn oval(&mut self, centre: (f32, f32), radii: (f32, f32), color: Rgb) {
        self.fill(&oval(centre, radii), color);
    }

    pub(crate) fn stroke(&mut self, path: &Path, width: f32, color: Rgb) {
        let stroke =
            Stroke { width, line_cap: LineCap::Round, line_join: LineJoin::Round, ..Stroke::default() };
        let paint = paint(Shader::SolidColor(color.color(1.0)));
        self.pixmap.stroke_path(path, &paint, &stroke, self.place, None);
    }

    fn fill_with(&mut self, path: &Path, shader: Shader) {
        self.pixmap.fill_path(path, &paint(shader), FillRule::Winding, self.place, None);
    }
}

const fn channel(hex: u32, shift: u32) -> f32 {
    ((hex >> shift) & 255) as f32 / 255.0
}

fn paint(shader: Shader) -> Paint {
    Paint { shader, anti_alias: true, ..Paint::default() }
}

/// An ellipse.
pub(crate) fn oval(centre: (f32, f32), radii: (f32, f32)) -> Path {
    let rect = Rect::from_xywh(centre.0 - radii.0, centre.1 - radii.1, 2.0 * radii.0, 2.0 * radii.1);
    rect.and_then(PathBuilder::from_oval).expect("an ellipse with finite, positive radii")
}

/// A quadratic curve from start over a control point to the end.
pub(crate) fn curve(start: (f32, f32), over: (f32, f32), end: (f32, f32)) -> Path {
    let mut path = PathBuilder::new();
    path.move_to(start.0, start.1);
    path.quad_to(over.0, over.1, end.0, end.1);
    path.finish().expect("a curve between finite points")
}

/// A closed smooth outline through the midpoints of `points`' sides.
pub(crate) fn blob(points: &[(f32, f32)]) -> Path {
    let middle = |a: (f32, f32), b: (f32, f32)| ((a.0 + b.0) / 2.0, (a.1 + b.1) / 2.0);
    let mut path = PathBuilder::new();
    let start = middle(points[points.len() - 1], points[0]);
    path.move_to(start.0, start.1);
    for (index, &point) in points.iter().enumerate() {
        let end = middle(point, points[(index + 1) % points.len()]);
        path.quad_to(point.0, point.1, end.0, end.1);
    }
    path.close();
    path.finish().expect("an outline through finite points")
}
