//! Kernel settings. Each is read first and left alone when it is right; what we change outside our
//! own device is remembered in a state file, so that cleanup can put it back.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rtnetlink::packet_core::DefaultNla;
use rtnetlink::packet_route::link::{AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute};
use rtnetlink::{Handle, LinkUnspec};

use tracing::info;

use super::links::{Interfaces, Link, PodBridge};
use super::nla::attribute;
use super::{HostConfig, HostError, Report, routes};

const ROOT: &str = "/proc/sys/";
/// Where a container that has no full privilege finds what it may write: its own /proc/sys is mounted
/// read-only. The pod mounts the node's `/proc/sys/net` there. It is no other than the one in /proc/sys: both
/// show the network namespace of who looks, so that reading needs no second place.
const WRITABLE_ROOT: &str = "/host/proc/sys/";

/// IFLA_INET_CONF (linux/if_link.h) and the IPV4_DEVCONF_* numbers (linux/ip.h) of the settings that
/// netlink can write where /proc/sys is read-only.
const IFLA_INET_CONF: u16 = 1;
const NESTED: u16 = 1 << 15;
const FORWARDING: u16 = 1;
const ACCEPT_REDIRECTS: u16 = 4;
const SEND_REDIRECTS: u16 = 6;
const RP_FILTER: u16 = 8;
const ACCEPT_LOCAL: u16 = 23;
const ROUTE_LOCALNET: u16 = 26;

/// What the tunnel device needs before it has addresses.
///
/// `rp_filter` is loose (2): a packet out of the tunnel may come from anywhere; the larger of `all`
/// and the device counts (include/linux/inetdevice.h), so this is enough. `accept_local`: the loop
/// hands back packets whose source is this node's own.
const TUN_V4: [(&str, &str, u16); 4] = [
    ("rp_filter", "2", RP_FILTER),
    ("accept_local", "1", ACCEPT_LOCAL),
    ("accept_redirects", "0", ACCEPT_REDIRECTS),
    ("send_redirects", "0", SEND_REDIRECTS),
];

/// The settings of the tunnel device itself; they vanish with it.
pub(super) async fn apply_device(
    handle: &Handle,
    tun: &Link,
    config: &HostConfig,
    report: &mut Report,
) -> Result<(), HostError> {
    // `127.0.0.1:nodePort` goes into the loop with its source, and the answer comes back to it.
    let localnet = if config.nodeport_localhost { "1" } else { "0" };
    let settings = TUN_V4.into_iter().chain([("route_localnet", localnet, ROUTE_LOCALNET)]);
    for (name, value, number) in settings {
        let key = device_key(&tun.name, name);
        let Err(source) = set(&key, value, report) else { continue };
        let netlink = device_setting(handle, tun.index, number, value.parse().unwrap_or(0)).await;
        netlink.map_err(|_| refused(&key, value, source))?;
        report.changed(format!("sysctl {} = {value} (by netlink)", dotted(&key)));
    }
    if !config.has_v6() {
        return Ok(());
    }
    let conf = format!("net/ipv6/conf/{}", tun.name);
    // Taken off the device while its MTU was below 1,280, or switched off for all devices.
    let key = format!("{conf}/disable_ipv6");
    set(&key, "0", report).map_err(|e| refused(&key, "0", e))?;
    // No link-local address: nobody answers ND in there, and the kernel would send MLD and RS.
    let key = format!("{conf}/addr_gen_mode");
    if let Err(source) = set(&key, "1", report) {
        no_link_local(handle, tun.index).await.map_err(|_| refused(&key, "1", source))?;
        report.changed(format!("sysctl {} = 1 (by netlink)", dotted(&key)));
    }
    // Router advertisements from a peer's pod must not reach the node's routing (CVE-2020-10749).
    let key = format!("{conf}/accept_ra");
    set(&key, "0", report).map_err(|e| refused(&key, "0", e))
}

