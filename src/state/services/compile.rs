//! The Services that changed, into the table of all.
//!
//! A change of one Service costs what that Service costs, however many there are: the store tells which
//! changed, claims tell whom that touches, and the table shares everything else with the one before.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::Surroundings;
use super::build::{Builder, Built, MAX_OF_ALL, Room};
use super::claims::{Claim, Claims};
use super::judge::judge;
use super::loops::LoopPorts;
use super::plan::{MAX_HEALTH_CHECKS, MAX_OUTSIDE, ServicePlan};
use super::service::{Problems, ServiceInfo};
use super::slice::{SliceEndpoint, SliceInfo};
use super::store::ServiceStore;
use crate::snapshot::service::{Listen, ServiceTable};
use crate::state::problem::{Problem, ProblemKind};

/// What a compile gives. What did not change is the same `Arc` as before.
#[derive(Clone, Debug)]
pub struct CompiledServices {
    /// For the packet line.
    pub table: Arc<ServiceTable>,
    /// For the host.
    pub plan: Arc<ServicePlan>,
    /// By origin: what is wrong now with Services that were looked at.
    pub reports: Vec<(String, Vec<Problem>)>,
}

/// How much the source has said about Services and slices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listed {
    /// Not both kinds were heard of: to serve Services without their endpoints would refuse every client.
    Nothing,
    /// Both, but maybe not all there is.
    Some,
    /// All there is.
    All,
}

/// The Service whose endpoints are the API servers.
const KUBERNETES: &str = "default/kubernetes";
/// Most API servers, times ports, that are protected from Services.
const MAX_API_SERVERS: usize = 256;

/// Compiles, and remembers what it compiled. It follows one store.
#[derive(Debug, Default)]
pub struct ServiceCompiler {
    revision: u64,
    around: Surroundings,
    /// What is around us once Services are heard of.
    waiting: Option<Surroundings>,
    entries: HashMap<Arc<str>, Entry>,
    claims: Claims,
    loops: LoopPorts,
    ids: HashSet<u32>,
    /// ClusterIPs in no Service range.
    outside: BTreeSet<IpAddr>,
    /// How many of those have no route, as last reported.
    unrouted: usize,
    /// Whether the Service ranges are others than those that `outside` was found by.
    ranges_changed: bool,
    endpoints: usize,
    /// Services that lack something because all together have too many.
    starved: BTreeSet<Arc<str>>,
    most: Room,
    rebuilt: u64,
    /// What was changed since the last hand-over, if anything was.
    table: ServiceTable,
    table_changed: bool,
    plan: ServicePlan,
    plan_changed: bool,
    last_table: Arc<ServiceTable>,
    last_plan: Arc<ServicePlan>,
}

/// A Service as it was compiled.
#[derive(Debug, Default)]
struct Entry {
    /// What the claims were made from.
    info: Option<Arc<ServiceInfo>>,
    claims: Box<[Claim]>,
    built: Built,
}

type Dirty = BTreeSet<Arc<str>>;

impl Default for Room {
    fn default() -> Room {
        Room { endpoints: MAX_OF_ALL, health_checks: MAX_HEALTH_CHECKS }
    }
}

impl ServiceCompiler {
    /// Compiles what changed. `around`: if that may have changed.
    pub fn compile(
        &mut self,
        store: &ServiceStore,
        around: Option<Surroundings>,
        listed: Listed,
    ) -> CompiledServices {
        let around = around.or(self.waiting.take());
        if listed == Listed::Nothing {
            self.waiting = around;
            let (table, plan) = self.hand_over();
            return CompiledServices { table, plan, reports: Vec::new() };
        }
        let mut dirty = match store.changed_since(self.revision) {
            Some(dirty) => dirty,
            None => self.everything(store),
        };
        self.revision = store.revision();
        let mut reports = Vec::new();
        let around =
            around.map(|around| Surroundings { api_servers: self.around.api_servers.clone(), ..around });
        if let Some(around) = around.filter(|around| *around != self.around) {
            reports = self.move_to(around, store, &mut dirty);
        }
        if self.around.settings.enabled {
            if dirty.contains(KUBERNETES) {
                self.heed_api_servers(store, &mut dirty);
            }
            self.settle(store, &mut dirty);
            // What was refused for lack of room gets what others have given up, the oldest first.
            if !dirty.is_empty() {
                dirty.extend(self.starved.iter().cloned());
            }
            reports = self.rebuild(store, dirty);
            reports.extend(self.report_unrouted());
        }
        if listed == Listed::All && !self.table.is_complete() {
            self.table.set_complete();
            self.table_changed = true;
        }
        let (table, plan) = self.hand_over();
        CompiledServices { table, plan, reports }
    }

