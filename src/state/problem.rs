//! What is wrong with what a person wrote or a node announced, in words, current and counted.

use std::collections::BTreeMap;
use std::fmt;

use super::source::Kind;

/// What kind of thing is wrong; each has a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProblemKind {
    /// A file or the folder itself cannot be read, or is not YAML or JSON.
    File,
    /// A document is YAML but no object that we can use.
    Object,
    /// One value inside an object's spec or status.
    Value,
    /// One `warren.dev/...` annotation.
    Annotation,
    /// A range, address or key that another node owns.
    Conflict,
    /// What this node's own settings and the cluster's objects do not agree about.
    Setting,
}

impl ProblemKind {
    /// Every kind, in the order of its counter.
    pub const ALL: [ProblemKind; 6] = [
        ProblemKind::File,
        ProblemKind::Object,
        ProblemKind::Value,
        ProblemKind::Annotation,
        ProblemKind::Conflict,
        ProblemKind::Setting,
    ];

    /// The name that `warren status` shows.
    pub const fn name(self) -> &'static str {
        match self {
            ProblemKind::File => "file",
            ProblemKind::Object => "object",
            ProblemKind::Value => "value",
            ProblemKind::Annotation => "annotation",
            ProblemKind::Conflict => "conflict",
            ProblemKind::Setting => "setting",
        }
    }
}

/// One thing that is wrong, with its reason.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Problem {
    /// What kind of thing.
    pub kind: ProblemKind,
    /// Whose: `Node/a`, or a file's name.
    pub subject: String,
    /// Where in it: `document 2, line 14`, `warren.dev/lanes`, `spec.podCIDRs[0]`; may be empty.
    pub field: String,
    /// Why, and what to do where that is known.
    pub reason: String,
}

impl Problem {
    /// A problem of a Node's value, annotation or claim.
    pub fn node(kind: ProblemKind, node: &str, field: &str, reason: impl Into<String>) -> Problem {
        Problem { kind, subject: format!("Node/{node}"), field: field.to_owned(), reason: reason.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.field.is_empty() {
            write!(f, "{}: {}", self.subject, self.reason)
        } else {
            write!(f, "{}, {}: {}", self.subject, self.field, self.reason)
        }
    }
}

/// Hostile text made fit for a report: control characters escaped, cut to 64 characters.
pub fn quote(text: &str) -> String {
    const LONGEST: usize = 64;
    let mut out = String::with_capacity(text.len().min(LONGEST) + 2);
    out.push('"');
    for (count, c) in text.chars().enumerate() {
        if count == LONGEST {
            out.push_str("...");
            break;
        }
        out.extend(c.escape_debug());
    }
    out.push('"');
    out
}

/// The first line of somebody else's message, which may quote hostile text: control characters escaped,
/// cut to 300 characters.
pub fn one_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default().chars().take(300);
    line.flat_map(|c| if c.is_control() { c.escape_debug().collect() } else { vec![c] }).collect()
}

/// The known name nearest to a mistyped one, if one is near enough to be what was meant. Large and small
/// letters count the same: who writes `podcidrs` means `podCIDRs`.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if word.chars().count() > 64 {
        return None; // nobody mistypes that; and the distance costs length times length
    }
    let limit = if word.len() <= 4 { 1 } else { 3 };
    let word = word.to_lowercase();
    known
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&word, &candidate.to_lowercase()), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Most problems of a share that are held; the rest are only counted, until there is room and they are told again.
const MAX_HELD: usize = 1_000;

/// Whose room on the board a problem takes: what users of namespaces write, in any number, must not keep back what is
/// said of Nodes, nor that what this node itself is short of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Share {
    /// Services and the like.
    Namespaces,
    /// Nodes, and what else has no namespace.
    Cluster,
    /// Settings, files, sources.
    Here,
}

impl Share {
    const COUNT: usize = 3;

    fn of(problem: &Problem) -> Share {
        let name = problem.subject.split('/').next().unwrap_or_default();
        match Kind::ALL.into_iter().find(|kind| kind.name() == name).map(Kind::namespaced) {
            Some(true) => Share::Namespaces,
            Some(false) => Share::Cluster,
            None => Share::Here,
        }
    }
}

/// All current problems, by where they come from, and how many there ever were.
#[derive(Debug, Default)]
pub struct ProblemBoard {
    current: BTreeMap<String, Vec<Problem>>,
    /// By share.
    held: [usize; Share::COUNT],
    /// How many of an origin are not held.
    left_out: BTreeMap<String, usize>,
    seen: [u64; ProblemKind::ALL.len()],
}

impl ProblemBoard {
    /// Replaces what `origin` has to report; an empty list means that all is well there now.
    /// Returns the problems that are new, so that each is logged once.
    pub fn set(&mut self, origin: &str, mut problems: Vec<Problem>) -> Vec<Problem> {
        problems.sort();
        problems.dedup();
        let before = self.current.remove(origin).unwrap_or_default();
        before.iter().for_each(|problem| self.held[Share::of(problem) as usize] -= 1);
        let all = problems.len();
        problems.retain(|problem| {
            let held = &mut self.held[Share::of(problem) as usize];
            let fits = *held < MAX_HELD;
            *held += usize::from(fits);
            fits
        });
        match all - problems.len() {
            0 => drop(self.left_out.remove(origin)),
            more => drop(self.left_out.insert(origin.to_owned(), more)),
        }
        let new: Vec<Problem> =
            problems.iter().filter(|p| before.binary_search(p).is_err()).cloned().collect();
        for problem in &new {
            self.seen[problem.kind as usize] += 1;
        }
        if !problems.is_empty() {
            self.current.insert(origin.to_owned(), problems);
        }
        new
    }

