//! Where a flow stands in its life, how long each stage lasts, and which is given up first.
//!
//! The TCP machine accepts what Linux's does (net/netfilter/nf_conntrack_proto_tcp.c), so that a flow which
//! the kernel tracks too is in the same state in both places. It does not follow sequence numbers.

use std::sync::atomic::{AtomicU32, Ordering};

/// Where a flow stands.
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

/// How long a flow lives in silence depends on this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Stage {
    /// TCP: SYN sent.
    SynSent,
    /// TCP: SYN answered.
    SynRecv,
    /// TCP: open.
    Established,
    /// TCP: looks open, but picked up in mid-stream and not answered yet.
    Unacknowledged,
    /// TCP: one side finished.
    FinWait,
    /// TCP: one side finished, acknowledged. kube-proxy raises it to an hour, for half-closed connections.
    CloseWait,
    /// TCP: both finished.
    LastAck,
    /// TCP: over.
    TimeWait,
    /// TCP: reset.
    Close,
    /// UDP.
    Udp,
    /// UDP that goes on being answered.
    UdpStream,
    /// ICMP echo.
    Icmp,
    /// SCTP that is not answered.
    SctpOpening,
    /// SCTP.
    Sctp,
    /// Every other protocol.
    Generic,
}

impl Stage {
    /// All of them, in the order of their numbers.
    pub const ALL: [Stage; 15] = [
        Stage::SynSent,
        Stage::SynRecv,
        Stage::Established,
        Stage::Unacknowledged,
        Stage::FinWait,
        Stage::CloseWait,
        Stage::LastAck,
        Stage::TimeWait,
        Stage::Close,
        Stage::Udp,
        Stage::UdpStream,
        Stage::Icmp,
        Stage::SctpOpening,
        Stage::Sctp,
        Stage::Generic,
    ];

    /// The stage of a flow in this state.
    pub(super) fn of(state: FlowState, protocol: u8, replied: bool) -> Stage {
        match state {
            FlowState::Unreplied | FlowState::Replied => match protocol {
                UDP => Stage::Udp,
                ICMP | ICMP_V6 => Stage::Icmp,
                SCTP if replied => Stage::Sctp,
                SCTP => Stage::SctpOpening,
                _ => Stage::Generic,
            },
            FlowState::Stream => Stage::UdpStream,
            FlowState::SynSent => Stage::SynSent,
            FlowState::SynRecv => Stage::SynRecv,
            FlowState::Established if replied => Stage::Established,
            FlowState::Established => Stage::Unacknowledged,
            FlowState::FinWait => Stage::FinWait,
            FlowState::CloseWait => Stage::CloseWait,
            FlowState::LastAck => Stage::LastAck,
            FlowState::TimeWait => Stage::TimeWait,
            FlowState::Close => Stage::Close,
        }
    }
}

/// Seconds of silence after which a flow is forgotten, by its [`Stage`]. Where the kernel tracks the same
/// connection, ours must not be longer, or we would speak of flows that it has forgotten: so the agent takes
/// the smaller of ours and the kernel's ([`Timeouts::at_most`]), and looks again while it runs.
///
/// The loop follows neither sequence numbers nor SCTP's chunks, so in two cases the kernel forgets a flow in
/// what is to it an earlier stage. TCP data that nobody acknowledges for five minutes
/// (nf_conntrack_tcp_timeout_{unacknowledged,max_retrans}): whoever sends it again gets a new entry of the
/// kernel's with the same translation, as every rule that makes one looks at the packet alone. SCTP that is
/// still being opened or closed (3 s in the kernel, here as if it were open): it is for the client to repeat
/// INIT, COOKIE ECHO and SHUTDOWN, and that makes the kernel's entry anew likewise.
///
/// A reset ends an open connection as soon as in the kernel, though nobody here has looked at its sequence
/// number. Strangers' resets seldom come this far: what enters at a node port or an external address, the
/// kernel has checked, and translates nothing that is out of its window; pods and peers cannot send with
/// others' addresses; and whoever goes on within the ten seconds shows that the connection is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts([u32; Stage::ALL.len()]);

