//! Processing of a request target by WSGI and Python's posixpath, before Nova sees it.

/// Returns the path of a request target without its query, percent-decoded. Invalid UTF-8 becomes
/// U+FFFD, which does not occur in the name of a document.
pub(super) fn path_info(target: &str) -> String {
    let path = target.split(['?', '#']).next().unwrap_or_default();
    let mut decoded = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let [byte, tail @ ..] = rest {
        rest = tail;
        let escaped = match (byte, tail) {
            (b'%', [high, low, after @ ..]) => hex(*high).zip(hex(*low)).map(|digits| (digits, after)),
            _ => None,
        };
        decoded.push(match escaped {
            Some(((high, low), after)) => {
                rest = after;
                high << 4 | low
            }
            None => *byte,
        });
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| value.try_into().ok())
}

/// Applies `posixpath.normpath` to an absolute path and splits it at its slashes. As in POSIX,
/// exactly two leading slashes stay two, so such a path begins with an empty name.
pub(super) fn normalised(path: &str) -> Vec<&str> {
    let two_slashes = path.starts_with("//") && !path.starts_with("///");
    let mut names = Vec::new();
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." => {
                names.pop();
            }
            name => names.push(name),
        }
    }
    if two_slashes {
        names.insert(0, "");
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_decoded_once_and_loses_its_query() {
        assert_eq!(path_info("/openstack/%6catest%2Fx?a=%20"), "/openstack/latest/x");
        assert_eq!(path_info("/%2541%zz%"), "/%41%zz%");
    }

    #[test]
    fn paths_are_normalised_as_by_posixpath() {
        assert_eq!(normalised("/a//b/./c/../d/"), ["a", "b", "d"]);
        assert_eq!(normalised("/../.."), [""; 0]);
        assert_eq!(normalised("//a"), ["", "a"]);
        assert_eq!(normalised("///a"), ["a"]);
    }
}
