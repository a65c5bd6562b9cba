//! Where a flow stands in its life, how long each stage lasts, and which is given up first.
//!
//! The TCP machine accepts what Linux's does (net/netfilter/nf_conntrack_proto_tcp.c), so that a flow which
//! the kernel tracks too is in the same state in both places. It does not follow sequence numbers.

/// The stage of a flow's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FlowState {
    /// Not TCP: packets in one direction only.
    Unreplied = 1,
    /// Not TCP: both directions seen.
    Replied,
    /// UDP that answers and goes on answering.
    Stream,
    /// TCP: SYN sent.
    SynSent,
    /// TCP: SYN answered.
    SynRecv,
    /// TCP: open.
    Established,
    /// TCP: one side has finished.
    FinWait,
    /// TCP: and the other has acknowledged it.
    CloseWait,
    /// TCP: both have finished.
    LastAck,
    /// TCP: and all is acknowledged.
    TimeWait,
    /// TCP: reset.
    Close,
}

impl FlowState {
    const ALL: [FlowState; 11] = [
        FlowState::Unreplied,
        FlowState::Replied,
        FlowState::Stream,
        FlowState::SynSent,
        FlowState::SynRecv,
        FlowState::Established,
        FlowState::FinWait,
        FlowState::CloseWait,
        FlowState::LastAck,
        FlowState::TimeWait,
        FlowState::Close,
    ];

    /// The name that `warren flows` shows.
    pub const fn name(self) -> &'static str {
        match self {
            FlowState::Unreplied => "unreplied",
            FlowState::Replied => "replied",
            FlowState::Stream => "stream",
            FlowState::SynSent => "syn-sent",
            FlowState::SynRecv => "syn-recv",
            FlowState::Established => "established",
            FlowState::FinWait => "fin-wait",
            FlowState::CloseWait => "close-wait",
            FlowState::LastAck => "last-ack",
            FlowState::TimeWait => "time-wait",
            FlowState::Close => "close",
        }
    }

    pub(super) fn from_u8(value: u8) -> Option<FlowState> {
        FlowState::ALL.get(usize::from(value).checked_sub(1)?).copied()
    }

    /// Which flows a full table gives up first.
    pub(super) fn rank(self, replied: bool) -> Rank {
        match self {
            // A flow picked up in mid-stream looks open, but nobody has answered yet: one pod could make any
            // number of them.
            _ if !replied => Rank::HalfOpen,
            FlowState::Unreplied | FlowState::SynSent | FlowState::SynRecv => Rank::HalfOpen,
            FlowState::LastAck | FlowState::TimeWait | FlowState::Close => Rank::Over,
            FlowState::Replied | FlowState::FinWait | FlowState::CloseWait => Rank::Answered,
            FlowState::Stream | FlowState::Established => Rank::Established,
        }
    }
}

/// How much a flow is worth to a full table, least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    HalfOpen,
    Over,
    Answered,
    Established,
}

/// Which way a packet goes, seen from the flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// As the packet that opened the flow.
    Original,
    /// Against it.
    Reply,
}

/// IP protocol numbers with rules of their own here.
pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMP_V6: u8 = 58;
pub(super) const SCTP: u8 = 132;

/// Seconds of silence after which a flow is forgotten. [`Timeouts::KERNEL`] are Linux's defaults; where the
/// kernel tracks the same connection, ours must not be longer, or we would speak of flows that it has forgotten.
/// (For TCP data that stays unacknowledged the kernel falls to five minutes; we do not follow sequence numbers,
/// so there alone ours is longer.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// SYN sent.
    pub syn_sent: u32,
    /// SYN answered.
    pub syn_recv: u32,
    /// Open.
    pub established: u32,
    /// Looks open, but picked up in mid-stream and not answered yet.
    pub unacknowledged: u32,
    /// One side finished.
    pub fin_wait: u32,
    /// One side finished, acknowledged. kube-proxy raises it to an hour, for half-closed connections.
    pub close_wait: u32,
    /// Both finished.
    pub last_ack: u32,
    /// Over.
    pub time_wait: u32,
    /// Reset.
    pub close: u32,
    /// UDP.
    pub udp: u32,
    /// UDP that goes on being answered.
    pub udp_stream: u32,
    /// ICMP echo.
    pub icmp: u32,
    /// SCTP that is not answered.
    pub sctp_opening: u32,
    /// SCTP.
    pub sctp: u32,
    /// Every other protocol.
    pub generic: u32,
}

impl Timeouts {
    /// Linux's defaults: net.netfilter.nf_conntrack_tcp_timeout_*, _udp_timeout*, _icmp(v6)_timeout,
    /// _sctp_timeout_{cookie_wait,established}, _generic_timeout
    /// (Documentation/networking/nf_conntrack-sysctl.rst).
    pub const KERNEL: Timeouts = Timeouts {
        syn_sent: 120,
        syn_recv: 60,
        established: 5 * 24 * 3600,
        unacknowledged: 300,
        fin_wait: 120,
        close_wait: 60,
        last_ack: 30,
        time_wait: 120,
        close: 10,
        udp: 30,
        udp_stream: 120,
        icmp: 30,
        sctp_opening: 3,
        sctp: 210,
        generic: 600,
    };

