//! What each drop reason means to a person, in one line.

use crate::packet::DropReason;

/// Why packets are dropped for this reason and, where it helps, what to look at.
pub const fn of_drop(reason: DropReason) -> &'static str {
    match reason {
        DropReason::Truncated => "shorter than its own headers say",
        DropReason::NotIp => "neither IPv4 nor IPv6",
        DropReason::MalformedHeader => "an IP header that contradicts itself",
        DropReason::TooManyExtensions => "more IPv6 extension headers than any honest sender uses",
        DropReason::MalformedTransport => "a TCP, UDP or ICMP header that does not fit its packet",
        DropReason::BadVirtioHeader => "the kernel's offload header does not fit its packet: report this",
        DropReason::MartianAddress => {
            "an address that no packet may carry here (loopback, unspecified, multicast source)"
        }
        DropReason::SourceRouted => "names the routers it wants: never forwarded",
        DropReason::Untranslatable => "a fragment whose ports or checksum cannot be changed",
        DropReason::NoRoute => {
            "in the cluster's ranges, but no node owns the address: a pod or node that is gone?"
        }
        DropReason::HopLimit => "hop limit ran out between two tunnels; elsewhere the kernel counts it",
        DropReason::TooBig => "too big for the path; the sender was told the right size",
        DropReason::ForeignSource => {
            "a local sender with an address that is not this node's: is it masqueraded wrongly?"
        }
        DropReason::Multicast => "multicast and broadcast stay on their node",
        DropReason::AwaitingSession => {
            "waited in vain for a WireGuard session: see peers that are connecting"
        }
        DropReason::NoEndpoint => "the peer announced no usable endpoint or key: see its annotations",
        DropReason::NoEncapsulation => "the two nodes allow no common encapsulation: compare their --encap",
        DropReason::AwaitingMac => "the VXLAN peer's MAC address is not known yet",
        DropReason::NoBuffer => "the lane's buffers were full: more traffic than it can carry",
        DropReason::UplinkFull => "the node's network is slower than what its pods send",
        DropReason::SendFailed => "the kernel refused the datagram: is there a route to the peer's endpoint?",
        DropReason::NoServiceEndpoint => "to a Service without endpoints; the client was told at once",
        DropReason::NoLocalEndpoint => {
            "the Service's traffic policy is Local, and this node has no endpoint of it"
        }
        DropReason::ServicePortClosed => "to a port on which no Service listens; the client was told at once",
        DropReason::ClientNotAllowed => "the client is not in the Service's loadBalancerSourceRanges",
        DropReason::EndpointGone => "the endpoint of an open connection is gone; the client was told (reset)",
        DropReason::UnknownConnection => {
            "in the middle of a connection to a Service that this node does not know; it was reset"
        }
        DropReason::InvalidTcp => "TCP of a translated connection that fits no state of it",
        DropReason::FlowTableFull => "no room for another translated flow: a flood from one pod?",
        DropReason::FlowQuota => "a pod of this node has a quarter of the flow table: is it flooding?",
        DropReason::FlowTableBusy => "another lane kept the flow's place in the table for too long",
        DropReason::HandOver => {
            "lane 0, the only one whose key an ordinary WireGuard peer knows, could not keep up with the others"
        }
        DropReason::NoSourcePort => "every source port tried is in use towards the same endpoint",
        DropReason::AwaitingFragment => "a fragment whose first one, with the ports, did not come",
        DropReason::NotTunnel => "a datagram that is neither WireGuard nor VXLAN: a scanner?",
        DropReason::TunnelInTunnel => {
            "WireGuard from an address inside the mesh: a tunnel through the tunnel?"
        }
        DropReason::UnknownPeer => {
            "WireGuard from a key or session not known here: a node that just left or restarted?"
        }
        DropReason::BadAuthentication => {
            "WireGuard that failed authentication: damaged, forged, or for an older key"
        }
        DropReason::Replay => "a WireGuard counter seen before or too old: duplicates or heavy reordering",
        DropReason::ExpiredSession => "WireGuard data of a session that has ended",
        DropReason::HandshakeRate => "more handshakes from one address than a node ever needs",
        DropReason::CookieDemanded => "under load: the sender was asked to prove its address first",
        DropReason::UnknownVxlanSource => "VXLAN from an address that is no VXLAN node of this cluster",
        DropReason::WrongVni => "VXLAN with another network identifier: another overlay on this port?",
        DropReason::BadInnerFrame => "a frame inside VXLAN that is neither IP, ARP nor ours",
        DropReason::SpoofedSource => {
            "a peer sent a packet whose source is not the peer's: misconfigured, or an attack"
        }
        DropReason::NotOurs => "the destination is not on this node",
        DropReason::BadChecksum => "neighbour discovery of a VXLAN peer with a wrong checksum",
        DropReason::TunWriteFailed => "the tunnel device refused the packet: is it up?",
        DropReason::IcmpRateLimited => "its ICMP answer was left out: those are rate-limited",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_one_line_of_its_own() {
        let mut seen = std::collections::HashSet::new();
        for reason in DropReason::ALL {
            let line = of_drop(*reason);
            assert!(!line.is_empty() && line.len() <= 100 && !line.contains('\n'), "{}", reason.name());
            assert!(seen.insert(line), "{} says the same as another", reason.name());
        }
    }
}
