//! What tells one flow from another, and its form in the table: five words, and a hash that is the
//! same for both directions.

use std::hash::Hasher as _;
use std::net::{IpAddr, Ipv6Addr};

use siphasher::sip::SipHasher13;

use crate::packet::parse::Echo;
use crate::packet::{Headers, L4};

/// Addresses, ports and protocol of one direction of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// Source address.
    pub source: IpAddr,
    /// Destination address, of the same family.
    pub destination: IpAddr,
    /// Source port; for an ICMP echo request its identifier; 0 without ports.
    pub source_port: u16,
    /// Destination port; for an ICMP echo reply its identifier; 0 without ports.
    pub destination_port: u16,
    /// Protocol number (TCP 6, UDP 17, ...).
    pub protocol: u8,
}

impl FlowKey {
    /// The key of a packet; `None` where the packet alone does not say which flow it belongs to: a later
    /// fragment, or an ICMP message about another packet (look up the quoted one).
    pub fn of(headers: &Headers) -> Option<FlowKey> {
        let (source_port, destination_port) = match headers.l4 {
            L4::Tcp { source, destination, .. }
            | L4::Udp { source, destination }
            | L4::Sctp { source, destination } => (source, destination),
            // The identifier stands on the side of the asker, so that both hosts may ping each other with
            // the same one.
            L4::Icmp { kind, id, .. } => match Echo::of(headers.protocol, kind)? {
                Echo::Request => (id, 0),
                Echo::Reply => (0, id),
            },
            L4::Other => (0, 0),
            L4::None => return None,
        };
        let Headers { source, destination, protocol, .. } = *headers;
        Some(FlowKey { source, destination, source_port, destination_port, protocol })
    }

    /// The key of a packet that goes the other way.
    pub fn reversed(&self) -> FlowKey {
        FlowKey {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            protocol: self.protocol,
        }
    }
}

/// The seed of the table's hash: from the outside nobody can aim flows at one bucket.
#[derive(Clone, Copy)]
pub struct Seed(pub u64, pub u64);

/// A key as the table stores it. IPv4 addresses are mapped (::ffff:a.b.c.d); `tail` is, from the top,
/// source port 16, destination port 16, protocol 8, family 8 (4 or 6) and 16 bits that are not part of the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PackedKey {
    pub(super) source: [u64; 2],
    pub(super) destination: [u64; 2],
    pub(super) tail: u64,
}

/// The bits of a tail that belong to the key.
pub(super) const TAIL_MASK: u64 = !0xffff;

impl PackedKey {
    pub(super) fn new(key: &FlowKey) -> PackedKey {
        let family = if key.source.is_ipv4() && key.destination.is_ipv4() { 4 } else { 6 };
        PackedKey {
            source: pack_address(key.source),
            destination: pack_address(key.destination),
            tail: u64::from(key.source_port) << 48
                | u64::from(key.destination_port) << 32
                | u64::from(key.protocol) << 24
                | family << 16,
        }
    }

    /// `None` for words that no key has: a free entry, or damage.
    pub(super) fn unpack(&self) -> Option<FlowKey> {
        let family = family(self.tail);
        Some(FlowKey {
            source: unpack_address(self.source, family)?,
            destination: unpack_address(self.destination, family)?,
            source_port: (self.tail >> 48) as u16,
            destination_port: (self.tail >> 32) as u16,
            protocol: protocol(self.tail),
        })
    }

    /// Equality whose first comparison, the ports, fails almost always when the keys differ.
    pub(super) fn same(&self, other: &PackedKey) -> bool {
        self.tail == other.tail && self.source == other.source && self.destination == other.destination
    }

    pub(super) fn reversed(&self) -> PackedKey {
        let ports = self.tail >> 48 << 32 | (self.tail >> 32 & 0xffff) << 48;
        PackedKey {
            source: self.destination,
            destination: self.source,
            tail: ports | self.tail & 0xffff_0000,
        }
    }