/// Forwarding, for the whole node.
pub(super) async fn apply_node(
    handle: &Handle,
    interfaces: &Interfaces,
    config: &HostConfig,
    saved: &mut Saved,
    report: &mut Report,
) -> Result<(), HostError> {
    if let Err(source) = set_and_save("net/ipv4/ip_forward", "1", saved, report) {
        // Forwarding is decided per receiving device; `ip_forward` only writes all of them at once.
        for link in &interfaces.links {
            set_device(handle, link, ("forwarding", FORWARDING), "1", saved, report)
                .await
                .map_err(|_| refused("net/ipv4/ip_forward", "1", io::Error::from(source.kind())))?;
        }
    }
    if config.services {
        apply_conntrack(saved, report);
    }
    if !config.has_v6() {
        return Ok(());
    }
    answer_nodes(saved, report);
    let key = "net/ipv6/conf/all/forwarding";
    if read(key).as_deref() == Some("1") {
        return Ok(());
    }
    // A forwarding node ignores router advertisements unless told 2 (Documentation/networking/
    // ip-sysctl.rst): an uplink that got its default route that way would lose it.
    let uplinks = routes::advertised_uplinks(handle).await?;
    for link in interfaces.links.iter().filter(|link| uplinks.contains(&link.index)) {
        let key = format!("net/ipv6/conf/{}/accept_ra", link.name);
        if read(&key).as_deref() == Some("1") {
            set_and_save(&key, "2", saved, report).map_err(|e| refused(&key, "2", e))?;
        }
    }
    set_and_save(key, "1", saved, report).map_err(|e| refused(key, "1", e))
}

/// A node's IPv6 address is the first of its pod range, to which peers have a route: that is how the kernel
/// knows a subnet's anycast address (`ipv6_anycast_destination`, include/net/ip6_route.h), and to those it
/// sends no ICMP error. Without "too big" a node's own processes would never learn of a narrow path.
fn answer_nodes(saved: &mut Saved, report: &mut Report) {
    const KEY: &str = "net/ipv6/icmp/error_anycast_as_unicast";
    if path(KEY).exists()
        && let Err(error) = set_and_save(KEY, "1", saved, report)
    {
        once(&format!("sysctl {} stays as it is: {error}", dotted(KEY)));
    }
}

const CONNTRACK_MAX: &str = "net/netfilter/nf_conntrack_max";

/// How full the kernel's connection table is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fullness {
    count: u64,
    /// How many entries it may have.
    pub(super) max: u64,
}

impl Fullness {
    /// `None` where there is no such table, or nothing that could fill it.
    pub(super) fn read() -> Option<Fullness> {
        const COUNT: &str = "net/netfilter/nf_conntrack_count";
        let fullness = Fullness { count: number(COUNT)?, max: number(CONNTRACK_MAX)? };
        // 0 is no limit.
        Some(fullness).filter(|fullness| fullness.max > 0)
    }

    /// Whether it is so full that what needs no place should have none.
    pub(super) fn is_pressed(self, before: bool) -> bool {
        is_pressed(before, self.count, self.max)
    }

    /// Whether even the fastest flood needs a while to fill it.
    pub(super) fn is_calm(self) -> bool {
        self.count < self.max / 4
    }
}

fn number(key: &str) -> Option<u64> {
    read(key)?.parse().ok()
}

/// From three quarters on, until it is half empty. The kernel itself begins to throw out closing
/// connections at 95 % (gc_worker, net/netfilter/nf_conntrack_core.c), and unanswered ones when full.
fn is_pressed(before: bool, count: u64, max: u64) -> bool {
    let enough = if before { max / 2 } else { max / 4 * 3 };
    count >= enough.max(1)
}

/// What kube-proxy sees to elsewhere, with its defaults (`--conntrack-max-per-core`, `--conntrack-min`,
/// `--conntrack-tcp-timeout-close-wait`). Outside the first network namespace the table's size cannot be
/// written (net/netfilter/nf_conntrack_standalone.c): no harm, the first one's is larger.
fn apply_conntrack(saved: &mut Saved, report: &mut Report) {
    const CLOSE_WAIT: &str = "net/netfilter/nf_conntrack_tcp_timeout_close_wait";
    const CLOSE_WAIT_SECONDS: &str = "3600";
    let cores =
        std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
    let max = read(CONNTRACK_MAX).and_then(|max| max.parse().ok());
    if let Some(wanted) = max.and_then(|max| larger_conntrack(max, cores))
        && let Err(error) = set_and_save(CONNTRACK_MAX, &wanted.to_string(), saved, report)
    {
        once(&format!(
            "sysctl {} stays as it is, less than the {wanted} that Services want here: {error}",
            dotted(CONNTRACK_MAX)
        ));
    }
    if path(CLOSE_WAIT).exists()
        && let Err(error) = set_and_save(CLOSE_WAIT, CLOSE_WAIT_SECONDS, saved, report)
    {
        once(&format!("sysctl {} stays as it is: {error}", dotted(CLOSE_WAIT)));
    }
}

