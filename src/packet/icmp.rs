//! Stand-in.
use super::Headers;
/// M
#[derive(Clone, Copy, Debug)]
pub enum Message { /// a
 HostUnreachable, /// b
 TooBig { /// m
 mtu: u16 }, /// t
 TimeExceeded }
/// L
#[derive(Debug)]
pub struct IcmpLimiter;
impl IcmpLimiter { /// n
 pub fn new(_: u64) -> Self { Self } /// a
 pub fn allow(&mut self, _: std::net::IpAddr, _: std::time::Instant) -> bool { true } }
/// m
pub fn may_answer(_: &[u8], _: &Headers) -> bool { false }
/// b
pub fn build(_: &mut [u8], _: std::net::IpAddr, _: &[u8], _: &Headers, _: Message) -> Option<usize> { None }
