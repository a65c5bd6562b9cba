//! What is fuzzed: plain functions from bytes to "nothing is broken", called by libFuzzer and, with the
//! committed corpus, by the ordinary tests. A target panics where one of our promises does not hold.

#[cfg(feature = "agent")]
mod annotations;
mod batch;
mod build;
#[cfg(feature = "agent")]
mod cni;
#[cfg(feature = "agent")]
mod objects;
mod packet;
mod world;

#[allow(unused_imports)] // only the replay asks
pub(crate) use world::assert_alive;

/// A target's name, and what it does with an input.
type Target = (&'static str, fn(&[u8]));

/// Every target: a folder of that name in `tests/fuzz/corpus` holds its corpus.
pub(crate) const TARGETS: &[Target] = &[
    ("packet", packet::run),
    ("batch", batch::run),
    ("datagrams", world::datagrams),
    ("frames", world::frames),
    #[cfg(feature = "agent")]
    ("annotations", annotations::run),
    #[cfg(feature = "agent")]
    ("objects", objects::run),
    #[cfg(feature = "agent")]
    ("cni", cni::run),
];

/// Runs one target.
pub(crate) fn run(name: &str, data: &[u8]) {
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).expect("a target of that name");
    target(data);
}

/// Takes the input apart; what is missing is zero.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(data: &'a [u8]) -> Reader<'a> {
        Reader { rest: data }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.rest.split_first() else { return 0 };
        self.rest = rest;
        *first
    }

    pub(crate) fn short(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    /// Up to `len` bytes.
    pub(crate) fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.rest.split_at(len.min(self.rest.len()));
        self.rest = rest;
        taken
    }

    /// One of these.
    pub(crate) fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.byte()) % choices.len()]
    }
}
