//! A call of the CNI plugin: variables as `NAME=value` lines, an empty line, then what the runtime writes to standard
//! input, which is also read as a file of the runtime's folder of lists.

use std::collections::BTreeMap;

use ipnet::IpNet;
use warren::cni::answer_unasked;
use warren::cni::conflist::{self, ConfFile};

/// What a runtime may get back at most; a result is no larger than what it was made from, but for our own words.
const WORDS: usize = 4096;

pub(crate) fn run(data: &[u8]) {
    let split = data.windows(2).position(|two| two == b"\n\n");
    let (variables, stdin) = match split {
        Some(at) => (&data[..at], &data[at + 2..]),
        None => (data, &[][..]),
    };
    let text = String::from_utf8_lossy(variables);
    let variables: BTreeMap<String, String> = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    match answer_unasked(&variables, stdin) {
        Ok(answer) => {
            assert!(is_json(&answer) && answer.len() <= 8 * stdin.len() + WORDS, "{answer}");
        }
        Err(object) => {
            assert!(is_json(&object) && object.len() <= WORDS, "an error object of {} bytes", object.len());
            for part in ["\"cniVersion\":", "\"code\":", "\"msg\":"] {
                assert!(object.contains(part), "{part} is missing: {object}");
            }
            assert!(!object.chars().any(char::is_control), "control characters reach a log: {object:?}");
        }
    }
    if let Ok(text) = std::str::from_utf8(stdin) {
        list(text);
    }
}

/// What becomes of a list of others.
fn list(text: &str) {
    const OWN: &str = "05-warren.conflist";
    let ranges: [IpNet; 2] = ["10.244.1.0/24".parse().unwrap(), "fd00:10:244:1::/64".parse().unwrap()];
    for name in ["10-x.conflist", "10-x.conf", "01-x.conf", OWN] {
        let file = ConfFile { name: name.to_owned(), text: text.to_owned() };
        match conflist::judge(std::slice::from_ref(&file), OWN, &ranges) {
            conflist::Verdict::Own => {}
            conflist::Verdict::Wrap(file) => {
                let wrapped = conflist::wrap(&file, "/run/warren");
                assert!(wrapped.is_none_or(|text| is_json(&text)));
            }
            // What the runtime takes can also be chained into, and comes back as it was.
            conflist::Verdict::Chain(file) => assert!(conflist::chain(&file.text, "/run/warren").is_some()),
            conflist::Verdict::Refuse(why) => {
                assert!(why.len() <= WORDS && !why.chars().any(char::is_control), "{why:?}");
            }
        }
    }
    let Some(before) = conflist::unchain(text) else { return };
    if let Some(chained) = conflist::chain(text, "/run/warren") {
        assert!(is_json(&chained), "{chained}");
        assert_eq!(conflist::chain(&chained, "/run/warren").as_ref(), Some(&chained), "twice is once");
        if before == text {
            assert_eq!(conflist::unchain(&chained).as_deref(), Some(text), "it comes back as it was");
        }
    }
}

fn is_json(text: &str) -> bool {
    json::is_value(text)
}

/// A reader of JSON that shares nothing with the one under test.
mod json {
    pub(super) fn is_value(text: &str) -> bool {
        let mut rest = text.as_bytes();
        value(&mut rest, 0) && rest.iter().all(u8::is_ascii_whitespace)
    }

    fn space(rest: &mut &[u8]) {
        while let Some((b' ' | b'\t' | b'\n' | b'\r', more)) = rest.split_first() {
            *rest = more;
        }
    }

    fn takes(rest: &mut &[u8], word: &[u8]) -> bool {
        match rest.strip_prefix(word) {
            Some(more) => {
                *rest = more;
                true
            }
            None => false,
        }
    }

    fn value(rest: &mut &[u8], depth: usize) -> bool {
        space(rest);
        let good = match rest.first() {
            _ if depth > 200 => false,
            Some(b'{') => items(rest, b"{", b"}", |rest| {
                space(rest);
                let named = string(rest);
                space(rest);
                named && takes(rest, b":") && value(rest, depth + 1)
            }),
            Some(b'[') => items(rest, b"[", b"]", |rest| value(rest, depth + 1)),
            Some(b'"') => string(rest),
            Some(b't') => takes(rest, b"true"),
            Some(b'f') => takes(rest, b"false"),
            Some(b'n') => takes(rest, b"null"),
            Some(b'-' | b'0'..=b'9') => number(rest),
            Some(_) | None => false,
        };
        space(rest);
        good
    }

    fn items(rest: &mut &[u8], open: &[u8], close: &[u8], mut item: impl FnMut(&mut &[u8]) -> bool) -> bool {
        takes(rest, open);
        space(rest);
        if takes(rest, close) {
            return true;
        }
        loop {
            if !item(rest) {
                return false;
            }
            space(rest);
            if takes(rest, close) {
                return true;
            }
            if !takes(rest, b",") {
                return false;
            }
        }
    }

    fn string(rest: &mut &[u8]) -> bool {
        if !takes(rest, b"\"") {
            return false;
        }
        while let Some((byte, more)) = rest.split_first() {
            *rest = more;
            match byte {
                b'"' => return true,
                b'\\' => *rest = rest.get(1..).unwrap_or_default(),
                0..=0x1f => return false,
                _ => {}
            }
        }
        false
    }

    fn number(rest: &mut &[u8]) -> bool {
        let end =
            rest.iter().position(|byte| !matches!(byte, b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9'));
        let (number, more) = rest.split_at(end.unwrap_or(rest.len()));
        *rest = more;
        std::str::from_utf8(number).is_ok_and(|number| number.parse::<f64>().is_ok())
    }
}
