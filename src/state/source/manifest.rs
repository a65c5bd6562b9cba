//! Bytes of one file to Kubernetes objects: multi-document YAML, JSON, Lists. Hostile input.
//!
//! Each document stands for itself: a bad one is reported with its number and line, the others are
//! taken. Sizes, depth and aliases are bounded, so that a small file cannot become a large one.

use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Kind, Object, fields, located};
use crate::state::problem::{Problem, ProblemKind, nearest, one_line, quote};

/// Largest file that is read.
pub const MAX_FILE_BYTES: u64 = 16 << 20;
/// Most documents in one file.
pub const MAX_DOCUMENTS: usize = 20_000;
/// Most objects in one file, Lists unfolded.
pub const MAX_OBJECTS: usize = 100_000;
/// Most unknown fields of one file that are named.
const MAX_UNKNOWN: usize = 100;
/// Most wrong values of one file whose line is looked for.
const MAX_LOCATED: usize = 100;
/// Deepest nesting; Kubernetes objects need about 12.
const MAX_DEPTH: usize = 64;

/// What one document has wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentProblem {
    /// Which document of the file, from 1; 0 when it concerns the file as a whole.
    pub document: usize,
    /// Line in the file, from 1; 0 when not known.
    pub line: u64,
    /// How it is wrong.
    pub flaw: Flaw,
    /// Why.
    pub reason: String,
}

/// How a document can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// Not even YAML or JSON.
    Syntax,
    /// An object that we cannot use, though it may be meant for us.
    Object,
    /// No object, or one of a kind that is none of ours: whatever it says, it hides none of our objects.
    Foreign,
}

/// What a file gave.
#[derive(Clone, Debug, Default)]
pub struct Manifest {
    /// The objects, in order.
    pub objects: Vec<Object>,
    /// The documents that gave none, with the reason.
    pub problems: Vec<DocumentProblem>,
    /// Fields of the objects that are none; the objects count all the same.
    pub unknown: Vec<Problem>,
    /// How many documents hold something.
    pub documents: usize,
}

/// Reads all documents of a file. `json` chooses the format; YAML would do for most JSON, but not
/// for tabs and not for several documents one after the other.
pub fn parse(bytes: &[u8], json: bool) -> Manifest {
    let mut manifest = Manifest::default();
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text.strip_prefix('\u{feff}').unwrap_or(text),
        Err(error) => {
            manifest.report(0, 0, Flaw::Syntax, format!("not UTF-8 at byte {}", error.valid_up_to()));
            return manifest;
        }
    };
    if text.contains('\0') {
        manifest.report(0, 0, Flaw::Syntax, "holds a zero byte: not a text file".to_owned());
        return manifest;
    }
    if json {
        parse_json(text, &mut manifest)
    } else {
        parse_yaml(text, &mut manifest)
    }
    manifest
}

/// The objects of a List (or the one object) that is there as a value already.
pub fn from_value(value: Value) -> Manifest {
    let mut manifest = Manifest { documents: 1, ..Manifest::default() };
    manifest.take(value, 0, None);
    manifest
}

fn parse_yaml(text: &str, manifest: &mut Manifest) {
    for (line, piece) in documents(text) {
        if manifest.full(line) {
            return;
        }
        manifest.documents += 1;
        match yaml::<Value>(piece) {
            Ok(Value::Null) => manifest.documents -= 1, // only comments
            Ok(value) => {
                let piece = Some(piece).filter(|_| manifest.problems.len() < MAX_LOCATED);
                manifest.take(value, line, piece);
            }
            Err(error) => {
                let (at, reason) = describe(&error, line);
                manifest.report(manifest.documents, at, Flaw::Syntax, reason);
            }
        }
    }
}

fn parse_json(text: &str, manifest: &mut Manifest) {
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    let (mut start, mut line) = (0, 1);
    loop {
        let rest = text.get(start..).unwrap_or_default();
        let blank = rest.len() - rest.trim_start().len();
        line += newlines(text, start, start + blank);
        let Some(value) = stream.next() else { return };
        if manifest.full(line) {
            return;
        }
        manifest.documents += 1;
        match value {
            Ok(value) => manifest.take(value, line, None),
            Err(error) => {
                let reason = one_line(&error.to_string());
                manifest.report(manifest.documents, error.line() as u64, Flaw::Syntax, reason);
                return;
            }
        }
        let end = stream.byte_offset();
        line += newlines(text, start + blank, end);
        start = end;
    }
}

