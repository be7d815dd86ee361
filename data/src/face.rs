//! Faces drawn by program: what a person looks like is chosen first, then painted back to front.
//!
//! Coordinates are pixels around the head's centre before it is moved, turned and scaled; y points down.

mod features;
mod hair;

use takuma_core::noise::{CounterRng, Purpose};
use tiny_skia::{Path, Transform};

use crate::canvas::{Canvas, Rgb, blob};

/// Sides of CelebA's aligned images, in pixels.
pub(crate) const WIDTH: u32 = 178;
/// See [`WIDTH`].
pub(crate) const HEIGHT: u32 = 218;

const SKINS: [u32; 8] = [0xF6D7C3, 0xEFC4A4, 0xE3AC86, 0xD19A70, 0xB57B50, 0x94603C, 0x74472B, 0x55331F];
const HAIRS: [u32; 9] =
    [0x17120F, 0x2B1D14, 0x4A2F1D, 0x6B4423, 0x8F5F2E, 0xC79A4E, 0xE2C27F, 0x9A3B1C, 0x9C9891];
const EYES: [u32; 5] = [0x4A2E1A, 0x2F5D8C, 0x4C7A4A, 0x6F6A63, 0x7A5526];
const CLOTHES: [u32; 8] = [0x27364F, 0x7C2230, 0x2F6B57, 0xD9D4C7, 0x1E1E22, 0xC98A2B, 0x54407A, 0x8FB0C9];
const GROUNDS: [u32; 8] = [0xB7C6CF, 0x6F7F8C, 0xD8C7A8, 0x3A4652, 0x8AA083, 0xB58C84, 0xE6E3DC, 0x54627A];

/// How the hair lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hair {
    Bald,
    Short,
    SidePart,
    Fringe,
    Long,
    Wavy,
    Afro,
    Bun,
}

const STYLES: [Hair; 10] = [
    Hair::Short,
    Hair::Short,
    Hair::SidePart,
    Hair::SidePart,
    Hair::Fringe,
    Hair::Long,
    Hair::Long,
    Hair::Wavy,
    Hair::Afro,
    Hair::Bun,
];

/// What is worn on the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hat {
    None,
    Beanie,
    Cap,
}

/// Everything that distinguishes one face. Lengths in pixels, angles in degrees.
#[derive(Debug, Clone)]
pub(crate) struct Look {
    pub(crate) skin: Rgb,
    pub(crate) hair_color: Rgb,
    pub(crate) iris: Rgb,
    pub(crate) clothes: Rgb,
    pub(crate) ground: [Rgb; 2],
    pub(crate) hair: Hair,
    pub(crate) hat: Hat,
    /// Half the head's width and height.
    pub(crate) head: (f32, f32),
    /// Width of the jaw over that of the head.
    pub(crate) jaw: f32,
    /// How far the features lie beside the head's middle: the head is turned.
    pub(crate) yaw: f32,
    pub(crate) tilt: f32,
    pub(crate) shift: (f32, f32),
    pub(crate) scale: f32,
    pub(crate) eye_gap: f32,
    pub(crate) eye_radius: f32,
    pub(crate) gaze: f32,
    pub(crate) brow_tilt: f32,
    pub(crate) brow_width: f32,
    pub(crate) nose_length: f32,
    pub(crate) mouth_width: f32,
    /// From -0.3 (sad) to 1 (smiling).
    pub(crate) smile: f32,
    pub(crate) mouth_open: f32,
    pub(crate) lipstick: f32,
    /// 0 = shaved, 1 = a full beard.
    pub(crate) beard: f32,
    pub(crate) moustache: bool,
    /// 0 = none, 1 = round, 2 = square, 3 = sunglasses.
    pub(crate) glasses: u32,
    /// Light from the left (-1) to the right (1).
    pub(crate) light: f32,
    /// Mirrors what is not symmetric.
    pub(crate) side: f32,
}

