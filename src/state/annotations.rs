//! `warren.dev/...` annotations on Nodes: what a node tells the others about itself. Hostile input.
//!
//! | annotation | value |
//! |---|---|
//! | `warren.dev/protocol` | `1` |
//! | `warren.dev/lanes` | `KEY:PORT,...`: each lane's WireGuard public key and UDP port, lane 0 first |
//! | `warren.dev/also-keys` | `KEY,...`: a second key of each lane, while its keys change: the next or the last one |
//! | `warren.dev/endpoints` | `IP:PORT,[IPV6]:PORT,...`: where lane 0 may be reached, best first |
//! | `warren.dev/location` | a word: nodes of one location may speak VXLAN to each other in `auto` mode |
//! | `warren.dev/encaps` | `wireguard`, `vxlan` or `wireguard,vxlan`: what the node sends and accepts |
//! | `warren.dev/vxlan-mac` | `02:00:00:aa:bb:cc`: inner MAC address of its VXLAN end |
//! | `warren.dev/keepalive` | seconds between keepalives with it, both ways |
//! | `warren.dev/services` | `on`: it takes packets of clients from outside that another node sends to its endpoints |
//!
//! For a WireGuard peer written by hand: `warren.dev/public-key` and `warren.dev/endpoint`.
//! A value that is wrong counts as not given; a protocol we do not speak makes all of them so.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::problem::{nearest, quote};
use crate::snapshot::{Encap, MAX_LANES, PeerLane, PublicKey};

/// What all our annotations start with.
pub const PREFIX: &str = "warren.dev/";
/// The protocol that this version speaks.
pub const PROTOCOL: &str = "1";
/// Port of a lane that names none: WireGuard's customary one.
pub const DEFAULT_PORT: u16 = 51820;
/// Longest value that is looked at: 64 lanes fit.
pub const MAX_VALUE: usize = 4096;
/// Most endpoints of one node.
pub const MAX_ENDPOINTS: usize = 16;

const PROTOCOL_NAME: &str = "warren.dev/protocol";
const LANES: &str = "warren.dev/lanes";
const ALSO_KEYS: &str = "warren.dev/also-keys";
const ENDPOINTS: &str = "warren.dev/endpoints";
const LOCATION: &str = "warren.dev/location";
const ENCAPS: &str = "warren.dev/encaps";
const VXLAN_MAC: &str = "warren.dev/vxlan-mac";
const KEEPALIVE: &str = "warren.dev/keepalive";
const SERVICES: &str = "warren.dev/services";
const PUBLIC_KEY: &str = "warren.dev/public-key";
const ENDPOINT: &str = "warren.dev/endpoint";
const KNOWN: [&str; 11] = [
    PROTOCOL_NAME,
    LANES,
    ALSO_KEYS,
    ENDPOINTS,
    LOCATION,
    ENCAPS,
    VXLAN_MAC,
    KEEPALIVE,
    SERVICES,
    PUBLIC_KEY,
    ENDPOINT,
];

/// The encapsulations that a node sends and accepts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Encaps {
    /// WireGuard.
    pub wireguard: bool,
    /// VXLAN.
    pub vxlan: bool,
}

impl Encaps {
    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        !self.wireguard && !self.vxlan
    }
}

impl fmt::Display for Encaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [(self.wireguard, Encap::WireGuard), (self.vxlan, Encap::Vxlan)];
        let names: Vec<&str> =
            names.into_iter().filter(|(on, _)| *on).map(|(_, encap)| encap.name()).collect();
        f.write_str(&names.join(","))
    }
}

/// What a node announces, checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Announcement {
    /// Its lanes, lane 0 first; empty when it has announced no key.
    pub lanes: Vec<PeerLane>,
    /// Whether a person described it, by one key of an ordinary WireGuard peer.
    pub ordinary: bool,
    /// A second key of each lane, while its keys change; empty otherwise.
    pub also: Vec<PublicKey>,
    /// Where lane 0 may be reached, best first.
    pub endpoints: Vec<SocketAddr>,
    /// Its location.
    pub location: Option<String>,
    /// What it speaks; empty when it does not say and nothing else tells.
    pub encaps: Encaps,
    /// Inner MAC address of its VXLAN end.
    pub vxlan_mac: Option<[u8; 6]>,
    /// Seconds between keepalives; 0 for none.
    pub keepalive: u16,
    /// Whether it does Services, and takes clients from outside that another node sends to its endpoints.
    pub services: bool,
}

/// Why one annotation does not count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnnotationProblem {
    /// Its name.
    pub annotation: String,
    /// Why.
    pub reason: String,
}

