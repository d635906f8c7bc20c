//! Bounds a document before a tree is built of it.
//!
//! The time and memory of the parser grow faster than the document: it copies all namespaces in
//! scope to each element that declares one, and compares each attribute of an element with the
//! others. So 214 KB of nested elements, each with a declaration, took 40 s. One pass over the text
//! rejects such documents.
//!
//! The pass need not recognise malformed XML, because the parser stops there. Up to that point it
//! must see the same tags as the parser.

/// libxml2, with which libvirt reads these files, accepts no deeper ones (`xmlParserMaxDepth`).
const MAX_DEPTH: usize = 256;
/// Namespace declarations of the document. libvirt and Nova write fewer than ten.
const MAX_NAMESPACES: usize = 64;
/// Attributes of one element. libvirt writes about twenty at most.
const MAX_ATTRIBUTES: usize = 128;
/// Occurrences of `<` and of `=`, for each of which the parser reserves memory. A domain with
/// hundreds of disks has about twenty thousand of each.
const MAX_MARKUP: usize = 200_000;

/// XML white space. Other white space may be part of a name.
const SPACES: [char; 4] = [' ', '\t', '\r', '\n'];

/// The document is within its size limit, but too expensive to parse.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DocumentLimitError {
    #[error("more than {MAX_MARKUP} tags or attributes")]
    Markup,
    #[error("more than {MAX_DEPTH} nested elements in line {line}")]
    Depth { line: usize },
    #[error("more than {MAX_NAMESPACES} namespace declarations in line {line}")]
    Namespaces { line: usize },
    #[error("more than {MAX_ATTRIBUTES} attributes of one element in line {line}")]
    Attributes { line: usize },
}

/// Counts up to the end of the scan.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    depth: usize,
    deepest: usize,
    elements: usize,
    namespaces: usize,
    most_attributes: usize,
}

/// Checks all limits.
pub(super) fn check(xml: &str) -> Result<(), DocumentLimitError> {
    let count = |wanted| xml.bytes().filter(|byte| *byte == wanted).count();
    if count(b'<') > MAX_MARKUP || count(b'=') > MAX_MARKUP {
        return Err(DocumentLimitError::Markup);
    }
    scan(xml).map(|_| ())
}

fn scan(xml: &str) -> Result<Counts, DocumentLimitError> {
    let mut counts = Counts::default();
    let mut rest = xml;
    while let Some((_, markup)) = rest.split_once('<') {
        let after = if let Some(comment) = markup.strip_prefix("!--") {
            after(comment, "-->")
        } else if let Some(data) = markup.strip_prefix("![CDATA[") {
            after(data, "]]>")
        } else if let Some(instruction) = markup.strip_prefix('?') {
            after(instruction, "?>")
        } else if let Some(end_tag) = markup.strip_prefix('/') {
            counts.depth = counts.depth.saturating_sub(1);
            after(end_tag, ">")
        } else if markup.starts_with('!') {
            // A document type, which the parser rejects.
            None
        } else {
            counts.start_tag(markup).map_err(|error| error(line(xml, markup)))?
        };
        let Some(after) = after else { break };
        rest = after;
    }
    Ok(counts)
}

impl Counts {
    /// Counts the tag at the start of `markup`, and returns the text after it. `None` if the tag
    /// does not end.
    fn start_tag<'a>(&mut self, markup: &'a str) -> Result<Option<&'a str>, fn(usize) -> DocumentLimitError> {
        let (mut attributes, mut rest) = (0, markup);
        loop {
            let Some(end) = rest.find(['"', '\'', '>']) else { return Ok(None) };
            let (before, from) = rest.split_at(end);
            if let Some(after) = from.strip_prefix('>') {
                return self.element(attributes, before.ends_with('/')).map(|()| Some(after));
            }
            // Count an attribute. A declaration is `xmlns="..."` or `xmlns:prefix="..."`.
            attributes += 1;
            let name = before.trim_end_matches(SPACES).trim_end_matches('=').trim_end_matches(SPACES);
            if name.rsplit(SPACES).next().is_some_and(|name| name.starts_with("xmlns")) {
                self.namespaces += 1;
                if self.namespaces > MAX_NAMESPACES {
                    return Err(|line| DocumentLimitError::Namespaces { line });
                }
            }
            if attributes > MAX_ATTRIBUTES {
                return Err(|line| DocumentLimitError::Attributes { line });
            }
            let quote = if from.starts_with('"') { "\"" } else { "'" };
            let value = from.strip_prefix(quote).unwrap_or_default();
            let Some(after) = after(value, quote) else { return Ok(None) };
            rest = after;
        }
    }

    fn element(&mut self, attributes: usize, is_empty: bool) -> Result<(), fn(usize) -> DocumentLimitError> {
        self.elements += 1;
        self.most_attributes = self.most_attributes.max(attributes);
        self.deepest = self.deepest.max(self.depth + 1);
        if self.deepest > MAX_DEPTH {
            return Err(|line| DocumentLimitError::Depth { line });
        }
        if !is_empty {
            self.depth += 1;
        }
        Ok(())
    }
}

/// Returns the text after the first `end`.
fn after<'a>(text: &'a str, end: &str) -> Option<&'a str> {
    text.split_once(end).map(|(_, after)| after)
}

