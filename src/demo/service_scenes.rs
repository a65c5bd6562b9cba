//! What is shown of Services: by address, from outside, by name, and when an endpoint dies.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::process::Stdio;
use std::time::Duration;

use super::dns::{LookedUp, Record};
use super::report::Check;
use super::stage::{Asker, Stage};
use super::traffic::download::Download;
use super::traffic::spread::Spread;
use super::traffic::{Answer, Protocol};
use super::world::{Outside, Process, ourselves};
use super::{DemoError, services};
use crate::io::clock;

/// Connections (and datagrams) of all clients together: so many that chance alone is small beside what would
/// be wrong, and so few that nobody waits.
const CONVERSATIONS: u32 = 600;
/// But no client has fewer.
const LEAST_EACH: u32 = 20;
/// A share counts as even within so many standard deviations: by chance it is not once in a million runs.
const DEVIATIONS: f64 = 5.0;
/// A download takes 2.5 s at the pace of the pods' servers.
const DOWNLOAD_BYTES: u64 = 250 * 32 * 1024;
/// The endpoint dies in the middle.
const LIVES_FOR: Duration = Duration::from_millis(700);
/// Longer silence of a download is not "untouched". Nothing should show but the scheduler of a busy machine.
const LONGEST_PAUSE_US: u64 = 1_500_000;
/// A client hears that its endpoint is gone, and has another, within that: the keepalive's second, and some.
const RESET_WITHIN_US: u64 = 2_500_000;
const AGAIN_WITHIN_US: u64 = 1_000_000;
/// Where a name or a Service has just been written.
const ANSWER_WITHIN_MS: u64 = 5000;

impl Stage {
    /// By its ClusterIP, from a pod of every node.
    pub(super) fn service_by_address(&mut self, again: bool) -> Result<(), DemoError> {
        let title = if again {
            "The same Service, now this way"
        } else {
            "A Service: pods reach it by its ClusterIP"
        };
        let (names, address) = (self.endpoint_names(), services::socket(false));
        let explanation = format!(
            "{} is {address}; behind it are {}, on port {}. No kube-proxy.",
            services::NAME,
            listed(&names),
            super::traffic::PORT
        );
        self.open(title, &explanation);
        let clients: Vec<_> =
            self.world.nodes.iter().filter_map(|node| node.pods.first()).map(Asker::pod).collect();
        let protocols = [Protocol::Tcp, Protocol::Udp];
        let times = (CONVERSATIONS / (clients.len() * protocols.len()) as u32).max(LEAST_EACH);
        let mut total = BTreeMap::new();
        for (index, client) in clients.iter().enumerate() {
            for (turn, protocol) in protocols.into_iter().enumerate() {
                let v6 = self.world.v6 && (index + turn) % 2 == 1;
                let spread =
                    self.many(client, protocol, services::socket(v6), services::NAME, times, &names)?;
                for (name, count) in spread.map(|spread| spread.by).unwrap_or_default() {
                    *total.entry(name).or_insert(0) += count;
                }
            }
        }
        self.share(&names, &total);
        let Some(client) = clients.first() else { return Ok(()) };
        let closed = SocketAddr::new(services::address(false), services::PORT + 1);
        self.must_not_answer(client, closed, "a port it does not have,", "connection refused")
    }

    /// By a NodePort, from a machine that is no node.
    pub(super) fn service_from_outside(&mut self) -> Result<(), DemoError> {
        let client = Asker {
            name: Outside::NAME.into(),
            holder: self.world.outside.holder.pid(),
            v4: self.world.outside.v4.into(),
            v6: self.world.outside.v6.into(),
        };
        self.open(
            &format!("The world reaches it by port {} of any node", services::NODE_PORT),
            &format!(
                "From {}, which is no node and knows no pods. Its address stays, whichever node has the pod.",
                client.v4
            ),
        );
        let names = self.endpoint_names();
        let nodes: Vec<_> = self
            .world
            .nodes
            .iter()
            .map(|node| (node.name.clone(), [node.address(false), node.address(true)]))
            .collect();
        let times = (CONVERSATIONS / (nodes.len() * 2) as u32).max(LEAST_EACH);
        for (index, (node, addresses)) in nodes.iter().enumerate() {
            for (turn, protocol) in [Protocol::Tcp, Protocol::Udp].into_iter().enumerate() {
                let v6 = self.world.v6 && (index + turn) % 2 == 1;
                let target = SocketAddr::new(addresses[usize::from(v6)], services::NODE_PORT);
                self.many(&client, protocol, target, node, times, &names)?;
            }
        }
        Ok(())
    }