    #[cfg(test)]
    pub(super) fn with_room(endpoints: usize, health_checks: usize) -> ServiceCompiler {
        ServiceCompiler { most: Room { endpoints, health_checks }, ..ServiceCompiler::default() }
    }

    /// How many Services there are.
    pub fn services(&self) -> usize {
        self.entries.len()
    }

    /// How many endpoints their ports have.
    pub fn endpoints(&self) -> usize {
        self.endpoints
    }

    /// How many times a Service was ever compiled: what a change costs.
    pub fn rebuilt(&self) -> u64 {
        self.rebuilt
    }

    fn everything(&self, store: &ServiceStore) -> Dirty {
        let known = self.entries.keys().cloned();
        store.services().map(|info| Arc::clone(&info.name)).chain(known).collect()
    }

    /// Marks the Services that what is around them may treat differently now; what there is to report already.
    fn move_to(
        &mut self,
        around: Surroundings,
        store: &ServiceStore,
        dirty: &mut Dirty,
    ) -> Vec<(String, Vec<Problem>)> {
        let before = std::mem::replace(&mut self.around, around);
        let around = &self.around;
        if !around.settings.enabled {
            return self.forget();
        }
        let elsewhere = before.node != around.node || before.zone != around.zone;
        if elsewhere || before.settings != around.settings || before.services != around.services {
            dirty.extend(self.everything(store));
            self.ranges_changed = true;
            return Vec::new();
        }
        let at_node = |around: &Surroundings, at: &Listen| around.is_node(at.address);
        let moved = |at: &&Listen| at_node(&before, at) != at_node(around, at);
        let api_servers: Vec<Listen> = around.api_servers.iter().filter(moved).copied().collect();
        let judged = |address: &IpAddr| {
            before.pods.holds(*address) != around.pods.holds(*address)
                || before.is_node(*address) != around.is_node(*address)
                || before.listeners_at(*address) != around.listeners_at(*address)
        };
        for info in self.entries.values().filter_map(|entry| entry.info.as_ref()) {
            let addresses = info.cluster_ips.iter().chain(&info.external_ips).chain(&info.load_balancers);
            // A node that comes with an API server's address takes its port from node ports.
            if addresses.into_iter().any(judged) || wants_one_of(info, &api_servers) {
                dirty.insert(Arc::clone(&info.name));
            }
        }
        Vec::new()
    }

    /// The API servers may have moved: marks the Services that ask for what is theirs, or was.
    fn heed_api_servers(&mut self, store: &ServiceStore, dirty: &mut Dirty) {
        let listens = |slice: &Arc<SliceInfo>| {
            let slice = Arc::clone(slice);
            (0..slice.endpoints.len() * slice.ports.len()).map(move |n| {
                let port = &slice.ports[n % slice.ports.len()];
                let address = slice.endpoints[n / slice.ports.len()].address;
                Listen { address, protocol: port.protocol, port: port.port }
            })
        };
        let mut next: Vec<Listen> =
            store.slices(KUBERNETES).flat_map(listens).take(MAX_API_SERVERS).collect();
        next.sort_unstable();
        next.dedup();
        if next == self.around.api_servers {
            return;
        }
        let before = std::mem::replace(&mut self.around.api_servers, next);
        let differs = |at: &Listen| before.contains(at) != self.around.api_servers.contains(at);
        let moved: Vec<Listen> =
            before.iter().chain(&self.around.api_servers).filter(|at| differs(at)).copied().collect();
        let infos = self.entries.values().filter_map(|entry| entry.info.as_ref());
        dirty.extend(infos.filter(|info| wants_one_of(info, &moved)).map(|info| Arc::clone(&info.name)));
    }

    /// Services are not ours to serve any more.
    fn forget(&mut self) -> Vec<(String, Vec<Problem>)> {
        let troubled = self.entries.iter().filter(|(_, entry)| !entry.built.problems.is_empty());
        let reports = troubled.map(|(name, _)| (origin(name), Vec::new()));
        let reports = reports.chain((self.unrouted > 0).then(|| (OUTSIDE.to_owned(), Vec::new()))).collect();
        let mut empty = ServiceCompiler {
            revision: self.revision,
            around: self.around.clone(),
            rebuilt: self.rebuilt,
            most: self.most,
            table_changed: !self.entries.is_empty(),
            plan_changed: !self.entries.is_empty(),
            last_table: Arc::clone(&self.last_table),
            last_plan: Arc::clone(&self.last_plan),
            ..ServiceCompiler::default()
        };
        if self.table.is_complete() {
            empty.table.set_complete();
        }
        *self = empty;
        reports
    }