/// Reads a Node's annotations; those that are not ours are none of our business.
pub fn parse(annotations: &BTreeMap<String, String>) -> (Announcement, Vec<AnnotationProblem>) {
    let mut reader = Reader { annotations, problems: Vec::new() };
    let spoken = |text: &str| match text {
        PROTOCOL => Ok(()),
        other => Err(format!("protocol {} is not spoken here; this agent speaks {PROTOCOL}", quote(other))),
    };
    reader.value(PROTOCOL_NAME, spoken);
    if !reader.problems.is_empty() {
        return (Announcement::default(), reader.problems);
    }
    let mut announcement = Announcement {
        lanes: reader.value(LANES, lanes).unwrap_or_default(),
        ordinary: false,
        also: Vec::new(),
        endpoints: reader.value(ENDPOINTS, endpoints).unwrap_or_default(),
        location: reader.value(LOCATION, location),
        encaps: reader.value(ENCAPS, encaps).unwrap_or_default(),
        vxlan_mac: reader.value(VXLAN_MAC, mac),
        keepalive: reader.value(KEEPALIVE, keepalive).unwrap_or_default(),
        services: reader.value(SERVICES, switch).unwrap_or_default(),
    };
    let first = announcement.lanes.clone();
    announcement.also = reader.value(ALSO_KEYS, |text| also_keys(text, &first)).unwrap_or_default();
    reader.by_hand(&mut announcement);
    reader.mistyped();
    if announcement.encaps.is_empty() && !annotations.contains_key(ENCAPS) {
        announcement.encaps =
            Encaps { wireguard: !announcement.lanes.is_empty(), vxlan: announcement.vxlan_mac.is_some() };
    }
    (announcement, reader.problems)
}

/// The names of all annotations that [`render`] may give.
pub fn published() -> impl Iterator<Item = &'static str> {
    KNOWN.into_iter().filter(|name| ![PUBLIC_KEY, ENDPOINT].contains(name))
}

/// The annotations that say this; reading them back gives the same.
pub fn render(announcement: &Announcement) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    let mut put = |name: &str, value: String| {
        if !value.is_empty() {
            out.insert(name.to_owned(), value);
        }
    };
    put(PROTOCOL_NAME, PROTOCOL.to_owned());
    put(LANES, lanes_text(&announcement.lanes));
    put(ALSO_KEYS, announcement.also.iter().map(key_text).collect::<Vec<_>>().join(","));
    let endpoints: Vec<String> = announcement.endpoints.iter().map(SocketAddr::to_string).collect();
    put(ENDPOINTS, endpoints.join(","));
    put(LOCATION, announcement.location.clone().unwrap_or_default());
    put(ENCAPS, announcement.encaps.to_string());
    put(VXLAN_MAC, announcement.vxlan_mac.map(mac_text).unwrap_or_default());
    if announcement.keepalive > 0 {
        put(KEEPALIVE, announcement.keepalive.to_string());
    }
    if announcement.services {
        put(SERVICES, "on".to_owned());
    }
    out
}

/// A key as WireGuard's tools write it.
pub fn key_text(key: &PublicKey) -> String {
    STANDARD.encode(key)
}

/// A MAC address as `ip link` writes it.
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The special range that this one overlaps, if any: no node, pod or Service has its address there.
pub fn special(range: IpNet) -> Option<IpNet> {
    SPECIAL.into_iter().find(|special| special.contains(&range) || range.contains(special))
}

/// Whether the address may be that of another node: unicast, not this host's own, not of one link only.
pub fn is_reachable(address: IpAddr) -> bool {
    special(address.into()).is_none()
}

const SPECIAL: [IpNet; 8] = [
    v4([0, 0, 0, 0], 8),      // this network, RFC 1122 3.2.1.3
    v4([127, 0, 0, 0], 8),    // loopback, RFC 1122 3.2.1.3
    v4([169, 254, 0, 0], 16), // link-local, RFC 3927
    v4([224, 0, 0, 0], 3),    // multicast (RFC 5771), reserved, broadcast
    v6(0, 16),                // unspecified, loopback, IPv4-mapped, RFC 4291 2.5
    v6(0xfe80 << 112, 10),    // link-local, RFC 4291 2.5.6
    v6(0xfec0 << 112, 10),    // site-local, RFC 3879
    v6(0xff00 << 112, 8),     // multicast, RFC 4291 2.7
];

const fn v4(octets: [u8; 4], length: u8) -> IpNet {
    let [a, b, c, d] = octets;
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length))
}

const fn v6(bits: u128, length: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::from_bits(bits), length))
}

