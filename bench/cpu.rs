//! Processor time: of the machine, and of the programs that carry the packets.

use std::fs;
use std::time::Duration;

use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

use crate::contestant::Running;

/// Processor time that was used until now.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    /// Seconds of all processors, of whatever kind: programs, kernel, interrupts.
    pub machine: f64,
    /// Seconds of the tunnel's program on each of the two nodes; the kernel's own tunnels have none.
    pub programs: [Option<f64>; 2],
}

impl Cpu {
    /// Reads the clocks.
    pub fn read(on: &Running) -> Cpu {
        Cpu { machine: machine(), programs: on.programs().map(|pid| pid.map(|pid| of(pid).as_secs_f64())) }
    }

    /// What has been used since.
    pub fn since(self, before: Cpu) -> Cpu {
        let used = |i: usize| Some(self.programs[i]? - before.programs[i]?);
        Cpu { machine: self.machine - before.machine, programs: [used(0), used(1)] }
    }
}

/// Processor time of one process, with all its threads.
pub fn of(pid: u32) -> Duration {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a process id fits"));
    let clock = clock_getcpuclockid(pid).and_then(clock_gettime);
    clock.map(Duration::from).unwrap_or_default()
}

fn machine() -> f64 {
    /// Ticks of a second in /proc/stat: USER_HZ, 100 on every architecture that Warren runs on.
    const TICKS: f64 = 100.0;
    let stat = fs::read_to_string("/proc/stat").expect("/proc/stat");
    let line = stat.lines().next().unwrap_or_default();
    let ticks: Vec<f64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal ...: proc_stat(5). Idle time is not work, stolen time is
    // not ours.
    [0, 1, 2, 5, 6].iter().filter_map(|i| ticks.get(*i)).sum::<f64>() / TICKS
}
