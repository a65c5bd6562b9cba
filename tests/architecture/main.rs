//! The house rules that no compiler checks, over every file of `src/`: who may import whom, and that the
//! packet line never reaches for the world. Each rule is proved by a planted violation at the end.

mod source;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use source::{Named, Token};

/// The rooms in the order in which a packet or an object meets them: each imports only from those before it.
/// `snapshot` stands first but one, because it is the plain data that the packet line reads.
const ROOMS: [&str; 13] = [
    "packet", "snapshot", "tunnel", "datapath", // pure: the packet line
    "state", "io", "cni", "status", "demo", "measure", "config", "agent", "main", // the world
];
/// How many of [`ROOMS`] are pure: no sockets, no files, no threads, no clock.
const CORE: usize = 4;
/// Pairs that the order would allow and that are wrong all the same: they meet in `agent`.
const STRANGERS: [(&str, &str); 1] = [("io", "state")];

/// Paths that the core may not name.
const WORLD: [&str; 20] = [
    "std::fs",
    "std::thread",
    "std::process",
    "std::env",
    "std::os",
    "std::net::UdpSocket",
    "std::net::TcpStream",
    "std::net::TcpListener",
    "std::net::ToSocketAddrs",
    "std::time::SystemTime",
    "std::io",
    "tokio",
    "nix",
    "libc",
    "socket2",
    "tun",
    "rtnetlink",
    "nlink",
    "futures_util",
    "arc_swap",
];
/// Words that the core may not use, however it came by them.
const WORLD_WORDS: [&str; 11] = [
    "Mutex",
    "Condvar",
    "Barrier",
    "UdpSocket",
    "TcpStream",
    "TcpListener",
    "UnixStream",
    "SystemTime",
    "ToSocketAddrs",
    "async",
    "thread_local",
];
/// The one file that may name this crate.
const WIREGUARD: (&str, &str) = ("boringtun", "tunnel/wireguard.rs");
/// The one folder with `unsafe`.
const UNSAFE: &str = "io/";

/// Who looks up a reason at night finds it.
#[test]
fn the_readme_explains_every_drop_reason() {
    let readme = include_str!("../../README.md");
    let rows: Vec<&str> = readme.lines().filter(|line| line.starts_with("| `")).collect();
    for reason in warren::packet::DropReason::ALL {
        let name = format!("`{}`", reason.name());
        let cell = |row: &&str| row.split('|').nth(1).is_some_and(|cell| cell.contains(&name));
        assert_eq!(rows.iter().filter(|row| cell(row)).count(), 1, "{name} in README.md's table");
    }
}

#[test]
fn the_source_keeps_its_own_rules() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = read_all(&root.join("src"));
    assert!(files.len() > 20, "only {} files found: is this the right folder?", files.len());
    let tests = test_files(&files);
    let mut broken: Vec<String> =
        files.iter().filter(|(name, _)| !tests.contains(name)).flat_map(|(n, text)| check(n, text)).collect();
    for folder in ["tests", "examples"] {
        files.extend(
            read_all(&root.join(folder)).into_iter().map(|(n, text)| (format!("{folder}/{n}"), text)),
        );
    }
    broken.extend(files.iter().flat_map(|(name, text)| check_attributes(name, text)));
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

/// All rules about code that ships, for one file; `name` counts from `src/`.
fn check(name: &str, text: &str) -> Vec<String> {
    let tokens = source::shipped(text);
    let named = source::paths(&tokens, &module_of(name));
    let mut broken = check_room(name, &named);
    if is_core(name) {
        broken.extend(check_core(name, &tokens, &named));
    }
    if name != WIREGUARD.1
        && let Some(token) = tokens.iter().find(|token| token.text == WIREGUARD.0)
    {
        broken.push(format!("src/{name}:{}: only {} names {}", token.line, WIREGUARD.1, WIREGUARD.0));
    }
    if !name.starts_with(UNSAFE) {
        let found = tokens.iter().filter(|token| token.text == "unsafe" || token.text == "unsafe_code");
        broken.extend(found.map(|token| format!("src/{name}:{}: `unsafe` outside src/{UNSAFE}", token.line)));
    }
    broken
}

