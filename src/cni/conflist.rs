//! Lists of plugins: which one this node's runtime uses, and how Warren comes into it.
//!
//! A runtime takes the first file of the folder, by name. So there are these cases ([`judge`]):
//!
//! | the folder holds | what the agent does |
//! |---|---|
//! | nothing, or networks whose addresses are not this node's pod range | writes a list of its own, which comes first |
//! | a `.conflist` of `bridge` or `ptp` with this node's pod range | puts `warren-cni` at its end ([`chain`]) |
//! | a `.conf` of them | writes a list that has it, whole, and `warren-cni`; the file stays as it is |
//! | another pod network (Flannel, Calico, ...) | nothing, and says so: two networks on one node help nobody |
//!
//! Files of others are changed as text, in one place: nothing is reordered, and what we do not know stays.

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::input::DEFAULT_RUN_DIR;
use super::{PLUGIN, SpecVersion};

/// The network's name in our own list.
pub const NETWORK: &str = "warren";
/// The bridge in our own list. Not `cni0`, which Flannel, containerd's examples and `bridge` itself use: whoever
/// made that one has given it another address, or has pods on it whose addresses our IPAM would give again.
pub const BRIDGE: &str = "warren-br0";
/// A key that makes a file ours, and tells whoever reads it.
const NOTE: &str = "warren.dev/note";
/// What must be there for a list of our own, and what may be missing with a word about it.
pub const NEEDED: [&str; 3] = ["bridge", "host-local", PLUGIN];
/// Each with what pods lose without it.
pub const WELCOME: [(&str, &str); 2] =
    [("portmap", "hostPort of pods does nothing"), ("bandwidth", "bandwidth limits of pods do nothing")];

/// What our own list is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own<'a> {
    /// Which version it is written in.
    pub version: SpecVersion,
    /// This node's pod ranges.
    pub ranges: &'a [IpNet],
    /// The pods' MTU.
    pub mtu: u16,
    /// The agent's run directory, absolute.
    pub run_dir: &'a str,
    /// Those of [`WELCOME`] that are installed.
    pub extras: &'a [&'static str],
}

impl Own<'_> {
    /// The file.
    pub fn render(&self) -> String {
        let of_family = |v4: bool| -> Vec<Value> {
            let family = self.ranges.iter().filter(|range| range.addr().is_ipv4() == v4);
            family.map(|range| json!({ "subnet": range.trunc().to_string() })).collect()
        };
        let families = [(true, "0.0.0.0/0"), (false, "::/0")];
        let families: Vec<_> = families.map(|(v4, all)| (of_family(v4), all)).into_iter().collect();
        let families = families.iter().filter(|(ranges, _)| !ranges.is_empty());
        let routes: Vec<Value> = families.clone().map(|(_, all)| json!({ "dst": all })).collect();
        let ranges: Vec<&Vec<Value>> = families.map(|(ranges, _)| ranges).collect();
        let mut plugins = vec![json!({
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": true,
            // A node that comes back with another pod range: the bridge follows.
            "forceAddress": true,
            // Warren masquerades what leaves the cluster; `bridge` would do it between nodes too.
            "ipMasq": false,
            // A pod reaches itself through its own Service.
            "hairpinMode": true,
            "mtu": self.mtu,
            "ipam": {
                "type": "host-local",
                // Gone with the pods when the machine is restarted: addresses never leak.
                "dataDir": format!("{}/ipam", self.run_dir),
                "ranges": ranges,
                "routes": routes,
            },
        })];
        if self.extras.contains(&"portmap") {
            plugins
                .push(json!({ "type": "portmap", "snat": true, "capabilities": { "portMappings": true } }));
        }
        if self.extras.contains(&"bandwidth") {
            plugins.push(json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } }));
        }
        plugins.push(entry(self.run_dir));
        let list = json!({
            "cniVersion": self.version.name(),
            "name": NETWORK,
            NOTE: "written by the Warren agent, which overwrites changes and removes it with --cleanup",
            "plugins": plugins,
        });
        format!("{list:#}\n")
    }
}

/// Our part of a list.
fn entry(run_dir: &str) -> Value {
    json!({ "type": PLUGIN, "runDir": run_dir })
}

/// A file of the folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfFile {
    /// Its name.
    pub name: String,
    /// What stands in it.
    pub text: String,
}

/// What to do on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Write our own list.
    Own,
    /// Write a list around this file's network.
    Wrap(ConfFile),
    /// Change this file's list.
    Chain(ConfFile),
    /// Leave all as it is: why, and what a person can do.
    Refuse(String),
}