    /// How long a flow in this state may be silent, in milliseconds.
    pub(super) fn of(&self, state: FlowState, protocol: u8, replied: bool) -> u64 {
        let seconds = match state {
            FlowState::Unreplied | FlowState::Replied => match protocol {
                UDP => self.udp,
                ICMP | ICMP_V6 => self.icmp,
                SCTP if replied => self.sctp,
                SCTP => self.sctp_opening,
                _ => self.generic,
            },
            FlowState::Stream => self.udp_stream,
            FlowState::SynSent => self.syn_sent,
            FlowState::SynRecv => self.syn_recv,
            FlowState::Established if replied => self.established,
            FlowState::Established => self.unacknowledged.min(self.established),
            FlowState::FinWait => self.fin_wait,
            FlowState::CloseWait => self.close_wait,
            FlowState::LastAck => self.last_ack,
            FlowState::TimeWait => self.time_wait,
            // Sequence numbers are not followed, so a reset may be a stranger's: a connection that was open has
            // the time of one that nobody acknowledges to show that it still is.
            FlowState::Close if replied => self.close.max(self.unacknowledged),
            FlowState::Close => self.close,
        };
        u64::from(seconds) * 1000
    }
}

/// What a packet does to its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The flow is in this state now, and lives on from now.
    To(FlowState),
    /// Legal, but says nothing (a repeated SYN): the flow grows no younger.
    Ignore,
    /// A new connection with the addresses and ports of an old one that is over.
    Restart,
    /// No sane sender sends this here.
    Invalid,
}

/// How a TCP connection begins in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Opening {
    pub(super) state: FlowState,
    /// The direction of the packet that was seen.
    pub(super) direction: Direction,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Segment {
    Syn,
    SynAck,
    Fin,
    Ack,
    Rst,
}

impl Segment {
    /// The combinations of flags that senders use; PSH, ECE, CWR go with any.
    fn of(flags: u8) -> Option<Segment> {
        const FIN: u8 = 0x01;
        const SYN: u8 = 0x02;
        const RST: u8 = 0x04;
        const ACK: u8 = 0x10;
        const URG: u8 = 0x20;
        match (flags & (FIN | SYN | RST | ACK), flags & URG != 0) {
            (SYN, _) => Some(Segment::Syn),
            (SYN_ACK, false) => Some(Segment::SynAck),
            (FIN_ACK, _) => Some(Segment::Fin),
            (ACK, _) => Some(Segment::Ack),
            (RST | RST_ACK, false) => Some(Segment::Rst),
            _ => None,
        }
    }
}
const SYN_ACK: u8 = 0x12;
const FIN_ACK: u8 = 0x11;
const RST_ACK: u8 = 0x14;

/// The first packet of a connection that the table does not know; `None` if a flow cannot begin so.
/// Connections that are older than the table are picked up in mid-stream (as with nf_conntrack_tcp_loose).
pub(super) fn tcp_open(flags: u8) -> Option<Opening> {
    match Segment::of(flags)? {
        Segment::Syn => Some(Opening { state: FlowState::SynSent, direction: Direction::Original }),
        Segment::SynAck => Some(Opening { state: FlowState::SynRecv, direction: Direction::Reply }),
        Segment::Ack => Some(Opening { state: FlowState::Established, direction: Direction::Original }),
        Segment::Fin | Segment::Rst => None,
    }
}

