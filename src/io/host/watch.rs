//! Keeping it so: the kernel's notifications, and a look every second for what they miss.

use std::collections::HashSet;
use std::pin::Pin;
use std::time::Duration;

use futures_util::StreamExt;
use ipnet::IpNet;
use nlink::OwnedEventStream;
use nlink::netlink::{Connection, Nftables};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, Sleep};

use super::sysctl::Fullness;
use super::{HostConfig, HostError, HostNetwork, Report, routes};

/// Changes come in bursts (a restarted firewall, a new pod); one look serves the whole burst.
const SETTLE: Duration = Duration::from_millis(100);
/// The look that needs no notification: a repair must never take longer than two seconds.
const POLL: Duration = Duration::from_secs(1);
/// How often it is looked whether the kernel's connection table fills up: one pod's flood must not fill the last
/// quarter of the smallest between two looks, and no loop takes 300,000 flows a second.
const PRESSURE: Duration = Duration::from_millis(100);
/// The same while three quarters of it are free.
const NO_PRESSURE: Duration = Duration::from_millis(300);
/// Above this many routes (a large cluster, a node that speaks BGP) listing them all costs too much for every
/// look; then a notification about a route of ours or in the place of one, or every tenth look, decides.
const MANY_ROUTES: usize = 200;
const MANY_ROUTES_TICKS: u32 = 10;

/// What [`HostNetwork::watch`] tells the agent.
#[derive(Debug)]
#[non_exhaustive]
pub enum HostEvent {
    /// Something was missing or wrong and is right again; the report is empty where the tunnel device is
    /// back and nothing had to be done.
    Repaired(Report),
    /// The wanted state is another one, and is reached.
    Changed(Report),
    /// The tunnel device is gone, and its queues with it: the agent must open them again. The rest
    /// comes back by itself once the device is there. Said once each time.
    TunGone {
        /// Its name.
        name: String,
    },
    /// Repair failed; it is tried again every second, and said again only if the reason changes.
    Failed(HostError),
}

impl HostNetwork {
    /// Applies every new `config` and repairs what others break, until `config`'s sender or
    /// `events`' receiver is gone.
    pub async fn watch(
        mut self,
        mut config: watch::Receiver<HostConfig>,
        events: mpsc::Sender<HostEvent>,
    ) -> Result<(), HostError> {
        let wanted = places(&config.borrow());
        let mut notifications = Notifications::open(wanted).await?;
        let mut poll = tokio::time::interval(POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut pressure = Box::pin(tokio::time::sleep(PRESSURE));
        let mut quiet = Quiet::default();
        let mut ticks = 0_u32;
        let mut burst = None;
        // What is due stays so until a look has come to its end.
        let mut look_at_routes = true;
        loop {
            let (due, mut asked) = (look_at_routes, false);
            tokio::select! {
                changed = config.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    asked = true;
                }
                kind = notifications.next(), if burst.is_none() => {
                    burst = Some((kind, Box::pin(tokio::time::sleep(SETTLE))));
                    continue;
                }
                kind = ended(&mut burst) => {
                    burst = None;
                    let more = notifications.drain();
                    // Our own commits are announced to us too.
                    if kind.max(more) == Kind::Nft && self.knows_generation().await {
                        continue;
                    }
                    look_at_routes = true;
                }
                _ = poll.tick() => {
                    ticks = ticks.wrapping_add(1);
                    if notifications.lost {
                        let wanted = places(&config.borrow());
                        notifications = Notifications::open(wanted).await.unwrap_or(notifications);
                        self.generation = None;
                        look_at_routes = true;
                    }
                    look_at_routes |=
                        self.routes < MANY_ROUTES || ticks.is_multiple_of(MANY_ROUTES_TICKS);
                }
                () = &mut pressure => {
                    let calm = Fullness::read().is_none_or(Fullness::is_calm);
                    pressure.as_mut().reset(Instant::now() + if calm { NO_PRESSURE } else { PRESSURE });
                    if (calm && self.pressed.is_none()) || !self.pressure_changes() {
                        continue;
                    }
                }
                () = events.closed() => return Ok(()),
            }
            // A change may have come together with something else.
            asked |= config.has_changed().unwrap_or(false);
            let wanted = config.borrow_and_update().clone();
            if asked {
                notifications.places = places(&wanted);
                look_at_routes = true;
            }
            // Services come and go all the time: where it is only that, nothing else waits to be looked at.
            if self.change_elements(&wanted).await && asked {
                look_at_routes = due;
                continue;
            }
            let outcome = self.reconcile(&wanted, look_at_routes).await;
            look_at_routes &= outcome.is_err();
            let event = match quiet.event(outcome) {
                Some(HostEvent::Repaired(report)) if asked => HostEvent::Changed(report),
                Some(event) => event,
                None => continue,
            };
            if events.send(event).await.is_err() {
                return Ok(());
            }
        }
    }
}

/// Waits for the end of a burst, if there is one; says what it began with.
async fn ended(burst: &mut Option<(Kind, Pin<Box<Sleep>>)>) -> Kind {
    match burst {
        Some((kind, sleep)) => {
            sleep.await;
            *kind
        }
        None => std::future::pending().await,
    }
}