    /// Settles what the dirty Services claim, and marks whom that touches.
    fn settle(&mut self, store: &ServiceStore, dirty: &mut Dirty) {
        let touched = self.enter_claims(store, dirty);
        let mut moved = HashSet::new();
        if std::mem::take(&mut self.ranges_changed) {
            let holds = |address: &IpAddr| self.around.services.holds(*address);
            self.outside = self.claims.cluster_ips().filter(|address| !holds(address)).collect();
            moved.extend(self.outside.iter().copied());
        }
        for (claim, before) in touched {
            self.pass_on(claim, before, dirty, &mut moved);
        }
        // Nobody's endpoint may be a ClusterIP. In a Service range that is seen at the endpoint itself.
        if !moved.is_empty() {
            let holds = |endpoint: &SliceEndpoint| moved.contains(&endpoint.address);
            dirty.extend(store.services_with(|slice| slice.endpoints.iter().any(holds)));
        }
        // Who has a route keeps it.
        let routed = &self.plan.cluster_ips_outside;
        let lost = || routed.difference(&self.outside).next().is_some();
        if routed.len() < MAX_OUTSIDE.min(self.outside.len()) || lost() {
            let mut next: BTreeSet<IpAddr> = routed.intersection(&self.outside).copied().collect();
            let others = self.outside.iter().filter(|address| !routed.contains(address));
            next.extend(others.take(MAX_OUTSIDE.saturating_sub(next.len())));
            if next != **routed {
                self.plan.cluster_ips_outside = Arc::new(next);
                self.plan_changed = true;
            }
        }
    }

    /// What there is to say of ClusterIPs that no packet is routed to, if it is something new.
    fn report_unrouted(&mut self) -> Option<(String, Vec<Problem>)> {
        let without = self.outside.len().saturating_sub(self.plan.cluster_ips_outside.len());
        if std::mem::replace(&mut self.unrouted, without) == without {
            return None;
        }
        let problem = (without > 0).then(|| Problem {
            kind: ProblemKind::Setting,
            subject: "Services".to_owned(),
            field: "spec.clusterIPs".to_owned(),
            reason: format!(
                "{without} ClusterIPs cannot be reached: they lie in no known Service range, and only {MAX_OUTSIDE} \
                 such addresses are routed; name their range with --service-cidr or in a ServiceCIDR object"
            ),
        });
        Some((OUTSIDE.to_owned(), problem.into_iter().collect()))
    }

    /// Enters what the dirty Services claim; of each claim that somebody makes or gives up, who had it.
    fn enter_claims(&mut self, store: &ServiceStore, dirty: &Dirty) -> BTreeMap<Claim, Option<Arc<str>>> {
        let mut touched = BTreeMap::new();
        for name in dirty {
            let info = store.service(name);
            let claims = match info {
                Some(info) => judge(info, &self.around, &mut Problems::of("", "", "")).claims(),
                None => Box::default(),
            };
            let same = match self.entries.get(name) {
                Some(entry) => {
                    let before = entry.info.as_ref();
                    entry.claims == claims && before.map(Arc::as_ptr) == info.map(Arc::as_ptr)
                }
                None => info.is_none(),
            };
            if same {
                continue;
            }
            let entry = self.entries.entry(Arc::clone(name)).or_default();
            for claim in entry.claims.iter().chain(&claims) {
                let winner = || self.claims.winner(claim).map(|winner| Arc::clone(&winner.name));
                touched.entry(*claim).or_insert_with(winner);
            }
            entry.claims.iter().for_each(|claim| self.claims.remove(claim, name));
            if let Some(info) = info {
                claims.iter().for_each(|claim| self.claims.add(*claim, info));
            }
            entry.claims = claims;
            entry.info = info.cloned();
        }
        touched
    }

