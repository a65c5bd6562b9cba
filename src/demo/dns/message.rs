//! A question's bytes to its answer's. Hostile input: whatever comes, it costs one small answer at most.

use std::net::IpAddr;

use simple_dns::rdata::{OPT, RData, SOA};
use simple_dns::{
    CLASS, Name, OPCODE, Packet, PacketFlag, QCLASS, QTYPE, Question, RCODE, ResourceRecord, TYPE,
    header_buffer,
};

use super::CLUSTER_DOMAIN;
use super::zone::Found;

/// Largest answer by UDP for who says nothing else (RFC 1035 section 4.2.1).
const PLAIN_UDP: usize = 512;
/// And what we ever send by UDP: it fits every path that IPv6 allows (DNS Flag Day 2020).
const LARGEST_UDP: usize = 1232;
/// More records beside a question are no question: EDNS, TSIG, and something new.
const MOST_ADDITIONAL: u16 = 8;
/// How long an answer may be kept, as CoreDNS has it in clusters.
const TTL_SECONDS: u32 = 5;

/// Over what a question came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    /// A datagram: a long answer does not fit.
    Udp,
    /// A connection: everything fits.
    Tcp,
}

/// The answer's bytes; none for what is no question at all.
pub(super) fn answer(
    question: &[u8],
    over: Over,
    look_up: impl FnOnce(&[String]) -> Found,
) -> Option<Vec<u8>> {
    // A server that answers answers never stops.
    if header_buffer::has_flags(question, PacketFlag::RESPONSE).ok()? {
        return None;
    }
    let id = header_buffer::id(question).ok()?;
    if header_buffer::opcode(question).ok()? != OPCODE::StandardQuery {
        return refusal(id, RCODE::NotImplemented);
    }
    // Looked at before anything is parsed: the counts decide how much memory that takes.
    let counts = [
        header_buffer::questions(question).ok()?,
        header_buffer::answers(question).ok()?,
        header_buffer::name_servers(question).ok()?,
    ];
    if counts != [1, 0, 0] || header_buffer::additional_records(question).ok()? > MOST_ADDITIONAL {
        return refusal(id, RCODE::FormatError);
    }
    let Ok(query) = Packet::parse(question) else { return refusal(id, RCODE::FormatError) };
    let [asked] = query.questions.as_slice() else { return refusal(id, RCODE::FormatError) };
    let mut reply = fill(&query, asked, look_up)?;
    let bytes = reply.build_bytes_vec_compressed().ok()?;
    let room =
        query.opt().map_or(PLAIN_UDP, |opt| usize::from(opt.udp_packet_size).clamp(PLAIN_UDP, LARGEST_UDP));
    if over == Over::Tcp || bytes.len() <= room {
        return Some(bytes);
    }
    // Without a record rather than with some: the client asks again by TCP.
    reply.answers.clear();
    reply.set_flags(PacketFlag::TRUNCATION);
    reply.build_bytes_vec_compressed().ok()
}

/// What a client of the server makes of an answer: whether the name exists, and its addresses.
pub(super) fn read(answer: &[u8], id: u16) -> Result<(bool, Vec<IpAddr>), String> {
    let packet = Packet::parse(answer).map_err(|e| format!("not a DNS message: {e}"))?;
    if packet.id() != id || !packet.has_flags(PacketFlag::RESPONSE) {
        return Err("an answer to something else".into());
    }
    if packet.has_flags(PacketFlag::TRUNCATION) {
        return Err("the answer is too long for UDP".into());
    }
    let addresses = packet.answers.iter().filter_map(|record| match &record.rdata {
        RData::A(a) => Some(IpAddr::V4(a.address.into())),
        RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.address.into())),
        _ => None,
    });
    match packet.rcode() {
        RCODE::NoError => Ok((true, addresses.collect())),
        RCODE::NameError => Ok((false, Vec::new())),
        other => Err(format!("the server says {other:?}")),
    }
}

/// A question for the addresses of a name.
pub(super) fn ask(id: u16, name: &str, v6: bool) -> Result<Vec<u8>, String> {
    let name = Name::new(name).map_err(|e| format!("{name:?} is no name: {e}"))?;
    let record = if v6 { TYPE::AAAA } else { TYPE::A };
    let mut packet = Packet::new_query(id);
    packet.set_flags(PacketFlag::RECURSION_DESIRED);
    packet.questions.push(Question::new(name, record.into(), CLASS::IN.into(), false));
    packet.build_bytes_vec_compressed().map_err(|e| e.to_string())
}

