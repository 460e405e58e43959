//! A squarified treemap (Bruls, Huizing and van Wijk, 2000): areas are to scale, and rectangles are
//! as close to squares as the sizes allow. Pure geometry; the template does the drawing.

/// A rectangle, in the drawing's units.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub(super) struct Rect {
    pub x: f64,
    pub y: f64,
    pub width: f64,
    pub height: f64,
}

impl Rect {
    pub(super) fn area(self) -> f64 {
        self.width * self.height
    }
}

/// Divides `area` among `sizes`, which must be positive and in descending order. The result has
/// one rectangle for each size.
pub(super) fn squarify(sizes: &[u64], area: Rect) -> Vec<Rect> {
    let total: f64 = sizes.iter().map(|size| *size as f64).sum();
    let mut rest = area;
    let mut done = Vec::with_capacity(sizes.len());
    if total <= 0.0 {
        return done;
    }
    let scale = area.area() / total;
    let mut todo: Vec<f64> = sizes.iter().map(|size| *size as f64 * scale).collect();
    while !todo.is_empty() {
        let side = rest.width.min(rest.height);
        let mut taken = 1;
        while taken < todo.len()
            && worst_ratio(&todo[..=taken], side) <= worst_ratio(&todo[..taken], side)
        {
            taken += 1;
        }
        let row: Vec<f64> = todo.drain(..taken).collect();
        rest = place_row(&row, rest, todo.is_empty(), &mut done);
    }
    done
}

/// The worst ratio of sides in a row of these areas along a side of this length.
fn worst_ratio(row: &[f64], side: f64) -> f64 {
    let sum: f64 = row.iter().sum();
    let largest = row.iter().copied().fold(0.0, f64::max);
    let smallest = row.iter().copied().fold(f64::INFINITY, f64::min);
    let (side, sum) = (side * side, sum * sum);
    (side * largest / sum).max(sum / (side * smallest))
}

/// Lays one row along the shorter side and returns the remaining area. The last row fills the whole
/// rest, so that rounding leaves no gap.
fn place_row(row: &[f64], area: Rect, last: bool, done: &mut Vec<Rect>) -> Rect {
    let sum: f64 = row.iter().sum();
    let upright = area.width >= area.height;
    let side = if upright { area.height } else { area.width };
    let whole = if upright { area.width } else { area.height };
    let depth = if last || side <= 0.0 { whole } else { (sum / side).min(whole) };
    let mut along = 0.0;
    for part in row {
        let length = if sum > 0.0 { part / sum * side } else { 0.0 };
        done.push(if upright {
            Rect { x: area.x, y: area.y + along, width: depth, height: length }
        } else {
            Rect { x: area.x + along, y: area.y, width: length, height: depth }
        });
        along += length;
    }
    if upright {
        Rect { x: area.x + depth, width: area.width - depth, ..area }
    } else {
        Rect { y: area.y + depth, height: area.height - depth, ..area }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AREA: Rect = Rect { x: 0.0, y: 0.0, width: 600.0, height: 400.0 };

    #[test]
    fn the_papers_example() {
        // Sizes 6 6 4 3 2 2 1 in a 6 by 4 rectangle; the first column holds both sixes.
        let area = Rect { x: 0.0, y: 0.0, width: 6.0, height: 4.0 };
        let rects = squarify(&[6, 6, 4, 3, 2, 2, 1], area);
        assert_eq!(rects[0], Rect { x: 0.0, y: 0.0, width: 3.0, height: 2.0 });
        assert_eq!(rects[1], Rect { x: 0.0, y: 2.0, width: 3.0, height: 2.0 });
        assert!((rects[2].width - 12.0 / 7.0).abs() < 1e-9, "{:?}", rects[2]);
    }

    #[test]
    fn areas_are_to_scale_and_nothing_overlaps() {
        let sizes: Vec<u64> = (1..=150).rev().map(|n| n * n * n).collect();
        let total: u64 = sizes.iter().sum();
        let rects = squarify(&sizes, AREA);
        assert_eq!(rects.len(), sizes.len());
        for (size, rect) in sizes.iter().zip(&rects) {
            let wanted = AREA.area() * *size as f64 / total as f64;
            assert!((rect.area() - wanted).abs() < 1e-3, "{size}: {rect:?}");
            assert!(rect.x >= 0.0 && rect.x + rect.width <= AREA.width + 1e-6);
            assert!(rect.y >= 0.0 && rect.y + rect.height <= AREA.height + 1e-6);
        }
        for (index, a) in rects.iter().enumerate() {
            for b in &rects[index + 1..] {
                let wide = (a.x + a.width).min(b.x + b.width) - a.x.max(b.x);
                let high = (a.y + a.height).min(b.y + b.height) - a.y.max(b.y);
                assert!(wide < 1e-6 || high < 1e-6, "{a:?} overlaps {b:?}");
            }
        }
    }

    #[test]
    fn nothing_and_one() {
        assert_eq!(squarify(&[], AREA), []);
        assert_eq!(squarify(&[7], AREA), [AREA]);
    }
}
