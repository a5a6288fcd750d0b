//! A picture of curves.

use super::files::Folder;
use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// A line of the picture.
pub struct Curve {
    pub name: String,
    pub points: Vec<(f64, f64)>,
    /// Curves of the same number have the same colour.
    pub colour: usize,
    pub dashed: bool,
}

/// Writes the curves over the steps as SVG.
pub fn write(folder: &Folder, name: &str, title: &str, unit: &str, curves: &[Curve]) -> Result<()> {
    let mut picture = String::new();
    draw(&mut picture, title, unit, curves).map_err(|error| anyhow!("{name}: {error}"))?;
    folder.write(name, picture.as_bytes())
}

fn draw(
    picture: &mut String,
    title: &str,
    unit: &str,
    curves: &[Curve],
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(picture, (900, 560)).into_drawing_area();
    area.fill(&WHITE)?;
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let steps = points().map(|point| point.0).fold(1.0, f64::max);
    let low = points().map(|point| point.1).fold(f64::INFINITY, f64::min);
    let high = points().map(|point| point.1).fold(f64::NEG_INFINITY, f64::max);
    // Room above for the legend.
    let margin = 0.05 * (high - low).max(0.1);
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..steps, low - margin..high + 4.0 * margin)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc(unit)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|value| format!("{value:.2}"))
        .light_line_style(WHITE)
        .draw()?;
    for curve in curves {
        let style = Palette99::pick(curve.colour).stroke_width(2);
        let points = curve.points.iter().copied();
        let drawn = match curve.dashed {
            true => chart.draw_series(DashedLineSeries::new(points, 6, 4, style))?,
            false => chart.draw_series(LineSeries::new(points, style))?,
        };
        let dashed = curve.dashed;
        drawn.label(&curve.name).legend(move |(x, y)| {
            // The legend's line: one piece, or two where the curve is dashed.
            let end = if dashed { x + 8 } else { x + 20 };
            PathElement::new([(x, y), (end, y)], style)
        });
    }
    let legend = SeriesLabelPosition::UpperRight;
    chart
        .configure_series_labels()
        .position(legend)
        .legend_area_size(28)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    area.present()?;
    Ok(())
}