/// Splits YAML at its document markers (YAML 1.2, 9.1.2: `---` or `...` at the start of a line, followed
/// by white space, is a marker even inside a block scalar). Gives each piece with its first line's number.
fn documents(text: &str) -> impl Iterator<Item = (u64, &str)> {
    let mut pieces = Vec::new();
    let (mut start, mut first, mut offset) = (0, 1, 0);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let marker = line.strip_prefix("---").or_else(|| line.strip_prefix("..."));
        let number = index as u64 + 1;
        if let Some(after) =
            marker.filter(|after| after.is_empty() || after.starts_with([' ', '\t', '\r', '\n']))
        {
            pieces.push((first, text.get(start..offset).unwrap_or_default()));
            // What follows the marker on its line belongs to the new document.
            start = offset + (line.len() - after.len());
            first = number;
        }
        offset += line.len();
    }
    pieces.push((first, text.get(start..).unwrap_or_default()));
    pieces.into_iter().filter(|(_, piece)| {
        piece.lines().any(|line| {
            let line = line.trim_start();
            !line.is_empty() && !line.starts_with('#') && !line.starts_with('%')
        })
    })
}

pub(super) fn yaml<T: DeserializeOwned>(piece: &str) -> Result<T, serde_saphyr::Error> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_documents: 1,
            max_aliases: 1_000,
            max_anchors: 1_000,
            max_merge_keys: 1_000,
            max_events: 4_000_000, // a List of 10,000 Services has about 700,000
            max_nodes: 2_000_000,
        },
        alias_limits: serde_saphyr::options::AliasLimits::default(),
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::Error,
        strict_booleans: true, // YAML 1.2 as Kubernetes means it: `no` and `on` are words
        with_snippet: false,
    };
    let mut options = options;
    options.alias_limits.max_total_replayed_events = 10_000;
    options.alias_limits.max_replay_stack_depth = 16;
    serde_saphyr::from_str_with_options(piece, options)
}

/// Line in the file and reason of a YAML error in a document that starts on line `first`.
fn describe(error: &serde_saphyr::Error, first: u64) -> (u64, String) {
    let line = error.location().map_or(first, |location| first + location.line().saturating_sub(1));
    (line, one_line(&error.to_string()))
}

/// Line ends between two offsets; each stretch is counted once, so that many documents cost no more.
fn newlines(text: &str, from: usize, to: usize) -> u64 {
    let between = text.as_bytes().get(from..to).unwrap_or_default();
    between.iter().filter(|byte| **byte == b'\n').count() as u64
}

impl Manifest {
    fn report(&mut self, document: usize, line: u64, flaw: Flaw, reason: String) {
        self.problems.push(DocumentProblem { document, line, flaw, reason });
    }

    fn add(&mut self, (object, unknown): (Object, Vec<fields::Unknown>)) {
        let room = MAX_UNKNOWN.saturating_sub(self.unknown.len());
        self.unknown.extend(unknown.into_iter().take(room).map(|unknown| Problem {
            kind: ProblemKind::Value,
            subject: object.key().to_string(),
            field: unknown.field,
            reason: unknown.reason,
        }));
        self.objects.push(object);
    }

    fn full(&mut self, line: u64) -> bool {
        let full = self.documents >= MAX_DOCUMENTS || self.objects.len() >= MAX_OBJECTS;
        if full {
            self.report(
                0,
                line,
                Flaw::Object,
                format!("more than {MAX_DOCUMENTS} documents or {MAX_OBJECTS} objects"),
            );
        }
        full
    }

    /// One document: an object, or a List of them.
    fn take(&mut self, value: Value, line: u64, piece: Option<&str>) {
        let document = self.documents;
        let items = match list_items(value) {
            Ok(items) => items,
            Err(value) => {
                match typed(value, piece) {
                    Ok(read) => self.add(read),
                    Err(wrong) => self.report(document, line + wrong.offset, wrong.flaw, wrong.reason),
                }
                return;
            }
        };
        for (index, item) in items.into_iter().enumerate() {
            if self.full(line) {
                return;
            }
            match typed(item, None) {
                Ok(read) => self.add(read),
                Err(Wrong { flaw, reason, .. }) => {
                    self.report(document, line, flaw, format!("items[{index}]: {reason}"));
                }
            }
        }
    }
}

