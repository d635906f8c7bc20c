//! Hexadecimal, in which guests encode their output, so that nothing in it can end a line.

use std::fmt::Write as _;

pub fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Returns `None` if `text` does not consist of pairs of hexadecimal digits.
pub fn decode(text: &str) -> Option<Vec<u8>> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    if !rest.is_empty() {
        return None;
    }
    pairs.iter().map(|&[high, low]| Some(digit(high)? << 4 | digit(low)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoding_reverses_encoding() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(encode(&[0, 0xa5]), "00a5");
        assert_eq!(decode(&encode(&bytes)), Some(bytes));
    }

    #[test]
    fn only_pairs_of_digits_decode() {
        assert_eq!(decode(""), Some(vec![]));
        assert_eq!(decode("00fF7a"), Some(vec![0, 255, 0x7a]));
        for bad in ["0", "0g", "+1", "\u{e9}"] {
            assert_eq!(decode(bad), None, "{bad:?}");
        }
    }
}
