//! The cost-vs-iteration plot: both losses against the iteration, raw in light and smoothed in strong lines.

use std::sync::OnceLock;
use std::time::Duration;

use plotters::prelude::*;
use plotters::style::register_font;
use takuma_core::layout;
use takuma_store::Store;
use tokio::time::Instant;

use super::persist::{Patience, persist};
use crate::drawing::Drawing;
use crate::samples::{Picture, png};

/// Nobody looks more often.
const SHORTEST_PERIOD: Duration = Duration::from_secs(2);
/// Drawing takes a twentieth of the time at most: a long run has many points.
const PERIODS_OF_DRAWING: u32 = 20;
const WIDTH: u32 = 1200;
const HEIGHT: u32 = 720;
const FONT: &str = "sans-serif";
/// Points of a raw curve; more than the plot has columns only costs time.
const MAX_POINTS: usize = 2_400;
/// The smoothed curve follows about this share of the run.
const SMOOTHING: f64 = 0.02;
/// Share of the values that the plot shows; the rest are spikes of the first steps.
const SHOWN: f64 = 0.995;

const D_COLOR: RGBColor = RGBColor(31, 119, 180);
const G_COLOR: RGBColor = RGBColor(214, 88, 20);
const INK: RGBColor = RGBColor(60, 60, 60);

/// Losses of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Finished steps.
    pub step: u64,
    /// Discriminator.
    pub d_loss: f64,
    /// Generator.
    pub g_loss: f64,
}

/// The plot in the store.
#[derive(Debug, Default)]
pub struct PlotFile {
    /// It lacks points.
    pub is_stale: bool,
    /// Somebody would like to see them.
    pub is_wanted: bool,
    not_before: Option<Instant>,
}

impl PlotFile {
    /// When it should be drawn next; `None` while nobody wants it, or it has all points.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        (self.is_stale && self.is_wanted).then(|| self.not_before.unwrap_or_else(Instant::now))
    }

    /// Draws and stores it, if it lacks points.
    ///
    /// # Errors
    /// In words: it cannot be drawn, or the store's last error.
    pub async fn flush(
        &mut self,
        title: &str,
        points: &[Point],
        drawing: Drawing,
        store: &Store,
        patience: &Patience,
    ) -> Result<(), String> {
        if !self.is_stale {
            return Ok(());
        }
        let (began, title, points) = (Instant::now(), title.to_owned(), points.to_vec());
        let png = bytes::Bytes::from(drawing.draw(move || draw(&title, &points)).await?);
        let period = (began.elapsed() * PERIODS_OF_DRAWING).max(SHORTEST_PERIOD);
        persist(patience, || store.put(layout::PLOT_FILE, png.clone())).await?;
        self.not_before = Some(Instant::now() + period);
        (self.is_stale, self.is_wanted) = (false, false);
        Ok(())
    }
}

/// Draws the plot as a PNG.
///
/// # Errors
/// In words, when the font or a picture operation fails.
pub fn draw(title: &str, points: &[Point]) -> Result<Vec<u8>, String> {
    register()?;
    let mut pixels = vec![255u8; (WIDTH * HEIGHT * 3) as usize];
    draw_into(&mut pixels, title, points).map_err(|error| format!("the plot cannot be drawn: {error}"))?;
    png(&Picture { height: HEIGHT, width: WIDTH, pixels })
}

/// The machine may have no fonts at all, so the program carries one.
fn register() -> Result<(), String> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let register = || register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT).is_ok();
    if *REGISTERED.get_or_init(register) { Ok(()) } else { Err("the built-in font is unreadable".to_owned()) }
}

type DrawResult = Result<(), Box<dyn std::error::Error>>;

fn draw_into(pixels: &mut [u8], title: &str, points: &[Point]) -> DrawResult {
    let root = BitMapBackend::with_buffer(pixels, (WIDTH, HEIGHT)).into_drawing_area();
    root.fill(&WHITE)?;
    let last = points.last().map_or(1, |point| point.step).max(1) as f64;
    let d = curve(points, |point| point.d_loss);
    let g = curve(points, |point| point.g_loss);
    let (low, high) = range(&d, &g);
    let text = |size: u32| (FONT, size).into_font().color(&INK);
    let mut chart = ChartBuilder::on(&root)
        .margin(24)
        .margin_right(40)
        .caption(title, text(30))
        .x_label_area_size(60)
        .y_label_area_size(76)
        .build_cartesian_2d(0.0..last, low..high)?;
    chart
        .configure_mesh()
        .x_desc("iteration")
        .y_desc("cost")
        .x_labels(10)
        .y_labels(8)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.2}"))
        .axis_desc_style(text(24))
        .label_style(text(20))
        .axis_style(INK)
        .bold_line_style(INK.mix(0.15))
        .light_line_style(INK.mix(0.05))
        .draw()?;
    for (curve, color, label) in
        [(&d, D_COLOR, "discriminator (d_loss)"), (&g, G_COLOR, "generator (g_loss)")]
    {
        chart.draw_series(LineSeries::new(thin(curve), color.mix(0.4)))?;
        chart
            .draw_series(LineSeries::new(thin(&smooth(curve)), color.stroke_width(3)))?
            .label(label)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 28, y)], color.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(16)
        .legend_area_size(36)
        .label_font(text(22))
        .background_style(WHITE.mix(0.85))
        .border_style(INK.mix(0.3))
        .draw()?;
    root.present()?;
    Ok(())
}