/// A room imports only from rooms before it.
fn check_room(name: &str, named: &[Named]) -> Vec<String> {
    let room = room_of(name);
    if room == "lib" {
        return Vec::new();
    }
    let Some(own) = rank(&room) else {
        return vec![format!("src/{name}: no such room; give it its place in ROOMS of tests/architecture")];
    };
    let mut broken = Vec::new();
    for path in named {
        // The binary reaches the rooms by the library's name.
        let [first, target, ..] = path.parts.as_slice() else { continue };
        if first != "crate" && !(room == "main" && first == "warren") {
            continue;
        }
        // Items of `lib.rs` itself have no rank.
        let Some(other) = rank(target) else { continue };
        if other > own || STRANGERS.contains(&(room.as_str(), target.as_str())) {
            broken.push(format!("src/{name}:{}: {room} may not import from {target}", path.line));
        }
    }
    broken
}

/// The packet line stays away from sockets, files, threads, clocks and async.
fn check_core(name: &str, tokens: &[Token], named: &[Named]) -> Vec<String> {
    let mut broken = Vec::new();
    for path in named {
        let text = path.parts.join("::");
        let hit = WORLD.iter().find(|world| text == **world || text.starts_with(&format!("{world}::")));
        if let Some(world) = hit {
            broken.push(format!("src/{name}:{}: the packet line names {world}", path.line));
        }
        if path.parts.ends_with(&["Instant".to_owned(), "now".to_owned()]) {
            broken.push(format!("src/{name}:{}: the packet line reads the clock", path.line));
        }
    }
    for token in tokens.iter().filter(|token| WORLD_WORDS.contains(&token.text.as_str())) {
        broken.push(format!("src/{name}:{}: the packet line uses {}", token.line, token.text));
    }
    // What another lane holds is left alone (`try_read`, `try_write`): a lane waits for nobody.
    for call in
        tokens.windows(4).filter(|call| call[0].text == "." && call[2].text == "(" && call[3].text == ")")
    {
        if ["read", "write", "lock", "wait"].contains(&call[1].text.as_str()) {
            broken.push(format!("src/{name}:{}: the packet line waits for a lock", call[1].line));
        }
    }
    broken
}

/// Whoever silences a lint says why: on the same line, on the line before, or as `reason = "..."`.
fn check_attributes(name: &str, text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let mut broken = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let trimmed = line.trim_start();
        let silences = ["allow(", "expect("].iter().any(|verb| {
            [format!("#[{verb}"), format!("#![{verb}")].iter().any(|start| trimmed.starts_with(start))
        });
        let before = index.checked_sub(1).map_or("", |above| lines[above].trim_start());
        let explained = line.contains("] //") || line.contains("reason =") || before.starts_with("// ");
        if silences && !explained {
            broken.push(format!("{name}:{}: a silenced lint without a reason: {trimmed}", index + 1));
        }
    }
    broken
}

fn is_core(name: &str) -> bool {
    rank(&room_of(name)).is_some_and(|rank| rank < CORE)
}

fn rank(room: &str) -> Option<usize> {
    ROOMS.iter().position(|known| *known == room)
}

/// The room that a file belongs to: its first folder, or its own name.
fn room_of(name: &str) -> String {
    let first = name.split('/').next().unwrap_or_default();
    first.strip_suffix(".rs").unwrap_or(first).to_owned()
}

/// `datapath/conntrack/key.rs` is `datapath::conntrack::key`.
fn module_of(name: &str) -> Vec<String> {
    let path = name.strip_suffix(".rs").unwrap_or(name);
    let mut parts: Vec<String> = path.split('/').map(str::to_owned).collect();
    if parts.last().is_some_and(|last| last == "mod" || last == "lib" || last == "main") {
        parts.pop();
    }
    parts
}

/// Files that only tests compile, as their parents declare them.
fn test_files(files: &[(String, String)]) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    for (name, text) in files {
        for module in source::test_modules(text) {
            let folder = Path::new(name).parent().unwrap_or(Path::new("")).to_owned();
            let own = folder.join(module_of(name).last().cloned().unwrap_or_default());
            let folders = if name.ends_with("mod.rs") || name == "lib.rs" || name == "main.rs" {
                [folder.clone(), folder]
            } else {
                [own, folder]
            };
            let names = [format!("{module}.rs"), format!("{module}/mod.rs"), module];
            let paths = folders.iter().flat_map(|folder| names.iter().map(|file| folder.join(file)));
            out.extend(paths.map(|path| path.to_string_lossy().into_owned()));
        }
    }
    // What a test module declares is a test module too.
    let inside =
        |name: &str| out.iter().any(|t| name.starts_with(&format!("{}/", t.trim_end_matches("/mod.rs"))));
    let more: Vec<String> = files.iter().map(|(name, _)| name.clone()).filter(|name| inside(name)).collect();
    out.extend(more);
    out
}