    /// The same for a key and its reverse.
    pub(super) fn hash(&self, seed: Seed) -> u64 {
        let here = (self.source, self.tail >> 48);
        let there = (self.destination, self.tail >> 32 & 0xffff);
        let (low, high) = if here <= there { (here, there) } else { (there, here) };
        let mut hasher = SipHasher13::new_with_keys(seed.0, seed.1);
        if family(self.tail) == 6 {
            hasher.write_u64(low.0[0]);
            hasher.write_u64(high.0[0]);
        }
        hasher.write_u64(low.0[1]);
        hasher.write_u64(high.0[1]);
        hasher.write_u64(low.1 << 48 | high.1 << 32 | self.tail & 0xffff_0000);
        hasher.finish()
    }
}

/// The protocol number in a tail.
pub(super) const fn protocol(tail: u64) -> u8 {
    (tail >> 24) as u8
}

/// The family in a tail; 0 in a free entry.
pub(super) const fn family(tail: u64) -> u8 {
    (tail >> 16) as u8
}

fn pack_address(address: IpAddr) -> [u64; 2] {
    let bits = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    [(bits >> 64) as u64, bits as u64]
}

fn unpack_address(words: [u64; 2], family: u8) -> Option<IpAddr> {
    let address = Ipv6Addr::from_bits(u128::from(words[0]) << 64 | u128::from(words[1]));
    match family {
        4 => address.to_ipv4_mapped().map(IpAddr::V4),
        6 => Some(IpAddr::V6(address)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::Fragment;

    fn key() -> impl Strategy<Value = FlowKey> {
        let addresses = prop_oneof![
            any::<([u8; 4], [u8; 4])>().prop_map(|(a, b)| (IpAddr::from(a), IpAddr::from(b))),
            any::<([u8; 16], [u8; 16])>().prop_map(|(a, b)| (IpAddr::from(a), IpAddr::from(b))),
        ];
        (addresses, any::<u16>(), any::<u16>(), any::<u8>()).prop_map(
            |((source, destination), source_port, destination_port, protocol)| FlowKey {
                source,
                destination,
                source_port,
                destination_port,
                protocol,
            },
        )
    }

    proptest! {
        #[test]
        fn packing_loses_nothing(key in key()) {
            let packed = PackedKey::new(&key);
            prop_assert_eq!(packed.unpack(), Some(key));
            prop_assert_eq!(packed.reversed().unpack(), Some(key.reversed()));
            prop_assert_eq!(packed.reversed().reversed(), packed);
        }

        #[test]
        fn both_directions_hash_alike(key in key(), a: u64, b: u64) {
            let packed = PackedKey::new(&key);
            prop_assert_eq!(packed.hash(Seed(a, b)), packed.reversed().hash(Seed(a, b)));
            prop_assert_ne!(packed.hash(Seed(a, b)), packed.hash(Seed(a ^ 1, b)));
        }
    }

    #[test]
    fn icmp_echo_has_a_side_and_other_icmp_no_key() {
        let mut headers = Headers {
            source: [10, 0, 0, 1].into(),
            destination: [10, 0, 0, 2].into(),
            l4_offset: 20,
            total_len: 84,
            protocol: 1,
            hop_limit: 64,
            traffic_class: 0,
            dont_fragment: false,
            fragment: Fragment::None,
            l4: L4::Icmp { kind: 8, code: 0, id: 7 },
        };
        let request = FlowKey::of(&headers).unwrap();
        assert_eq!((request.source_port, request.destination_port), (7, 0));
        std::mem::swap(&mut headers.source, &mut headers.destination);
        headers.l4 = L4::Icmp { kind: 0, code: 0, id: 7 };
        assert_eq!(FlowKey::of(&headers), Some(request.reversed()));
        headers.l4 = L4::Icmp { kind: 8, code: 0, id: 7 };
        assert_ne!(FlowKey::of(&headers), Some(request.reversed()));
        headers.l4 = L4::Icmp { kind: 3, code: 4, id: 0 };
        assert_eq!(FlowKey::of(&headers), None);
    }
}
