//! What can be measured, and by which run.

use clap::ValueEnum;

/// A run of some program, which gives one or more figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Work {
    /// One TCP stream; also what it costs in processor time.
    Tcp,
    /// One TCP stream in the other direction.
    TcpReverse,
    /// Four TCP streams at once.
    Tcp4,
    /// Sixteen TCP streams at once.
    Tcp16,
    /// As much UDP as the sender can send, 1372 bytes each.
    Udp,
    /// The same with 64 bytes each.
    UdpSmall,
    /// The most UDP of which nearly all arrives.
    UdpLossFree,
    /// The same with 64 bytes each.
    UdpSmallLossFree,
    /// TCP request and answer, nothing else going on.
    TcpLatency,
    /// The same with UDP.
    UdpLatency,
    /// TCP request and answer beside one TCP stream.
    TcpLatencyLoaded,
    /// The same with UDP.
    UdpLatencyLoaded,
    /// Memory and processor time with 1,000 peers and no traffic.
    Idle,
}

impl Work {
    /// All, in the order of running.
    pub const ALL: [Work; 13] = [
        Work::Tcp,
        Work::TcpReverse,
        Work::Tcp4,
        Work::Tcp16,
        Work::Udp,
        Work::UdpSmall,
        Work::UdpLossFree,
        Work::UdpSmallLossFree,
        Work::TcpLatency,
        Work::UdpLatency,
        Work::TcpLatencyLoaded,
        Work::UdpLatencyLoaded,
        Work::Idle,
    ];

    /// What it gives, in this order.
    pub fn figures(self) -> &'static [Figure] {
        use Figure as F;
        match self {
            Work::Tcp => &[F::Tcp, F::CpuMachine, F::CpuSender, F::CpuReceiver],
            Work::TcpReverse => &[F::TcpReverse],
            Work::Tcp4 => &[F::Tcp4],
            Work::Tcp16 => &[F::Tcp16],
            Work::Udp => &[F::Udp],
            Work::UdpSmall => &[F::UdpSmall],
            Work::UdpLossFree => &[F::UdpLossFree],
            Work::UdpSmallLossFree => &[F::UdpSmallLossFree],
            Work::TcpLatency => &[F::TcpP50, F::TcpP99, F::TcpP999],
            Work::UdpLatency => &[F::UdpP50, F::UdpP99, F::UdpP999],
            Work::TcpLatencyLoaded => &[F::TcpLoadedP50, F::TcpLoadedP99, F::TcpLoadedP999],
            Work::UdpLatencyLoaded => &[F::UdpLoadedP50, F::UdpLoadedP99, F::UdpLoadedP999],
            Work::Idle => &[F::IdleMemory, F::IdleCpu],
        }
    }
}

/// One column of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figure {
    /// Gbit/s of one TCP stream.
    Tcp,
    /// The same in the other direction.
    TcpReverse,
    /// Of four together.
    Tcp4,
    /// Of sixteen together.
    Tcp16,
    /// Gbit/s of UDP that arrive under overload.
    Udp,
    /// Thousands of small datagrams a second that arrive under overload.
    UdpSmall,
    /// Gbit/s of UDP with hardly any loss.
    UdpLossFree,
    /// Thousands of small datagrams a second with hardly any loss.
    UdpSmallLossFree,
    /// Half a TCP round trip, microseconds: the median.
    TcpP50,
    /// One of a hundred is slower.
    TcpP99,
    /// One of a thousand is slower.
    TcpP999,
    /// The same with UDP.
    UdpP50,
    /// The same with UDP.
    UdpP99,
    /// The same with UDP.
    UdpP999,
    /// Beside a TCP stream.
    TcpLoadedP50,
    /// Beside a TCP stream.
    TcpLoadedP99,
    /// Beside a TCP stream.
    TcpLoadedP999,
    /// UDP beside a TCP stream.
    UdpLoadedP50,
    /// UDP beside a TCP stream.
    UdpLoadedP99,
    /// UDP beside a TCP stream.
    UdpLoadedP999,
    /// Processor seconds of the whole machine for each GB of one TCP stream.
    CpuMachine,
    /// Of the sending node's tunnel program.
    CpuSender,
    /// Of the receiving node's.
    CpuReceiver,
    /// MiB that an idle program with 1,000 peers occupies.
    IdleMemory,
    /// Percent of one processor that it uses.
    IdleCpu,
}

