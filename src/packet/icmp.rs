//! What a router says when it lets go of a packet: ICMP errors and TCP resets, built into the
//! caller's buffer, and how often it may. And what it finds quoted in the errors of others.

use std::hash::Hasher as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use etherparse::{
    Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, IpDscp, IpNumber, Ipv4Header, Ipv6Header, TcpHeader,
    icmpv4, icmpv6,
};
use siphasher::sip::SipHasher13;

use super::parse::parse_quoted;
use super::{Fragment, Headers, L4};

/// Why the sender is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IcmpError {
    /// There is no route.
    NetUnreachable,
    /// There is a route, but nobody there.
    HostUnreachable,
    /// Nobody listens (a Service without endpoints, over UDP or SCTP).
    PortUnreachable,
    /// Policy forbids it.
    AdminProhibited,
    /// The packet does not fit: fragmentation needed (IPv4), packet too big (IPv6).
    TooBig {
        /// What fits.
        mtu: u16,
    },
    /// The hop limit ran out.
    TimeExceeded,
}

/// The largest answer that [`build_error`] or [`build_reset`] writes.
pub const MAX_ANSWER: usize = MAX_V6;

/// Writes an ICMP error about `packet` from `source` to its sender into `out`; returns its length.
///
/// `None` where no error may be sent ([`may_answer`]), where `source` is of the other family, or
/// where `out` is too small. Quote the packet as it came, before its hop limit is decremented.
pub fn build_error(
    out: &mut [u8],
    error: IcmpError,
    source: IpAddr,
    packet: &[u8],
    headers: &Headers,
) -> Option<usize> {
    if !may_answer(headers) {
        return None;
    }
    let packet = packet.get(..headers.total_len as usize)?;
    match (source, headers.source) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let quote = &packet[..packet.len().min(MAX_V4 - Ipv4Header::MIN_LEN - ICMP_LEN)];
            let header = Icmpv4Header::with_checksum(error.v4(), quote).to_bytes();
            let at = write_v4(out, source, destination, IpNumber::ICMP, ICMP_LEN + quote.len())?;
            write_parts(out, at, &header, quote)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let quote = &packet[..packet.len().min(MAX_V6 - Ipv6Header::LEN - ICMP_LEN)];
            let (from, to) = (source.octets(), destination.octets());
            let header = Icmpv6Header::with_checksum(error.v6(), from, to, quote).ok()?.to_bytes();
            let at = write_v6(out, source, destination, IpNumber::IPV6_ICMP, ICMP_LEN + quote.len())?;
            write_parts(out, at, &header, quote)
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => None,
    }
}

/// Writes the TCP reset that a closed port answers with (RFC 9293 section 3.10.7.1), from the
/// packet's destination to its source; returns its length. `None` for what is not TCP, is a reset
/// itself, a fragment, or not between two hosts.
pub fn build_reset(out: &mut [u8], packet: &[u8], headers: &Headers) -> Option<usize> {
    const FIN: u8 = 0x01;
    const SYN: u8 = 0x02;
    const RST: u8 = 0x04;
    const ACK: u8 = 0x10;
    let L4::Tcp { source, destination, flags, .. } = headers.l4 else { return None };
    if flags & RST != 0 || headers.fragment != Fragment::None || !may_answer(headers) {
        return None;
    }
    let tcp = headers.transport(packet).first_chunk::<20>()?;
    let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
    let acknowledged = u32::from_be_bytes([tcp[8], tcp[9], tcp[10], tcp[11]]);
    let mut reset = TcpHeader::new(destination, source, 0, 0);
    reset.rst = true;
    if flags & ACK != 0 {
        reset.sequence_number = acknowledged;
    } else {
        let data = (headers.total_len as usize).saturating_sub(headers.payload_offset()) as u32;
        let len = data + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        reset.ack = true;
        reset.acknowledgment_number = sequence.wrapping_add(len);
    }
    match (headers.destination, headers.source) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            reset.checksum = reset.calc_checksum_ipv4_raw(from.octets(), to.octets(), &[]).ok()?;
            let at = write_v4(out, from, to, IpNumber::TCP, reset.header_len())?;
            write_parts(out, at, &reset.to_bytes(), &[])
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            reset.checksum = reset.calc_checksum_ipv6_raw(from.octets(), to.octets(), &[]).ok()?;
            let at = write_v6(out, from, to, IpNumber::TCP, reset.header_len())?;
            write_parts(out, at, &reset.to_bytes(), &[])
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => None,
    }
}