    /// Every current problem, in a stable order.
    pub fn list(&self) -> Vec<Problem> {
        let mut all: Vec<Problem> = self.current.values().flatten().cloned().collect();
        all.sort();
        all.dedup();
        let more: usize = self.left_out.values().sum();
        if more > 0 {
            let reason = format!("{more} more problems are not told here: put these right first");
            let (subject, field) = ("problems".to_owned(), String::new());
            all.push(Problem { kind: ProblemKind::Setting, subject, field, reason });
        }
        all
    }

    /// How many problems of each kind have ever been seen.
    pub fn seen(&self) -> impl Iterator<Item = (ProblemKind, u64)> + '_ {
        ProblemKind::ALL.into_iter().map(|kind| (kind, self.seen[kind as usize]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_is_cut_and_escaped() {
        assert_eq!(quote("a\nb\u{1b}[31m"), "\"a\\nb\\u{1b}[31m\"");
        assert!(quote(&"x".repeat(10_000)).len() < 80);
        assert_eq!(one_line("a\u{1b}[2Jb\nc"), "a\\u{1b}[2Jb");
    }

    #[test]
    fn nearest_finds_typing_mistakes_only() {
        let known = ["underlay-mtu", "vxlan-port", "vni"];
        assert_eq!(nearest("underlay_mtu", known), Some("underlay-mtu"));
        assert_eq!(nearest("vn", known), Some("vni"));
        assert_eq!(nearest("masquerade", known), None);
        assert_eq!(nearest("VXLANPORT", known), Some("vxlan-port"));
        assert_eq!(nearest(&"v".repeat(1_000_000), known), None);
    }

    #[test]
    fn so_many_problems_are_held_and_the_rest_is_counted() {
        let mut board = ProblemBoard::default();
        let problems = |origin: &str| -> Vec<Problem> {
            let problem = |n| Problem::node(ProblemKind::Value, origin, &format!("{n}"), "x");
            (0..600).map(problem).collect()
        };
        assert_eq!(board.set("a", problems("a")).len(), 600);
        assert_eq!(board.set("b", problems("b")).len(), MAX_HELD - 600);
        assert!(board.set("c", problems("c")).is_empty());
        let last = board.list().pop().expect("problems");
        assert_eq!((board.list().len(), last.reason.starts_with("800 more")), (MAX_HELD + 1, true));
        board.set("a", Vec::new());
        board.set("c", Vec::new());
        assert_eq!(board.set("b", problems("b")).len(), 200);
        assert_eq!(board.list().len(), 600);
    }

    #[test]
    fn what_users_write_takes_no_room_from_what_is_said_of_nodes_and_settings() {
        let mut board = ProblemBoard::default();
        let of = |subject: &str, field: u32| Problem {
            subject: subject.to_owned(),
            ..Problem::node(ProblemKind::Value, "", &field.to_string(), "x")
        };
        let many = |subject: &str| (0..2_000).map(|n| of(subject, n)).collect::<Vec<_>>();
        assert_eq!(board.set("users", many("Service/shop/web")).len(), MAX_HELD);
        for subject in ["EndpointSlice/shop/web", "Service/a/b"] {
            assert!(board.set(subject, vec![of(subject, 0)]).is_empty(), "{subject}");
        }
        for subject in ["Node/a", "ServiceCIDR/x", "source", "folder/file.yaml"] {
            assert_eq!(board.set(subject, vec![of(subject, 0)]).len(), 1, "{subject}");
        }
        // Nor do Nodes of what is said of this one.
        assert_eq!(board.set("nodes", many("Node/b")).len(), MAX_HELD - 2);
        assert_eq!(board.set("API server", vec![of("API server", 0)]).len(), 1);
        board.set("users", Vec::new());
        assert_eq!(board.set("Service/a/b", vec![of("Service/a/b", 0)]).len(), 1);
    }

    #[test]
    fn a_problem_is_new_once_and_goes_when_its_origin_is_well() {
        let mut board = ProblemBoard::default();
        let problem = Problem::node(ProblemKind::Annotation, "a", "warren.dev/lanes", "not a key");
        assert_eq!(board.set("file:x", vec![problem.clone(), problem.clone()]), vec![problem.clone()]);
        assert!(board.set("file:x", vec![problem.clone()]).is_empty());
        assert_eq!(board.list(), vec![problem]);
        board.set("file:x", Vec::new());
        assert!(board.list().is_empty());
        assert_eq!(
            board.seen().find(|(k, _)| *k == ProblemKind::Annotation),
            Some((ProblemKind::Annotation, 1))
        );
    }
}
