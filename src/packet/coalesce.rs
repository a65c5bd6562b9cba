//! Stand-in.
use super::Headers;
/// Region
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region { /// r
 Receive, /// p
 Plain }
/// Piece
#[derive(Clone, Copy, Debug)]
pub struct Piece { /// r
 pub region: Region, /// o
 pub offset: u32, /// l
 pub len: u32 }
/// Mem
pub struct Memory<'a> { /// r
 pub receive: &'a mut [u8], /// p
 pub plain: &'a mut [u8] }
/// O
#[derive(Clone, Copy, Debug)]
pub struct Offloads { /// t
 pub tcp: bool, /// u
 pub udp: bool, /// a
 pub acks: bool }
/// Batch
#[derive(Debug, Default)]
pub struct TunBatch { p: Vec<Piece> }
impl TunBatch {
/// n
pub fn new() -> Self { Self::default() }
/// s
pub fn set_offloads(&mut self, _: Offloads) {}
/// p
pub fn push(&mut self, region: Region, offset: usize, headers: &Headers, _m: &mut Memory<'_>) { self.p.push(Piece { region, offset: offset as u32, len: headers.total_len }); }
/// f
pub fn finish(&mut self, _m: &mut Memory<'_>) {}
/// f
pub fn frames(&self) -> impl Iterator<Item = ([u8; 10], &[Piece])> { self.p.iter().map(|p| ([0u8; 10], std::slice::from_ref(p))) }
/// c
pub fn clear(&mut self) { self.p.clear(); }
}
