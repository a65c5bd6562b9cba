//! Tests of [`super`]: layers, refusals, help.

use std::ffi::OsString;
use std::path::Path;

use clap::{CommandFactory, Parser};

use super::file::{FileArgs, parse_file};
use super::*;

fn agent(arguments: &[&str]) -> AgentArgs {
    let line = ["warren", "agent"].iter().chain(arguments);
    match Cli::try_parse_from(line).unwrap_or_else(|error| panic!("{error}")).command {
        Command::Agent(args) => *args,
        other => panic!("{other:?}"),
    }
}

fn refusal(arguments: &[&str]) -> String {
    let line = ["warren", "agent"].iter().chain(arguments);
    match Cli::try_parse_from(line) {
        Err(error) => error.to_string(),
        Ok(Cli { command: Command::Agent(args) }) => {
            AgentConfig::resolve(*args).expect_err("accepted").to_string()
        }
        Ok(other) => panic!("{other:?}"),
    }
}

#[test]
fn the_command_line_is_sound() {
    Cli::command().debug_assert();
    FileArgs::command().debug_assert();
}

#[test]
fn lanes_follow_from_processors_unless_given() {
    let lanes: Vec<u16> = [0, 1, 2, 3, 4, 6, 8, 64].map(lanes_for).into();
    assert_eq!(lanes, [1, 1, 1, 1, 2, 3, 4, 4]);
    assert_eq!(
        [(51820, 8472), (8470, 8472), (65534, 8472), (65535, 8472)].map(|(a, b)| free_ports(a, b)),
        [13715, 2, 1, 1]
    );
    let config = |lanes: &str| {
        AgentConfig::resolve(agent(&["--source", "dir:/x", "--node", "a", "--lanes", lanes])).unwrap().lanes
    };
    assert_eq!((config("7"), config("auto")), (7, lanes_for(processors())));
    for bad in ["0", "65", "-1", "many", ""] {
        assert!(
            bad.parse::<LanesArg>().unwrap_err().contains("neither auto nor a number from 1 to 64"),
            "{bad}"
        );
    }
}

#[test]
fn defaults() {
    let config = AgentConfig::resolve(agent(&["--source", "dir:/x", "--node", "a"])).unwrap();
    assert_eq!(config.source, Some(SourceSpec::Dir("/x".into())));
    assert_eq!(
        (config.encap, config.port, config.vxlan_port, config.vni),
        (EncapPolicy::WireGuard, 51820, 8472, 1)
    );
    assert_eq!((config.underlay_mtu, config.masquerade), (UnderlayMtu::Auto, Masquerade::On));
    assert_eq!(config.lanes, lanes_for(processors()));
    assert_eq!(config.tun_name.as_str(), "warren0");
    let on = Offloads { tun_gso: true, udp_gso: true, udp_gro: true, coalescing: true, ack_coalescing: true };
    assert_eq!(config.offloads, on);
    assert_eq!(config.state_dir, Path::new("/var/lib/warren"));
}

#[test]
fn a_flag_wins_over_the_file_and_lists_are_taken_either_way() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("warren.yaml");
    let text = "source: dir:/file\nnode: from-file\nencap: auto\nport: 4000\nmasquerade: off\nno-udp-gso: true\n\
                cluster-cidr: [10.244.0.0/16, 'fd00:244::/56']\nservice-cidr: 10.96.0.0/16\nunderlay-mtu: 9000\n\
                endpoint: 203.0.113.7\n# the end\n";
    std::fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap();
    let config = AgentConfig::resolve(agent(&[
        "--config",
        path,
        "--node",
        "from-flag",
        "--cluster-cidr",
        "10.0.0.0/10,fd00::/48",
        "--cluster-cidr",
        "10.100.0.0/14",
        "--no-udp-gso=false",
        "--no-tun-gso",
    ]));
    let config = config.unwrap();
    assert_eq!((config.node.as_str(), config.encap, config.port), ("from-flag", EncapPolicy::Auto, 4000));
    assert_eq!((config.cluster_ranges.len(), config.service_ranges.len()), (3, 1));
    assert_eq!(
        (config.offloads.udp_gso, config.offloads.tun_gso, config.offloads.udp_gro),
        (true, false, true)
    );
    assert_eq!((config.masquerade, config.underlay_mtu), (Masquerade::Off, UnderlayMtu::Fixed(9000)));
    assert_eq!(config.endpoints, ["203.0.113.7:4000".parse().unwrap()]);
}

