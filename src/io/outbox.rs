//! Datagrams on their way into the sockets, in order, without ever waiting for a socket.
//!
//! A socket that is full stops the queue, and with it the lane's reading from the TUN, so that the queue in
//! front of the lane fills up and drops as that of any slow interface does. The lane goes on receiving
//! meanwhile, and comes back here each turn; after [`PATIENCE`] what the socket did not take is dropped.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use tracing::info;

use super::kernel::Kernel;
use crate::datapath::{Counters, Total};
use crate::packet::DropReason;
use crate::tunnel::batch::Run;
use crate::tunnel::{TxBatch, Via};

/// How long a batch may stand before full sockets. A batch has up to 1 MiB, which 400 Mbit/s carry away in
/// this time: a slower link is told by drops, early enough that TCP does not fill seconds of queue.
const PATIENCE: Duration = Duration::from_millis(20);
/// For how long a destination that refused a run gets its datagrams one by one. The kernel forgets a path's
/// MTU after ten minutes (`net.ipv4.route.mtu_expires`); asking again costs one failed call.
const REFUSED_FOR: Duration = Duration::from_secs(60);
/// Most destinations remembered for that; beyond, the oldest is asked again.
const REFUSED: usize = 1024;
/// Once devices refused for so many addresses and never took a run for any, nothing is given them to cut.
const GIVE_UP_AFTER: usize = 8;

/// What a lane still has to send of its batch.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// The batch's runs as messages for the kernel: whole, or cut into datagrams.
    messages: Vec<Run>,
    /// The first message that was not sent.
    next: usize,
    /// How many of the batch's runs are in `messages`.
    taken: usize,
    full: Option<Full>,
    refused: Refused,
}

#[derive(Clone, Copy, Debug)]
struct Full {
    via: Via,
    until: Instant,
}

impl Outbox {
    /// The socket that takes no more for now.
    pub(super) fn full(&self) -> Option<Via> {
        self.full.map(|full| full.via)
    }

