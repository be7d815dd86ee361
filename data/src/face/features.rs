//! Eyes, brows, nose, mouth, beard and glasses.

use super::Look;
use crate::canvas::{Canvas, Rgb, blob, curve, oval};

const WHITE: Rgb = Rgb::of(0xF4F0EA);
const DARK: Rgb = Rgb::of(0x1A1412);

/// Paints the face's features.
pub(super) fn paint(canvas: &mut Canvas, look: &Look) {
    if look.beard > 0.0 {
        beard(canvas, look);
    }
    nose(canvas, look);
    mouth(canvas, look);
    for side in [-1.0, 1.0] {
        eye(canvas, look, side);
        brow(canvas, look, side);
    }
}

/// Height of the eyes.
fn eye_y(look: &Look) -> f32 {
    -look.head.1 * 0.06
}

/// The far eye of a turned head lies nearer to the nose.
fn eye_x(look: &Look, side: f32) -> f32 {
    side * (look.eye_gap - side * look.yaw * 0.18) + look.yaw
}

fn eye(canvas: &mut Canvas, look: &Look, side: f32) {
    let (x, y, r) = (eye_x(look, side), eye_y(look), look.eye_radius);
    // A broad smile narrows the eyes.
    let open = r * (0.66 - 0.16 * look.smile.max(0.0));
    let white = blob(&[
        (x - r * 1.25, y + 0.5),
        (x - r * 0.5, y - open * 1.3),
        (x + r * 0.5, y - open * 1.3),
        (x + r * 1.25, y + 0.5),
        (x, y + open * 1.45),
    ]);
    canvas.fill(&white, WHITE.mix(look.skin, 0.12));
    let at = (x + look.gaze + look.yaw * 0.12, y - 0.2);
    canvas.oval(at, (r * 0.52, open.min(r * 0.56)), look.iris);
    canvas.oval(at, (r * 0.25, r * 0.26), DARK);
    canvas.oval((at.0 + look.light * 1.4, at.1 - 1.3), (1.0, 1.0), WHITE);
    let lid = curve((x - r * 1.05, y - open * 0.2), (x, y - open * 1.95), (x + r * 1.05, y - open * 0.2));
    canvas.stroke(&lid, 1.3 + 0.9 * look.lipstick, look.hair_color.mix(DARK, 0.75));
    let under = curve((x - r * 0.8, y + open * 0.8), (x, y + open * 1.5), (x + r * 0.8, y + open * 0.8));
    canvas.stroke(&under, 0.7, look.skin.darker(0.4));
}

fn brow(canvas: &mut Canvas, look: &Look, side: f32) {
    let (x, y, r) = (eye_x(look, side), eye_y(look) - look.eye_radius * 1.75, look.eye_radius);
    let inner = (x - side * r * 1.2, y + look.brow_tilt);
    let outer = (x + side * r * 1.45, y + 1.2 - look.brow_tilt * 0.4);
    let color = look.hair_color.mix(DARK, 0.35);
    canvas.stroke(&curve(inner, (x + side * r * 0.4, y - 3.4), outer), look.brow_width, color);
}

fn nose(canvas: &mut Canvas, look: &Look) {
    let (top, tip) = (eye_y(look) + 2.0, eye_y(look) + look.nose_length + 4.0);
    let x = look.yaw * 1.5;
    let shade = look.skin.darker(0.3);
    let away = if look.light > 0.0 { -1.0 } else { 1.0 };
    let flank = blob(&[
        (look.yaw + away * 2.0, top),
        (x + away * 5.5, tip - 1.0),
        (x, tip + 1.5),
        (x + away * 0.6, top + 6.0),
    ]);
    canvas.fill_alpha(&flank, shade, 0.55);
    canvas.glow((x - away * 1.2, tip - 3.5), 6.0, look.skin.lighter(0.6), 0.6);
    canvas.stroke(
        &curve((x - 4.6, tip - 0.5), (x, tip + 3.0), (x + 4.6, tip - 0.5)),
        1.1,
        look.skin.darker(0.45),
    );
    for side in [-1.0, 1.0] {
        canvas.oval((x + side * 2.6, tip + 0.4), (1.3, 0.8), look.skin.darker(0.62));
    }
}

/// Centre of the mouth.
fn mouth_at(look: &Look) -> (f32, f32) {
    (look.yaw * 1.15, eye_y(look) + look.nose_length + 15.5)
}