/// Run again as a child with an environment: tests share theirs, and setting it is not safe.
#[test]
#[ignore = "run by the_environment_stands_between_flag_and_file"]
fn child() {
    let args = agent(&["--config", &std::env::var("TEST_CONFIG_FILE").unwrap(), "--port", "1"]);
    let config = AgentConfig::resolve(args).unwrap();
    assert_eq!((config.port, config.vni, config.lanes), (1, 2, 3));
    assert!(!config.offloads.udp_gro && config.offloads.udp_gso);
}

#[test]
fn the_environment_stands_between_flag_and_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("warren.yaml");
    std::fs::write(&path, "source: dir:/x\nnode: a\nport: 3\nvni: 3\nlanes: 3\n").unwrap();
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["config::tests::child", "--exact", "--ignored"])
        .env("TEST_CONFIG_FILE", path)
        .env("WARREN_LISTEN_PORT", "2")
        .env("WARREN_VNI", "2")
        .env("WARREN_NO_UDP_GRO", "1")
        .env("WARREN_PORT", "tcp://10.96.0.9:80") // what Kubernetes sets beside a Service `warren`
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
fn unknown_keys_are_named_with_what_was_meant() {
    let of = |text: &str| parse_file("w.yaml", text).expect_err(text).to_string();
    let message = of("encap: auto\nunderlay_mtu: 1500\n");
    assert_eq!(
        message,
        "configuration file w.yaml: there is no setting \"underlay_mtu\"; did you mean underlay-mtu?"
    );
    assert!(of("cleanup: true").contains("no setting"));
    assert!(of("stay: true").contains("no setting"));
    assert!(of("config: x").contains("no setting"));
    assert!(of("help: true").contains("no setting"));
    assert!(of("a\nb: [").contains("w.yaml"));
    assert!(of("- encap").contains("settings like"));
    assert!(of("encap: {a: b}").contains("one value or a list"));
    assert!(of("encap: ipsec").contains("wireguard, vxlan, auto"), "{}", of("encap: ipsec"));
    assert!(of("port: 0").contains("port"));
    assert!(of("lanes: 65").contains("lanes"));
    assert!(of("port: 1\nport: 2").contains("w.yaml"));
    assert_eq!(parse_file("w.yaml", "# nothing\n").unwrap(), AgentArgs::default());

    let warnings = |variables: &[(&str, &str)]| {
        environment_warnings(
            variables.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))),
        )
    };
    let near = ["WARREN_NODES", "WARREN_SERVICE_HOST", "HOME", "WARREN_NODE"].map(|name| (name, "x"));
    let said = ["environment variable WARREN_NODES is not known; did you mean WARREN_NODE?"];
    assert_eq!(warnings(&near), said);
    let said = ["environment variable WARREN_PORT is not known; did you mean WARREN_LISTEN_PORT?"];
    assert_eq!(warnings(&[("WARREN_PORT", "51821")]), said);
    assert!(warnings(&[("WARREN_PORT", "tcp://10.96.0.9:80")]).is_empty());
}