impl Figure {
    /// All, in the order of the tables.
    pub const ALL: [Figure; 25] = [
        Figure::Tcp,
        Figure::TcpReverse,
        Figure::Tcp4,
        Figure::Tcp16,
        Figure::Udp,
        Figure::UdpSmall,
        Figure::UdpLossFree,
        Figure::UdpSmallLossFree,
        Figure::TcpP50,
        Figure::TcpP99,
        Figure::TcpP999,
        Figure::UdpP50,
        Figure::UdpP99,
        Figure::UdpP999,
        Figure::TcpLoadedP50,
        Figure::TcpLoadedP99,
        Figure::TcpLoadedP999,
        Figure::UdpLoadedP50,
        Figure::UdpLoadedP99,
        Figure::UdpLoadedP999,
        Figure::CpuMachine,
        Figure::CpuSender,
        Figure::CpuReceiver,
        Figure::IdleMemory,
        Figure::IdleCpu,
    ];

    /// Its name in the results, the head of its column, and digits behind the point.
    fn about(self) -> (&'static str, &'static str, usize) {
        match self {
            Figure::Tcp => ("tcp", "1 stream, Gbit/s", 2),
            Figure::TcpReverse => ("tcp-reverse", "reverse, Gbit/s", 2),
            Figure::Tcp4 => ("tcp4", "4 streams, Gbit/s", 2),
            Figure::Tcp16 => ("tcp16", "16 streams, Gbit/s", 2),
            Figure::Udp => ("udp", "1372 B, overload, Gbit/s", 2),
            Figure::UdpSmall => ("udp-small", "64 B, overload, thousands/s", 0),
            Figure::UdpLossFree => ("udp-loss-free", "1372 B, < 0.1 % lost, Gbit/s", 2),
            Figure::UdpSmallLossFree => ("udp-small-loss-free", "64 B, < 0.1 % lost, thousands/s", 0),
            Figure::TcpP50 => ("tcp-p50", "TCP p50", 0),
            Figure::TcpP99 => ("tcp-p99", "p99", 0),
            Figure::TcpP999 => ("tcp-p99.9", "p99.9", 0),
            Figure::UdpP50 => ("udp-p50", "UDP p50", 0),
            Figure::UdpP99 => ("udp-p99", "p99", 0),
            Figure::UdpP999 => ("udp-p99.9", "p99.9", 0),
            Figure::TcpLoadedP50 => ("tcp-loaded-p50", "TCP p50", 0),
            Figure::TcpLoadedP99 => ("tcp-loaded-p99", "p99", 0),
            Figure::TcpLoadedP999 => ("tcp-loaded-p99.9", "p99.9", 0),
            Figure::UdpLoadedP50 => ("udp-loaded-p50", "UDP p50", 0),
            Figure::UdpLoadedP99 => ("udp-loaded-p99", "p99", 0),
            Figure::UdpLoadedP999 => ("udp-loaded-p99.9", "p99.9", 0),
            Figure::CpuMachine => ("cpu-machine", "whole machine", 2),
            Figure::CpuSender => ("cpu-sender", "sender's program", 2),
            Figure::CpuReceiver => ("cpu-receiver", "receiver's program", 2),
            Figure::IdleMemory => ("idle-memory", "memory, MiB", 1),
            Figure::IdleCpu => ("idle-cpu", "% of one processor", 3),
        }
    }

    /// Its name in the results.
    pub fn name(self) -> &'static str {
        self.about().0
    }

    /// The figure of that name.
    pub fn named(name: &str) -> Option<Figure> {
        Figure::ALL.into_iter().find(|figure| figure.name() == name)
    }

    /// The head of its column, in a table that says what it is about.
    pub fn title(self) -> &'static str {
        self.about().1
    }

    /// A value as tables have it.
    pub fn show(self, value: f64) -> String {
        format!("{value:.*}", self.about().2)
    }
}