impl Look {
    /// The look of image `index`: a pure function of (seed, index).
    pub(crate) fn of(seed: u64, index: u64) -> Self {
        let mut rng = CounterRng::new(seed, Purpose::SynthImage, index, 0);
        let mut range = |from: f32, to: f32| from + (to - from) * rng.uniform_f32();
        let chance = |value: f32, share: f32| value < share;
        let masculine = chance(range(0.0, 1.0), 0.5);
        let style = STYLES[range(0.0, STYLES.len() as f32) as usize];
        let bald = masculine && chance(range(0.0, 1.0), 0.12);
        let hat = range(0.0, 1.0);
        let glasses = range(0.0, 1.0);
        let (beard, shaved) = (range(0.35, 1.0), chance(range(0.0, 1.0), 0.6));
        let grounds = [pick(&GROUNDS, range(0.0, 1.0)), pick(&GROUNDS, range(0.0, 1.0))];
        Self {
            skin: between(&SKINS, range(0.0, 1.0)).mix(Rgb([0.9, 0.5, 0.45]), range(0.0, 0.1)),
            hair_color: between(&HAIRS, range(0.0, 1.0)),
            iris: pick(&EYES, range(0.0, 1.0)),
            clothes: pick(&CLOTHES, range(0.0, 1.0)).mix(pick(&CLOTHES, range(0.0, 1.0)), range(0.0, 0.5)),
            ground: [grounds[0].darker(range(0.0, 0.25)), grounds[0].mix(grounds[1], range(0.2, 0.9))],
            hair: if bald { Hair::Bald } else { style },
            hat: if hat < 0.05 {
                Hat::Beanie
            } else if hat < 0.09 {
                Hat::Cap
            } else {
                Hat::None
            },
            head: (range(33.0, 38.5), range(43.0, 49.5)),
            jaw: if masculine { range(0.72, 0.9) } else { range(0.56, 0.76) },
            yaw: range(-5.0, 5.0),
            tilt: range(-8.0, 8.0),
            shift: (range(-5.0, 5.0), range(-4.0, 4.0)),
            scale: range(0.93, 1.08),
            eye_gap: range(14.0, 17.5),
            eye_radius: range(5.2, 7.0),
            gaze: range(-1.2, 1.2),
            brow_tilt: range(-2.2, 2.2),
            brow_width: if masculine { range(2.4, 3.8) } else { range(1.4, 2.4) },
            nose_length: range(12.0, 18.0),
            mouth_width: range(11.0, 17.0),
            smile: range(-0.25, 1.0),
            mouth_open: (range(-1.0, 1.0)).max(0.0),
            lipstick: if masculine { 0.0 } else { range(0.1, 0.9) },
            beard: if masculine && !shaved { beard } else { 0.0 },
            moustache: masculine && chance(range(0.0, 1.0), 0.25),
            glasses: if glasses < 0.09 {
                1
            } else if glasses < 0.17 {
                2
            } else {
                u32::from(glasses < 0.21) * 3
            },
            light: range(-1.0, 1.0),
            side: if chance(range(0.0, 1.0), 0.5) { -1.0 } else { 1.0 },
        }
    }

    /// Outline of the head: a round skull, a jaw as wide as `jaw` says.
    pub(crate) fn head_path(&self) -> Path {
        let (rx, ry) = self.head;
        let jaw = rx * self.jaw;
        blob(&[
            (-rx * 0.62, -ry * 1.02),
            (rx * 0.62, -ry * 1.02),
            (rx * 1.06, -ry * 0.5),
            (rx * 1.02, ry * 0.25),
            (jaw, ry * 0.8),
            (jaw * 0.45, ry * 1.04),
            (-jaw * 0.45, ry * 1.04),
            (-jaw, ry * 0.8),
            (-rx * 1.02, ry * 0.25),
            (-rx * 1.06, -ry * 0.5),
        ])
    }
}

fn pick(colors: &[u32], at: f32) -> Rgb {
    Rgb::of(colors[(at * colors.len() as f32) as usize])
}

/// A colour somewhere on the way through `colors`.
fn between(colors: &[u32], at: f32) -> Rgb {
    let place = at * (colors.len() - 1) as f32;
    let first = place as usize;
    Rgb::of(colors[first]).mix(Rgb::of(colors[first + 1]), place - first as f32)
}