#[test]
fn refusals_say_what_to_do() {
    let base = ["--node", "a", "--source", "dir:/x"];
    let with = |more: &[&str]| refusal(&[&base, more].concat());
    assert!(refusal(&["--node", "a"]).contains("--source dir:PATH"));
    assert!(refusal(&["--source", "kubernetes", "--node", "a"]).contains("neither kube"));
    assert!(with(&["--api-server", "http://10.0.0.1:8080"]).contains("without TLS"));
    assert!(with(&["--api-server", "10.0.0.1:6443"]).contains("https://"));
    assert!(with(&["--api-server", "https://rancher.example/k8s/clusters/c"]).contains("path"));
    assert!(refusal(&["--source", "dir:/x", "--node", "A/b"]).contains("no Node's name"));
    assert!(refusal(&["--source", "dir:/x", "--node", "ATTIC"]).contains("lower case; attic?"));
    assert!(with(&["--port", "65530", "--lanes", "9"]).contains("beyond 65535"));
    assert!(with(&["--encap", "auto", "--port", "8470", "--lanes", "4"]).contains("WireGuard's ports"));
    assert!(with(&["--cluster-cidr", "10.0.0.0/8", "--service-cidr", "10.96.0.0/16"]).contains("overlaps"));
    assert!(with(&["--cluster-cidr", "10.1.0.0/8"]).contains("write 10.0.0.0/8"));
    assert!(with(&["--endpoint", "127.0.0.1"]).contains("cannot be reached"));
    assert!(with(&["--underlay-mtu", "100"]).contains("576"));
    assert!(with(&["--tun-name", "a/b"]).contains("device name"));
    assert!(with(&["--location", "a b"]).contains("word"));
    assert!(with(&["--config", "/no/such/file"]).contains("/no/such/file"));
    assert!(with(&["--encapsulation", "vxlan"]).contains("--encap"));
    for (filter, word) in [
        ("blah", "no level"),
        ("inof", "did you mean info?"),
        ("warn,warren::state", "no level"),
        ("a=b", "no level"),
    ] {
        assert!(with(&["--log", filter]).contains(word), "{filter}: {}", with(&["--log", filter]));
    }
    for filter in ["debug", "INFO", "warn,warren::state=debug", "info,[span{field=1}]=trace", "off"] {
        agent(&["--log", filter]);
    }
    // Cleaning up needs no source.
    let config = AgentConfig::resolve(agent(&["--cleanup", "--node", "a"])).unwrap();
    assert!(config.cleanup && config.source.is_none() && !config.stay);
}

#[test]
fn what_makes_no_sense_is_told_from_what_may_still_come() {
    let error = |arguments: &[&str]| AgentConfig::resolve(agent(arguments)).expect_err("accepted");
    assert!(error(&["--node", "a"]).is_usage(), "no source");
    assert!(error(&["--source", "dir:/x", "--node", "ATTIC"]).is_usage());
    assert!(!error(&["--config", "/no/such/file"]).is_usage());
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "encapp: auto\n").unwrap();
    assert!(error(&["--config", file.path().to_str().unwrap()]).is_usage());
}

#[test]
fn help_teaches() {
    let help = Cli::command().find_subcommand_mut("agent").unwrap().render_long_help().to_string();
    for text in
        ["[env: WARREN_ENCAP", "Tunnel:", "Host:", "Offloads", "Examples:", "dir:PATH", "[default: 51820]"]
    {
        assert!(help.contains(text), "{text}\n{help}");
    }
    for line in help.lines() {
        assert!(!line.contains("machine/"), "{line}");
    }
    assert!(Cli::command().render_help().to_string().contains("warren demo"));
}

#[test]
fn settings_for_the_state_line() {
    let arguments = [
        "--source",
        "dir:/x",
        "--node",
        "a",
        "--lanes",
        "2",
        "--encap",
        "auto",
        "--endpoint",
        "[2001:db8::1]",
    ];
    let config = AgentConfig::resolve(agent(&arguments)).unwrap();
    let settings = config.settings(&[[1; 32], [2; 32]], [2; 6], 1500);
    let lanes: Vec<u16> = settings.announcement.lanes.iter().map(|lane| lane.port).collect();
    assert_eq!(lanes, [51820, 51821]);
    assert_eq!(settings.announcement.endpoints, ["[2001:db8::1]:51820".parse().unwrap()]);
    assert_eq!(settings.announcement.vxlan_mac, Some(settings.mac));
    assert_eq!(settings.mac[0] & 3, 2, "locally administered, one device's");
    let read = annotations::parse(&annotations::render(&settings.announcement));
    assert_eq!(read, (settings.announcement, Vec::new()));
}

