//! On which line of a YAML document a value of the wrong type stands.
//!
//! serde_json, which gives objects their types, knows no lines. Reading the text a second time with types, by the YAML
//! reader, would tell, at the price of all of Kubernetes' types a second time in the program (a fifth of it). So the
//! culprit is found by leaving things out until the mistake is another one, and then looked up in the text.

use std::fmt;

use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_saphyr::Spanned;

use super::manifest::yaml;

/// How many bytes of documents are read again for one mistake: a file of mistakes must not cost much more than one
/// without.
const READ_AGAIN: usize = 256 << 10;
const MOST_TRIALS: usize = 256;

/// A step from a value into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Field(String),
    Item(usize),
}

/// Where in `value`, whose text has `bytes`, the mistake is that makes it no `T`, with these words.
pub(super) fn blame<T: DeserializeOwned>(mut value: Value, words: &str, bytes: usize) -> Vec<Step> {
    let mut path = Vec::new();
    let mut trials = (READ_AGAIN / bytes.max(1)).min(MOST_TRIALS);
    loop {
        let mut culprit = None;
        for step in steps(&mut value, &path) {
            if trials == 0 {
                return path;
            }
            trials -= 1;
            let Some(taken) = take_out(&mut value, &path, &step) else { continue };
            let other = T::deserialize(&value).err().is_none_or(|error| error.to_string() != words);
            put_back(&mut value, &path, &step, taken);
            if other {
                culprit = Some(step);
                break;
            }
        }
        match culprit {
            Some(step) => path.push(step),
            None => return path,
        }
    }
}

/// How many lines below the first of the document that is.
pub(super) fn line(piece: &str, path: &[Step]) -> Option<u64> {
    let mut at = yaml::<Spanned<Node>>(piece).ok()?;
    for step in path {
        let next = match (at.value, step) {
            (Node::Map(fields), Step::Field(name)) => {
                fields.into_iter().find(|(key, _)| key == name).map(|(_, value)| value)
            }
            (Node::List(items), Step::Item(index)) => items.into_iter().nth(*index),
            (Node::Map(_) | Node::List(_) | Node::Leaf, _) => None,
        };
        at = next?;
    }
    Some(at.referenced.line().saturating_sub(1))
}

fn steps(value: &mut Value, path: &[Step]) -> Vec<Step> {
    match inner(value, path) {
        Some(Value::Object(fields)) => fields.keys().cloned().map(Step::Field).collect(),
        Some(Value::Array(items)) => (0..items.len()).map(Step::Item).collect(),
        Some(Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_)) | None => Vec::new(),
    }
}

fn inner<'v>(value: &'v mut Value, path: &[Step]) -> Option<&'v mut Value> {
    path.iter().try_fold(value, |value, step| match step {
        Step::Field(name) => value.get_mut(name),
        Step::Item(index) => value.get_mut(*index),
    })
}

fn take_out(value: &mut Value, path: &[Step], step: &Step) -> Option<Value> {
    match (inner(value, path)?, step) {
        (Value::Object(fields), Step::Field(name)) => fields.remove(name),
        (Value::Array(items), Step::Item(index)) if *index < items.len() => Some(items.remove(*index)),
        (_, Step::Field(_) | Step::Item(_)) => None,
    }
}

fn put_back(value: &mut Value, path: &[Step], step: &Step, taken: Value) {
    match (inner(value, path), step) {
        (Some(Value::Object(fields)), Step::Field(name)) => drop(fields.insert(name.clone(), taken)),
        (Some(Value::Array(items)), Step::Item(index)) if *index <= items.len() => {
            items.insert(*index, taken)
        }
        (_, Step::Field(_) | Step::Item(_)) => {}
    }
}

/// The shape of a document, each part with its place.
enum Node {
    Map(Vec<(String, Spanned<Node>)>),
    List(Vec<Spanned<Node>>),
    Leaf,
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(Shape)
    }
}

struct Shape;

impl<'de> Visitor<'de> for Shape {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut fields = Vec::new();
        while let Some(field) = map.next_entry()? {
            fields.push(field);
        }
        Ok(Node::Map(fields))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Node::List(items))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
        Ok(Node::Leaf)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Node, E> {
        Ok(Node::Leaf)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Node, E> {
        Ok(Node::Leaf)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Node, E> {
        Ok(Node::Leaf)
    }

    fn visit_str<E>(self, _: &str) -> Result<Node, E> {
        Ok(Node::Leaf)
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Leaf)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Leaf)
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{Node, Service};

    use super::*;

    fn found<T: DeserializeOwned>(text: &str) -> (Vec<Step>, Option<u64>) {
        let value: Value = yaml(text).unwrap();
        let Err(error) = T::deserialize(&value) else { panic!("nothing is wrong with {text}") };
        let path = blame::<T>(value, &error.to_string(), text.len());
        let line = line(text, &path);
        (path, line)
    }

    #[test]
    fn the_line_of_a_wrong_value_is_found() {
        let head = "apiVersion: v1\nkind: Node\nmetadata:\n  name: a\n";
        for (rest, expected) in [
            ("  labels:\n    a: b\n    c: 5\n    d: e\n", 6),
            ("spec:\n  podCIDRs:\n  - 10.244.1.0/24\n  - 7\n", 7),
            ("spec:\n  podCIDRs: x\n", 5),
            ("spec: {unschedulable: 1}\nstatus: {}\n", 4),
            ("status:\n  addresses:\n  - type: InternalIP\n    address: 1.5\n", 7),
        ] {
            let text = format!("{head}{rest}");
            assert_eq!(found::<Node>(&text).1, Some(expected), "{rest}");
        }
        let text = "metadata: {name: s}\nspec:\n  ports:\n  - port: 80\n  - port: http\n";
        let (path, line) = found::<Service>(text);
        let field = |name: &str| Step::Field(name.to_owned());
        assert_eq!(path, [field("spec"), field("ports"), Step::Item(1), field("port")]);
        assert_eq!(line, Some(4));
    }

    #[test]
    fn two_of_the_same_are_found_where_they_meet_and_large_ones_cost_little() {
        let twice = "metadata:\n  labels:\n    a: 5\n    b: 5\n";
        assert_eq!(found::<Node>(twice).0.last(), Some(&Step::Field("labels".to_owned())));
        let large =
            format!("metadata:\n  labels:\n    a: 5\n  annotations: {{a: {}}}\n", "x".repeat(READ_AGAIN));
        assert_eq!(found::<Node>(&large), (Vec::new(), Some(0)));
    }
}