/// Whether an error may be sent about a packet (RFC 1122 section 3.2.2, RFC 1812 section 4.3.2.7,
/// RFC 4443 section 2.4 e): not about an error, not about a later fragment, only if it came from
/// one host and was meant for one host.
pub fn may_answer(headers: &Headers) -> bool {
    let about_an_error = match headers.l4 {
        // Linux too takes an unknown type for an error (net/ipv4/icmp.c, __icmp_send).
        L4::Icmp { kind, .. } if headers.is_ipv4() => !matches!(kind, 0 | 8..=10 | 13..=18),
        L4::Icmp { kind, .. } => kind < 128 || kind == REDIRECT_V6,
        L4::Tcp { .. } | L4::Udp { .. } | L4::Sctp { .. } | L4::Other | L4::None => false,
    };
    if about_an_error || matches!(headers.fragment, Fragment::Later { .. }) {
        return false;
    }
    is_one_host(headers.source) && is_one_host(headers.destination)
}

/// The packet that an ICMP error quotes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quoted {
    /// Where it starts in the error.
    pub start: u16,
    /// Its headers; offsets count from `start`. See [`parse_quoted`] for what a cut leaves out.
    pub headers: Headers,
}

/// Finds the packet quoted in an ICMP error; `None` for anything else, and for a quote too short to
/// name its flow.
pub fn quoted(packet: &[u8], headers: &Headers) -> Option<Quoted> {
    let L4::Icmp { kind, .. } = headers.l4 else { return None };
    // Unreachable, source quench, redirect, time exceeded, parameter problem (RFC 792), and their
    // successors (RFC 4443 section 2.1; its errors below 1 and above 4 are not assigned).
    let quotes = if headers.is_ipv4() { matches!(kind, 3 | 4 | 5 | 11 | 12) } else { matches!(kind, 1..=4) };
    if !quotes || headers.fragment != Fragment::None {
        return None;
    }
    let start = usize::from(headers.l4_offset) + ICMP_LEN;
    let inner = parse_quoted(packet.get(start..headers.total_len as usize)?)?;
    (inner.is_ipv4() == headers.is_ipv4()).then_some(Quoted { start: start as u16, headers: inner })
}

/// How many ICMP errors may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcmpRates {
    /// Time between two errors, all receivers together.
    pub interval: Duration,
    /// Errors that may go at once.
    pub burst: u32,
    /// Time between two errors to one receiver.
    pub receiver_interval: Duration,
    /// Errors that may go to one receiver at once.
    pub receiver_burst: u32,
}

impl Default for IcmpRates {
    /// Linux's long-standing ones: `icmp_msgs_per_sec`, `icmp_msgs_burst` and `icmp_ratelimit`
    /// (net/ipv4/icmp.c), and XRLIM_BURST_FACTOR.
    fn default() -> Self {
        IcmpRates {
            interval: Duration::from_millis(1),
            burst: 50,
            receiver_interval: Duration::from_secs(1),
            receiver_burst: 6,
        }
    }
}

/// Decides whether an ICMP error may leave now: a bucket for all receivers together and one for
/// each, of fixed size however many receivers there are.
///
/// "Too big" has buckets apart, one for each path and not only for each receiver: a flood of
/// packets to closed ports must not silence path MTU discovery.
#[derive(Debug)]
pub struct IcmpLimiter {
    rates: IcmpRates,
    seed: u64,
    start: Instant,
    all: [Bucket; 2],
    receivers: Box<[Bucket; RECEIVERS]>,
}