fn mouth(canvas: &mut Canvas, look: &Look) {
    let (x, y) = mouth_at(look);
    let (w, lift) = (look.mouth_width * (0.85 + 0.2 * look.smile.max(0.0)), 4.2 * look.smile);
    let lips = look.skin.darker(0.2).mix(Rgb::of(0xB3303C), 0.3 + 0.55 * look.lipstick);
    let (left, right) = ((x - w, y - lift), (x + w, y - lift));
    let gape = look.mouth_open * (2.0 + 4.5 * look.smile.max(0.0));
    let full = 3.0 + 1.4 * look.lipstick;
    let shape = blob(&[
        left,
        (x - w * 0.4, y - full * 0.9),
        (x, y - full * 0.55),
        (x + w * 0.4, y - full * 0.9),
        right,
        (x + w * 0.5, y + full + gape + lift * 0.3),
        (x - w * 0.5, y + full + gape + lift * 0.3),
    ]);
    canvas.fill(&shape, lips);
    if gape > 1.2 {
        let inner = blob(&[
            (x - w * 0.86, y - lift * 0.75),
            (x, y - 0.6),
            (x + w * 0.86, y - lift * 0.75),
            (x + w * 0.42, y + gape + lift * 0.35),
            (x - w * 0.42, y + gape + lift * 0.35),
        ]);
        canvas.fill(&inner, Rgb::of(0x5A1A1E));
        let teeth = blob(&[
            (x - w * 0.74, y - lift * 0.62),
            (x, y - 0.2),
            (x + w * 0.74, y - lift * 0.62),
            (x + w * 0.4, y + gape * 0.55),
            (x - w * 0.4, y + gape * 0.55),
        ]);
        canvas.fill(&teeth, WHITE);
    } else {
        let line =
            curve((x - w * 0.8, y - lift * 0.7), (x, y + lift * 0.75 + 0.6), (x + w * 0.8, y - lift * 0.7));
        canvas.stroke(&line, 1.2, lips.darker(0.55));
    }
    if look.moustache {
        let color = look.hair_color.darker(0.1);
        for side in [-1.0, 1.0] {
            let end = (x + side * w * 1.0, y - 2.0 + 1.5 * side * look.side);
            canvas.stroke(&curve((x + side, y - 6.6), (x + side * w * 0.6, y - 6.6), end), 3.6, color);
        }
    }
}

fn beard(canvas: &mut Canvas, look: &Look) {
    let (rx, ry) = look.head;
    let ((x, y), jaw) = (mouth_at(look), rx * look.jaw);
    let long = 1.0 + 0.16 * look.beard;
    let path = blob(&[
        (-rx * 0.97, ry * 0.12),
        (-rx * 0.8, ry * 0.4),
        (x - look.mouth_width * 1.2, y - 7.5),
        (x, y - 9.0),
        (x + look.mouth_width * 1.2, y - 7.5),
        (rx * 0.8, ry * 0.4),
        (rx * 0.97, ry * 0.12),
        (rx * 1.0, ry * 0.42),
        (jaw, ry * 0.84 * long),
        (jaw * 0.45, ry * 1.06 * long),
        (-jaw * 0.45, ry * 1.06 * long),
        (-jaw, ry * 0.84 * long),
        (-rx * 1.0, ry * 0.42),
    ]);
    canvas.fill_alpha(&path, look.hair_color.darker(0.12), look.beard.sqrt());
}

/// Paints the glasses, over everything on the face.
pub(super) fn glasses(canvas: &mut Canvas, look: &Look) {
    if look.glasses == 0 {
        return;
    }
    let (y, frame) = (eye_y(look) + 1.0, DARK.mix(look.clothes, 0.25));
    let radius = look.eye_gap * 0.74;
    let tall = if look.glasses == 1 { radius * 0.95 } else { radius * 0.74 };
    for side in [-1.0, 1.0] {
        let x = eye_x(look, side);
        let lens = if look.glasses == 1 {
            oval((x, y), (radius, tall))
        } else {
            let (w, h) = (radius * 1.22, tall * 1.25);
            blob(&[(x - w, y - h), (x, y - h), (x + w, y - h), (x + w, y + h), (x, y + h), (x - w, y + h)])
        };
        if look.glasses == 3 {
            canvas.fill_alpha(&lens, DARK, 0.92);
            canvas.fill_alpha(&oval((x - 3.0, y - tall * 0.35), (3.4, 2.0)), WHITE, 0.25);
        } else {
            canvas.fill_alpha(&lens, WHITE, 0.12);
        }
        canvas.stroke(&lens, 1.7, frame);
        let temple = (side * look.head.0 * 0.98, y - 2.0);
        canvas.stroke(
            &curve((x + side * radius, y - 2.0), (x + side * radius * 1.2, y - 2.5), temple),
            1.5,
            frame,
        );
    }
    let (left, right) = (eye_x(look, -1.0) + radius, eye_x(look, 1.0) - radius);
    if right > left {
        canvas.stroke(&curve((left, y - 1.0), (look.yaw, y - 3.5), (right, y - 1.0)), 1.6, frame);
    }
}
