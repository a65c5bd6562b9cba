//! The one place that looks into raw IP packets: [`parse`] checks once, [`Headers`] is trusted after.

use std::net::IpAddr;

use super::DropReason;

/// Where a packet stands in a fragmented datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fragment {
    /// Whole.
    None,
    /// The first fragment: it carries the transport header.
    First {
        /// Identification, to find the others.
        id: u32,
    },
    /// A later one: no transport header in it.
    Later {
        /// Identification, to find the first.
        id: u32,
    },
}

/// What the packet carries above IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum L4 {
    /// TCP with a checked header length.
    Tcp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
        /// The flags byte (CWR ECE URG ACK PSH RST SYN FIN).
        flags: u8,
        /// Header length with options, 20 to 60.
        header_len: u8,
    },
    /// UDP.
    Udp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
    },
    /// SCTP.
    Sctp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
    },
    /// ICMP or ICMPv6.
    Icmp {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
        /// The identifier of an echo; 0 otherwise.
        id: u16,
    },
    /// A protocol we only route.
    Other,
    /// A later fragment: no transport header here.
    None,
}

/// What [`parse`] found; offsets are checked against the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Offset of the transport header: IP header with options or extension headers.
    pub l4_offset: u16,
    /// Length of the packet as its IP header says; the buffer is at least this long. For a TUN
    /// super-packet this is the super-packet's length (up to 65,535 + 40).
    pub total_len: u32,
    /// The last protocol number (TCP 6, UDP 17, ...).
    pub protocol: u8,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// Traffic class or TOS byte.
    pub traffic_class: u8,
    /// IPv4's don't-fragment flag; always true for IPv6.
    pub dont_fragment: bool,
    /// Fragmentation.
    pub fragment: Fragment,
    /// Transport header.
    pub l4: L4,
}

/// Checks a packet and says what it is.
pub fn parse(_packet: &[u8]) -> Result<Headers, DropReason> {
    Err(DropReason::Truncated)
}
