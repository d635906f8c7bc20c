//! The results as one page that needs only a browser.

use std::fmt::Write as _;

use super::plots::Plot;
use super::tables::Table;

const HEAD: &str = "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
    <meta name=\"viewport\" content=\"width=device-width\">\n<title>Metadata path: benchmark</title>\n<style>\n\
    body { font: 15px/1.5 sans-serif; max-width: 1560px; margin: 2em auto; padding: 0 1em; color: #222 }\n\
    .plots { display: flex; flex-wrap: wrap; gap: 1em }\n.plots figure { margin: 0 }\n\
    table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }\n\
    th, td { padding: .2em .7em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }\n\
    th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left }\n\
    .reached { color: #06741f } .missed { color: #b00020; font-weight: bold }\n\
    p { max-width: 75em }\n</style></head><body>\n<h1>Metadata path: benchmark</h1>\n";

/// Renders the page.
pub fn page(preamble: &[String], plots: &[Plot], tables: &[Table]) -> String {
    let mut page = HEAD.to_owned();
    for line in preamble {
        push(&mut page, format_args!("<p>{}</p>\n", escaped(line)));
    }
    let mut tables = tables.iter();
    // The targets come first, then the plots.
    if let Some(first) = tables.next() {
        push_table(&mut page, first);
    }
    page.push_str("<div class=\"plots\">\n");
    for plot in plots {
        push(
            &mut page,
            format_args!("<figure aria-label=\"{}\">{}</figure>\n", escaped(&plot.title), plot.svg),
        );
    }
    page.push_str("</div>\n");
    for table in tables {
        push_table(&mut page, table);
    }
    page.push_str("</body></html>\n");
    page
}

fn push_table(page: &mut String, table: &Table) {
    push(
        page,
        format_args!("<h2>{}</h2>\n<p>{}</p>\n<table>\n<tr>", escaped(table.title), escaped(table.note)),
    );
    for cell in &table.header {
        push(page, format_args!("<th>{}</th>", escaped(cell)));
    }
    page.push_str("</tr>\n");
    for row in &table.rows {
        page.push_str("<tr>");
        for cell in row {
            let class = match cell.as_str() {
                "reached" => " class=\"reached\"",
                "MISSED" => " class=\"missed\"",
                _ => "",
            };
            push(page, format_args!("<td{class}>{}</td>", escaped(cell)));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table>\n");
}

fn push(page: &mut String, text: std::fmt::Arguments<'_>) {
    page.write_fmt(text).unwrap_or_else(|_| unreachable!("writing to a String cannot fail"));
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::results::tests::rates;
    use super::super::tables::{preamble, tables};
    use super::*;

    #[test]
    fn a_page_is_complete_and_loads_nothing() {
        let results = rates(&[("ours", &[1.0]), ("haproxy", &[1.0])]);
        let plot = Plot { name: "a", title: "a \"plot\"".to_owned(), svg: "<svg></svg>".to_owned() };
        let page = page(&preamble(&results), &[plot], &tables(&results));
        assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
        assert!(page.contains("a &lt;fast&gt; one") && page.contains("a &quot;plot&quot;"));
        assert!(page.contains("<td class=\"missed\">MISSED</td>"));
        for reference in ["src=", "href=", "http:", "https:"] {
            assert!(!page.contains(reference), "{reference}");
        }
    }
}