impl Timeouts {
    /// Linux's defaults: net.netfilter.nf_conntrack_tcp_timeout_*, _udp_timeout*, _icmp(v6)_timeout,
    /// _sctp_timeout_{cookie_wait,established}, _generic_timeout
    /// (Documentation/networking/nf_conntrack-sysctl.rst).
    pub const KERNEL: Timeouts =
        Timeouts([120, 60, 5 * 24 * 3600, 300, 120, 60, 30, 120, 10, 30, 120, 30, 3, 210, 600]);

    /// The same with another one for that stage.
    pub const fn with(mut self, stage: Stage, seconds: u32) -> Timeouts {
        self.0[stage as usize] = seconds;
        self
    }

    /// The same, but none longer than the kernel's, where it says one. None is shorter than a second.
    pub fn at_most(mut self, kernel: impl Fn(Stage) -> Option<u32>) -> Timeouts {
        for stage in Stage::ALL {
            let ours = &mut self.0[stage as usize];
            *ours = kernel(stage).map_or(*ours, |kernel| kernel.min(*ours)).max(1);
        }
        // What is only half open does not outlive what is open.
        let open = self.0[Stage::Established as usize];
        let half_open = &mut self.0[Stage::Unacknowledged as usize];
        *half_open = open.min(*half_open);
        self
    }

    /// The seconds of a stage.
    pub const fn seconds(&self, stage: Stage) -> u32 {
        self.0[stage as usize]
    }

    /// How long a flow in this state may be silent, in milliseconds.
    #[cfg(test)]
    pub(super) fn of(&self, state: FlowState, protocol: u8, replied: bool) -> u64 {
        u64::from(self.seconds(Stage::of(state, protocol, replied))) * 1000
    }
}

/// Timeouts that may change while lanes read them.
pub(super) struct LiveTimeouts([AtomicU32; Stage::ALL.len()]);

impl LiveTimeouts {
    pub(super) fn new(timeouts: Timeouts) -> LiveTimeouts {
        LiveTimeouts(timeouts.0.map(AtomicU32::new))
    }

    pub(super) fn set(&self, timeouts: &Timeouts) {
        for (live, seconds) in self.0.iter().zip(timeouts.0) {
            live.store(seconds, Ordering::Relaxed);
        }
    }

    /// How long a flow in this state may be silent, in milliseconds.
    pub(super) fn of(&self, state: FlowState, protocol: u8, replied: bool) -> u64 {
        let seconds = self.0[Stage::of(state, protocol, replied) as usize].load(Ordering::Relaxed);
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
    fn no_flow_outlives_the_kernels() {
        let ours = Timeouts::KERNEL.with(Stage::CloseWait, 3_600);
        // Each longer, each shorter, and some of both; and a kernel that says nothing.
        let longer = |stage: Stage| Some(ours.seconds(stage) * 2);
        let shorter = |stage: Stage| Some((ours.seconds(stage) / 2).max(1));
        let mixed =
            |stage: Stage| if (stage as usize).is_multiple_of(2) { longer(stage) } else { shorter(stage) };
        let tiny = |stage: Stage| Some(1 + stage as u32);
        let kernels: [&dyn Fn(Stage) -> Option<u32>; 5] = [&longer, &shorter, &mixed, &tiny, &|_| None];
        for (n, kernel) in kernels.into_iter().enumerate() {
            let least = ours.at_most(kernel);
            let live = LiveTimeouts::new(Timeouts::KERNEL);
            live.set(&least);
            for state in FlowState::ALL {
                for protocol in [ICMP, TCP, UDP, ICMP_V6, SCTP, 47] {
                    for replied in [false, true] {
                        let stage = Stage::of(state, protocol, replied);
                        let life = live.of(state, protocol, replied);
                        let most = kernel(stage).unwrap_or(u32::MAX).min(ours.seconds(stage));
                        let case = format!("{n}: {state:?}, protocol {protocol}, replied {replied}");
                        assert!(life <= u64::from(most) * 1000, "{case}: {life} ms, kernel {most} s");
                        assert_eq!(least.of(state, protocol, replied), life, "{case}");
                        if stage != Stage::Unacknowledged {
                            assert_eq!(life, u64::from(most) * 1000, "{case}: shorter than need be");
                        }
                    }
                }
            }
        }
        assert_eq!(ours.at_most(|_| Some(0)), Timeouts([1; Stage::ALL.len()]));
        for (number, stage) in Stage::ALL.into_iter().enumerate() {
            assert_eq!(stage as usize, number);
        }
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