    /// By its name: DNS is a Service too.
    pub(super) fn service_by_name(&mut self) -> Result<(), DemoError> {
        let full = services::full_name();
        let server = services::dns_socket(false);
        self.open(
            "Pods find it by its name",
            &format!(
                "The pod `dns` answers at {server}, a Service too, from the same objects as the agents."
            ),
        );
        let client = Asker::pod(self.pod(0, 0)?);
        let v4 = vec![services::address(false)];
        let mut questions = vec![
            (full.clone(), Record::A, server, false, Some(v4.clone())),
            (full.clone(), Record::A, server, true, Some(v4)),
            (full.replacen(services::NAME, "no-service", 1), Record::A, server, false, None),
        ];
        if self.world.v6 {
            let (v6, server_v6) = (vec![services::address(true)], services::dns_socket(true));
            questions.insert(2, (full.clone(), Record::Aaaa, server_v6, false, Some(v6)));
        }
        for (name, record, server, tcp, expected) in questions {
            self.must_resolve(&client, &name, record, server, tcp, expected.as_deref())?;
        }
        // As any program does it: with the resolver of the system, by the pod's own /etc/resolv.conf.
        for (node, name) in [(0, full), (1, services::short_name())] {
            let client = Asker::pod(self.pod(node, 0)?);
            self.must_answer_by_name(&client, &name)?;
        }
        Ok(())
    }

    /// An endpoint dies while it is being downloaded from.
    pub(super) fn endpoint_dies(&mut self) -> Result<(), DemoError> {
        let names = self.endpoint_names();
        let last = services::endpoints(&self.world).last().map(|(node, pod)| (*node, pod.name.clone()));
        let Some((node, victim)) = last else { return Ok(()) };
        self.open(
            &format!("A pod dies in the middle of downloads: {victim}"),
            "Without a word, as if it had lost power. A client that waits in vain asks after 1 s: Warren says no.",
        );
        let target = services::socket(false);
        let clients: Vec<_> = self
            .world
            .nodes
            .iter()
            .take(names.len())
            .filter_map(|node| node.pods.first())
            .map(Asker::pod)
            .collect();
        let mut running = Vec::new();
        for client in clients {
            let mut command = ourselves(Some(client.holder));
            command.args(["download", &target.to_string(), "--from", &names.join(",")]);
            command.args(["--bytes", &DOWNLOAD_BYTES.to_string()]).stdin(Stdio::null());
            let process = Process::start(command, &format!("{}'s downloads", client.name), "downloading")?;
            running.push((client, process));
        }
        std::thread::sleep(LIVES_FOR);
        self.world.kill_pod(node, 1)?;
        services::write(&self.world)?;
        for (client, process) in running {
            let who = format!("{}'s downloads", client.name);
            let done = self.answer_of::<Vec<Download>>(process, &who, &who)?;
            let done =
                done.unwrap_or_else(|error| vec![Download { error: Some(error), ..Download::default() }]);
            let (dead, alive): (Vec<_>, Vec<_>) = done.into_iter().partition(|one| one.from == victim);
            self.untouched(&client, &alive, names.len() - 1);
            self.moved_on(&client, dead.first(), &victim);
        }
        // The next scenes have it replaced.
        self.world.add_pod(node)?;
        services::write(&self.world)
    }

    fn endpoint_names(&self) -> Vec<String> {
        services::endpoints(&self.world).into_iter().map(|(_, pod)| pod.name.clone()).collect()
    }

