//! Questions to the kernel about links and addresses, one at a time and without a runtime: a plugin lives for
//! some milliseconds.

use std::fs::File;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use nix::sched::{CloneFlags, setns};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage as Message;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};

/// A socket in one network namespace.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

/// An interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mtu: u32,
    pub(super) up: bool,
    pub(super) mac: String,
    pub(super) veth: bool,
    /// Of a veth pair: the other end's index, in its namespace.
    pub(super) peer: Option<u32>,
    /// The bridge that it is a port of.
    pub(super) bridge: Option<u32>,
}

impl Netlink {
    /// In the namespace of the calling thread.
    pub(super) fn here() -> io::Result<Netlink> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Netlink { socket, sequence: 0 })
    }

    /// In another one: a socket stays where it was opened, so a thread that goes there and ends is enough.
    pub(super) fn within(namespace: &File) -> io::Result<Netlink> {
        std::thread::scope(|scope| {
            let visit = scope.spawn(|| {
                setns(namespace, CloneFlags::CLONE_NEWNET)?;
                Netlink::here()
            });
            visit.join().unwrap_or_else(|_| Err(io::Error::other("the thread there panicked")))
        })
    }

    pub(super) fn link_by_name(&mut self, name: &str) -> io::Result<Option<Link>> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        self.link(message)
    }

    pub(super) fn link_by_index(&mut self, index: u32) -> io::Result<Option<Link>> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.link(message)
    }

    fn link(&mut self, message: LinkMessage) -> io::Result<Option<Link>> {
        match self.ask(Message::GetLink(message), 0) {
            Ok(answers) => Ok(answers.into_iter().find_map(|answer| match answer {
                Message::NewLink(link) => Some(read_link(link)),
                _ => None,
            })),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn set_mtu(&mut self, index: u32, mtu: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::Mtu(mtu));
        self.ask(Message::SetLink(message), NLM_F_ACK).map(drop)
    }

    /// Both families'.
    pub(super) fn addresses(&mut self, index: u32) -> io::Result<Vec<IpNet>> {
        let answers = self.ask(Message::GetAddress(AddressMessage::default()), NLM_F_DUMP)?;
        let addresses = answers.into_iter().filter_map(|answer| match answer {
            Message::NewAddress(message) if message.header.index == index => read_address(&message),
            _ => None,
        });
        Ok(addresses.collect())
    }

    /// Sends a request and takes its answers: one, an acknowledgement, or a list.
    fn ask(&mut self, request: Message, flags: u16) -> io::Result<Vec<Message>> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut answers = Vec::new();
        loop {
            let (received, _) = self.socket.recv_from_full()?;
            if received.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if self.read(&received, flags & NLM_F_DUMP == NLM_F_DUMP, &mut answers)? {
                return Ok(answers);
            }
        }
    }

    /// Reads one datagram; whether the answer is complete.
    fn read(&self, mut bytes: &[u8], list: bool, answers: &mut Vec<Message>) -> io::Result<bool> {
        while !bytes.is_empty() {
            let message = NetlinkMessage::<Message>::deserialize(bytes).map_err(io::Error::other)?;
            let length = (message.header.length as usize).next_multiple_of(4).clamp(4, bytes.len());
            bytes = &bytes[length..];
            if message.header.sequence_number != self.sequence {
                continue;
            }
            match message.payload {
                NetlinkPayload::Done(_) => return Ok(true),
                NetlinkPayload::Error(error) if error.code.is_none() => return Ok(true),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(answer) => {
                    answers.push(answer);
                    if !list {
                        return Ok(true);
                    }
                }
                _ => {}
            }
        }
        Ok(false)
    }
}

fn read_link(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        up: message.header.flags.contains(LinkFlags::Up),
        ..Link::default()
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Link(peer) => link.peer = Some(peer),
            LinkAttribute::Controller(bridge) => link.bridge = Some(bridge),
            LinkAttribute::Address(mac) => {
                link.mac = mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":");
            }
            LinkAttribute::LinkInfo(infos) => link.veth = infos.contains(&LinkInfo::Kind(InfoKind::Veth)),
            _ => {}
        }
    }
    link
}

/// IFA_LOCAL is the address itself, where there is one; IFA_ADDRESS may be the far end (rtnetlink(7)).
fn read_address(message: &AddressMessage) -> Option<IpNet> {
    let mut local = None;
    let mut other: Option<IpAddr> = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => other = Some(*address),
            _ => {}
        }
    }
    IpNet::new(local.or(other)?, message.header.prefix_len).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_found_by_name_and_by_index() {
        let mut netlink = Netlink::here().unwrap();
        let found = netlink.link_by_name("lo").unwrap().expect("every namespace has one");
        assert_eq!((found.name.as_str(), found.veth), ("lo", false));
        assert_eq!(netlink.link_by_index(found.index).unwrap(), Some(found.clone()));
        assert_eq!(netlink.link_by_name("no-such-link").unwrap(), None);
        assert_eq!(netlink.link_by_index(0x7fff_fff0).unwrap(), None);
        // One after the other over the same socket.
        if found.up {
            let own = "127.0.0.1/8".parse().unwrap();
            assert!(netlink.addresses(found.index).unwrap().contains(&own));
        }
        assert_eq!(netlink.addresses(0x7fff_fff0).unwrap(), []);
    }
}