/// What a notification was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// nftables: its generation says whether we know.
    Nft,
    /// Links, addresses, routes, rules.
    Route,
}

/// What was said last, so that a lasting trouble is said once.
#[derive(Default)]
struct Quiet {
    tun_gone: bool,
    failure: Option<String>,
}

impl Quiet {
    fn event(&mut self, outcome: Result<Report, HostError>) -> Option<HostEvent> {
        match outcome {
            Ok(report) => {
                let was_gone = self.tun_gone;
                *self = Self::default();
                (was_gone || !report.is_empty()).then_some(HostEvent::Repaired(report))
            }
            Err(HostError::NoTun { name }) => {
                self.failure = None;
                let first = !std::mem::replace(&mut self.tun_gone, true);
                first.then_some(HostEvent::TunGone { name })
            }
            Err(error) => {
                let reason = error.to_string();
                let first = self.failure.replace(reason.clone()) != Some(reason);
                first.then_some(HostEvent::Failed(error))
            }
        }
    }
}

type RouteMessages = futures_util::stream::BoxStream<'static, RouteNetlinkMessage>;

/// Both kernels' announcements, boiled down to "something that may be ours has changed".
struct Notifications {
    route: RouteMessages,
    nft: OwnedEventStream<Nftables>,
    /// A stream has ended (the kernel had more to say than its buffer holds): only the poll looks
    /// until both are opened again.
    lost: bool,
    /// Where our routes lead: another in the place of one is the end of ours.
    places: HashSet<IpNet>,
}

impl Notifications {
    async fn open(places: HashSet<IpNet>) -> Result<Self, HostError> {
        let (connection, _, messages) = rtnetlink::new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ])
        .map_err(|e| HostError::io("listen for network changes", e))?;
        tokio::spawn(connection);
        let route = messages
            .filter_map(|(message, _)| async move {
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => Some(inner),
                    _ => None,
                }
            })
            .boxed();
        let nft = Connection::<Nftables>::new().map_err(|_| HostError::NoNftables)?;
        nft.subscribe_all().map_err(|e| HostError::nft("listen for nft changes", e))?;
        Ok(Self { route, nft: nft.into_events().await, lost: false, places })
    }

    /// Waits until something that may concern us has changed.
    async fn next(&mut self) -> Kind {
        while !self.lost {
            tokio::select! {
                message = self.route.next() => match message {
                    Some(message) if concerns_us(&message, &self.places) => return Kind::Route,
                    Some(_) => {}
                    None => self.lost = true,
                },
                event = self.nft.next() => match event {
                    Some(Ok(_)) => return Kind::Nft,
                    Some(Err(_)) | None => self.lost = true,
                },
            }
        }
        std::future::pending().await
    }

    /// Forgets what has arrived already: the look that follows sees its result.
    fn drain(&mut self) -> Kind {
        use futures_util::FutureExt;
        let mut all = Kind::Nft;
        while let Some(kind) = self.next().now_or_never() {
            all = all.max(kind);
        }
        all
    }
}

/// Route changes of a routing daemon must not cost us a look each.
fn concerns_us(message: &RouteNetlinkMessage, places: &HashSet<IpNet>) -> bool {
    match message {
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
            routes::is_ours(route) || routes::destination(route).is_some_and(|to| places.contains(&to))
        }
        _ => true,
    }
}

/// Where the wanted routes lead.
fn places(config: &HostConfig) -> HashSet<IpNet> {
    let routes = config.tunnel_routes.iter().chain(&config.service_routes);
    routes.map(|route| route.range.trunc()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gone() -> Result<Report, HostError> {
        Err(HostError::NoTun { name: "warren0".to_owned() })
    }

    fn failed() -> Result<Report, HostError> {
        Err(HostError::MtuTooSmall { mtu: 1000 })
    }

    #[test]
    fn a_device_that_is_back_with_nothing_to_repair_is_said() {
        // Renamed and back; and made anew, with all but one thing repaired in the look that failed.
        for between in [None, Some(failed())] {
            let mut quiet = Quiet::default();
            assert!(matches!(quiet.event(gone()), Some(HostEvent::TunGone { .. })));
            assert!(quiet.event(gone()).is_none());
            if let Some(failure) = between {
                assert!(matches!(quiet.event(failure), Some(HostEvent::Failed(_))));
                assert!(quiet.event(failed()).is_none());
            }
            let said = quiet.event(Ok(Report::default()));
            assert!(matches!(&said, Some(HostEvent::Repaired(report)) if report.is_empty()), "{said:?}");
            assert!(quiet.event(Ok(Report::default())).is_none(), "said once");
        }
    }

    #[test]
    fn a_failure_that_passes_by_itself_needs_no_word() {
        let mut quiet = Quiet::default();
        assert!(quiet.event(Ok(Report::default())).is_none());
        assert!(matches!(quiet.event(failed()), Some(HostEvent::Failed(_))));
        assert!(quiet.event(Ok(Report::default())).is_none());
        assert!(matches!(quiet.event(failed()), Some(HostEvent::Failed(_))), "news again");
    }
}
