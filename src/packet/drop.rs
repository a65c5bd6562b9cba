//! Why a packet was dropped: one variant, one counter, one name each.

/// Declares the enum, its names and its list from one table, so that no variant can miss a name.
macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $variant:ident => $name:literal,)*) => {
        /// Why the packet line let go of a packet. Small and `Copy`: a drop never allocates.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum DropReason { $($(#[$doc])* $variant,)* }

        impl DropReason {
            /// Every reason, in the order of its counter.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$variant,)*];

            /// The name that `warren status` shows.
            pub const fn name(self) -> &'static str {
                match self { $(DropReason::$variant => $name,)* }
            }
        }
    };
}

drop_reasons! {
    // --- parse -----------------------------------------------------------------------------------
    /// Shorter than its own headers say.
    Truncated => "truncated",
    /// Neither IPv4 nor IPv6.
    NotIp => "not-ip",
    /// A header that contradicts itself (lengths, version, fragment offsets, IPv4 header checksum).
    MalformedHeader => "malformed-header",
    /// More IPv6 extension headers than any honest sender uses.
    TooManyExtensions => "too-many-extensions",
    /// A TCP, UDP or ICMP header that does not fit into the packet.
    MalformedTransport => "malformed-transport",
    /// The TUN's virtio header does not fit the packet behind it.
    BadVirtioHeader => "bad-virtio-header",
    /// Source or destination that no packet may carry here (unspecified, loopback, multicast source).
    MartianAddress => "martian-address",
    /// A packet that names the routers it wants (IPv4 source route, IPv6 routing header in use).
    SourceRouted => "source-routed",
    /// A packet whose ports must change but cannot, because its checksum lies in another fragment.
    Untranslatable => "untranslatable",

    // --- outbound --------------------------------------------------------------------------------
    /// Inside the cluster's ranges, but no node owns the address.
    NoRoute => "no-route",
    /// The hop limit ran out on this node.
    HopLimit => "hop-limit",
    /// Too big for the path; the sender was told (ICMP).
    TooBig => "too-big",
    /// The source does not belong to this node.
    ForeignSource => "foreign-source",
    /// Multicast and broadcast stay on their node.
    Multicast => "multicast",
    /// The queue of packets that wait for a WireGuard session is full, or the wait was too long.
    AwaitingSession => "awaiting-session",
    /// The peer has no usable endpoint.
    NoEndpoint => "no-endpoint",
    /// The peer does not speak an encapsulation that this node allows.
    NoEncapsulation => "no-encapsulation",
    /// The VXLAN peer's MAC address is not known yet.
    AwaitingMac => "awaiting-mac",
    /// The batch buffers are full.
    NoBuffer => "no-buffer",
    /// The way out of this node is full: the sockets took nothing more for a while.
    UplinkFull => "uplink-full",
    /// The kernel refused the datagram.
    SendFailed => "send-failed",

    // --- Services --------------------------------------------------------------------------------
    /// The Service has no endpoint; the client was told (reset or unreachable).
    NoServiceEndpoint => "no-service-endpoint",
    /// The Service's policy allows endpoints of this node only, and there is none.
    NoLocalEndpoint => "no-local-endpoint",
    /// A port of a ClusterIP on which no Service listens; the client was told.
    ServicePortClosed => "service-port-closed",
    /// The client's address is not in the Service's `loadBalancerSourceRanges`.
    ClientNotAllowed => "client-not-allowed",
    /// The endpoint of an open connection is gone; the client was told.
    EndpointGone => "endpoint-gone",
    /// TCP to a Service in the middle of a connection that is not known; the client was told.
    UnknownConnection => "unknown-connection",
    /// TCP of a translated flow that fits no state of it.
    InvalidTcp => "invalid-tcp",
    /// No room in the flow table for a flow that must be translated.
    FlowTableFull => "flow-table-full",
    /// The local pod has as many flows as one pod may have.
    FlowQuota => "flow-quota",
    /// Another lane kept the flow's place in the table for too long.
    FlowTableBusy => "flow-table-busy",
    /// Lane 0 has no room for more packets that other lanes hand over for peers that know its key alone.
    HandOver => "hand-over",
    /// Every source port that was tried is in use towards the same endpoint.
    NoSourcePort => "no-source-port",
    /// A fragment whose first one did not come.
    AwaitingFragment => "awaiting-fragment",

    // --- inbound ---------------------------------------------------------------------------------
    /// A datagram that is neither WireGuard nor VXLAN.
    NotTunnel => "not-tunnel",
    /// A tunnel's datagram from a pod's address or a tunnel's own: it came through a tunnel.
    TunnelInTunnel => "tunnel-in-tunnel",
    /// A WireGuard message of a key or session that is not known here.
    UnknownPeer => "unknown-peer",
    /// A WireGuard message that failed authentication.
    BadAuthentication => "bad-authentication",
    /// A WireGuard counter seen before, or too old.
    Replay => "replay",
    /// A WireGuard data message of a session that has ended.
    ExpiredSession => "expired-session",
    /// More WireGuard handshakes from this source address than one node ever needs.
    HandshakeRate => "handshake-rate",
    /// Under load: the sender was asked to prove its address with a cookie.
    CookieDemanded => "cookie-demanded",
    /// VXLAN from an address that is no node of this cluster, or that should be speaking WireGuard.
    UnknownVxlanSource => "unknown-vxlan-source",
    /// VXLAN with another network identifier, or without one.
    WrongVni => "wrong-vni",
    /// An Ethernet frame inside VXLAN that is neither IP, ARP nor ours.
    BadInnerFrame => "bad-inner-frame",
    /// The inner source address does not belong to the peer that sent the packet.
    SpoofedSource => "spoofed-source",
    /// The destination is not on this node.
    NotOurs => "not-ours",
    /// An inner checksum is wrong.
    BadChecksum => "bad-checksum",
    /// The TUN refused the packet.
    TunWriteFailed => "tun-write-failed",
    /// The packet needed an ICMP answer, but those are rate-limited.
    IcmpRateLimited => "icmp-rate-limited",
}