/// Decides by the folder's files, sorted by name, of which `own_name` is the one we write.
pub fn judge(files: &[ConfFile], own_name: &str, ranges: &[IpNet]) -> Verdict {
    let ours = files.iter().find(|file| file.name == own_name);
    match ours {
        // Pods are in it already.
        Some(ours) if is_own_network(ours) => return Verdict::Own,
        Some(ours) if !is_ours(ours) => {
            let why = "is in the way: it has the name of Warren's CNI configuration and is not of Warren";
            return Verdict::Refuse(format!(
                "{own_name} {why}; remove it, or choose another --cni-conf-name"
            ));
        }
        Some(_) | None => {}
    }
    // Whether the runtime would take another file than one that fits.
    let mut preceded = false;
    for file in files.iter().filter(|file| file.name != own_name) {
        match List::parse(file).map_or(Opinion::Unreadable, |list| list.judge(file, ranges)) {
            Opinion::Unreadable if file.name.as_str() < own_name => {
                return Verdict::Refuse(format!(
                    "{} is no CNI configuration and comes before {own_name}: the runtime stumbles over it; remove it",
                    file.name
                ));
            }
            Opinion::NoNetwork => {}
            Opinion::Unreadable => preceded = true,
            Opinion::NotThisNodes if file.name.as_str() < own_name => {
                return Verdict::Refuse(format!(
                    "{} comes before {own_name} and gives pods addresses that are not in this node's pod range: \
                     remove it, or rename it so that it comes after",
                    file.name
                ));
            }
            Opinion::NotThisNodes => preceded = true,
            Opinion::Fits if preceded => {}
            Opinion::Fits if file.name.ends_with(".conflist") => return Verdict::Chain(file.clone()),
            Opinion::Fits if file.name.as_str() < own_name => {
                return Verdict::Refuse(format!(
                    "{} comes before {own_name} and is no list that could take another plugin: rename it so that it \
                     comes after, or make it a .conflist",
                    file.name
                ));
            }
            Opinion::Fits => return Verdict::Wrap(file.clone()),
            Opinion::Refused(why) => return Verdict::Refuse(format!("{} {why}", file.name)),
        }
    }
    Verdict::Own
}

/// Plugins that hand on to another file's network, or make none.
const NO_NETWORKS: [&str; 3] = ["loopback", "multus", "multus-shim"];

/// What one file means for us.
enum Opinion {
    Unreadable,
    NoNetwork,
    NotThisNodes,
    Fits,
    Refused(String),
}

/// A list, or a single plugin as a list of one; borrowed from its text, so that places in it can be found.
struct List<'a> {
    version: Option<String>,
    name: String,
    note: bool,
    plugins: Vec<&'a RawValue>,
}