struct Reader<'a> {
    annotations: &'a BTreeMap<String, String>,
    problems: Vec<AnnotationProblem>,
}

impl Reader<'_> {
    fn report(&mut self, annotation: &str, reason: String) {
        self.problems.push(AnnotationProblem { annotation: annotation.to_owned(), reason });
    }

    fn value<T>(&mut self, name: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        let text = self.annotations.get(name)?;
        let result = if text.len() > MAX_VALUE {
            Err(format!("{} bytes; at most {MAX_VALUE} are read", text.len()))
        } else if text.trim().is_empty() {
            Err("empty".to_owned())
        } else {
            parse(text.trim())
        };
        result.map_err(|reason| self.report(name, reason)).ok()
    }

    /// The short form for a peer that a person describes: one key, one endpoint.
    fn by_hand(&mut self, announcement: &mut Announcement) {
        if let Some(endpoint) = self.value(ENDPOINT, endpoint) {
            if announcement.endpoints.is_empty() {
                announcement.endpoints.push(endpoint);
            } else {
                self.report(ENDPOINT, format!("not used, because {ENDPOINTS} is given too"));
            }
        }
        if let Some(key) = self.value(PUBLIC_KEY, key) {
            if announcement.lanes.is_empty() {
                let port = announcement.endpoints.first().map_or(DEFAULT_PORT, SocketAddr::port);
                announcement.lanes.push(PeerLane { key, port });
                announcement.ordinary = true;
            } else {
                self.report(PUBLIC_KEY, format!("not used, because {LANES} is given too"));
            }
        }
    }

    /// Names that are nearly ours. Others may come from a newer version: they are left alone.
    fn mistyped(&mut self) {
        let unknown: Vec<String> = self
            .annotations
            .keys()
            .filter(|name| name.starts_with(PREFIX) && !KNOWN.contains(&name.as_str()))
            .take(16)
            .cloned()
            .collect();
        for name in unknown {
            if let Some(known) = nearest(&name, KNOWN) {
                self.report(&name, format!("not known; did you mean {known}?"));
            }
        }
    }
}

fn lanes(text: &str) -> Result<Vec<PeerLane>, String> {
    let mut keys = BTreeSet::new();
    let mut lanes = Vec::new();
    for item in items(text, MAX_LANES)? {
        let (key_text, port) = match item.rsplit_once(':') {
            Some((key, port)) => (key, self::port(port)?),
            None => (item, DEFAULT_PORT),
        };
        let key = key(key_text)?;
        if !keys.insert(key) {
            return Err(format!("key {key_text} twice: each lane needs its own"));
        }
        lanes.push(PeerLane { key, port });
    }
    Ok(lanes)
}

/// One for each lane, and none of them a lane's first.
fn also_keys(text: &str, lanes: &[PeerLane]) -> Result<Vec<PublicKey>, String> {
    let keys = items(text, MAX_LANES)?.into_iter().map(key).collect::<Result<Vec<_>, _>>()?;
    if keys.len() != lanes.len() {
        return Err(format!("{} keys for {} lanes; each lane has one", keys.len(), lanes.len()));
    }
    let distinct: BTreeSet<_> = keys.iter().chain(lanes.iter().map(|lane| &lane.key)).collect();
    if distinct.len() != keys.len() + lanes.len() {
        return Err("a key twice: each lane needs its own".to_owned());
    }
    Ok(keys)
}

fn lanes_text(lanes: &[PeerLane]) -> String {
    let lanes: Vec<String> =
        lanes.iter().map(|lane| format!("{}:{}", key_text(&lane.key), lane.port)).collect();
    lanes.join(",")
}

fn key(text: &str) -> Result<PublicKey, String> {
    let bytes = STANDARD.decode(text).ok().and_then(|bytes| PublicKey::try_from(bytes).ok());
    let key = bytes
        .ok_or_else(|| format!("{} is not a WireGuard public key (44 characters of base64)", quote(text)))?;
    // The all-zero point has order 1: every handshake with it would have the same secret (RFC 7748 6.1).
    if key == [0; 32] { Err("the zero key is nobody's".to_owned()) } else { Ok(key) }
}

fn endpoints(text: &str) -> Result<Vec<SocketAddr>, String> {
    let mut endpoints = Vec::new();
    for item in items(text, MAX_ENDPOINTS)? {
        let endpoint = endpoint(item)?;
        if !endpoints.contains(&endpoint) {
            endpoints.push(endpoint);
        }
    }
    Ok(endpoints)
}

