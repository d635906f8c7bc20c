//! A plot as a bitmap for places that do not show SVG: the same on white, with a font of the
//! machine.

use anyhow::{Context as _, ensure};
use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{Options, Tree};

/// The font that the bench's set-up installs. Without it another font is used.
const FONT: &str = "DejaVu Sans";
/// Pixels per unit of the SVG.
const SCALE: f32 = 1.5;

/// Renders bitmaps.
pub struct Painter {
    options: Options<'static>,
}

impl Painter {
    /// Fails on a machine without fonts, because text would be missing silently.
    pub fn new() -> anyhow::Result<Self> {
        let mut options = Options::default();
        let fonts = options.fontdb_mut();
        fonts.load_system_fonts();
        let families: Vec<&str> =
            fonts.faces().filter_map(|face| face.families.first()).map(|(name, _)| name.as_str()).collect();
        let chosen = families.iter().find(|name| **name == FONT).or(families.first());
        let chosen = (*chosen.context("no font is installed: apt-get install fonts-dejavu-core")?).to_owned();
        fonts.set_sans_serif_family(chosen);
        Ok(Self { options })
    }

    /// Renders an SVG as PNG.
    pub fn png(&self, svg: &str) -> anyhow::Result<Vec<u8>> {
        let tree = Tree::from_str(svg, &self.options).context("read the SVG")?;
        let size = tree.size().to_int_size().scale_by(SCALE).context("a size")?;
        let mut points = Pixmap::new(size.width(), size.height()).context("room for the picture")?;
        resvg::render(&tree, Transform::from_scale(SCALE, SCALE), &mut points.as_mut());
        let png = points.encode_png().context("write the PNG")?;
        ensure!(!png.is_empty(), "an empty picture");
        Ok(png)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORD: &str = "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"80\" height=\"20\">\
        <rect width=\"80\" height=\"20\" fill=\"#FFFFFF\"/>\
        <text x=\"4\" y=\"14\" font-family=\"sans-serif\" font-size=\"12\">word</text></svg>";

    #[test]
    fn text_is_rendered() {
        let painter = Painter::new().expect("a font");
        let blank = painter.png(&WORD.replace("word", "")).expect("a picture");
        let word = painter.png(WORD).expect("a picture");
        assert!(word.starts_with(b"\x89PNG") && word.len() > blank.len() + 50);
    }
}