#[test]
fn kubernetes_is_found_by_itself_or_as_told() {
    let config = AgentConfig::resolve(agent(&["--source", "kube", "--node", "a"])).unwrap();
    assert_eq!((config.source, config.probe), (Some(SourceSpec::Kube), "127.0.0.1:51820".parse().ok()));
    assert_eq!(config.access.kubelet[0], Path::new("/etc/kubernetes/kubelet.conf"));
    assert_eq!(config.access.saved, Path::new("/var/lib/warren/api-servers.json"));
    let config = AgentConfig::resolve(agent(&[
        "--source=kube",
        "--node=a",
        "--api-server=https://10.0.0.1:6443,https://[2001:db8::1]:6443/,https://api.example",
        "--kubelet-kubeconfig=/k",
        "--state-dir=/s",
        "--probe-bind-address=",
    ]))
    .unwrap();
    let servers: Vec<String> = config.access.servers.iter().map(ToString::to_string).collect();
    assert_eq!(servers, ["https://10.0.0.1:6443", "https://[2001:db8::1]:6443", "https://api.example:443"]);
    assert_eq!((config.access.kubelet, config.probe), (vec!["/k".into()], None));
    assert_eq!(config.access.saved, Path::new("/s/api-servers.json"));
    // A folder has no probes unless they are asked for.
    assert_eq!(AgentConfig::resolve(agent(&["--source=dir:/x", "--node=a"])).unwrap().probe, None);
}

#[test]
fn services_are_automatic_and_answered_for_as_kube_proxy_does() {
    let config = |arguments: &[&str]| {
        let all = [&["--source", "dir:/x", "--node", "a"], arguments].concat();
        AgentConfig::resolve(agent(&all)).unwrap()
    };
    let plain = config(&[]);
    assert_eq!(
        (plain.services, plain.external_ips, plain.nodeport_localhost),
        (ServicesArg::Auto, true, false)
    );
    assert_eq!(plain.nodeport_ranges, []);
    let ports = [plain.healthz, plain.proxy_mode].map(|at| at.unwrap().to_string());
    assert_eq!(ports, ["[::]:10256", "127.0.0.1:10249"]);
    let all = config(&[
        "--services=off",
        "--external-ips=off",
        "--nodeport-localhost",
        "--nodeport-addresses=192.0.2.0/24,2001:db8::1",
        "--healthz-bind-address=",
        "--proxy-mode-bind-address=127.0.0.1:1",
    ]);
    assert_eq!((all.services, all.external_ips, all.nodeport_localhost), (ServicesArg::Off, false, true));
    let ranges: Vec<String> = all.nodeport_ranges.iter().map(ToString::to_string).collect();
    assert_eq!(ranges, ["192.0.2.0/24", "2001:db8::1/128"]);
    assert_eq!((all.healthz, all.proxy_mode), (None, "127.0.0.1:1".parse().ok()));
    for (arguments, reason) in [
        (&["--services", "maybe"][..], "maybe"),
        (&["--nodeport-addresses", "192.0.2.1/24"], "did you mean 192.0.2.0/24"),
        (&["--nodeport-addresses", "eth0"], "not a range"),
        (&["--healthz-bind-address", "10256"], "ADDRESS:PORT"),
        (&["--healthz-bind-address", "[::]:0"], "ADDRESS:PORT"),
    ] {
        let said = refusal(arguments);
        assert!(said.contains(reason), "{said}");
    }
    let text =
        "services: on\nnodeport-addresses: [192.0.2.0/24]\nhealthz-bind-address: ''\nexternal-ips: off\n";
    let file = parse_file("x", text).unwrap();
    assert_eq!((file.services, file.external_ips), (Some(ServicesArg::On), Some(Switch::Off)));
    assert_eq!(file.healthz_bind_address, Some(BindArg(None)));
}

#[test]
fn the_cni_folders() {
    let config = |arguments: &[&str]| {
        let all = [&["--source", "dir:/x", "--node", "a"], arguments].concat();
        AgentConfig::resolve(agent(&all)).unwrap().cni
    };
    let plain = config(&[]);
    assert_eq!((plain.conf_dir, plain.conf_name.as_str()), (None, "05-warren.conflist"));
    assert_eq!(plain.bin_dir, Path::new("/opt/cni/bin"));
    let set = config(&["--cni-conf-dir=/a", "--cni-bin-dir=/b", "--cni-conf-name=00-x.conflist"]);
    assert_eq!(
        (set.conf_dir, set.bin_dir, set.conf_name.as_str()),
        (Some("/a".into()), "/b".into(), "00-x.conflist")
    );
    assert_eq!(config(&["--cni-conf-dir="]).conf_dir, None);
    assert!(refusal(&["--cni-conf-dir", "a"]).contains("slash"));
    for name in ["x", "x.conf", ".conflist", "../x.conflist", ".x.conflist", "a b.conflist"] {
        assert!(refusal(&["--cni-conf-name", name]).contains("05-warren.conflist"), "{name}");
    }
}
