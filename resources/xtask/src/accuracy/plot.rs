//! docs/accuracy.svg: each figure's error, and each interval, around the truth.

use std::fmt::Write;

use super::row::{Row, percent};

const WIDTH: f64 = 1000.0;
/// Where the plot begins and ends; left of it are the names, right of it the errors in figures.
const LEFT: f64 = 200.0;
const RIGHT: f64 = 880.0;
/// One figure's line.
const LINE: f64 = 15.0;
/// Between two workloads, and above a group's title.
const GAP: f64 = 8.0;
/// Title, legend and the axis above the first group.
const TOP: f64 = 120.0;

/// The axis is linear up to this error, in percent, and logarithmic beyond.
const LINEAR: f64 = 0.1;
/// The largest error that is shown where it is: 1000 %.
const LARGEST: f64 = 1000.0;
const TICKS: [f64; 9] = [-100.0, -10.0, -1.0, -0.1, 0.0, 0.1, 1.0, 10.0, 100.0];

/// Readable on light and dark pages alike, whether or not the viewer tells which it is. Classes and not custom properties: not
/// every viewer knows those.
const STYLE: &str = "\
<style>
  text { font: 12px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #1f2328; }
  .title { font-size: 17px; font-weight: 600; }
  .group { font-weight: 600; }
  .soft { fill: #59636e; font-size: 11px; }
  .page { fill: #ffffff; }
  .grid { stroke: #d1d9e0; stroke-width: 1; }
  .zero { stroke: #1f2328; stroke-width: 1.2; }
  .truth { fill: #8b949e; fill-opacity: 0.35; }
  path { stroke-width: 2.5; fill: none; }
  circle.proc { fill: #c2410c; } circle.stat { fill: #0e7490; }
  circle.bpf { fill: #15803d; } circle.vtime { fill: #1d4ed8; } circle.oncpu { fill: #7e22ce; }
  path.bpf { stroke: #15803d; } path.vtime { stroke: #1d4ed8; } path.oncpu { stroke: #7e22ce; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; }
    .soft { fill: #9198a1; }
    .page { fill: #0d1117; }
    .grid { stroke: #30363d; }
    .zero { stroke: #f0f6fc; }
    circle.proc { fill: #fb923c; } circle.stat { fill: #22d3ee; }
    circle.bpf { fill: #4ade80; } circle.vtime { fill: #60a5fa; } circle.oncpu { fill: #c084fc; }
    path.bpf { stroke: #4ade80; } path.vtime { stroke: #60a5fa; } path.oncpu { stroke: #c084fc; }
  }
</style>
";

/// A figure's way of being told: its colour, and its name in the legend.
const KINDS: [(&str, &str); 5] = [
    ("proc", "/proc gtime of the thread"),
    ("stat", "/proc/stat of the CPU"),
    ("bpf", "bpf"),
    ("vtime", "vtime"),
    ("oncpu", "oncpu"),
];

/// The whole picture.
pub fn render(rows: &[Row]) -> String {
    let mut body = String::new();
    let bottom = draw(&mut body, rows).expect("a string takes everything");
    let height = bottom + 44.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         role=\"img\" aria-label=\"How far each figure of guest time is from the truth\">\n{STYLE}\
         <rect class=\"page\" width=\"{WIDTH}\" height=\"{height}\"/>\n{body}</svg>\n"
    )
}

/// Draws all of it, and tells where it ends.
fn draw(svg: &mut String, rows: &[Row]) -> Result<f64, std::fmt::Error> {
    writeln!(
        svg,
        "<text class=\"title\" x=\"20\" y=\"30\">Guest time: how far each figure is from the truth</text>"
    )?;
    legend(svg, rows)?;

    // The grid goes behind what is drawn on it, and is as high as that: first the lines, in a text of their own.
    let mut lines = String::new();
    let mut y = TOP;
    let mut group = String::new();
    for row in rows {
        if row.place() != group {
            group = row.place();
            y += 2.0 * GAP + LINE;
            writeln!(
                lines,
                "<text class=\"group\" x=\"20\" y=\"{:.1}\">{group}, Linux {}</text>",
                y - 4.0,
                row.kernel()
            )?;
        }
        y = workload(&mut lines, row, y + GAP)?;
    }
    grid(svg, TOP + GAP, y + GAP)?;
    svg.push_str(&lines);
    Ok(y + GAP)
}

fn legend(svg: &mut String, rows: &[Row]) -> std::fmt::Result {
    let used = |class: &str| {
        let source = |row: &Row| row.measured.sources.iter().any(|source| source.source == class);
        class == "proc" || class == "stat" || rows.iter().any(source)
    };
    let mut x = 20.0;
    for (class, name) in KINDS.iter().filter(|(class, _)| used(class)) {
        let ours = !matches!(*class, "proc" | "stat");
        if ours {
            bar(svg, class, x, x + 24.0, 52.0)?;
        }
        dot(svg, class, x + 12.0, 52.0)?;
        writeln!(svg, "<text x=\"{:.1}\" y=\"56\">{name}</text>", x + 30.0)?;
        x += 60.0 + 6.6 * f64::from(u32::try_from(name.len()).expect("short"));
    }
    writeln!(
        svg,
        "<rect class=\"truth\" x=\"{x:.1}\" y=\"46\" width=\"24\" height=\"12\"/>"
    )?;
    writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"56\">the truth, as well as it is known</text>",
        x + 30.0
    )?;
    for (y, line) in [
        (
            78,
            "A bar is the interval that a source claims to hold the truth. Errors are in percent, logarithmic beyond 0.1 %.",
        ),
        (
            93,
            "The truth is by the tracer's stamps in the emulated host, and what the guest itself says on this machine; errors are from its middle.",
        ),
    ] {
        writeln!(svg, "<text class=\"soft\" x=\"20\" y=\"{y}\">{line}</text>")?;
    }
    Ok(())
}

fn grid(svg: &mut String, top: f64, bottom: f64) -> std::fmt::Result {
    for tick in TICKS {
        let x = x_of(tick);
        let class = if tick == 0.0 { "zero" } else { "grid" };
        writeln!(
            svg,
            "<line class=\"{class}\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top:.1}\" y2=\"{bottom:.1}\"/>"
        )?;
        // The lines of 0.1 % are too close to the truth's for a label each.
        let label = match tick.abs() {
            0.0 => "truth".to_owned(),
            LINEAR => continue,
            _ => format!("{tick:+} %"),
        };
        for y in [top - 6.0, bottom + 16.0] {
            writeln!(
                svg,
                "<text class=\"soft\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{label}</text>"
            )?;
        }
    }
    Ok(())
}

/// One workload's figures, a line each; tells where it ends.
fn workload(svg: &mut String, row: &Row, top: f64) -> Result<f64, std::fmt::Error> {
    let figures = row.figures();
    // Of a CPU that guests share, the line in /proc/stat is nobody's.
    let figures: Vec<_> = figures
        .iter()
        .filter_map(|figure| Some((figure, figure.truth?)))
        .collect();
    let height = LINE * f64::from(u32::try_from(figures.len()).expect("a handful"));
    writeln!(
        svg,
        "<text x=\"34\" y=\"{:.1}\">{}</text>",
        top + height / 2.0 + 4.0,
        row.name()
    )?;
    let mut y = top + LINE / 2.0;
    for (figure, truth) in figures {
        let class = class_of(figure.by);
        let [from, to] = [truth.lower_ns, truth.upper_ns].map(|ns| x_of(truth.error(ns)));
        writeln!(
            svg,
            "<rect class=\"truth\" x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{LINE:.1}\"/>",
            y - LINE / 2.0,
            (to - from).max(1.0)
        )?;
        if let Some(claim) = figure.claim_ns {
            let [from, to] = claim.map(|ns| x_of(truth.error(ns)));
            bar(svg, class, from, to, y)?;
        }
        let error = truth.error(figure.ns);
        dot(svg, class, x_of(error), y)?;
        writeln!(
            svg,
            "<text class=\"soft\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - 20.0,
            y + 4.0,
            percent(error)
        )?;
        y += LINE;
    }
    Ok(top + height)
}

fn class_of(by: &str) -> &'static str {
    let known = KINDS.iter().find(|(class, _)| *class == by);
    known.map_or("oncpu", |(class, _)| class)
}

fn bar(svg: &mut String, class: &str, from: f64, to: f64, y: f64) -> std::fmt::Result {
    let (low, high) = (y - 4.0, y + 4.0);
    writeln!(
        svg,
        "<path class=\"{class}\" d=\"M{from:.1} {y:.1}H{to:.1}M{from:.1} {low:.1}V{high:.1}M{to:.1} \
         {low:.1}V{high:.1}\"/>"
    )
}

fn dot(svg: &mut String, class: &str, x: f64, y: f64) -> std::fmt::Result {
    writeln!(svg, "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\"/>")
}

/// Where an error of so many percent is.
fn x_of(error: f64) -> f64 {
    let scaled = |error: f64| error.signum() * (1.0 + error.abs().min(LARGEST) / LINEAR).log10();
    let (least, most) = (scaled(TICKS[0]), scaled(LARGEST));
    LEFT + (scaled(error) - least) / (most - least) * (RIGHT - LEFT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_placed_in_their_order_and_none_outside_of_the_plot() {
        let errors = [-100.0, -10.0, -0.01, 0.0, 0.01, 5.0, 1000.0];
        let places: Vec<f64> = errors.iter().map(|&error| x_of(error)).collect();
        assert!(
            places.is_sorted() && places[0] >= LEFT && places[6] <= RIGHT,
            "{places:?}"
        );
        assert_eq!(x_of(1e9), x_of(1000.0));
    }
}