/// Every `.rs` file below a folder, with its name counted from there.
fn read_all(root: &Path) -> Vec<(String, String)> {
    let (mut out, mut folders) = (Vec::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for path in entries.map(|entry| entry.expect("a folder's entry").path()) {
            if path.is_dir() && !path.ends_with("target") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                out.push((relative(&path, root), fs::read_to_string(&path).expect("a source file")));
            }
        }
    }
    out.sort();
    out
}

fn relative(path: &Path, root: &Path) -> String {
    let path: PathBuf = path.strip_prefix(root).expect("a file below the folder").to_owned();
    path.to_string_lossy().into_owned()
}

/// A planted violation in a file of that name must be found, and named.
#[track_caller]
fn breaks(name: &str, text: &str, expected: &str) {
    let broken = check(name, text);
    assert!(broken.iter().any(|line| line.contains(expected)), "{name}: {text}\n{broken:?}");
}

#[track_caller]
fn holds(name: &str, text: &str) {
    let broken = check(name, text);
    assert!(broken.is_empty(), "{name}: {text}\n{broken:?}");
}

#[test]
fn planted_imports_from_below_are_found() {
    breaks("packet/parse.rs", "use crate::datapath::Lane;", "packet may not import from datapath");
    breaks("packet/parse.rs", "fn f() { crate::io::clock::now(); }", "packet may not import from io");
    breaks(
        "datapath/mod.rs",
        "use crate::{packet::parse, state::{self, keys}};",
        "datapath may not import from state",
    );
    breaks("datapath/outbound.rs", "use super::super::io::tun;", "datapath may not import from io");
    breaks("tunnel/mod.rs", "mod x { mod y { use super::super::super::status::View; } }", "from status");
    breaks("state/run.rs", "use crate::io::tun::TunQueue;", "state may not import from io");
    breaks("io/lane.rs", "pub use crate::state::Desired;", "io may not import from state");
    breaks("demo/mod.rs", "use crate::agent;", "demo may not import from agent");
    breaks("kitchen/mod.rs", "", "no such room");
    holds("datapath/mod.rs", "use crate::packet::{DropReason, Headers}; use super::datapath::route;");
    holds("io/lane.rs", "use crate::{datapath::Lane, snapshot::Snapshot}; // crate::state is elsewhere");
    holds("agent.rs", "use crate::{io, state}; fn f() { let s = \"crate::main\"; }");
    holds("main.rs", "fn main() { warren::agent::run() }");
}

