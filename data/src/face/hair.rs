//! Hair behind and before the head, and hats.

use super::{Hair, Hat, Look};
use crate::canvas::{Canvas, Rgb, blob, curve, oval};

/// Paints what lies behind head and shoulders.
pub(super) fn behind(canvas: &mut Canvas, look: &Look) {
    let (rx, ry) = look.head;
    let dark = look.hair_color.darker(0.32);
    match look.hair {
        Hair::Afro => {
            for (x, y, r) in [
                (0.0, -0.62, 1.12),
                (-0.75, -0.35, 0.82),
                (0.75, -0.35, 0.82),
                (-0.85, 0.1, 0.6),
                (0.85, 0.1, 0.6),
            ] {
                canvas.oval((x * rx, y * ry), (r * rx, r * rx), dark);
            }
        }
        Hair::Long | Hair::Wavy => {
            let (wide, wave) = if look.hair == Hair::Wavy { (1.5, 0.22) } else { (1.28, 0.0) };
            let locks = blob(&[
                (0.0, -ry * 1.32),
                (rx * 1.15, -ry * 1.1),
                (rx * (wide - 0.1), 0.0),
                (rx * (wide + wave), ry * 0.55),
                (rx * (wide - wave), ry * 1.05),
                (rx * wide, ry * 1.75),
                (-rx * wide, ry * 1.75),
                (-rx * (wide - wave), ry * 1.05),
                (-rx * (wide + wave), ry * 0.55),
                (-rx * (wide - 0.1), 0.0),
                (-rx * 1.15, -ry * 1.1),
            ]);
            canvas.fill_along(&locks, (0.0, -ry), (0.0, ry * 1.6), [look.hair_color, dark]);
        }
        Hair::Bun => {
            canvas.oval((look.side * 4.0, -ry * 1.28), (rx * 0.46, rx * 0.42), look.hair_color);
            canvas.oval((0.0, -ry * 0.25), (rx * 1.12, ry * 0.98), dark);
        }
        Hair::Fringe => canvas.oval((0.0, -ry * 0.1), (rx * 1.22, ry * 1.06), dark),
        Hair::Short | Hair::SidePart => canvas.oval((0.0, -ry * 0.32), (rx * 1.1, ry * 0.86), dark),
        Hair::Bald => {}
    }
}

/// Paints what falls over the forehead.
pub(super) fn front(canvas: &mut Canvas, look: &Look) {
    let (rx, ry) = look.head;
    let s = look.side;
    let hairline = match look.hair {
        Hair::Bald => return,
        Hair::Short | Hair::Afro => vec![
            (s * rx * 0.9, -ry * 0.48),
            (s * rx * 0.3, -ry * 0.68),
            (-s * rx * 0.4, -ry * 0.66),
            (-s * rx * 0.9, -ry * 0.46),
        ],
        Hair::SidePart => vec![
            (s * rx * 0.92, -ry * 0.3),
            (s * rx * 0.55, -ry * 0.82),
            (-s * rx * 0.2, -ry * 0.62),
            (-s * rx * 0.95, -ry * 0.26),
        ],
        Hair::Fringe => vec![
            (s * rx * 0.98, -ry * 0.02),
            (s * rx * 0.6, -ry * 0.4),
            (-s * rx * 0.6, -ry * 0.38),
            (-s * rx * 0.98, -ry * 0.02),
        ],
        Hair::Long | Hair::Wavy => vec![
            (s * rx * 1.0, ry * 0.1),
            (s * rx * 0.42, -ry * 0.92),
            (s * rx * 0.1, -ry * 0.88),
            (-s * rx * 1.0, ry * 0.1),
        ],
        Hair::Bun => vec![
            (s * rx * 0.95, -ry * 0.25),
            (s * rx * 0.45, -ry * 0.76),
            (-s * rx * 0.45, -ry * 0.76),
            (-s * rx * 0.95, -ry * 0.25),
        ],
    };
    let volume = if look.hair == Hair::Afro { 1.3 } else { 1.14 };
    let mut outline = vec![
        (-s * rx * 1.1, -ry * 0.12),
        (-s * rx * 1.18, -ry * 0.78),
        (-s * rx * 0.55, -ry * volume),
        (s * rx * 0.55, -ry * volume),
        (s * rx * 1.18, -ry * 0.78),
        (s * rx * 1.1, -ry * 0.12),
    ];
    outline.extend(hairline);
    let cap = blob(&outline);
    let (from, to) = ((look.light * rx, -ry * 1.2), (-look.light * rx, -ry * 0.2));
    canvas.fill_along(&cap, from, to, [look.hair_color.lighter(0.12), look.hair_color.darker(0.28)]);
    let shine = curve((-rx * 0.6, -ry * 0.86), (look.light * 8.0, -ry * 1.16), (rx * 0.6, -ry * 0.86));
    if look.hair != Hair::Afro {
        canvas.stroke(&shine, 2.2, look.hair_color.lighter(0.24));
    }
}

/// Paints the hat, over the hair.
pub(super) fn hat(canvas: &mut Canvas, look: &Look) {
    let (rx, ry) = look.head;
    let color = look.clothes.mix(Rgb::of(0xC4423A), 0.35 + 0.3 * look.side);
    if look.hat == Hat::None {
        return;
    }
    let crown = blob(&[
        (-rx * 1.2, -ry * 0.42),
        (-rx * 1.16, -ry * 1.05),
        (-rx * 0.5, -ry * 1.42),
        (rx * 0.5, -ry * 1.42),
        (rx * 1.16, -ry * 1.05),
        (rx * 1.2, -ry * 0.42),
        (0.0, -ry * 0.56),
    ]);
    canvas.fill_along(&crown, (0.0, -ry * 1.4), (0.0, -ry * 0.4), [color.lighter(0.15), color.darker(0.25)]);
    match look.hat {
        Hat::Beanie => {
            let band = curve((-rx * 1.06, -ry * 0.5), (0.0, -ry * 0.7), (rx * 1.06, -ry * 0.5));
            canvas.stroke(&band, 9.0, color.darker(0.3));
        }
        Hat::Cap => {
            let brim = oval((look.side * 8.0 + look.yaw, -ry * 0.5), (rx * 1.06, 6.0));
            canvas.fill(&brim, color.darker(0.45));
        }
        Hat::None => {}
    }
}