fn curve(points: &[Point], loss: impl Fn(&Point) -> f64) -> Vec<(f64, f64)> {
    points.iter().map(|point| (point.step as f64, loss(point))).filter(|(_, loss)| loss.is_finite()).collect()
}

/// The losses that the plot spans: 0 to a little over nearly all of them.
fn range(d: &[(f64, f64)], g: &[(f64, f64)]) -> (f64, f64) {
    let mut losses: Vec<f64> = d.iter().chain(g).map(|&(_, loss)| loss).collect();
    losses.sort_by(f64::total_cmp);
    let at = ((losses.len() as f64 * SHOWN) as usize).min(losses.len().saturating_sub(1));
    let high = losses.get(at).copied().unwrap_or(1.0).max(0.1);
    (losses.first().copied().unwrap_or(0.0).min(0.0), high * 1.08)
}

/// The average of an exponential mean from the left and one from the right: it follows without lagging.
fn smooth(curve: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let window = (curve.len() as f64 * SMOOTHING).max(5.0);
    let keep = 1.0 - 1.0 / window;
    let mean = |losses: &mut dyn Iterator<Item = f64>| {
        let (mut sum, mut weight) = (0.0, 0.0);
        let next = |loss: f64| {
            sum = sum * keep + loss;
            weight = weight * keep + 1.0;
            sum / weight
        };
        losses.map(next).collect::<Vec<f64>>()
    };
    let forward = mean(&mut curve.iter().map(|point| point.1));
    let backward = mean(&mut curve.iter().rev().map(|point| point.1));
    let both = forward.iter().zip(backward.iter().rev());
    curve.iter().zip(both).map(|(point, (left, right))| (point.0, (left + right) / 2.0)).collect()
}

/// At most [`MAX_POINTS`] points: the least and the greatest of each stretch, so that spikes stay.
fn thin(curve: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if curve.len() <= MAX_POINTS {
        return curve.to_vec();
    }
    let stretch = curve.len().div_ceil(MAX_POINTS / 2);
    let extremes = |points: &[(f64, f64)]| {
        let by_loss = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let (least, greatest) =
            (points.iter().min_by(by_loss).copied(), points.iter().max_by(by_loss).copied());
        let mut both: Vec<(f64, f64)> = least.into_iter().chain(greatest).collect();
        both.sort_by(|a, b| a.0.total_cmp(&b.0));
        both
    };
    curve.chunks(stretch).flat_map(extremes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spikes_survive_thinning() {
        let mut curve: Vec<(f64, f64)> = (0..50_000).map(|x| (f64::from(x), 1.0)).collect();
        curve[31_234].1 = 9.0;
        let thinned = thin(&curve);
        assert!(thinned.len() <= MAX_POINTS);
        assert!(thinned.contains(&(31_234.0, 9.0)));
    }

    #[test]
    fn smoothed_constant_is_the_constant() {
        let curve: Vec<(f64, f64)> = (0..100).map(|x| (f64::from(x), 0.7)).collect();
        assert!(smooth(&curve).iter().all(|&(_, y)| (y - 0.7).abs() < 1e-12));
    }

    #[test]
    fn plot_has_both_curves_and_survives_bad_numbers() {
        let noise = |x: u64| ((x * 7919 % 101) as f64 / 101.0 - 0.5) * 0.3;
        let mut points: Vec<Point> = (1..=300)
            .map(|step| {
                let decay = (-(step as f64) / 60.0).exp();
                let (d_loss, g_loss) =
                    (0.9 - 0.5 * decay + noise(step), 1.6 + 4.0 * decay + noise(step + 50));
                Point { step, d_loss, g_loss }
            })
            .collect();
        points[3].d_loss = f64::NAN;
        let file = draw("calm-otter-3: dcgan-celeba, cost vs iteration", &points).unwrap();
        if let Ok(path) = std::env::var("TAKUMA_PLOT_OUT") {
            std::fs::write(path, &file).unwrap();
        }
        let picture = image::load_from_memory(&file).unwrap().to_rgb8();
        let count = |color: RGBColor| picture.pixels().filter(|p| p.0 == [color.0, color.1, color.2]).count();
        assert!(count(D_COLOR) > 500 && count(G_COLOR) > 500);
        draw("no steps yet", &[]).unwrap();
    }
}