/// Paints a face.
///
/// # Shapes
/// `out`: `[HEIGHT, WIDTH, 3]`, u8 RGB.
pub(crate) fn draw(look: &Look, out: &mut [u8]) {
    let mut canvas = Canvas::new(WIDTH, HEIGHT);
    ground(&mut canvas, look);
    let (x, y) = (WIDTH as f32 / 2.0 + look.shift.0, 111.0 + look.shift.1);
    let upright = Transform::from_translate(x, y).pre_scale(look.scale, look.scale);
    canvas.place = upright.pre_concat(Transform::from_rotate(look.tilt * 0.5));
    hair::behind(&mut canvas, look);
    canvas.place = upright;
    body(&mut canvas, look);
    canvas.place = upright.pre_concat(Transform::from_rotate(look.tilt));
    head(&mut canvas, look);
    features::paint(&mut canvas, look);
    hair::front(&mut canvas, look);
    features::glasses(&mut canvas, look);
    hair::hat(&mut canvas, look);
    canvas.copy_rgb(out);
}

fn ground(canvas: &mut Canvas, look: &Look) {
    let (width, height) = (WIDTH as f32, HEIGHT as f32);
    let spot = (width * (0.5 + 0.4 * look.side), height * 0.25);
    canvas.backdrop(look.light, look.ground, spot, 90.0, look.ground[1].lighter(0.6));
}

fn body(canvas: &mut Canvas, look: &Look) {
    let (rx, ry) = look.head;
    let shoulders = blob(&[
        (-rx * 0.7, ry * 1.22),
        (rx * 0.7, ry * 1.22),
        (rx * 1.9, ry * 1.5),
        (rx * 2.4, ry * 3.2),
        (-rx * 2.4, ry * 3.2),
        (-rx * 1.9, ry * 1.5),
    ]);
    canvas.fill_along(
        &shoulders,
        (-60.0, 50.0),
        (60.0, 90.0),
        [look.clothes.lighter(0.1), look.clothes.darker(0.3)],
    );
    let neck = rx * (0.36 + 0.2 * look.jaw);
    let throat = blob(&[
        (-neck, ry * 0.3),
        (neck, ry * 0.3),
        (neck, ry * 1.2),
        (neck * 1.5, ry * 1.38),
        (0.0, ry * 1.62),
        (-neck * 1.5, ry * 1.38),
        (-neck, ry * 1.2),
    ]);
    canvas.fill_along(
        &throat,
        (0.0, ry * 0.8),
        (0.0, ry * 1.5),
        [look.skin.darker(0.42), look.skin.darker(0.12)],
    );
}

fn head(canvas: &mut Canvas, look: &Look) {
    let (rx, ry) = look.head;
    for side in [-1.0, 1.0] {
        let ear = (side * rx * 1.0 - look.yaw * 0.4, ry * 0.08);
        canvas.oval(ear, (5.0, 9.0), look.skin.darker(0.16));
        canvas.oval((ear.0 + side * 0.6, ear.1), (2.6, 5.4), look.skin.darker(0.32));
    }
    let outline = look.head_path();
    let lit = [look.skin.lighter(0.14), look.skin.darker(0.3)];
    canvas.fill_along(&outline, (look.light * rx, -ry * 0.5), (-look.light * rx, ry * 0.9), lit);
    for side in [-1.0, 1.0] {
        let cheek = (side * rx * 0.52 + look.yaw, ry * 0.34);
        canvas.glow(cheek, 14.0, Rgb::of(0xD9604F), 0.18 + 0.15 * look.lipstick);
        let socket = (side * look.eye_gap + look.yaw, -ry * 0.06);
        canvas.glow(socket, 13.0, look.skin.darker(0.55), 0.4);
    }
    canvas.glow((look.yaw * 1.5 + look.light * 9.0, -ry * 0.5), 26.0, Rgb::of(0xFFF6E8), 0.28);
}