impl IcmpLimiter {
    /// Starts with full buckets. `seed` keeps senders from choosing whose bucket they share.
    pub fn new(rates: IcmpRates, seed: u64, now: Instant) -> Self {
        let receivers = Box::new([Bucket::default(); RECEIVERS]);
        IcmpLimiter { rates, seed, start: now, all: [Bucket::default(); 2], receivers }
    }

    /// Whether this error about that packet may leave; if so, it counts.
    pub fn allow(&mut self, error: IcmpError, headers: &Headers, now: Instant) -> bool {
        let path = match error {
            IcmpError::TooBig { .. } => Some(headers.destination),
            IcmpError::NetUnreachable
            | IcmpError::HostUnreachable
            | IcmpError::PortUnreachable
            | IcmpError::AdminProhibited
            | IcmpError::TimeExceeded => None,
        };
        let mut hasher = SipHasher13::new_with_keys(self.seed, !self.seed);
        write_address(&mut hasher, headers.source);
        if let Some(destination) = path {
            write_address(&mut hasher, destination);
        }
        let now = now.saturating_duration_since(self.start).as_nanos() as u64;
        let all = &mut self.all[usize::from(path.is_some())];
        let receiver = &mut self.receivers[hasher.finish() as usize % RECEIVERS];
        let (rate, burst) = (self.rates.interval.as_nanos() as u64, self.rates.burst);
        let (receiver_rate, receiver_burst) =
            (self.rates.receiver_interval.as_nanos() as u64, self.rates.receiver_burst);
        if !all.holds(now, rate, burst) || !receiver.holds(now, receiver_rate, receiver_burst) {
            return false;
        }
        all.take(now, rate);
        receiver.take(now, receiver_rate);
        true
    }
}

impl IcmpError {
    fn v4(self) -> Icmpv4Type {
        use icmpv4::DestUnreachableHeader;
        let unreachable = match self {
            IcmpError::NetUnreachable => DestUnreachableHeader::Network,
            IcmpError::HostUnreachable => DestUnreachableHeader::Host,
            IcmpError::PortUnreachable => DestUnreachableHeader::Port,
            IcmpError::AdminProhibited => DestUnreachableHeader::FilterProhibited,
            IcmpError::TooBig { mtu } => DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: mtu },
            IcmpError::TimeExceeded => {
                return Icmpv4Type::TimeExceeded(icmpv4::TimeExceededCode::TtlExceededInTransit);
            }
        };
        Icmpv4Type::DestinationUnreachable(unreachable)
    }

    fn v6(self) -> Icmpv6Type {
        use icmpv6::DestUnreachableCode;
        let unreachable = match self {
            IcmpError::NetUnreachable => DestUnreachableCode::NoRoute,
            IcmpError::HostUnreachable => DestUnreachableCode::Address,
            IcmpError::PortUnreachable => DestUnreachableCode::Port,
            IcmpError::AdminProhibited => DestUnreachableCode::Prohibited,
            // RFC 8201 section 4: a host ignores less than IPv6's least MTU.
            IcmpError::TooBig { mtu } => return Icmpv6Type::PacketTooBig { mtu: u32::from(mtu).max(1280) },
            IcmpError::TimeExceeded => {
                return Icmpv6Type::TimeExceeded(icmpv6::TimeExceededCode::HopLimitExceeded);
            }
        };
        Icmpv6Type::DestinationUnreachable(unreachable)
    }
}

/// An error with its quote is at most this long (RFC 1812 section 4.3.2.3).
const MAX_V4: usize = 576;
/// And for IPv6, its least MTU (RFC 4443 section 2.4 c).
const MAX_V6: usize = 1280;
const ICMP_LEN: usize = 8;
/// ND redirect: counts as an error (RFC 4443 section 2.4 e.2).
const REDIRECT_V6: u8 = 137;
/// The hop limit of what starts here (RFC 1340, and the kernel's default).
const HOP_LIMIT: u8 = 64;
/// Buckets for single receivers; 8 KiB.
const RECEIVERS: usize = 1024;