/// The size that the kernel's connection table should have instead of `max`: it is never made smaller.
/// kube-proxy takes no limit (0 here) for no limit too.
fn larger_conntrack(max: u64, cores: u32) -> Option<u32> {
    const PER_CORE: u32 = 32_768;
    const AT_LEAST: u32 = 131_072;
    // The kernel keeps it in a signed number.
    let wanted = PER_CORE.saturating_mul(cores).clamp(AT_LEAST, i32::MAX.cast_unsigned());
    (max != 0 && max < u64::from(wanted)).then_some(wanted)
}

/// Said once per process: the next look comes in a second.
fn once(text: &str) {
    use std::sync::Mutex;
    static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let mut said = SAID.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !said.iter().any(|before| before == text) {
        info!("{text}");
        said.push(text.to_owned());
    }
}

/// The reverse-path filter where pods are.
///
/// With `src_valid_mark` (wg-quick sets it for all devices) the filter looks a packet's source up with the
/// packet's mark. For a marked reply that is our own table, which says "by the tunnel", and a strict
/// filter drops what came from the bridge. A way back to the pods in that table would not do: replies
/// from pod to pod of this node have to follow it into the tunnel. IPv6 has no such filter.
pub(super) async fn apply_bridges(
    handle: &Handle,
    interfaces: &Interfaces,
    bridges: &[PodBridge],
    saved: &mut Saved,
    report: &mut Report,
) -> Result<(), HostError> {
    for link in bridges.iter().filter_map(|bridge| interfaces.by_name(&bridge.name)) {
        // Of `all` and the device the larger counts (include/linux/inetdevice.h).
        let value = |name: &str| {
            let of = |device: &str| read(&device_key(device, name))?.parse::<u32>().ok();
            of("all").max(of(&link.name))
        };
        if value("src_valid_mark") >= Some(1) && value("rp_filter") == Some(1) {
            set_device(handle, link, ("rp_filter", RP_FILTER), "2", saved, report)
                .await
                .map_err(|e| refused(&device_key(&link.name, "rp_filter"), "2", e))?;
        }
    }
    Ok(())
}