/// What a TCP packet does to a flow in `state`.
pub(super) fn tcp_step(state: FlowState, direction: Direction, flags: u8) -> Step {
    use Direction::{Original, Reply};
    use FlowState::*;
    let Some(segment) = Segment::of(flags) else { return Step::Invalid };
    match (segment, state) {
        // States of other protocols: damage.
        (_, Unreplied | Replied | Stream) => Step::Invalid,
        (Segment::Rst, _) => Step::To(Close),

        (Segment::Syn, TimeWait | Close) => Step::Restart,
        (Segment::Syn, SynSent) if direction == Original => Step::To(SynSent),
        // Both opened at once (RFC 9293 section 3.5, figure 7).
        (Segment::Syn, SynSent) => Step::To(SynRecv),
        (Segment::Syn, _) if direction == Original => Step::Ignore,
        (Segment::Syn, _) => Step::Invalid,

        (Segment::SynAck, SynSent) if direction == Reply => Step::To(SynRecv),
        (Segment::SynAck, SynRecv) => Step::To(SynRecv),
        (Segment::SynAck, _) if direction == Reply => Step::Ignore,
        (Segment::SynAck, _) => Step::Invalid,

        (Segment::Fin, SynSent) => Step::Invalid,
        (Segment::Fin, SynRecv | Established) => Step::To(FinWait),
        (Segment::Fin, FinWait | CloseWait | LastAck) => Step::To(LastAck),
        (Segment::Fin, TimeWait | Close) => Step::To(state),

        (Segment::Ack, SynSent) if direction == Original => Step::Invalid,
        // The answer to a SYN that the server took for an old one (RFC 9293 section 3.5.1): a reset follows.
        (Segment::Ack, SynSent) => Step::Ignore,
        (Segment::Ack, SynRecv) if direction == Original => Step::To(Established),
        // Whoever goes on after a reset did not take it: it was forged, or out of its window.
        (Segment::Ack, Close) => Step::To(Established),
        (Segment::Ack, SynRecv | Established | TimeWait) => Step::To(state),
        (Segment::Ack, FinWait | CloseWait) => Step::To(CloseWait),
        (Segment::Ack, LastAck) => Step::To(TimeWait),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;
    const RST: u8 = 0x04;

    /// Plays packets from the first on; panics where one is not a step.
    fn play(packets: &[(Direction, u8)]) -> FlowState {
        let (first, rest) = packets.split_first().unwrap();
        let mut state = tcp_open(first.1).unwrap().state;
        for (direction, flags) in rest {
            match tcp_step(state, *direction, *flags) {
                Step::To(next) => state = next,
                Step::Ignore => {}
                other => panic!("{state:?} {direction:?} {flags:#x}: {other:?}"),
            }
        }
        state
    }

    #[test]
    fn a_connection_lives_and_ends() {
        use Direction::{Original as O, Reply as R};
        let whole = [
            (O, SYN),
            (R, SYN_ACK),
            (O, ACK),
            (O, ACK | 8),
            (R, ACK),
            (O, FIN_ACK),
            (R, ACK),
            (R, FIN_ACK),
            (O, ACK),
        ];
        let states = [
            FlowState::SynSent,
            FlowState::SynRecv,
            FlowState::Established,
            FlowState::Established,
            FlowState::Established,
            FlowState::FinWait,
            FlowState::CloseWait,
            FlowState::LastAck,
            FlowState::TimeWait,
        ];
        for (n, expected) in states.iter().enumerate() {
            assert_eq!(play(&whole[..=n]), *expected, "after {} packets", n + 1);
        }
        assert_eq!(play(&[(O, SYN), (R, RST_ACK)]), FlowState::Close);
        assert_eq!(play(&[(O, SYN), (R, SYN), (O, SYN_ACK), (R, SYN_ACK), (O, ACK)]), FlowState::Established);
        assert_eq!(play(&[(R, SYN_ACK), (O, ACK)]), FlowState::Established);
        assert_eq!(play(&[(O, ACK), (R, FIN_ACK), (O, FIN_ACK), (R, ACK)]), FlowState::TimeWait);
        assert_eq!(play(&[(O, SYN), (O, SYN), (R, SYN_ACK), (R, SYN_ACK)]), FlowState::SynRecv);
    }

    #[test]
    fn nonsense_is_invalid() {
        use Direction::{Original as O, Reply as R};
        for flags in [0, SYN | 1, SYN | RST, 0x01, 0x20, SYN_ACK | 0x20, 0xff] {
            assert_eq!(tcp_open(flags), None, "{flags:#x}");
            assert_eq!(tcp_step(FlowState::Established, O, flags), Step::Invalid, "{flags:#x}");
        }
        assert_eq!(tcp_open(RST), None);
        assert_eq!(tcp_open(FIN_ACK), None);
        assert_eq!(tcp_step(FlowState::Established, R, SYN), Step::Invalid);
        assert_eq!(tcp_step(FlowState::Established, O, SYN), Step::Ignore);
        assert_eq!(tcp_step(FlowState::SynSent, O, ACK), Step::Invalid);
        assert_eq!(tcp_step(FlowState::TimeWait, O, SYN), Step::Restart);
    }

    #[test]
    fn every_state_has_a_number_and_a_bounded_life() {
        for state in FlowState::ALL {
            assert_eq!(FlowState::from_u8(state as u8), Some(state));
            for protocol in 0..=255 {
                for replied in [false, true] {
                    let life = Timeouts::KERNEL.of(state, protocol, replied);
                    assert!((3_000..=432_000_000).contains(&life));
                }
            }
        }
        assert_eq!(FlowState::from_u8(0), None);
        assert_eq!(FlowState::from_u8(12), None);
    }

    #[test]
    fn unanswered_flows_rank_lowest() {
        assert_eq!(FlowState::Established.rank(false), Rank::HalfOpen);
        assert_eq!(FlowState::Established.rank(true), Rank::Established);
        assert!(
            Rank::HalfOpen < Rank::Over && Rank::Over < Rank::Answered && Rank::Answered < Rank::Established
        );
    }
}