/// A token bucket as one number (the generic cell rate algorithm): when it will be full again, in
/// nanoseconds since the limiter's start.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket(u64);

impl Bucket {
    fn holds(self, now: u64, interval: u64, burst: u32) -> bool {
        let room = interval.saturating_mul(u64::from(burst));
        self.0.saturating_sub(now).saturating_add(interval) <= room
    }

    fn take(&mut self, now: u64, interval: u64) {
        self.0 = self.0.max(now).saturating_add(interval);
    }
}

/// Whether an address names one host.
fn is_one_host(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => {
            // Class E with the broadcast address in it (RFC 1812 section 4.3.2.7).
            !(a.is_unspecified() || a.is_loopback() || a.is_multicast() || a.octets()[0] >= 240)
        }
        IpAddr::V6(a) => !(a.is_unspecified() || a.is_loopback() || a.is_multicast()),
    }
}

fn write_v4(
    out: &mut [u8],
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: IpNumber,
    payload: usize,
) -> Option<usize> {
    let payload = u16::try_from(payload).ok()?;
    let mut ip = Ipv4Header::new(payload, HOP_LIMIT, protocol, source.octets(), destination.octets()).ok()?;
    if protocol == IpNumber::ICMP {
        // RFC 1812 section 4.3.2.5: errors go with precedence 6.
        ip.dscp = IpDscp::CS6;
    }
    ip.header_checksum = ip.calc_header_checksum();
    out.get_mut(..Ipv4Header::MIN_LEN)?.copy_from_slice(&ip.to_bytes());
    Some(Ipv4Header::MIN_LEN)
}

fn write_v6(
    out: &mut [u8],
    source: Ipv6Addr,
    destination: Ipv6Addr,
    protocol: IpNumber,
    payload: usize,
) -> Option<usize> {
    let ip = Ipv6Header {
        payload_length: u16::try_from(payload).ok()?,
        next_header: protocol,
        hop_limit: HOP_LIMIT,
        source: source.octets(),
        destination: destination.octets(),
        ..Ipv6Header::default()
    };
    out.get_mut(..Ipv6Header::LEN)?.copy_from_slice(&ip.to_bytes());
    Some(Ipv6Header::LEN)
}

/// Writes two parts one after the other; returns where they end.
fn write_parts(out: &mut [u8], at: usize, first: &[u8], second: &[u8]) -> Option<usize> {
    let middle = at + first.len();
    let end = middle + second.len();
    out.get_mut(at..middle)?.copy_from_slice(first);
    out.get_mut(middle..end)?.copy_from_slice(second);
    Some(end)
}