/// Checks one endpoint.
pub fn endpoint(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text.parse().map_err(|_| {
        format!("{} is not an address and port (192.0.2.1:51820 or [2001:db8::1]:51820)", quote(text))
    })?;
    let scoped = matches!(address, SocketAddr::V6(v6) if v6.scope_id() != 0 || v6.flowinfo() != 0);
    if address.port() == 0 || scoped || !is_reachable(address.ip()) {
        return Err(format!("{address} cannot be reached from another node"));
    }
    Ok(address)
}

/// Checks a location.
pub fn location(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    if text.len() <= 63 && text.chars().all(allowed) {
        Ok(text.to_owned())
    } else {
        Err(format!("{} is not a word of at most 63 letters, digits and -_./", quote(text)))
    }
}

fn encaps(text: &str) -> Result<Encaps, String> {
    let mut encaps = Encaps::default();
    for item in items(text, 8)? {
        if item == Encap::WireGuard.name() {
            encaps.wireguard = true;
        } else if item == Encap::Vxlan.name() {
            encaps.vxlan = true;
        } else if !item.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()) {
            return Err(format!("{} is no encapsulation", quote(item)));
        }
        // Another word may be an encapsulation of a newer version: what we know is enough.
    }
    if encaps.is_empty() {
        Err(format!("{} has neither wireguard nor vxlan", quote(text)))
    } else {
        Ok(encaps)
    }
}

/// Checks a MAC address.
pub fn mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("{} is not a MAC address like 02:00:00:aa:bb:cc", quote(text));
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2 && !part.starts_with('+')).ok_or_else(wrong)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    if parts.next().is_some() {
        return Err(wrong());
    }
    // The lowest bit of the first byte marks a group (IEEE 802): no device has such an address.
    if mac[0] & 1 != 0 || mac == [0; 6] { Err(format!("{text} is no device's address")) } else { Ok(mac) }
}

fn keepalive(text: &str) -> Result<u16, String> {
    let seconds = text.parse().ok().filter(|seconds| *seconds <= 3600);
    seconds.ok_or_else(|| format!("{} is not a number of seconds from 0 to 3600", quote(text)))
}

fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        other => Err(format!("{} is neither on nor off", quote(other))),
    }
}

fn port(text: &str) -> Result<u16, String> {
    let port = text.parse().ok().filter(|port| *port > 0 && !text.starts_with('+'));
    port.ok_or_else(|| format!("{} is not a port", quote(text)))
}

