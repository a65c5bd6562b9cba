//! One packet through parse, rewrite, hop limit, MSS, ICMP and fragmentation.

use std::net::IpAddr;

use warren::packet::checksum::{Verdict, check_transport, verify_ipv4_header};
use warren::packet::icmp::{self, IcmpError, MAX_ANSWER};
use warren::packet::parse::{parse_any_address, parse_quoted};
use warren::packet::rewrite::{self, ChecksumState, Rewrite};
use warren::packet::segment::fragment_v4;
use warren::packet::{Fragment, Headers, L4, parse};

use super::Reader;
use super::build::{Builder, address};

/// Whoever quotes us must find what we said.
const ERRORS: [IcmpError; 6] = [
    IcmpError::NetUnreachable,
    IcmpError::HostUnreachable,
    IcmpError::PortUnreachable,
    IcmpError::AdminProhibited,
    IcmpError::TooBig { mtu: 1280 },
    IcmpError::TimeExceeded,
];

pub(crate) fn run(data: &[u8]) {
    let mut input = Reader::new(data);
    let packet = Builder::new().packet(&mut input, 1500);
    let _ = parse_quoted(&packet);
    let Ok(headers) = parse_any_address(&packet) else { return };
    assert_offsets(&packet, &headers);
    translate(&packet, &headers, &mut input);
    route(&packet, &headers, input.short());
    if parse(&packet).is_ok() {
        answer(&packet, &headers, &mut input);
        cut(&packet, &headers, input.short());
    }
}

fn assert_offsets(packet: &[u8], headers: &Headers) {
    assert!(headers.total_len as usize <= packet.len());
    assert!(usize::from(headers.l4_offset) <= headers.total_len as usize);
    assert!(headers.payload_offset() <= headers.total_len as usize, "{headers:?}");
    assert_eq!(headers.transport(packet).len(), headers.l4_len());
    assert_eq!(headers.is_ipv4(), headers.source.is_ipv4());
    assert_eq!(headers.flow_hash(7), headers.flow_hash(7));
}

/// A rewrite changes what it says, keeps the checksum as right or wrong as it was, and an error changes nothing.
fn translate(packet: &[u8], headers: &Headers, input: &mut Reader<'_>) {
    let (ipv4, other) = (headers.is_ipv4(), input.byte() == 1);
    let side = |input: &mut Reader<'_>| -> Option<(IpAddr, Option<u16>)> {
        let what = input.byte() % 3;
        (what > 0).then(|| (address(input, ipv4 != other), (what > 1).then(|| input.short())))
    };
    let change = Rewrite { source: side(input), destination: side(input) };
    let before = check_transport(packet, headers);
    let (mut copy, mut changed) = (packet.to_vec(), *headers);
    match rewrite::rewrite(&mut copy, &mut changed, &change, ChecksumState::Complete) {
        Ok(()) => {
            assert_eq!(parse_any_address(&copy), Ok(changed), "the headers follow the rewrite");
            // A message of nothing but zeros with checksum 0 is wrong (0xffff is right); the two are one number
            // to any incremental update (RFC 1624 section 3).
            if headers.transport(packet).iter().any(|byte| *byte != 0) {
                assert_eq!(check_transport(&copy, &changed), before, "the checksum follows the rewrite");
            }
            assert_eq!(verify_ipv4_header(&copy), verify_ipv4_header(packet));
            assert_eq!(change.source.map(|(address, _)| address).unwrap_or(headers.source), changed.source);
        }
        Err(_) => assert_eq!(copy, packet, "a refused rewrite leaves the packet alone"),
    }
    if let Some(mut quoted) = icmp::quoted(packet, headers) {
        let mut copy = packet.to_vec();
        if rewrite::rewrite_quoted(&mut copy, headers, &mut quoted, &change).is_ok() {
            assert_eq!(check_transport(&copy, headers), before, "the checksum follows the quoted rewrite");
        }
    }
}

fn route(packet: &[u8], headers: &Headers, mss: u16) {
    let mut copy = packet.to_vec();
    if rewrite::decrement_hop_limit(&mut copy).is_ok() {
        let after = parse_any_address(&copy).expect("still a packet");
        assert_eq!(after.hop_limit, headers.hop_limit - 1);
        assert_eq!(verify_ipv4_header(&copy), verify_ipv4_header(packet));
    }
    let before = check_transport(packet, headers);
    let mut copy = packet.to_vec();
    rewrite::clamp_mss(&mut copy, headers, mss, ChecksumState::Complete);
    assert_eq!(check_transport(&copy, headers), before, "the checksum follows the MSS");
}

/// Our own errors and resets are packets that anyone can read, and never answers to answers.
fn answer(packet: &[u8], headers: &Headers, input: &mut Reader<'_>) {
    let mut room = [0; MAX_ANSWER];
    let from = address(input, headers.is_ipv4());
    for error in ERRORS {
        let Some(len) = icmp::build_error(&mut room, error, from, packet, headers) else { continue };
        let answer = &room[..len];
        let said = parse_any_address(answer).expect("our own error is a packet");
        assert_eq!((said.total_len as usize, said.destination), (len, headers.source));
        assert_eq!(check_transport(answer, &said), Verdict::Right);
        assert!(!icmp::may_answer(&said), "errors are not answered");
        if let (Some(quoted), true) = (icmp::quoted(answer, &said), headers.fragment == Fragment::None) {
            assert_eq!(quoted.headers.source, headers.source);
            assert_eq!(quoted.headers.ports(), headers.ports());
        }
    }
    if let Some(len) = icmp::build_reset(&mut room, packet, headers) {
        let said = parse_any_address(&room[..len]).expect("our own reset is a packet");
        assert_eq!(check_transport(&room[..len], &said), Verdict::Right);
        assert!(matches!(said.l4, L4::Tcp { flags, .. } if flags & 4 != 0));
        assert!(icmp::build_reset(&mut [0; MAX_ANSWER], &room[..len], &said).is_none());
    }
}

/// Fragments fit, can be read, and hold together what the packet held.
fn cut(packet: &[u8], headers: &Headers, mtu: u16) {
    let mut whole = packet.to_vec();
    let header_len = usize::from(packet[0] & 0x0f) * 4;
    let total = headers.total_len as usize;
    let mut payload = Vec::new();
    let mut count = 0;
    let result = fragment_v4(&mut whole, headers, mtu, |fragment| {
        assert!(fragment.len() <= usize::from(mtu) || total <= usize::from(mtu));
        payload.extend_from_slice(&fragment[header_len.min(fragment.len())..]);
        count += 1;
    });
    let Ok(fragments) = result else { return };
    assert_eq!(fragments, count);
    if headers.is_ipv4() {
        assert_eq!(payload, &packet[header_len..total]);
    }
}