#[test]
fn planted_io_in_the_packet_line_is_found() {
    breaks("packet/mod.rs", "use std::net::{IpAddr, UdpSocket};", "names std::net::UdpSocket");
    breaks("snapshot.rs", "use std::{collections::HashMap, fs::{self, File}};", "names std::fs");
    breaks("datapath/mod.rs", "fn f() { std::thread::spawn(|| ()); }", "names std::thread");
    breaks("datapath/mod.rs", "fn f() -> String { std::env::var(\"X\").unwrap() }", "names std::env");
    breaks(
        "datapath/mod.rs",
        "use std::time::Instant; fn f() { let t = Instant::now(); }",
        "reads the clock",
    );
    breaks("tunnel/vxlan.rs", "use std::net; fn f() { net::UdpSocket::bind(a); }", "uses UdpSocket");
    breaks("tunnel/vxlan.rs", "fn f() { std::time::SystemTime::now(); }", "names std::time::SystemTime");
    breaks("tunnel/vxlan.rs", "use tokio::sync::mpsc;", "names tokio");
    breaks("tunnel/vxlan.rs", "use libc;", "names libc");
    breaks("tunnel/vxlan.rs", "use std::process as p;", "names std::process");
    breaks("packet/mod.rs", "async fn f() {}", "uses async");
    breaks("datapath/mod.rs", "use std::sync::Mutex;", "uses Mutex");
    breaks("tunnel/neighbours.rs", "fn f(t: &RwLock<u8>) { t.read().unwrap(); }", "waits for a lock");
    breaks("tunnel/neighbours.rs", "fn f(t: &RwLock<u8>) { *t.write().unwrap() = 1; }", "waits for a lock");
    holds(
        "tunnel/neighbours.rs",
        "fn f(t: &RwLock<u8>) { t.try_read().ok(); t.try_write().ok(); s.write(0, b); }",
    );
    holds("packet/mod.rs", "use std::net::{IpAddr, SocketAddr}; use std::time::{Duration, Instant};");
    holds("packet/mod.rs", "#[cfg(test)] mod tests { use std::fs; fn f() { std::time::Instant::now(); } }");
    holds(
        "packet/mod.rs",
        "/* std::fs /* nested */ tokio::x */ // use tokio::net;\nconst A: &str = r#\"use std::fs;\"#;",
    );
    breaks(
        "packet/mod.rs",
        "#[cfg(test)]\nmod tests { const C: char = '{'; }\nuse std::fs;",
        "names std::fs",
    );
    holds("io/tun.rs", "use std::fs::File; use std::time::Instant; fn f() { Instant::now(); }");
}

#[test]
fn planted_boringtun_and_unsafe_are_found() {
    breaks("tunnel/mod.rs", "use boringtun::noise::Tunn;", "only tunnel/wireguard.rs names boringtun");
    breaks("io/mod.rs", "fn f() { boringtun::x(); }", "only tunnel/wireguard.rs names boringtun");
    holds("tunnel/wireguard.rs", "use boringtun::noise::Tunn;");
    holds("tunnel/mod.rs", "//! Speaks WireGuard through boringtun.");
    breaks("status/mod.rs", "fn f() { unsafe { g() } }", "`unsafe` outside src/io/");
    breaks("packet/checksum.rs", "#[allow(unsafe_code)] fn f() {}", "`unsafe` outside src/io/");
    holds("io/udp.rs", "fn f() { unsafe { g() } }");
}

#[test]
fn planted_silence_without_a_reason_is_found() {
    for bad in ["#[allow(dead_code)]", "    #![allow(missing_docs)]", "#[expect(clippy::all)]\nfn f() {}"] {
        assert_eq!(check_attributes("x.rs", bad).len(), 1, "{bad}");
    }
    for good in [
        "#[allow(dead_code)] // used by the other half",
        "// The table is generated.\n#[allow(dead_code)]",
        "#[expect(dead_code, reason = \"generated\")]",
        "let x = limiter.allow(now);",
    ] {
        assert_eq!(check_attributes("x.rs", good), [""; 0], "{good}");
    }
}

#[test]
fn test_files_are_those_that_a_test_module_declares() {
    let files = [
        ("packet/mod.rs", "#[cfg(test)]\nmod testing;\npub mod parse;"),
        ("packet/testing.rs", ""),
        ("packet/parse.rs", ""),
        ("datapath/conntrack.rs", "#[cfg(test)] mod tests;"),
        ("datapath/conntrack/tests.rs", ""),
        ("state/compile.rs", "#[cfg(test)]\n#[path = \"compile_tests.rs\"]\nmod tests;"),
        ("state/compile_tests.rs", ""),
    ];
    let files: Vec<_> = files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
    let found = test_files(&files);
    let shipped: Vec<_> =
        files.iter().map(|(name, _)| name.as_str()).filter(|n| !found.contains(*n)).collect();
    assert_eq!(shipped, ["packet/mod.rs", "packet/parse.rs", "datapath/conntrack.rs", "state/compile.rs"]);
}

#[test]
fn tokens_leave_out_what_is_no_code() {
    let text =
        "let a: &'static str = \"x\\\"y\"; let b = b'\\''; let c = 'c'; let d = br##\"q\"#\"##; f(r#type)";
    let tokens = source::tokens(text);
    let words = source::words(&tokens);
    assert_eq!(words, BTreeSet::from(["let", "a", "str", "b", "c", "d", "f", "r", "type"]), "{tokens:?}");
}