    /// A claim may have gone from one Service to another: marks whom that touches. `moved`: addresses that
    /// have become ClusterIPs outside of the Service ranges, or are none any more.
    fn pass_on(
        &mut self,
        claim: Claim,
        before: Option<Arc<str>>,
        dirty: &mut Dirty,
        moved: &mut HashSet<IpAddr>,
    ) {
        let after = self.claims.winner(&claim).map(|winner| Arc::clone(&winner.name));
        if before == after {
            return;
        }
        dirty.extend(self.claims.claimants(&claim).map(|info| Arc::clone(&info.name)));
        match claim {
            Claim::ClusterIp(address) if before.is_some() != after.is_some() => {
                let touched = self.claims.external_claimants(address);
                dirty.extend(touched.map(|info| Arc::clone(&info.name)));
                if !self.around.services.holds(address) {
                    match after {
                        Some(_) => self.outside.insert(address),
                        None => self.outside.remove(&address),
                    };
                    moved.insert(address);
                }
            }
            Claim::NodePort(protocol, port) => {
                let touched = self.claims.external_port_claimants(protocol, port);
                dirty.extend(touched.map(|info| Arc::clone(&info.name)));
                if before.is_some() {
                    return;
                }
                for evicted in self.loops.evict(protocol, port) {
                    let evicted = Claim::External(evicted);
                    let claimants = self.claims.claimants(&evicted);
                    dirty.extend(claimants.map(|info| Arc::clone(&info.name)));
                }
            }
            Claim::External(listen) if after.is_none() => self.loops.free(&listen),
            Claim::ClusterIp(_) | Claim::External(_) => {}
        }
    }

    /// Builds the dirty Services anew: first all that goes, then all that comes, as one Service may get
    /// what another one loses.
    fn rebuild(&mut self, store: &ServiceStore, dirty: Dirty) -> Vec<(String, Vec<Problem>)> {
        let built = self.build(store, dirty);
        let nothing = Built::default();
        for (_, before, after) in &built {
            self.remove(before, after.as_ref().unwrap_or(&nothing));
        }
        let mut reports = Vec::new();
        for (name, before, after) in built {
            let problems = after.as_ref().map(|after| after.problems.clone()).unwrap_or_default();
            if !(before.problems.is_empty() && problems.is_empty()) {
                reports.push((origin(&name), problems));
            }
            match after {
                Some(after) => {
                    self.enter(&before, &after);
                    match after.starved {
                        true => self.starved.insert(Arc::clone(&name)),
                        false => self.starved.remove(&name),
                    };
                    self.entries.entry(name).or_default().built = after;
                }
                None => {
                    self.entries.remove(&name);
                    self.starved.remove(&name);
                }
            }
        }
        reports
    }

    /// Builds Services as they come where there is not enough for all: load balancers' first, then the oldest.
    /// Gives each with what it was before.
    fn build(&mut self, store: &ServiceStore, dirty: Dirty) -> Vec<(Arc<str>, Built, Option<Built>)> {
        let mut order: Vec<Arc<str>> = dirty.into_iter().collect();
        let rank = |name: &Arc<str>| {
            let info = store.service(name)?;
            Some((info.load_balancers.is_empty(), &info.precedence))
        };
        order.sort_by(|a, b| rank(a).cmp(&rank(b)));
        let mut room = self.most;
        order.iter().filter_map(|name| self.entries.get(name)).for_each(|entry| room.give_back(&entry.built));
        room.endpoints = room.endpoints.saturating_sub(self.endpoints);
        room.health_checks = room.health_checks.saturating_sub(self.plan.health_checks.len());
        let mut evicted = Vec::new();
        let mut built = Vec::with_capacity(order.len());
        for name in order {
            let before = self.take_built(&name);
            let after = self.build_one(store, &name, &before, &mut room, &mut evicted);
            built.push((name, before, after));
        }
        // External IPs that had to make room for a load balancer look for another place, or say that there is none.
        while let Some(listen) = evicted.pop() {
            let Some(winner) = self.claims.winner(&Claim::External(listen)) else { continue };
            let name = Arc::clone(&winner.name);
            let (before, once) = match built.iter().position(|(other, ..)| *other == name) {
                Some(at) => {
                    let (_, before, once) = built.swap_remove(at);
                    (before, once)
                }
                None => (self.take_built(&name), None),
            };
            let last = once.as_ref().unwrap_or(&before);
            room.give_back(last);
            let after = self.build_one(store, &name, last, &mut room, &mut evicted);
            built.push((name, before, after));
        }
        built
    }

    fn take_built(&mut self, name: &str) -> Built {
        self.entries.get_mut(name).map(|entry| std::mem::take(&mut entry.built)).unwrap_or_default()
    }