/// The items of a `List`, or of a list of one kind (`NodeList`); the value itself if it is neither.
fn list_items(mut value: Value) -> Result<Vec<Value>, Value> {
    let name = value.get("kind").and_then(Value::as_str).unwrap_or_default().to_owned();
    let Some(of) = name.strip_suffix("List") else { return Err(value) };
    let Some(Value::Array(mut items)) = value.get_mut("items").map(Value::take) else { return Err(value) };
    if !of.is_empty() {
        // `kubectl get -o json` names each item's kind, the API's own lists do not.
        let version = value.get("apiVersion").cloned().unwrap_or(Value::Null);
        for item in items.iter_mut().filter_map(Value::as_object_mut) {
            item.entry("kind").or_insert_with(|| Value::from(of));
            item.entry("apiVersion").or_insert_with(|| version.clone());
        }
    }
    Ok(items)
}

/// Why a document gives no object, and how many lines below the document's first the mistake is.
struct Wrong {
    offset: u64,
    flaw: Flaw,
    reason: String,
}

impl Wrong {
    fn object(reason: String) -> Wrong {
        Wrong { offset: 0, flaw: Flaw::Object, reason }
    }
}

fn typed(value: Value, piece: Option<&str>) -> Result<(Object, Vec<fields::Unknown>), Wrong> {
    let text = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
    let Some(name) = text("kind") else {
        let flaw = if is_begun(&value) { Flaw::Object } else { Flaw::Foreign };
        return Err(Wrong { offset: 0, flaw, reason: "no `kind`: not a Kubernetes object".to_owned() });
    };
    let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.name() == name) else {
        let near = nearest(&name, Kind::ALL.map(Kind::name));
        // A file that is being written may end inside of the word, or before the items of a List.
        let lists = Kind::ALL.map(|kind| format!("{}List", kind.name()));
        let begun = "List".starts_with(&name) || lists.iter().any(|list| list.starts_with(&name));
        let flaw = if near.is_some() || begun { Flaw::Object } else { Flaw::Foreign };
        let hint = near.map(|known| format!(" (did you mean {known}?)")).unwrap_or_default();
        let reason = format!("kind {} is not one that Warren reads{hint}", quote(&name));
        return Err(Wrong { offset: 0, flaw, reason });
    };
    let version = text("apiVersion").unwrap_or_default();
    if version != kind.api_version() {
        let wanted = kind.api_version();
        return Err(Wrong::object(format!("apiVersion of a {name} is {wanted}, not {}", quote(&version))));
    }
    let (unknown, misshapen) = (fields::unknown(kind, &value), fields::misshapen(kind, &value));
    let object = match kind {
        Kind::Node => into(value, piece).map(Object::Node),
        Kind::Service => into(value, piece).map(Object::Service),
        Kind::EndpointSlice => into(value, piece).map(Object::EndpointSlice),
        Kind::Pod => into(value, piece).map(Object::Pod),
        Kind::ServiceCidr => into(value, piece).map(Object::ServiceCidr),
    };
    let object = object.map_err(|wrong| match misshapen {
        Some(reason) => Wrong { reason, ..wrong },
        None => wrong,
    })?;
    check_names(&object).map_err(Wrong::object)?;
    Ok((object, unknown))
}

/// Whether a document without a `kind` may be the beginning of an object of ours, whose writer is not done:
/// Helm's values and whatever else is no object must not count as one for as long as it is there.
fn is_begun(value: &Value) -> bool {
    const FIRST: [&str; 3] = ["apiVersion", "kind", "metadata"];
    match value {
        Value::Object(fields) => match fields.get("apiVersion").and_then(Value::as_str) {
            Some(version) => Kind::ALL.iter().any(|kind| kind.api_version().starts_with(version)),
            None => FIRST.iter().any(|field| fields.contains_key(*field)),
        },
        // It ends inside of its first word.
        Value::String(text) => FIRST.iter().any(|field| field.starts_with(text.as_str())),
        // Somebody's idea of a List.
        Value::Array(items) => items.iter().any(|item| item.is_object() && is_begun(item)),
        // The last item of a List: a hyphen, and nothing yet behind it.
        Value::Null => true,
        Value::Bool(_) | Value::Number(_) => false,
    }
}