    /// Each must be answered, by all of the pods that are behind it and nobody else, and all must have seen
    /// the client's own address.
    fn many(
        &mut self,
        from: &Asker,
        protocol: Protocol,
        target: SocketAddr,
        name: &str,
        times: u32,
        behind: &[String],
    ) -> Result<Option<Spread>, DemoError> {
        let words = [
            "spread".into(),
            protocol.flag().into(),
            target.to_string(),
            "--times".into(),
            times.to_string(),
        ];
        let heard = self.tool::<Spread>(from.holder, &words, &format!("{} asks {target}", from.name))?;
        let own = from.address(target.is_ipv6());
        let all: BTreeSet<_> = behind.iter().collect();
        let ok = heard.as_ref().is_ok_and(|heard| {
            heard.answered() == times
                && heard.by.keys().collect::<BTreeSet<_>>() == all
                && heard.saw == [own].into()
        });
        let seen = match &heard {
            Ok(heard) if ok => {
                format!(
                    "{times} answers; all {} pods saw {own} ({:.1} ms)",
                    behind.len(),
                    heard.median as f64 / 1000.0
                )
            }
            Ok(heard) => {
                let saw: Vec<_> = heard.saw.iter().map(IpAddr::to_string).collect();
                let error = heard
                    .error
                    .as_ref()
                    .map_or_else(String::new, |e| format!("; {} times {e}", heard.failed));
                format!("{}, who saw {}{error}", counts(&heard.by), saw.join(", "))
            }
            Err(error) => error.clone(),
        };
        let what = format!("{:4} {} -> {name} {target}", protocol.name(), from.name);
        let expected = format!("{times} answers, by {}, who saw {own}", listed(behind));
        self.report.check(Check { what, expected, seen, ok }, clock::now());
        Ok(heard.ok())
    }

    /// Whether chance alone explains the difference between the shares.
    fn share(&mut self, names: &[String], by: &BTreeMap<String, u32>) {
        let count = |name: &String| by.get(name).copied().unwrap_or(0);
        let total: u32 = by.values().sum();
        let (least, most) = even(total, names.len());
        let ok = total > 0 && names.iter().all(|name| (least..=most).contains(&count(name)));
        let share =
            |name: &String| format!("{name} {:.0} %", f64::from(count(name) * 100) / f64::from(total.max(1)));
        let seen = names.iter().map(share).collect::<Vec<_>>().join(", ");
        let what = format!("who answered those {total}");
        let expected = format!("{least} to {most} each, as chance has it");
        let seen = if ok { seen } else { counts(by) };
        self.report.check(Check { what, expected, seen, ok }, clock::now());
    }

