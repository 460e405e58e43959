//! The floors of a crate as a picture: a box for each module, the highest floor at the top.

use std::fmt::Write;

/// Width of the picture, height of a row of boxes and the space between boxes, in pixels.
const WIDTH: usize = 760;
const ROW: usize = 30;
const GAP: usize = 6;
/// Where the boxes begin: to the left is the floor's number.
const LEFT: usize = 40;
/// Width of a character of the font, which is monospaced and 12 pixels high.
const CHARACTER: usize = 8;

const HEAD: &str = "<style>\
text{font:12px monospace;fill:#1f2328}\
.band{fill:#f3f4f6}.box{fill:#fff;stroke:#9ca3af}.floor{fill:#6b7280}\
@media (prefers-color-scheme:dark){\
text{fill:#e6edf3}.band{fill:#161b22}.box{fill:#0d1117;stroke:#4b5563}.floor{fill:#9ca3af}}\
</style>\n";

/// The picture of these modules and their floors, as SVG.
pub fn draw(name: &str, rows: &[(String, u32)]) -> String {
    let mut floors: Vec<u32> = rows.iter().map(|(_, floor)| *floor).collect();
    floors.sort_unstable();
    floors.dedup();
    let (mut body, mut top) = (String::new(), 0);
    for floor in floors.iter().rev() {
        let (mut boxes, mut left, mut line) = (String::new(), LEFT, 0);
        for (module, _) in rows.iter().filter(|(_, of)| of == floor) {
            let width = module.len() * CHARACTER + 2 * GAP;
            if left + width > WIDTH {
                (left, line) = (LEFT, line + 1);
            }
            let y = top + GAP + line * ROW;
            writeln!(
                boxes,
                "<rect class=\"box\" x=\"{left}\" y=\"{y}\" width=\"{width}\" height=\"{}\" rx=\"3\"/>\
                 <text x=\"{}\" y=\"{}\">{module}</text>",
                ROW - GAP,
                left + GAP + CHARACTER / 4,
                y + 16
            )
            .expect("a string takes all");
            left += width + GAP;
        }
        let height = (line + 1) * ROW + GAP;
        write!(
            body,
            "<rect class=\"band\" x=\"0\" y=\"{top}\" width=\"{WIDTH}\" height=\"{height}\" rx=\"4\"/>\
             <text class=\"floor\" x=\"12\" y=\"{}\">{floor}</text>\n{boxes}",
            top + height / 2 + 4
        )
        .expect("a string takes all");
        top += height + GAP;
    }
    let height = top - GAP;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         aria-label=\"The floors of {name}\">\n{HEAD}{body}</svg>\n"
    )
}
