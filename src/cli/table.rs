//! Tables for a terminal.

/// How a column is aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// Aligns rows by the longest cell of each column; the headings are the first line. What is at the end
/// of a line is not padded.
pub(super) fn table(columns: &[(&str, Align)], rows: &[Vec<String>]) -> Vec<String> {
    let headings = columns.iter().map(|(heading, _)| (*heading).to_owned()).collect();
    let all: Vec<Vec<String>> = std::iter::once(headings).chain(rows.iter().cloned()).collect();
    let width = |column: usize| all.iter().map(|row| len(&row[column])).max().unwrap_or(0);
    let widths: Vec<_> = (0..columns.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let mut line = String::new();
        for ((cell, width), (_, align)) in row.iter().zip(&widths).zip(columns) {
            let padding = " ".repeat(width - len(cell));
            if !line.is_empty() {
                line.push_str("  ");
            }
            match align {
                Align::Left => line.extend([cell.as_str(), &padding]),
                Align::Right => line.extend([padding.as_str(), cell]),
            }
        }
        line.truncate(line.trim_end().len());
        line
    };
    all.iter().map(line).collect()
}

fn len(cell: &str) -> usize {
    cell.chars().count()
}

/// A text of somebody else's, which must not speak to the terminal.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let rows = [["a", "1", "x"], ["long", "10", ""]];
        let rows: Vec<Vec<_>> = rows.iter().map(|row| row.map(str::to_owned).to_vec()).collect();
        let columns = [("NAME", Align::Left), ("N", Align::Right), ("WHY", Align::Left)];
        assert_eq!(table(&columns, &rows), ["NAME   N  WHY", "a      1  x", "long  10"]);
        assert_eq!(plain("a\x1b[2Jb"), "a\u{fffd}[2Jb");
    }
}