    fn must_resolve(
        &mut self,
        from: &Asker,
        name: &str,
        record: Record,
        server: SocketAddr,
        tcp: bool,
        expected: Option<&[IpAddr]>,
    ) -> Result<(), DemoError> {
        let mut words: Vec<String> =
            ["lookup", name, "--record", record.flag(), "--server"].map(Into::into).into();
        words.extend([server.to_string(), "--retry-ms".into(), ANSWER_WITHIN_MS.to_string()]);
        words.extend(tcp.then(|| "--tcp".into()));
        let heard = self.tool::<LookedUp>(from.holder, &words, &format!("{} asks for {name}", from.name))?;
        let ok =
            heard.as_ref().is_ok_and(|heard| heard.exists.then_some(heard.addresses.as_slice()) == expected);
        let in_words = |exists: bool, addresses: &[IpAddr]| match (exists, addresses) {
            (false, _) => "no such name".to_string(),
            (true, []) => "no address".into(),
            (true, some) => some.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", "),
        };
        let seen = match &heard {
            Ok(heard) => {
                let took = heard.micros as f64 / 1000.0;
                format!("{} ({took:.1} ms)", in_words(heard.exists, &heard.addresses))
            }
            Err(error) => error.clone(),
        };
        let over = if tcp { Protocol::Tcp } else { Protocol::Udp };
        let family = if server.is_ipv6() { " over IPv6" } else { "" };
        let short = name.split('.').next().unwrap_or_default();
        let what =
            format!("{:4} {} asks for {} of {short}...{family}", over.name(), from.name, record.name());
        let expected = in_words(expected.is_some(), expected.unwrap_or_default());
        self.report.check(Check { what, expected, seen, ok }, clock::now());
        Ok(())
    }

    fn must_answer_by_name(&mut self, from: &Asker, name: &str) -> Result<(), DemoError> {
        let target = format!("{name}:{}", services::PORT);
        let retry = ANSWER_WITHIN_MS.to_string();
        let words = ["ask".into(), "tcp".into(), target, "--retry-ms".into(), retry];
        let heard = self.tool::<Answer>(from.holder, &words, &format!("{} asks {name}", from.name))?;
        let behind = self.endpoint_names();
        let ok = heard.as_ref().is_ok_and(|answer| {
            let v6 = answer.to.is_ipv6();
            behind.contains(&answer.by) && answer.to == services::socket(v6) && answer.saw == from.address(v6)
        });
        let seen = match &heard {
            Ok(answer) => format!("is {}; {} saw {}", answer.to, answer.by, answer.saw),
            Err(error) => error.clone(),
        };
        let what = format!("TCP  {} -> {name}", from.name);
        let expected =
            format!("it is {}, {} answers and saw {}", services::address(false), listed(&behind), from.v4);
        self.report.check(Check { what, expected, seen, ok }, clock::now());
        Ok(())
    }

    fn untouched(&mut self, client: &Asker, done: &[Download], count: usize) {
        let whole = |one: &&Download| {
            one.error.is_none()
                && one.right
                && one.bytes == DOWNLOAD_BYTES
                && one.saw == Some(client.v4)
                && one.longest_pause <= LONGEST_PAUSE_US
        };
        let ok = done.len() == count && done.iter().all(|one| whole(&one));
        let from = listed(&done.iter().map(|one| one.from.clone()).collect::<Vec<_>>());
        let pause = done.iter().map(|one| one.longest_pause).max().unwrap_or(0) as f64 / 1000.0;
        let seen = match done.iter().find(|one| !whole(one)) {
            None => {
                format!("untouched, {:.1} MB each, longest pause {pause:.0} ms", DOWNLOAD_BYTES as f64 / 1e6)
            }
            Some(bad) => {
                let how = bad.error.as_deref().unwrap_or("whole");
                let right = if bad.right { "right" } else { "wrong" };
                format!("{}: {how}, {} {right} bytes, longest pause {pause:.0} ms", bad.from, bad.bytes)
            }
        };
        let what = format!("{} downloads from {from}", client.name);
        let expected = format!("{count} downloads, whole, without a pause");
        self.report.check(Check { what, expected, seen, ok }, clock::now());
    }

    fn moved_on(&mut self, client: &Asker, done: Option<&Download>, victim: &str) {
        let ok = done.is_some_and(|one| {
            one.error.as_deref() == Some("connection reset")
                && one.right
                && (1..DOWNLOAD_BYTES).contains(&one.bytes)
                && one.ended_after <= RESET_WITHIN_US
                && one.again.as_ref().is_some_and(|(by, took)| by != victim && *took <= AGAIN_WITHIN_US)
        });
        let seen = done.map_or("no download".into(), |one| {
            let how = one.error.as_deref().unwrap_or("whole");
            let after = one.ended_after as f64 / 1e6;
            let again = one.again.as_ref().map_or("nobody answers a new one".into(), |(by, took)| {
                format!("{by} answers a new one in {:.1} ms", *took as f64 / 1000.0)
            });
            format!("{how} after {after:.1} s; {again}")
        });
        let what = format!("{} downloads from {victim}, killed", client.name);
        let expected = "connection reset within 2.5 s; another pod answers a new one at once".into();
        self.report.check(Check { what, expected, seen, ok }, clock::now());
    }
}

/// The least and the most that one of `endpoints` may have of so many, if each is chosen by chance.
fn even(total: u32, endpoints: usize) -> (u32, u32) {
    let share = 1.0 / endpoints.max(1) as f64;
    let mean = f64::from(total) * share;
    let deviation = (mean * (1.0 - share)).sqrt() * DEVIATIONS;
    ((mean - deviation).max(0.0).floor() as u32, (mean + deviation).ceil() as u32)
}

fn counts(by: &BTreeMap<String, u32>) -> String {
    if by.is_empty() {
        return "nobody".into();
    }
    by.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
}

fn listed(names: &[String]) -> String {
    match names {
        [] => "nobody".into(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_even_share_has_room_for_chance_and_no_more() {
        assert_eq!(even(600, 3), (142, 258));
        let (least, most) = even(600, 2);
        assert!(least > 230 && most < 370, "{least} {most}");
        assert_eq!(even(0, 3), (0, 0));
        // One of three that gets nothing, or twice its share, is seen.
        assert!(!(142..=258).contains(&0) && !(142..=258).contains(&400));
    }

    #[test]
    fn names_are_listed_as_people_do() {
        let names: Vec<String> = ["a", "b", "c"].map(Into::into).into();
        assert_eq!(listed(&names), "a, b and c");
        assert_eq!((listed(&names[..1]), listed(&[])), ("a".into(), "nobody".into()));
    }
}