fn fill<'a>(
    query: &Packet<'a>,
    asked: &Question<'a>,
    look_up: impl FnOnce(&[String]) -> Found,
) -> Option<Packet<'a>> {
    let mut reply = Packet::new_reply(query.id());
    if query.has_flags(PacketFlag::RECURSION_DESIRED) {
        reply.set_flags(PacketFlag::RECURSION_DESIRED);
    }
    reply.questions.push(asked.clone());
    if let Some(opt) = query.opt() {
        // RFC 6891 section 6.1.3: version 0 is all we know.
        let udp_packet_size = u16::try_from(LARGEST_UDP).unwrap_or(u16::MAX);
        *reply.opt_mut() = Some(OPT { opt_codes: Vec::new(), udp_packet_size, version: 0 });
        if opt.version != 0 {
            *reply.rcode_mut() = RCODE::BADVERS;
            return Some(reply);
        }
    }
    if !matches!(asked.qclass, QCLASS::CLASS(CLASS::IN) | QCLASS::ANY) {
        *reply.rcode_mut() = RCODE::Refused;
        return Some(reply);
    }
    let addresses = match look_up(&labels(&asked.qname)) {
        Found::Elsewhere => {
            *reply.rcode_mut() = RCODE::Refused;
            return Some(reply);
        }
        Found::Nothing => {
            *reply.rcode_mut() = RCODE::NameError;
            Vec::new()
        }
        Found::Name(addresses) => addresses,
    };
    reply.set_flags(PacketFlag::AUTHORITATIVE_ANSWER);
    for address in addresses {
        let data = match (address, asked.qtype) {
            (IpAddr::V4(v4), QTYPE::TYPE(TYPE::A) | QTYPE::ANY) => RData::A(v4.into()),
            (IpAddr::V6(v6), QTYPE::TYPE(TYPE::AAAA) | QTYPE::ANY) => RData::AAAA(v6.into()),
            (IpAddr::V4(_) | IpAddr::V6(_), _) => continue,
        };
        reply.answers.push(ResourceRecord::new(asked.qname.clone(), CLASS::IN, TTL_SECONDS, data));
    }
    if reply.answers.is_empty() {
        // RFC 2308: how long "no" may be kept.
        reply.name_servers.push(start_of_authority()?);
    }
    Some(reply)
}

/// From the left, in small letters; a label that is no text is no Service's, and stays what it is not.
fn labels(name: &Name<'_>) -> Vec<String> {
    name.as_bytes().map(|label| String::from_utf8_lossy(label).to_ascii_lowercase()).collect()
}

fn start_of_authority() -> Option<ResourceRecord<'static>> {
    let soa = SOA {
        mname: Name::new("ns.dns.cluster.local").ok()?,
        rname: Name::new("hostmaster.cluster.local").ok()?,
        serial: 1,
        refresh: 7200,
        retry: 1800,
        expire: 86_400,
        minimum: TTL_SECONDS,
    };
    let zone = Name::new(CLUSTER_DOMAIN).ok()?;
    Some(ResourceRecord::new(zone, CLASS::IN, TTL_SECONDS, RData::SOA(soa)))
}