/// The items of a comma-separated list, none empty, not too many.
fn items(text: &str, most: usize) -> Result<Vec<&str>, String> {
    let items: Vec<&str> = text.split(',').map(str::trim).collect();
    if items.len() > most {
        return Err(format!("{} items; at most {most} are read", items.len()));
    }
    if items.iter().any(|item| item.is_empty()) { Err("an item is empty".to_owned()) } else { Ok(items) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(pairs: &[(&str, &str)]) -> (Announcement, Vec<AnnotationProblem>) {
        parse(&pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    #[test]
    fn a_peer_written_by_hand_needs_one_key_and_one_endpoint() {
        let key = key_text(&[7; 32]);
        let (peer, problems) = read(&[(PUBLIC_KEY, &key), (ENDPOINT, "192.0.2.1:4500")]);
        assert_eq!(problems, []);
        assert_eq!(peer.lanes, [PeerLane { key: [7; 32], port: 4500 }]);
        assert_eq!(peer.endpoints, ["192.0.2.1:4500".parse().unwrap()]);
        assert_eq!(peer.encaps, Encaps { wireguard: true, vxlan: false });
        let (lane, problems) = read(&[(LANES, &key), (ENDPOINTS, "[2001:db8::1]:51820")]);
        assert_eq!((problems.len(), lane.lanes[0].port), (0, DEFAULT_PORT));
    }

    #[test]
    fn each_wrong_value_is_named_and_costs_itself() {
        let long = "x".repeat(MAX_VALUE + 1);
        let zero = key_text(&[0; 32]);
        let twice = format!("{0}:1,{0}:2", key_text(&[1; 32]));
        let many = vec![key_text(&[1; 32]); MAX_LANES + 1].join(",");
        for (name, value) in [
            (LANES, "a"),
            (LANES, ""),
            (LANES, long.as_str()),
            (LANES, &zero),
            (LANES, &twice),
            (LANES, &many),
            (LANES, "$(reboot):1"),
            (ENDPOINTS, "127.0.0.1:1"),
            (ENDPOINTS, "[fe80::1%2]:1"),
            (ENDPOINTS, "1.2.3.4:0"),
            (ENDPOINTS, "[::ffff:10.0.0.1]:1"),
            (ENDPOINTS, "example.com:1"),
            (ENDPOINTS, "224.0.0.1:1"),
            (ENDPOINTS, "0.0.0.0:1"),
            (ENDPOINTS, "1.2.3.4:1,"),
            (LOCATION, "a b"),
            (ENCAPS, "IPIP;"),
            (ENCAPS, "ipip"),
            (VXLAN_MAC, "01:00:00:00:00:00"),
            (VXLAN_MAC, "02:00:00:00:00"),
            (VXLAN_MAC, "02:00:00:00:00:+1"),
            (KEEPALIVE, "-1"),
            (KEEPALIVE, "99999"),
            (PUBLIC_KEY, "k"),
            (ENDPOINT, "x"),
            ("warren.dev/lane", "x"),
        ] {
            let (announcement, problems) = read(&[(name, value), (LOCATION, "here")]);
            if name != LOCATION {
                assert_eq!(announcement.location.as_deref(), Some("here"));
                assert_eq!(problems.len(), 1, "{name} {value}");
                assert_eq!(problems[0].annotation, name);
            }
        }
        let (announcement, problems) = read(&[(PROTOCOL_NAME, "2"), (LOCATION, "here")]);
        assert_eq!((announcement, problems.len()), (Announcement::default(), 1));
        let (_, problems) = read(&[("warren.dev/from-the-future", "x"), ("other/lanes", "x")]);
        assert_eq!(problems, []);
    }

    #[test]
    fn second_keys_are_one_for_each_lane_and_new() {
        let [a, b, c] = [1_u8, 2, 3].map(|n| key_text(&[n; 32]));
        let of = |also: &str| read(&[(LANES, &format!("{a}:1,{b}:2")), (ALSO_KEYS, also)]);
        let (announcement, problems) = of(&format!("{c},{}", key_text(&[4; 32])));
        assert_eq!((announcement.also, problems), (vec![[3; 32], [4; 32]], Vec::new()));
        for wrong in [c.clone(), format!("{c},{c}"), format!("{c},{a}"), format!("{c},x"), String::new()] {
            let (announcement, problems) = of(&wrong);
            assert_eq!((announcement.lanes.len(), announcement.also.len()), (2, 0), "{wrong}");
            assert_eq!(problems[0].annotation, ALSO_KEYS, "{wrong}");
        }
        let (announcement, problems) = read(&[(ALSO_KEYS, &c)]);
        assert_eq!((announcement.also.len(), problems.len()), (0, 1), "keys without lanes");
    }

    fn lane() -> impl Strategy<Value = PeerLane> {
        (proptest::array::uniform32(1..=255_u8), 1..=u16::MAX).prop_map(|(key, port)| PeerLane { key, port })
    }

    fn lanes() -> impl Strategy<Value = Vec<PeerLane>> {
        proptest::collection::vec(lane(), 0..=MAX_LANES)
    }

    prop_compose! {
        fn announcement()(
            lanes in lanes(),
            endpoints in proptest::collection::btree_set(any::<SocketAddr>(), 0..=MAX_ENDPOINTS),
            location in proptest::option::of("[a-zA-Z0-9_./-]{1,63}"),
            (wireguard, vxlan) in (any::<bool>(), any::<bool>()),
            mac in proptest::option::of(any::<[u8; 6]>()), keepalive in 0..=3600_u16,
            services in any::<bool>(), changing in any::<bool>(),
        ) -> Announcement {
            let plain = |endpoint: &SocketAddr| {
                endpoint.port() != 0 && is_reachable(endpoint.ip())
            };
            let endpoints = endpoints.into_iter().map(|e| SocketAddr::new(e.ip(), e.port()));
            let encaps = Encaps { wireguard: wireguard || !lanes.is_empty(), vxlan: vxlan || mac.is_some() };
            let second = |lane: &PeerLane| lane.key.map(|byte| byte ^ 0x55);
            let also = if changing { lanes.iter().map(second).collect() } else { Vec::new() };
            Announcement {
                lanes, ordinary: false, also, endpoints: endpoints.filter(plain).collect(), location, encaps,
                vxlan_mac: mac.map(|mut mac| { mac[0] = mac[0] & 0xfe | 2; mac }), keepalive, services,
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_rendered_reads_the_same(announcement in announcement()) {
            let text = render(&announcement);
            prop_assert!(text.values().all(|value| value.len() <= MAX_VALUE));
            prop_assert_eq!(parse(&text), (announcement, Vec::new()));
        }

        #[test]
        fn no_value_panics(index in 0..KNOWN.len(), value in "\\PC{0,80}|[A-Za-z0-9+/=:,.\\[\\]]{0,200}") {
            parse(&BTreeMap::from([(KNOWN[index].to_owned(), value)]));
        }
    }
}