fn into<T: DeserializeOwned>(value: Value, piece: Option<&str>) -> Result<Arc<T>, Wrong> {
    // Asked again only where something is wrong.
    T::deserialize(&value).map(Arc::new).map_err(|error| {
        let error = error.to_string();
        let line =
            piece.and_then(|piece| located::line(piece, &located::blame::<T>(value, &error, piece.len())));
        let reason = one_line(&error);
        let hint = if reason.contains("expected a string") || reason.contains("expected string") {
            " (put it in quotes)"
        } else {
            ""
        };
        Wrong { offset: line.unwrap_or(0), flaw: Flaw::Object, reason: format!("{reason}{hint}") }
    })
}

/// Names as the API would accept them (RFC 1123 subdomain): they go into reports, files and rules.
fn check_names(object: &Object) -> Result<(), String> {
    let Some(name) = object.metadata().name.as_deref().filter(|name| !name.is_empty()) else {
        return Err(format!("{} without metadata.name", object.kind().name()));
    };
    if !is_dns_name(name) {
        return Err(format!("metadata.name {} is not a valid name", quote(name)));
    }
    match object.metadata().namespace.as_deref() {
        Some(namespace) if object.kind().namespaced() && !namespace.is_empty() && !is_dns_name(namespace) => {
            Err(format!("metadata.namespace {} is not a valid name", quote(namespace)))
        }
        Some(_) | None => Ok(()),
    }
}

