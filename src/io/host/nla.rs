//! Netlink attributes that no library call writes for us (linux/netlink.h: length, type, value,
//! padded to four bytes).

/// NLA_F_NESTED.
const NESTED: u16 = 1 << 15;

/// One attribute.
pub(super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    // Our values are names, numbers and short rules; a longer one would be a bug of ours.
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// An attribute that holds others.
pub(super) fn nested(kind: u16, inner: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NESTED, &inner.concat())
}

/// A string attribute, with its zero byte.
pub(super) fn string(kind: u16, text: &str) -> Vec<u8> {
    let mut value = text.as_bytes().to_vec();
    value.push(0);
    attribute(kind, &value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_their_length_is_not() {
        assert_eq!(attribute(7, &[1, 2, 3]), [7, 0, 7, 0, 1, 2, 3, 0]);
        assert_eq!(string(1, "abc"), [8, 0, 1, 0, b'a', b'b', b'c', 0]);
        assert_eq!(nested(2, &[attribute(1, &[9])])[..4], [12, 0, 2, 0x80]);
    }
}