/// Puts back what was changed outside our device, where it still is as we left it; says what.
pub(super) async fn restore(
    handle: &Handle,
    interfaces: &Interfaces,
    state: &Path,
    restored: &mut Vec<String>,
) -> Result<(), HostError> {
    let saved = Saved::load(Some(state.to_owned()))?;
    for (key, (before, ours)) in saved.values.iter().rev() {
        if read(key).as_deref() == Some(ours) && put_back(handle, interfaces, key, before).await {
            restored.push(format!("sysctl {} back to {before}", dotted(key)));
        }
    }
    match std::fs::remove_file(state) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(HostError::io(format!("remove {}", state.display()), e))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

async fn put_back(handle: &Handle, interfaces: &Interfaces, key: &str, value: &str) -> bool {
    if write(key, value).is_ok() {
        return true;
    }
    let Some((device, name)) = key.strip_prefix("net/ipv4/conf/").and_then(|rest| rest.split_once('/'))
    else {
        return false;
    };
    let number = match name {
        "forwarding" => FORWARDING,
        "rp_filter" => RP_FILTER,
        _ => return false,
    };
    let (Some(link), Ok(value)) = (interfaces.by_name(device), value.parse()) else { return false };
    device_setting(handle, link.index, number, value).await.is_ok()
}

/// The settings we changed outside our device, with their earlier values. In the file: the boot they
/// belong to (the next one starts from what its own configuration says), then one line each, `key
/// before ours`, keys as paths under /proc/sys.
#[derive(Debug, Default)]
pub(super) struct Saved {
    file: Option<PathBuf>,
    boot: String,
    values: BTreeMap<String, (String, String)>,
}

impl Saved {
    pub(super) fn load(file: Option<PathBuf>) -> Result<Self, HostError> {
        Self::load_in(file, read("kernel/random/boot_id").unwrap_or_else(|| "unknown".to_owned()))
    }

    fn load_in(file: Option<PathBuf>, boot: String) -> Result<Self, HostError> {
        let Some(path) = &file else { return Ok(Self::default()) };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(HostError::io(format!("read {}", path.display()), e)),
        };
        let mut lines = text.lines();
        let same_boot = lines.next().and_then(|line| line.strip_prefix("boot ")) == Some(boot.as_str());
        let values = lines.filter(|_| same_boot).filter_map(|line| {
            let mut words = line.split_whitespace();
            let (key, before, ours) = (words.next()?, words.next()?, words.next()?);
            // The file is ours, but a path out of /proc/sys must not be writable through it.
            let safe = key.starts_with("net/") && key.split('/').all(|part| !matches!(part, "" | "." | ".."));
            safe.then(|| (key.to_owned(), (before.to_owned(), ours.to_owned())))
        });
        let values = values.collect();
        Ok(Self { file, boot, values })
    }

    /// Remembers the value before our first change.
    fn remember(&mut self, key: &str, before: &str, ours: &str) -> io::Result<()> {
        let first = self.values.get(key).map_or(before, |(first, _)| first).to_owned();
        let entry = (first, ours.to_owned());
        if self.values.insert(key.to_owned(), entry.clone()) == Some(entry) {
            return Ok(());
        }
        // Devices come and go with pods.
        self.values.retain(|known, _| known == key || path(known).exists());
        self.store()
    }

    /// It was not changed after all: then it is not ours to put back either.
    fn forget(&mut self, key: &str) -> io::Result<()> {
        if self.values.remove(key).is_some() { self.store() } else { Ok(()) }
    }

    fn store(&self) -> io::Result<()> {
        let Some(path) = &self.file else { return Ok(()) };
        let mut lines = format!("boot {}\n", self.boot);
        lines.extend(self.values.iter().map(|(key, (before, ours))| format!("{key} {before} {ours}\n")));
        let next = path.with_extension("new");
        let mut file = File::create(&next)?;
        file.write_all(lines.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(next, path)
    }
}

/// One IPv4 setting of one device that is not ours, remembered; by netlink if /proc/sys is read-only.
async fn set_device(
    handle: &Handle,
    link: &Link,
    (name, number): (&str, u16),
    value: &str,
    saved: &mut Saved,
    report: &mut Report,
) -> io::Result<()> {
    let key = device_key(&link.name, name);
    let before = read(&key);
    let Err(source) = set_and_save(&key, value, saved, report) else { return Ok(()) };
    if let Some(before) = before {
        saved.remember(&key, &before, value)?;
    }
    if device_setting(handle, link.index, number, value.parse().unwrap_or(0)).await.is_err() {
        saved.forget(&key)?;
        return Err(source);
    }
    report.changed(format!("sysctl {} = {value} (by netlink)", dotted(&key)));
    Ok(())
}

fn set_and_save(key: &str, value: &str, saved: &mut Saved, report: &mut Report) -> io::Result<()> {
    let before = read(key);
    if before.as_deref() == Some(value) {
        return Ok(());
    }
    // Nothing to remember where /proc/sys is read-only.
    writable(key)?;
    if let Some(before) = before {
        saved.remember(key, &before, value)?;
    }
    set(key, value, report)
}

fn set(key: &str, value: &str, report: &mut Report) -> io::Result<()> {
    if read(key).as_deref() == Some(value) {
        return Ok(());
    }
    write(key, value)?;
    report.changed(format!("sysctl {} = {value}", dotted(key)));
    Ok(())
}

fn write(key: &str, value: &str) -> io::Result<()> {
    writable(key)?.write_all(value.as_bytes())
}

fn writable(key: &str) -> io::Result<File> {
    let open = |root: &str| File::options().write(true).open(Path::new(root).join(key));
    match open(ROOT) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => match open(WRITABLE_ROOT) {
            Err(second) if second.kind() == io::ErrorKind::NotFound => Err(error),
            outcome => outcome,
        },
        outcome => outcome,
    }
}

/// One IPv4 setting of one device, by netlink.
async fn device_setting(
    handle: &Handle,
    index: u32,
    number: u16,
    value: u32,
) -> Result<(), rtnetlink::Error> {
    let conf = DefaultNla::new(IFLA_INET_CONF | NESTED, attribute(number, &value.to_ne_bytes()));
    let spec = AfSpecUnspec::Inet(vec![AfSpecInet::Other(conf)]);
    let message = LinkUnspec::new_with_index(index)
        .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![spec]))
        .build();
    handle.link().set(message).execute().await
}