/// RFC 1123 subdomain, as Kubernetes checks names: at most 253 of `[a-z0-9.-]`, ends alphanumeric.
pub fn is_dns_name(name: &str) -> bool {
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    name.len() <= 253
        && name.starts_with(alphanumeric)
        && name.ends_with(alphanumeric)
        && name.chars().all(|c| alphanumeric(c) || c == '-' || c == '.')
        && !name.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NODE: &str = "apiVersion: v1\nkind: Node\nmetadata: {name: a}\nspec: {podCIDRs: [10.244.1.0/24]}\n";

    fn names(manifest: &Manifest) -> Vec<String> {
        manifest.objects.iter().map(|object| object.key().to_string()).collect()
    }

    #[test]
    fn reads_documents_lists_and_json() {
        let text = format!(
            "# a comment\n---\n{NODE}---\n# nothing here\n---\napiVersion: v1\nkind: List\nitems:\n\
             - {{apiVersion: v1, kind: Service, metadata: {{name: s}}}}\n...\n---\n\
             apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {{name: k}}\nspec: {{cidrs: [10.96.0.0/16]}}\n"
        );
        let manifest = parse(text.as_bytes(), false);
        assert_eq!(manifest.problems, []);
        assert_eq!(names(&manifest), ["Node/a", "Service/default/s", "ServiceCIDR/k"]);

        let json = "{\"apiVersion\":\"v1\",\n\t\"kind\":\"NodeList\",\"items\":[{\"metadata\":{\"name\":\"b\"}}]}\n\
                    {\"apiVersion\":\"v1\",\"kind\":\"Node\",\"metadata\":{\"name\":\"c\"}}";
        let manifest = parse(json.as_bytes(), true);
        assert_eq!(
            (manifest.problems.len(), names(&manifest)),
            (0, vec!["Node/b".to_owned(), "Node/c".to_owned()])
        );
    }

    #[test]
    fn a_bad_document_costs_itself_and_says_where() {
        let text =
            format!("{NODE}---\nkind: [\n---\napiVersion: v1\nkind: Nod\n---\n{}", NODE.replace("a}", "b}"));
        let manifest = parse(text.as_bytes(), false);
        assert_eq!(names(&manifest), ["Node/a", "Node/b"]);
        let [syntax, kind] = manifest.problems.as_slice() else { panic!("{:?}", manifest.problems) };
        assert_eq!((syntax.document, syntax.flaw), (2, Flaw::Syntax));
        assert!((5..=7).contains(&syntax.line), "{syntax:?}");
        assert_eq!((kind.document, kind.line, kind.flaw), (3, 7, Flaw::Object));
        assert!(kind.reason.contains("did you mean Node?"), "{kind:?}");
        for (kind, flaw) in [("Deployment", Flaw::Foreign), ("No", Flaw::Object), ("''", Flaw::Object)] {
            let text = format!("apiVersion: v1\nkind: {kind}\n");
            assert_eq!(parse(text.as_bytes(), false).problems[0].flaw, flaw, "{kind}");
        }
    }

    #[test]
    fn what_is_no_object_is_told_from_one_that_is_being_written() {
        let begun =
            ["api", "kind", "kind:", "apiVersion: v", "apiVersion: v1", "metadata: {name: a}", "a: 1\nkind:"];
        let lists = ["apiVersion: v1\nkind: Li", "apiVersion: v1\nkind: List\nitems:", "kind: NodeList"];
        let items =
            ["kind: List\nitems:\n-", "kind: List\nitems:\n- api", "- {kind: 7, metadata: {name: a}}"];
        for text in begun.iter().chain(&lists).chain(&items) {
            let manifest = parse(text.as_bytes(), false);
            assert_eq!(
                manifest.problems.iter().map(|p| p.flaw).collect::<Vec<_>>(),
                [Flaw::Object],
                "{text}"
            );
        }
        let values = "replicas: 2\nimage: {tag: x}";
        for text in [
            values,
            "apiVersion: v2\nname: chart",
            "only words",
            "- a\n- b: 1",
            "7",
            "kind: List\nitems: [{a: 1}]",
        ] {
            let manifest = parse(text.as_bytes(), false);
            assert_eq!(
                manifest.problems.iter().map(|p| p.flaw).collect::<Vec<_>>(),
                [Flaw::Foreign],
                "{text}"
            );
        }
    }

    #[test]
    fn a_wrong_type_names_its_line() {
        let text = "\n---\napiVersion: v1\nkind: Node\nmetadata:\n  name: a\nspec:\n  podCIDRs: 7\n";
        let manifest = parse(text.as_bytes(), false);
        assert_eq!(manifest.problems.len(), 1);
        assert_eq!(manifest.problems[0].line, 8, "{:?}", manifest.problems);
        let text = "apiVersion: v1\nkind: Node\nmetadata: {name: a, annotations: {warren.dev/protocol: 1}}\n";
        let manifest = parse(text.as_bytes(), false);
        assert!(manifest.problems[0].reason.contains("quotes"), "{:?}", manifest.problems);
    }

    #[test]
    fn refuses_what_would_grow() {
        let mut bomb = String::from("a: &a [x,x,x,x,x,x,x,x,x]\n");
        for (from, to) in "abcdefgh".chars().zip("bcdefghi".chars()) {
            bomb +=
                &format!("{to}: &{to} [*{from},*{from},*{from},*{from},*{from},*{from},*{from},*{from}]\n");
        }
        assert_eq!(parse(bomb.as_bytes(), false).problems.len(), 1);
        let deep = "[".repeat(100_000);
        assert_eq!(parse(deep.as_bytes(), false).problems.len(), 1);
        assert_eq!(parse(deep.as_bytes(), true).problems.len(), 1);
        let deep = "- ".repeat(10_000);
        assert!(!parse(deep.as_bytes(), false).problems.is_empty());
        assert_eq!(parse(b"\xff\xfe", false).problems.len(), 1);
    }

    #[test]
    fn json_documents_know_their_lines() {
        let text = "{\"kind\":\n\"X\"}\n\n {\"kind\":\"Y\"}\n{\"kind\":";
        let lines: Vec<u64> = parse(text.as_bytes(), true).problems.iter().map(|p| p.line).collect();
        assert_eq!(lines, [1, 4, 5]);
    }

    #[test]
    fn a_large_list_is_taken() {
        let item = "- {apiVersion: v1, kind: Service, metadata: {name: NAME, namespace: x, labels: {a: b}}, spec: {type: \
                    ClusterIP, clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1], ports: [{name: http, port: 80, targetPort: 8080}]}}\n";
        let items: String = (0..10_000).map(|i| item.replace("NAME", &format!("s{i}"))).collect();
        let manifest = parse(format!("apiVersion: v1\nkind: List\nitems:\n{items}").as_bytes(), false);
        assert_eq!(manifest.problems, []);
        assert_eq!(manifest.objects.len(), 10_000);
    }

    #[test]
    fn names_are_checked() {
        for name in ["../etc/passwd", "A", "a/b", "", "-a", "a\u{7}", "a..b"] {
            assert!(!is_dns_name(name), "{name}");
        }
        assert!(is_dns_name("node-1.example.com"));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), json: bool) {
            parse(&bytes, json);
        }

        #[test]
        fn no_yaml_like_text_panics(text in "[-:\\[\\]{}a-c&*!|> \n\"'%.#]{0,200}", json: bool) {
            parse(text.as_bytes(), json);
        }
    }
}
