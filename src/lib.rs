//! Warren: the pod network of a Kubernetes cluster whose nodes cannot route pod traffic to each other.
//!
//! This page is the map. Two straight lines go through the program, and only one thing connects them.
//!
//! # The packet line
//!
//! No async, no clock, no lock that a packet waits on. No allocation for a packet that goes straight through; what
//! has to wait (for a session, for its first fragment) or to change lanes is copied into memory of its own, bounded.
//!
//! ```text
//! pod -> TUN -> parse -> decide -> translate -> fit -> encapsulate -> UDP         datapath/outbound.rs
//! UDP -> decapsulate -> parse -> check inner source -> hop -> join -> translate
//!     -> TUN -> pod                                                               datapath/inbound.rs
//! ```
//!
//! 1. `io::lane`: a thread reads frames and datagrams, and sends what comes out
//! 2. [`packet`]: bytes become [`packet::Headers`], checked once; rewriting, checksums, ICMP, cutting, joining
//! 3. [`datapath`]: a [`datapath::Lane`] decides where each packet goes, by its flow (`datapath/conntrack.rs`),
//!    the Services (`datapath/service.rs`) and the routes of the [`snapshot`] it is given
//! 4. [`tunnel`]: WireGuard ([`tunnel::wireguard`], the only file that names boringtun) and VXLAN wrap it
//!
//! Packets come in runs, cut from one super-packet by the sender: one that repeats the headers of the packet before it
//! goes from decapsulation straight to joining (`packet/coalesce/repeat.rs`).
//!
//! How often a payload is copied, and why not less:
//!
//! | | outbound | inbound |
//! |---|---|---|
//! | the kernel | read from the TUN; send | receive; write to the TUN |
//! | we | a super-packet's segments get headers in between: VXLAN into the send buffer, WireGuard into a scratch segment that stays in the first-level cache | none: VXLAN stays where it was received, and the TUN gathers from there |
//! | boringtun | from the scratch segment into the send buffer, where it seals | into a buffer of ours, where it opens |
//!
//! What goes from the TUN back into it (a Service with an endpoint on this node, or outside) is copied once more, for
//! its frame's buffer is read into again before the TUN is written to; what goes from one tunnel into another is
//! copied too, a packet at a time: no peer sends that by the dozen.
//!
//! A lane is a thread with its own queue of the TUN, sockets and key. Which queue a flow's packets come by is the
//! kernel's symmetric hash of it, as long as there are the same queues: lanes write in a way that the kernel does not
//! remember (`io::tun`). Which lane receives is the sender's choice, by the key or the port. So each direction of a flow
//! has one lane; they are the same one only by chance, as each node's hash has a secret of its own.
//!
//! # The state line
//!
//! Async, at Kubernetes' speed.
//!
//! ```text
//! source -> convert (hostile input ends here) -> desired -> compile -> Snapshot -> ArcSwap      state/run.rs
//! ```
//!
//! 1. `state::source`: a folder of Kubernetes objects, or the Kubernetes API, watched
//! 2. `state::convert`, `state::annotations`: typed, bounded values; what is wrong is reported
//! 3. `state::desired`, `state::ownership`: what should be, and who owns which range, address and key
//! 4. `state::compile`: the [`snapshot::Snapshot`] for the lanes and the plan for the host;
//!    `state::services`: the same for Services, of which only those are compiled that changed
//!
//! `agent` puts both together: it starts the lanes, keeps routes, rules and nftables as planned
//! (`io::host`), and answers `warren status` and `wg show` (`status`).
//!
//! # Rooms
//!
//! A room imports only from rooms above it in this list, and `io` never from `state`: both meet in `agent`.
//! `tests/architecture` checks that, and that everything above the line does no I/O.
//!
//! | room | what happens there |
//! |---|---|
//! | [`packet`] | bytes and typed packets |
//! | [`snapshot`] | what the packet line reads: immutable, compiled |
//! | [`tunnel`] | encapsulation |
//! | [`datapath`] | the packet line |
//! | *the line: above, pure; below, the world (feature `agent`)* | |
//! | `state` | the state line |
//! | `io` | TUN, UDP, lanes, routes, nftables, clocks: the only room with `unsafe` |
//! | `cni` | `warren-cni`, the plugin that runtimes call for every pod, and the lists it stands in |
//! | `status` | gRPC, the UAPI socket, and the commands that ask |
//! | `demo` | `warren demo` |
//! | `measure` | `warren bench`: what the way between two nodes or pods carries, and what a tunnel of our lanes would |
//! | `config`, `agent` | settings, and what puts the rooms together |
//!
//! The simulated mesh (`tests/sim`) runs whole lanes in virtual time with feature `sim`, which stops
//! boringtun's own clock: never a feature of a build that ships.

pub mod datapath;
pub mod packet;
pub mod snapshot;
pub mod tunnel;

#[cfg(feature = "agent")]
pub mod agent;
#[cfg(feature = "agent")]
pub mod cni;
#[cfg(feature = "agent")]
pub mod config;
#[cfg(feature = "agent")]
pub mod demo;
#[cfg(feature = "agent")]
pub mod io;
#[cfg(feature = "agent")]
pub mod measure;
#[cfg(feature = "agent")]
pub mod state;
#[cfg(feature = "agent")]
pub mod status;