fn refusal(id: u16, code: RCODE) -> Option<Vec<u8>> {
    let mut reply = Packet::new_reply(id);
    *reply.rcode_mut() = code;
    reply.build_bytes_vec().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NAME: &str = "My-Service.my-namespace.svc.cluster.local";

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn found(count: u8) -> Found {
        let v4 = (1..=count).map(|n| IpAddr::from([10, 244, 1, n]));
        Found::Name(v4.chain([ip("fd00:10:96::14")]).collect())
    }

    #[test]
    fn a_name_has_the_addresses_of_the_family_that_is_asked_for() {
        for (v6, expected) in [(false, vec![ip("10.244.1.1")]), (true, vec![ip("fd00:10:96::14")])] {
            let bytes = ask(7, NAME, v6).expect("a question");
            let looked_up = |labels: &[String]| {
                assert_eq!(labels.join("."), NAME.to_lowercase());
                found(1)
            };
            let said = answer(&bytes, Over::Udp, looked_up).expect("an answer");
            assert_eq!(read(&said, 7), Ok((true, expected)));
            assert!(read(&said, 8).is_err(), "somebody else's");
            let packet = Packet::parse(&said).expect("a message");
            assert_eq!(packet.questions[0].qname.to_string(), NAME, "as it was spelt");
            assert!(packet.has_flags(PacketFlag::AUTHORITATIVE_ANSWER | PacketFlag::RECURSION_DESIRED));
        }
    }

    #[test]
    fn no_is_said_in_three_ways() {
        let bytes = ask(1, NAME, false).expect("a question");
        let empty = answer(&bytes, Over::Udp, |_| Found::Name(vec![ip("fd00::1")])).expect("an answer");
        assert_eq!(read(&empty, 1), Ok((true, vec![])), "the other family only");
        let nothing = answer(&bytes, Over::Udp, |_| Found::Nothing).expect("an answer");
        assert_eq!(read(&nothing, 1), Ok((false, vec![])));
        for said in [&empty, &nothing] {
            let soa = &Packet::parse(said).expect("a message").name_servers[0];
            assert_eq!(soa.name.to_string(), CLUSTER_DOMAIN);
        }
        let refused = answer(&bytes, Over::Udp, |_| Found::Elsewhere).expect("an answer");
        assert!(read(&refused, 1).is_err_and(|e| e.contains("Refused")));
    }

    #[test]
    fn what_does_not_fit_a_datagram_is_asked_again_by_tcp() {
        let mut bytes = ask(1, NAME, false).expect("a question");
        assert_eq!(
            read(&answer(&bytes, Over::Tcp, |_| found(60)).expect("all"), 1).expect("read").1.len(),
            60
        );
        let said = answer(&bytes, Over::Udp, |_| found(60)).expect("an answer");
        assert!(said.len() <= PLAIN_UDP && read(&said, 1).is_err_and(|e| e.contains("too long")));
        // With EDNS there is more room.
        let mut query = Packet::parse(&bytes).expect("a message").clone();
        *query.opt_mut() = Some(OPT { opt_codes: Vec::new(), udp_packet_size: 4096, version: 0 });
        bytes = query.build_bytes_vec().expect("bytes");
        let said = answer(&bytes, Over::Udp, |_| found(60)).expect("an answer");
        assert_eq!(read(&said, 1).expect("read").1.len(), 60);
        assert!(Packet::parse(&said).expect("a message").opt().is_some(), "EDNS is answered with EDNS");
    }

    #[test]
    fn what_is_no_plain_question_is_refused_or_ignored() {
        let bytes = ask(5, NAME, false).expect("a question");
        let nobody = |_: &[String]| -> Found { panic!("nothing to look up") };
        let code = |bytes: &[u8]| {
            let said = answer(bytes, Over::Udp, nobody).expect("an answer");
            Packet::parse(&said).expect("a message").rcode()
        };
        for (at, value, expected) in [
            (5, 2, RCODE::FormatError),
            (5, 0, RCODE::FormatError),
            (7, 1, RCODE::FormatError),
            (10, 0xff, RCODE::FormatError),
            (2, 0x10, RCODE::NotImplemented),
        ] {
            let mut odd = bytes.clone();
            odd[at] = value;
            assert_eq!(code(&odd), expected, "byte {at}");
        }
        assert_eq!(code(&bytes[..bytes.len() - 3]), RCODE::FormatError, "cut off");
        let mut reply = bytes.clone();
        reply[2] |= 0x80;
        assert_eq!(answer(&reply, Over::Udp, nobody), None);
        assert_eq!(answer(&bytes[..11], Over::Udp, nobody), None);
    }

    proptest! {
        #[test]
        fn whatever_comes_the_answer_is_a_message_or_none(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            keep in 0..12_usize,
        ) {
            // Half the way with a header that is right.
            let mut bytes = bytes;
            let right = ask(9, NAME, false).expect("a question");
            for (at, byte) in bytes.iter_mut().enumerate().take(12).skip(keep) {
                *byte = right[at];
            }
            if let Some(said) = answer(&bytes, Over::Udp, |_| found(1)) {
                prop_assert!(said.len() <= LARGEST_UDP);
                prop_assert!(Packet::parse(&said).is_ok());
            }
            let _ = read(&bytes, 9);
        }
    }
}