/// Returns the line, counted from 1, in which `rest` begins.
fn line(xml: &str, rest: &str) -> usize {
    let before = xml.len().saturating_sub(rest.len());
    1 + xml.bytes().take(before).filter(|byte| *byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use roxmltree::{Document, Node};

    const OVS: &str = include_str!("../testdata/ovs_nova_1_1.xml");

    fn nested(depth: usize, attributes: impl Fn(usize) -> String) -> String {
        let start: Vec<_> = (0..depth).map(|at| format!("<e{}>\n", attributes(at))).collect();
        start.concat() + &"</e>".repeat(depth)
    }

    #[test]
    fn each_limit_holds_exactly() {
        let plain = |_| String::new();
        assert_eq!(check(&nested(MAX_DEPTH, plain)), Ok(()));
        let error = check(&nested(MAX_DEPTH + 1, plain)).unwrap_err();
        assert_eq!(error, DocumentLimitError::Depth { line: 257 });
        assert_eq!(error.to_string(), "more than 256 nested elements in line 257");

        let declare = |at| format!(" xmlns:n{at}='urn:n{at}'");
        assert_eq!(check(&nested(MAX_NAMESPACES, declare)), Ok(()));
        let error = check(&nested(MAX_NAMESPACES + 1, declare)).unwrap_err();
        assert_eq!(error, DocumentLimitError::Namespaces { line: 65 });

        let with = |count| {
            let attributes: Vec<_> = (0..count).map(|at| format!(" a{at}=''")).collect();
            format!("<e{}/>", attributes.concat())
        };
        assert_eq!(check(&with(MAX_ATTRIBUTES)), Ok(()));
        assert_eq!(check(&with(MAX_ATTRIBUTES + 1)), Err(DocumentLimitError::Attributes { line: 1 }));

        assert_eq!(check(&"<".repeat(MAX_MARKUP + 1)), Err(DocumentLimitError::Markup));
        assert_eq!(check(&"=".repeat(MAX_MARKUP + 1)), Err(DocumentLimitError::Markup));
    }

    #[test]
    fn declarations_are_found_however_they_are_written() {
        for text in [
            "<a xmlns='u'/>",
            "<a\txmlns\n=\r\n'u'/>",
            "<a b='>' xmlns:c='u'/>",
            "<a b=\"'\" xmlns:c='u'>",
            "<a xmlns:c\u{1680}d='u'/>",
            "<!-- <a --><a xmlns:c='u'/>",
            "<?xml version=\"?>\"?><a xmlns:c='u'/>",
            "<a><![CDATA[<!--]]><b xmlns='u'/></a>",
        ] {
            assert_eq!(scan(text).unwrap().namespaces, 1, "{text}");
        }
        for text in ["<!-- <a xmlns='u'/> -->", "<a>xmlns='u'</a>", "<a><![CDATA[<a xmlns='u'/>]]></a>"] {
            assert_eq!(scan(text).unwrap().namespaces, 0, "{text}");
        }
    }

    /// Counts in a parsed tree, except declarations, which the tree does not keep one by one.
    fn parsed(document: &Document) -> Counts {
        let elements: Vec<Node> = document.descendants().filter(Node::is_element).collect();
        let depth = |node: &Node| node.ancestors().filter(Node::is_element).count();
        Counts {
            depth: 0,
            deepest: elements.iter().map(depth).max().unwrap_or_default(),
            elements: elements.len(),
            namespaces: 0,
            most_attributes: 0,
        }
    }

    fn assert_same(xml: &str) {
        if let Ok(document) = Document::parse(xml) {
            let counts = Counts { namespaces: 0, most_attributes: 0, ..scan(xml).unwrap() };
            assert_eq!(counts, parsed(&document), "{xml}");
            let declared = xml.contains("xmlns").then(|| scan(xml).unwrap().namespaces);
            let known = document.descendants().map(|node| node.namespaces().count()).max();
            assert!(known <= Some(1 + declared.unwrap_or_default()), "{xml}");
        }
    }

    #[test]
    fn the_real_files_are_counted_as_they_are_parsed() {
        assert!(Document::parse(OVS).is_ok());
        assert_same(OVS);
    }

    proptest! {
        #[test]
        fn the_scan_sees_the_elements_that_the_parser_sees(
            at in 0..OVS.len(),
            length in 0..64usize,
            text in prop_oneof![
                "\\PC{0,16}",
                "(<!--|-->|<!\\[CDATA\\[|\\]\\]>|<\\?|\\?>|<a/?>|</a>|[\"'=> ]| xmlns(:a)?='u'|<b c='){0,4}",
            ],
        ) {
            let end = (at + length).min(OVS.len());
            if OVS.is_char_boundary(at) && OVS.is_char_boundary(end) {
                assert_same(&format!("{}{text}{}", &OVS[..at], &OVS[end..]));
            }
        }

        #[test]
        fn small_documents_are_counted_as_they_are_parsed(
            pieces in proptest::collection::vec(
                proptest::sample::select(vec![
                    "<a>", "</a>", "<a/>", "<b c='1'>", "</b>", "<!--", "-->", "<![CDATA[", "]]>", "<?p", "?>",
                    " ", ">", "'", "\"", "<a xmlns='u'>", "<a xmlns:p=\">\">", "<p:b xmlns:p='u'/>", "-", "]",
                ]),
                0..12,
            ),
        ) {
            assert_same(&format!("<r>{}</r>", pieces.concat()));
        }
    }
}