fn write_address(hasher: &mut SipHasher13, address: IpAddr) {
    match address {
        IpAddr::V4(a) => hasher.write(&a.octets()),
        IpAddr::V6(a) => hasher.write(&a.octets()),
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    use super::*;
    use crate::packet::checksum::{verify_ipv4_header, verify_transport};
    use crate::packet::parse;
    use crate::packet::testing::{Kind, Piece, Sample, icmp_error, samples, tcp_kinds};

    const ERRORS: [IcmpError; 6] = [
        IcmpError::NetUnreachable,
        IcmpError::HostUnreachable,
        IcmpError::PortUnreachable,
        IcmpError::AdminProhibited,
        IcmpError::TooBig { mtu: 1412 },
        IcmpError::TimeExceeded,
    ];

    fn udp(source: &str, destination: &str, payload: usize) -> Sample {
        Sample {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            ports: (4000, 53),
            kind: Kind::Udp,
            extensions: false,
            hop_limit: 1,
            payload: vec![7; payload],
        }
    }

    #[test]
    fn types_and_codes() {
        let v4 = [(3, 0), (3, 1), (3, 3), (3, 13), (3, 4), (11, 0)];
        let v6 = [(1, 0), (1, 3), (1, 4), (1, 1), (2, 0), (3, 0)];
        for (sample, expected) in
            [(udp("10.0.0.1", "10.0.0.2", 900), v4), (udp("fd00::1", "fd00::2", 1300), v6)]
        {
            let packet = sample.whole();
            let headers = parse(&packet).unwrap();
            for (error, expected) in ERRORS.into_iter().zip(expected) {
                let mut out = [0; MAX_ANSWER];
                let len = build_error(&mut out, error, sample.destination, &packet, &headers).unwrap();
                assert_eq!(len, if sample.is_ipv4() { 576 } else { 1280 }, "as much as may be quoted");
                let answer = parse(&out[..len]).unwrap();
                let L4::Icmp { kind, code, .. } = answer.l4 else { panic!("not ICMP") };
                assert_eq!((kind, code), expected, "{error:?}");
                let mtu = &out[answer.payload_offset() - 4..answer.payload_offset()];
                let too_big = matches!(error, IcmpError::TooBig { .. });
                assert_eq!(mtu, if too_big { 1412u32 } else { 0 }.to_be_bytes());
            }
        }
    }

    #[test]
    fn a_small_buffer_is_left_alone() {
        let packet = udp("10.0.0.1", "10.0.0.2", 10).whole();
        let headers = parse(&packet).unwrap();
        let source = headers.destination;
        let full = build_error(&mut [0; 600], IcmpError::TimeExceeded, source, &packet, &headers);
        assert_eq!(full, Some(28 + packet.len()));
        for len in 0..28 + packet.len() {
            let mut out = vec![0; len];
            assert_eq!(build_error(&mut out, IcmpError::TimeExceeded, source, &packet, &headers), None);
        }
        let other = "fd00::1".parse().unwrap();
        assert_eq!(build_error(&mut [0; 600], IcmpError::TimeExceeded, other, &packet, &headers), None);
    }

    #[test]
    fn about_what_nothing_may_be_said() {
        let may = |packet: &[u8]| may_answer(&parse(packet).unwrap());
        assert!(may(&udp("10.0.0.1", "10.0.0.2", 0).whole()));
        for destination in ["224.0.0.251", "255.255.255.255", "240.0.0.1"] {
            assert!(!may(&udp("10.0.0.1", destination, 0).whole()), "{destination}");
        }
        assert!(!may(&udp("241.0.0.1", "10.0.0.2", 0).whole()));
        assert!(!may(&udp("fd00::1", "ff02::fb", 0).whole()));
        for (a, b) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
            let sample = udp(a, b, 64);
            assert!(!may(&icmp_error(sample.source, sample.destination, &sample.whole())));
            assert!(may(&Sample { kind: Kind::EchoRequest, ..sample.clone() }.whole()));
            assert!(may(&sample.fragment(Piece { offset: 0, len: 16, more: true, id: 1 })));
            assert!(!may(&sample.fragment(Piece { offset: 16, len: 16, more: true, id: 1 })));
        }
    }

    #[test]
    fn limits_each_receiver_and_all_together() {
        #[allow(clippy::disallowed_methods)] // any instant does; only differences count
        let start = Instant::now();
        let mut limiter = IcmpLimiter::new(IcmpRates::default(), 1, start);
        let about = |source: [u8; 4], destination: [u8; 4]| {
            let mut headers = parse(&udp("10.0.0.1", "10.0.0.2", 0).whole()).unwrap();
            (headers.source, headers.destination) = (source.into(), destination.into());
            headers
        };
        let (refused, too_big) = (IcmpError::PortUnreachable, IcmpError::TooBig { mtu: 1400 });
        let one = about([10, 0, 0, 1], [10, 0, 0, 2]);
        let count = |limiter: &mut IcmpLimiter, error, headers: &Headers, now, times: usize| {
            (0..times).filter(|_| limiter.allow(error, headers, now)).count()
        };
        assert_eq!(count(&mut limiter, refused, &one, start, 20), 6);
        assert_eq!(count(&mut limiter, too_big, &one, start, 20), 6, "apart from the others");
        let path = about([10, 0, 0, 1], [10, 0, 0, 3]);
        assert_eq!(count(&mut limiter, refused, &path, start, 20), 0, "the same receiver");
        assert_eq!(count(&mut limiter, too_big, &path, start, 20), 6, "another path");
        let second = start + Duration::from_secs(1);
        assert_eq!(count(&mut limiter, refused, &one, second, 20), 1);
        let later = start + Duration::from_secs(60);
        let crowd = (0..250).filter(|i| limiter.allow(refused, &about([10, 1, 0, *i], [10, 0, 0, 2]), later));
        assert_eq!(crowd.count(), 50, "all together");
        assert!(!limiter.allow(refused, &about([10, 2, 0, 1], [10, 0, 0, 2]), later));
        let moment = later + Duration::from_millis(2);
        assert!(limiter.allow(refused, &about([10, 2, 0, 1], [10, 0, 0, 2]), moment));
        // A clock that steps back neither panics nor locks anyone out for long.
        let before = limiter.allow(refused, &about([10, 3, 0, 1], [10, 0, 0, 2]), start);
        assert!(!before);
    }

    proptest! {
        #[test]
        fn errors_are_right_and_quote_what_they_are_about(sample in samples(), which in 0..ERRORS.len()) {
            let packet = sample.whole();
            let headers = parse(&packet).unwrap();
            let mut out = [0; MAX_ANSWER];
            let len =
                build_error(&mut out, ERRORS[which], sample.destination, &packet, &headers).unwrap();
            let out = &out[..len];
            let answer = parse(out).unwrap();
            prop_assert_eq!((answer.source, answer.destination), (sample.destination, sample.source));
            prop_assert!(verify_transport(out, &answer));
            prop_assert!(!sample.is_ipv4() || verify_ipv4_header(out));
            prop_assert!(!may_answer(&answer), "an error about an error");
            let quote = quoted(out, &answer).unwrap();
            prop_assert!(out[usize::from(quote.start)..] == packet[..len - usize::from(quote.start)]);
            prop_assert_eq!(quote.headers, headers);
        }

        #[test]
        fn resets_are_right((sample, kind) in (samples(), tcp_kinds())) {
            let sample = Sample { kind, ..sample };
            let Kind::Tcp { syn, ack, fin, .. } = kind else { panic!("not TCP") };
            let packet = sample.whole();
            let headers = parse(&packet).unwrap();
            let mut out = [0; MAX_ANSWER];
            let len = build_reset(&mut out, &packet, &headers).unwrap();
            let answer = parse(&out[..len]).unwrap();
            prop_assert_eq!((answer.source, answer.destination), (sample.destination, sample.source));
            prop_assert!(verify_transport(&out[..len], &answer));
            prop_assert_eq!(build_reset(&mut [0; MAX_ANSWER], &out[..len], &answer), None);
            let sliced = SlicedPacket::from_ip(&out[..len]).unwrap();
            if let Some(NetSlice::Ipv4(ip)) = &sliced.net {
                prop_assert_eq!(ip.header().header_checksum(), ip.header().to_header().calc_header_checksum());
            }
            let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("not TCP") };
            prop_assert!(tcp.rst() && !tcp.syn() && !tcp.fin());
            prop_assert_eq!((tcp.source_port(), tcp.destination_port()), (sample.ports.1, sample.ports.0));
            if ack {
                prop_assert_eq!((tcp.sequence_number(), tcp.ack()), (77, false));
            } else {
                let len = sample.payload.len() as u32 + u32::from(syn) + u32::from(fin);
                prop_assert_eq!((tcp.sequence_number(), tcp.ack()), (0, true));
                prop_assert_eq!(tcp.acknowledgment_number(), 0x8000_0001 + len);
            }
        }
    }
}