impl<'a> List<'a> {
    fn parse(file: &'a ConfFile) -> Option<List<'a>> {
        List::of(&file.text, file.name.ends_with(".conflist"))
    }

    fn of(text: &'a str, list: bool) -> Option<List<'a>> {
        // As libcni reads it: of a repeated key the last one counts.
        let outer: BTreeMap<String, &'a RawValue> = serde_json::from_str(text).ok()?;
        let text_of = |key: &str| match outer.get(key) {
            Some(raw) => serde_json::from_str::<String>(raw.get()).ok().map(Some),
            None => Some(None),
        };
        let plugins = match list {
            true => serde_json::from_str(outer.get("plugins")?.get()).ok()?,
            false => vec![serde_json::from_str::<&RawValue>(text).ok()?],
        };
        Some(List {
            version: text_of("cniVersion")?,
            name: text_of("name")?.unwrap_or_default(),
            note: outer.contains_key(NOTE),
            plugins,
        })
    }

    fn judge(&self, file: &ConfFile, ranges: &[IpNet]) -> Opinion {
        let Some(first) = self.plugins.first().and_then(|raw| Plugin::parse(raw)) else {
            return Opinion::Unreadable;
        };
        if NO_NETWORKS.contains(&first.kind.as_str()) {
            return Opinion::NoNetwork;
        }
        if !["bridge", "ptp"].contains(&first.kind.as_str()) {
            return Opinion::Refused(format!(
                "belongs to another pod network ({}): two on one node would undo each other's work. Remove that one \
                 from this node and its file from here; Warren then writes its own",
                super::plugins::printable(&first.kind)
            ));
        }
        match first.subnets() {
            None => {
                return Opinion::Refused(
                    "gets its addresses from something else than `host-local` with subnets, so nobody can tell \
                     whether they are this node's pod range: put warren-cni at the end of its plugins yourself"
                        .to_owned(),
                );
            }
            Some(subnets) if !subnets.iter().all(|net| ranges.iter().any(|range| range.contains(net))) => {
                return Opinion::NotThisNodes;
            }
            Some(_) => {}
        }
        if first.kind == "bridge" && !first.is_gateway() {
            return Opinion::Refused(
                "has a `bridge` without \"isGateway\": true: packets of pods to other nodes would not come to this \
                 node's IP stack. Set it, and Warren goes on"
                    .to_owned(),
            );
        }
        match self.version.as_deref().and_then(SpecVersion::parse) {
            Some(_) => Opinion::Fits,
            None => {
                let [oldest, .., newest] = SpecVersion::ALL;
                let version = super::plugins::printable(self.version.as_deref().unwrap_or("none"));
                let name = &file.name;
                Opinion::Refused(format!(
                    "has the cniVersion {version}: write one of {oldest} to {newest} into {name}"
                ))
            }
        }
    }
}

/// One plugin's part.
struct Plugin {
    kind: String,
    config: Value,
}

impl Plugin {
    fn parse(raw: &RawValue) -> Option<Plugin> {
        let config: Value = serde_json::from_str(raw.get()).ok()?;
        let kind = config.get("type")?.as_str()?.to_owned();
        Some(Plugin { kind, config })
    }

    /// What `host-local` gives addresses from.
    fn subnets(&self) -> Option<Vec<IpNet>> {
        let ipam = self.config.get("ipam")?;
        if ipam.get("type")?.as_str()? != "host-local" {
            return None;
        }
        let mut subnets: Vec<&Value> = ipam.get("subnet").into_iter().collect();
        for set in ipam.get("ranges").and_then(Value::as_array).into_iter().flatten() {
            subnets.extend(set.as_array()?.iter().map(|range| &range["subnet"]));
        }
        let subnets: Option<Vec<IpNet>> = subnets.into_iter().map(|net| net.as_str()?.parse().ok()).collect();
        subnets.filter(|subnets| !subnets.is_empty())
    }

    /// Of our own part.
    fn run_dir(&self) -> Option<&str> {
        self.config.get("runDir").map_or(Some(DEFAULT_RUN_DIR), Value::as_str)
    }

    fn is_gateway(&self) -> bool {
        ["isGateway", "isDefaultGateway"].iter().any(|key| self.config.get(*key) == Some(&Value::Bool(true)))
    }
}

/// The list of a single plugin's file, with us at its end. `None`: it is not one.
pub fn wrap(file: &ConfFile, run_dir: &str) -> Option<String> {
    let list = List::parse(file)?;
    let [plugin] = list.plugins[..] else { return None };
    let version = list.version.as_deref().and_then(SpecVersion::parse)?;
    // Under the same name, because the addresses that are given out are noted under it.
    let name = Value::from(list.name);
    let note = format!("made from {} by the Warren agent, which removes it with --cleanup", file.name);
    let ours = entry(run_dir);
    Some(format!(
        "{{\n  \"cniVersion\": \"{version}\",\n  \"name\": {name},\n  \"{NOTE}\": {note},\n  \"plugins\": [\n    \
         {plugin},\n    {ours}\n  ]\n}}\n",
        note = Value::from(note),
        plugin = plugin.get(),
    ))
}

/// The list with us at its end: the same text where we are there already. `None`: it is no list.
pub fn chain(text: &str, run_dir: &str) -> Option<String> {
    let ours = entry(run_dir);
    let without = match position(text)? {
        // Perhaps in a person's words.
        Some(at) if Plugin::parse(List::of(text, true)?.plugins[at])?.run_dir() == Some(run_dir) => {
            return Some(text.to_owned());
        }
        Some(_) => unchain(text)?,
        None => text.to_owned(),
    };
    let list = List::of(&without, true)?;
    let (start, end) = place(&without, list.plugins.last()?)?;
    // In the style of the file: what stands before the last plugin stands before us.
    let before = without.get(..start)?;
    let space = &before[before.trim_end().len()..];
    Some(format!("{},{space}{ours}{}", without.get(..end)?, without.get(end..)?))
}

/// The list without us: what [`chain`] was given, if it was us who put us there. `None`: it is no list, or would be
/// an empty one.
pub fn unchain(text: &str) -> Option<String> {
    let Some(at) = position(text)? else { return Some(text.to_owned()) };
    let list = List::of(text, true)?;
    let (start, end) = place(text, list.plugins[at])?;
    let (from, to) = match at.checked_sub(1) {
        Some(before) => (place(text, list.plugins[before])?.1, end),
        None => (start, place(text, list.plugins.get(1)?)?.0),
    };
    Some(format!("{}{}", text.get(..from)?, text.get(to..)?))
}

/// Whether a file is the list of our own network.
pub fn is_own_network(file: &ConfFile) -> bool {
    List::parse(file).is_some_and(|list| list.note && list.name == NETWORK)
}

/// The version that a list is written in, if it is one of ours.
pub fn version_of(file: &ConfFile) -> Option<SpecVersion> {
    List::parse(file)?.version.as_deref().and_then(SpecVersion::parse)
}

/// Whether a runtime could read it.
pub fn is_readable(file: &ConfFile) -> bool {
    List::parse(file).is_some()
}

/// Whether a file is of the agent's making.
pub fn is_ours(file: &ConfFile) -> bool {
    List::parse(file).is_some_and(|list| list.note && file.name.ends_with(".conflist"))
}

/// Where we stand in a list.
fn position(text: &str) -> Option<Option<usize>> {
    let list = List::of(text, true)?;
    let ours = |raw: &&RawValue| Plugin::parse(raw).is_some_and(|plugin| plugin.kind == PLUGIN);
    Some(list.plugins.iter().position(ours))
}

/// Which bytes of the text are this part of it.
fn place(text: &str, part: &RawValue) -> Option<(usize, usize)> {
    let start = (part.get().as_ptr() as usize).checked_sub(text.as_ptr() as usize)?;
    let end = start + part.get().len();
    (text.get(start..end)? == part.get()).then_some((start, end))
}

#[cfg(test)]
mod tests;