    fn build_one(
        &mut self,
        store: &ServiceStore,
        name: &str,
        before: &Built,
        room: &mut Room,
        evicted: &mut Vec<Listen>,
    ) -> Option<Built> {
        let info = store.service(name)?;
        let mut builder = Builder {
            store,
            around: &self.around,
            claims: &self.claims,
            outside: &self.outside,
            loops: &mut self.loops,
            evicted,
            ids: &mut self.ids,
            room: *room,
        };
        let after = builder.build(info, before);
        room.take(&after);
        self.rebuilt += 1;
        Some(after)
    }

    /// Takes out what is in `before` and not in `after`.
    fn remove(&mut self, before: &Built, after: &Built) {
        for (listen, _) in &before.frontends {
            if after.frontends.binary_search_by_key(listen, |(listen, _)| *listen).is_err() {
                self.table.unlisten(listen);
                self.table_changed = true;
            }
        }
        for built in &before.ports {
            let id = built.port.id;
            if !after.ports.iter().any(|other| other.port.id == id) {
                self.table.take_port(id);
                self.ids.remove(&id);
                self.table_changed = true;
            }
        }
        for listen in before.exposed.iter().filter(|listen| after.exposed.binary_search(listen).is_err()) {
            self.table.hide(listen);
            self.table_changed = true;
        }
        for external in before.externals.iter().filter(|one| after.externals.binary_search(one).is_err()) {
            Arc::make_mut(&mut self.plan.externals).remove(&external.0);
            self.plan_changed = true;
        }
        for port in before.node_ports.iter().filter(|port| after.node_ports.binary_search(port).is_err()) {
            Arc::make_mut(&mut self.plan.node_ports).remove(port);
            self.plan_changed = true;
        }
        if let Some((port, _)) = &before.health_check
            && before.health_check != after.health_check
        {
            Arc::make_mut(&mut self.plan.health_checks).remove(port);
            self.plan_changed = true;
        }
        self.endpoints -= before.endpoints;
    }

    /// Enters what is in `after` and was not in `before`.
    fn enter(&mut self, before: &Built, after: &Built) {
        for built in &after.ports {
            let same = |other: &super::build::BuiltPort| Arc::ptr_eq(&other.port, &built.port);
            if !before.ports.iter().any(same) {
                self.table.put_port(Arc::clone(&built.port));
                self.table_changed = true;
            }
        }
        for (listen, frontend) in &after.frontends {
            let there = before.frontends.binary_search_by_key(listen, |(listen, _)| *listen);
            let same = there.is_ok_and(|at| {
                let (_, before) = &before.frontends[at];
                before.way == frontend.way && Arc::ptr_eq(&before.port, &frontend.port)
            });
            if !same {
                self.table.listen(*listen, frontend.clone());
                self.table_changed = true;
            }
        }
        for listen in after.exposed.iter().filter(|listen| before.exposed.binary_search(listen).is_err()) {
            self.table.expose(*listen);
            self.table_changed = true;
        }
        for external in after.externals.iter().filter(|one| before.externals.binary_search(one).is_err()) {
            Arc::make_mut(&mut self.plan.externals).insert(external.0, external.1);
            self.plan_changed = true;
        }
        for port in after.node_ports.iter().filter(|port| before.node_ports.binary_search(port).is_err()) {
            Arc::make_mut(&mut self.plan.node_ports).insert(*port);
            self.plan_changed = true;
        }
        if let Some((port, health)) = &after.health_check
            && before.health_check != after.health_check
        {
            Arc::make_mut(&mut self.plan.health_checks).insert(*port, health.clone());
            self.plan_changed = true;
        }
        self.endpoints += after.endpoints;
    }

    fn hand_over(&mut self) -> (Arc<ServiceTable>, Arc<ServicePlan>) {
        if std::mem::take(&mut self.table_changed) {
            self.last_table = Arc::new(self.table.clone());
        }
        if std::mem::take(&mut self.plan_changed) && *self.last_plan != self.plan {
            self.last_plan = Arc::new(self.plan.clone());
        }
        (Arc::clone(&self.last_table), Arc::clone(&self.last_plan))
    }
}

/// Under which name problems of ClusterIPs outside of the Service ranges are kept.
const OUTSIDE: &str = "ClusterIPs outside";

/// Under which name problems of the compiled Service are kept: its object's own are under another.
fn origin(service: &str) -> String {
    format!("Service/{service} compiled")
}

/// Whether a Service asks for the place of one of these, or for its port on every node.
fn wants_one_of(info: &ServiceInfo, places: &[Listen]) -> bool {
    places.iter().any(|at| {
        info.external_ips.contains(&at.address)
            || info.load_balancers.contains(&at.address)
            || info.health_check == at.port
            || info.ports.iter().any(|port| port.node_port == at.port)
    })
}