async fn no_link_local(handle: &Handle, index: u32) -> Result<(), rtnetlink::Error> {
    let spec = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    let message = LinkUnspec::new_with_index(index)
        .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![spec]))
        .build();
    handle.link().set(message).execute().await
}

fn read(key: &str) -> Option<String> {
    std::fs::read_to_string(path(key)).ok().map(|text| text.trim().to_owned())
}

fn device_key(device: &str, name: &str) -> String {
    format!("net/ipv4/conf/{device}/{name}")
}

fn path(key: &str) -> PathBuf {
    Path::new(ROOT).join(key)
}

fn dotted(key: &str) -> String {
    key.replace('/', ".")
}

fn refused(key: &str, value: &str, source: io::Error) -> HostError {
    let key = dotted(key);
    // A read-only /proc/sys answers EROFS; EACCES and EPERM are about us.
    if source.kind() == io::ErrorKind::PermissionDenied {
        return HostError::NoPermission { doing: format!("set sysctl {key} to {value}") };
    }
    HostError::Sysctl { key, value: value.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_connection_table_is_made_larger_but_never_smaller() {
        for (max, cores, expected) in [
            (65_536, 1, Some(131_072)),
            (131_071, 4, Some(131_072)),
            (131_072, 4, None),
            (131_072, 5, Some(163_840)),
            (262_144, 8, None),
            (262_143, 8, Some(262_144)),
            (1_000_000, 2, None),
            // No limit is no small one; nor does anything overflow.
            (0, 8, None),
            (1 << 40, u32::MAX, None),
            (65_536, u32::MAX, Some(i32::MAX as u32)),
        ] {
            assert_eq!(larger_conntrack(max, cores), expected, "{max}, {cores} cores");
        }
    }

    #[test]
    fn pressure_begins_high_and_ends_low() {
        for (before, count, expected) in [
            (false, 0, false),
            (false, 749, false),
            (false, 750, true),
            (true, 500, true),
            (true, 499, false),
        ] {
            assert_eq!(is_pressed(before, count, 1000), expected, "{before} {count}");
        }
        assert!(!is_pressed(true, 0, 0), "no table, no pressure");
    }

    #[test]
    fn the_first_value_is_the_one_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("sysctl");
        let mut saved = Saved::load(Some(file.clone())).unwrap();
        saved.remember("net/ipv4/ip_forward", "0", "1").unwrap();
        saved.remember("net/ipv4/ip_forward", "7", "1").unwrap();
        let again = Saved::load(Some(file)).unwrap();
        assert_eq!(again.values["net/ipv4/ip_forward"], ("0".to_owned(), "1".to_owned()));
    }

    #[test]
    fn another_boot_remembers_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("sysctl");
        let load = |boot: &str| Saved::load_in(Some(file.clone()), boot.to_owned()).unwrap();
        load("one").remember("net/ipv4/ip_forward", "0", "1").unwrap();
        assert_eq!(load("one").values.len(), 1);
        assert!(load("two").values.is_empty());
        load("two").remember("net/ipv4/ip_forward", "1", "0").unwrap();
        assert_eq!(load("two").values["net/ipv4/ip_forward"], ("1".to_owned(), "0".to_owned()));
    }

    #[test]
    fn what_failed_and_what_is_gone_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("sysctl");
        let mut saved = Saved::load(Some(file.clone())).unwrap();
        saved.remember("net/ipv4/conf/no-such-device/forwarding", "0", "1").unwrap();
        saved.remember("net/ipv4/ip_forward", "0", "1").unwrap();
        assert_eq!(saved.values.keys().collect::<Vec<_>>(), ["net/ipv4/ip_forward"]);
        saved.forget("net/ipv4/ip_forward").unwrap();
        assert!(Saved::load(Some(file)).unwrap().values.is_empty());
    }

    #[test]
    fn a_path_out_of_net_is_not_taken_from_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("sysctl");
        let lines = "boot x\nnet/../kernel/panic 0 1\nkernel/panic 0 1\nnonsense\nnet/a 1 2\n";
        std::fs::write(&file, lines).unwrap();
        let saved = Saved::load_in(Some(file), "x".to_owned()).unwrap();
        assert_eq!(saved.values.keys().collect::<Vec<_>>(), ["net/a"]);
    }
}