    /// When what it does not take is dropped.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.full.map(|full| full.until)
    }

    /// Sends what the sockets take; the batch is empty afterwards unless one is full. `segmentation` is
    /// unset when the kernel turns out not to cut runs at all. Returns whether anything was done.
    pub(super) fn flush<K: Kernel>(
        &mut self,
        now: Instant,
        kernel: &mut K,
        batch: &mut TxBatch,
        segmentation: &mut bool,
        counters: &Counters,
    ) -> bool {
        if batch.is_empty() {
            return false;
        }
        self.take(now, batch, *segmentation, counters);
        let late = self.full.is_some_and(|full| full.until <= now);
        let mut done = false;
        while let Some(first) = self.messages.get(self.next) {
            let via = first.via;
            let same = self.messages[self.next..].iter().take_while(|m| m.via == via).count();
            let group = &self.messages[self.next..self.next + same];
            match kernel.send(batch, group) {
                Ok(count) => {
                    let count = count.clamp(1, same);
                    self.refused.note_sent(&group[..count]);
                    self.next += count;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if !late {
                        let until = self.full.map_or(now + PATIENCE, |full| full.until);
                        self.full = Some(Full { via, until });
                        // A run that stands in `messages` must not grow any more.
                        batch.close();
                        return done;
                    }
                    counters.count_drops(DropReason::UplinkFull, group.iter().map(|m| m.count).sum());
                    self.next += same;
                }
                Err(error) => self.handle_refusal(now, &error, segmentation, counters),
            }
            done = true;
        }
        self.messages.clear();
        (self.next, self.taken, self.full) = (0, 0, None);
        batch.clear();
        done
    }

    /// Makes messages of the runs that came since the last flush.
    fn take(&mut self, now: Instant, batch: &TxBatch, segmentation: bool, counters: &Counters) {
        let runs = &batch.runs()[self.taken..];
        self.taken += runs.len();
        counters.add(Total::SendRuns, runs.len());
        for run in runs {
            if run.count == 1 || (segmentation && !self.refused.holds(now, run.to)) {
                self.messages.push(*run);
            } else {
                self.messages.extend(datagrams(run));
            }
        }
    }

    /// The first message was refused: it is lost, or if that is about cutting, cut here.
    fn handle_refusal(&mut self, now: Instant, error: &io::Error, seg: &mut bool, counters: &Counters) {
        let run = self.messages[self.next];
        // udp_send_skb() in net/ipv4/udp.c looks at each destination's route on its own.
        let (everywhere, why) = match error.raw_os_error() {
            // Its device does not do checksums, or IPsec takes it: maybe so for all, maybe for this one.
            Some(libc::EIO) if run.count > 1 => {
                (self.refused.is_hopeless(run.to.ip()), "its device or IPsec refuses it")
            }
            // A segment does not fit its path: EINVAL until Linux 6.13, EMSGSIZE since.
            Some(libc::EINVAL | libc::EMSGSIZE) if run.count > 1 => (false, "its MTU is small"),
            Some(_) | None => {
                counters.count_drops(DropReason::SendFailed, run.count);
                self.next += 1;
                return;
            }
        };
        if everywhere {
            *seg = false;
            counters.add(Total::OffloadFallbacks, 1);
            info!(
                "the kernel or network card refuses UDP segmentation: sending datagrams one by one from now on"
            );
            let rest = self.messages.split_off(self.next);
            self.messages.extend(rest.iter().flat_map(datagrams));
            return;
        }
        if self.refused.remember(now, run.to) {
            counters.add(Total::OffloadFallbacks, 1);
            info!(to = %run.to, why, "no UDP segmentation on this path: sending datagrams one by one");
        }
        // All that wait for this destination, so that the rest of the batch does not ask again.
        let rest = self.messages.split_off(self.next);
        for message in &rest {
            if message.to == run.to {
                self.messages.extend(datagrams(message));
            } else {
                self.messages.push(*message);
            }
        }
    }
}

/// Destinations that do not take runs.
#[derive(Debug, Default)]
struct Refused {
    until: HashMap<SocketAddr, Instant>,
    /// Where a device refused, as long as none ever took a run.
    uncut: Vec<IpAddr>,
    /// Whether one ever did.
    cut: bool,
}

impl Refused {
    fn holds(&self, now: Instant, to: SocketAddr) -> bool {
        !self.until.is_empty() && self.until.get(&to).is_some_and(|until| now < *until)
    }

    /// Whether that is news.
    fn remember(&mut self, now: Instant, to: SocketAddr) -> bool {
        if self.until.len() >= REFUSED && !self.until.contains_key(&to) {
            let oldest = self.until.iter().min_by_key(|(_, until)| **until).map(|(to, _)| *to);
            oldest.and_then(|to| self.until.remove(&to));
        }
        self.until.insert(to, now + REFUSED_FOR).is_none()
    }

    /// What a socket took.
    fn note_sent(&mut self, messages: &[Run]) {
        if !self.cut && messages.iter().any(|message| message.count > 1) {
            self.cut = true;
            self.uncut = Vec::new();
        }
    }

    /// A device refused to cut what goes to `to`; whether there is no hope for other destinations either.
    /// Addresses count, not ports: the lanes of one node share their path.
    fn is_hopeless(&mut self, to: IpAddr) -> bool {
        if self.cut {
            return false;
        }
        if !self.uncut.contains(&to) {
            self.uncut.push(to);
        }
        self.uncut.len() >= GIVE_UP_AFTER
    }
}

/// A run's datagrams, one by one.
fn datagrams(run: &Run) -> impl Iterator<Item = Run> {
    let run = *run;
    (0..run.count).map(move |i| {
        let start = i * run.segment;
        let len = run.segment.min(run.len - start);
        Run { offset: run.offset + start, len, segment: len, count: 1, ..run }
    })
}
