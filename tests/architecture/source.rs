//! Rust source as the rules need it: tokens without comments, strings and test code, and the paths they name.
//!
//! Not a compiler: enough of one to find imports, also in nested braces and inside expressions, and strict
//! enough that a comment that names a socket is not taken for a socket.

use std::collections::BTreeSet;

/// One token and the line it stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    /// An identifier, `::`, or one character of punctuation.
    pub(crate) text: String,
    /// From 1.
    pub(crate) line: usize,
}

/// A path that the source names, such as `crate::packet::parse`, and the line it stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    /// Its parts; `super` and `self` at the front are resolved to `crate::...`.
    pub(crate) parts: Vec<String>,
    /// From 1.
    pub(crate) line: usize,
}

/// Tokens of the code that ships: without what `#[cfg(test)]` guards.
pub(crate) fn shipped(text: &str) -> Vec<Token> {
    without_tests(&tokens(text)).0
}

/// Modules that `#[cfg(test)] mod NAME;` declares, with the file that `#[path]` gives them, if it does.
pub(crate) fn test_modules(text: &str) -> Vec<String> {
    without_tests(&tokens(text)).1
}

/// Splits source into identifiers and punctuation; comments, strings, characters and numbers vanish, but
/// the text of a string stays in one place: as the token behind `path =`, for `#[path = "..."]`.
pub(crate) fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let mut out: Vec<Token> = Vec::new();
    let (mut at, mut line) = (0, 1);
    while let Some(&c) = chars.get(at) {
        let next = chars.get(at + 1).copied().unwrap_or(' ');
        let end = match c {
            '/' if next == '/' => find(&chars, at, |rest| rest.starts_with(&['\n'])),
            '/' if next == '*' => block_comment(&chars, at),
            '"' => string(&chars, at + 1),
            'r' | 'b' | 'c' if starts_string(&chars, at) => prefixed_string(&chars, at),
            '\'' => character_or_lifetime(&chars, at),
            c if c.is_alphabetic() || c == '_' => {
                let end = find(&chars, at, |rest| !(rest[0].is_alphanumeric() || rest[0] == '_'));
                out.push(Token { text: chars[at..end].iter().collect(), line });
                end
            }
            c if c.is_ascii_digit() => {
                find(&chars, at, |rest| !(rest[0].is_alphanumeric() || rest[0] == '_'))
            }
            ':' if next == ':' => {
                out.push(Token { text: "::".to_owned(), line });
                at + 2
            }
            c if c.is_whitespace() => at + 1,
            c => {
                out.push(Token { text: c.to_string(), line });
                at + 1
            }
        };
        if c == '"' && out.len() >= 2 && out[out.len() - 1].text == "=" && out[out.len() - 2].text == "path" {
            out.push(Token { text: chars[at + 1..end - 1].iter().collect(), line });
        }
        line += chars[at..end].iter().filter(|c| **c == '\n').count();
        at = end;
    }
    out
}

/// Every path of two parts or more, and every path that a `use` names. `module` is the file's own path below
/// the crate, so that `super` can be followed.
pub(crate) fn paths(tokens: &[Token], module: &[String]) -> Vec<Named> {
    let mut out = Vec::new();
    let mut inline: Vec<(String, usize)> = Vec::new();
    let (mut depth, mut at) = (0, 0);
    while let Some(token) = tokens.get(at) {
        match token.text.as_str() {
            "{" => depth += 1,
            "}" => {
                depth -= 1;
                inline.retain(|(_, opened)| *opened < depth + 1);
            }
            "mod" if text(tokens, at + 2) == "{" => inline.push((text(tokens, at + 1).to_owned(), depth + 1)),
            _ => {}
        }
        let starts = is_word(&token.text) && (at == 0 || tokens[at - 1].text != "::");
        let in_use = at > 0 && tokens[at - 1].text == "use";
        if starts && (in_use || text(tokens, at + 1) == "::") {
            let mut here = module.to_vec();
            here.extend(inline.iter().map(|(name, _)| name.clone()));
            at = tree(tokens, at, &mut Vec::new(), &here, &mut out);
        } else {
            at += 1;
        }
    }
    out
}

/// One use tree or path from `at` on; returns where it ends.
fn tree(
    tokens: &[Token],
    mut at: usize,
    prefix: &mut Vec<String>,
    module: &[String],
    out: &mut Vec<Named>,
) -> usize {
    let before = prefix.len();
    let line = tokens.get(at).map_or(0, |token| token.line);
    loop {
        match text(tokens, at) {
            "{" => {
                at += 1;
                while !matches!(text(tokens, at), "}" | "") {
                    at = if text(tokens, at) == "," { at + 1 } else { tree(tokens, at, prefix, module, out) };
                }
                prefix.truncate(before);
                return at + 1;
            }
            word if is_word(word) || word == "*" => {
                prefix.push(word.to_owned());
                at += 1;
                if text(tokens, at) == "::"
                    && (is_word(text(tokens, at + 1)) || "{*".contains(text(tokens, at + 1)))
                {
                    at += 1;
                    continue;
                }
                if text(tokens, at) == "as" {
                    at += 2;
                }
            }
            _ => at += 1,
        }
        out.push(Named { parts: resolve(prefix, module), line });
        prefix.truncate(before);
        return at;
    }
}

/// Follows `self` and `super` from a module; `crate` stays.
fn resolve(parts: &[String], module: &[String]) -> Vec<String> {
    let supers = parts.iter().take_while(|part| *part == "super").count();
    let own = parts.first().is_some_and(|part| part == "self");
    if supers == 0 && !own {
        return parts.to_vec();
    }
    let kept = module.len().saturating_sub(supers);
    let mut out = vec!["crate".to_owned()];
    out.extend(module[..kept].iter().cloned());
    out.extend(parts[if own { 1 } else { supers }..].iter().cloned());
    out
}

/// Takes out items behind `#[cfg(test)]` and `#[cfg(all(test, ...))]`; second, the modules among them.
fn without_tests(tokens: &[Token]) -> (Vec<Token>, Vec<String>) {
    let (mut out, mut modules) = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < tokens.len() {
        let end = if text(tokens, at) == "#" { attribute_end(tokens, at) } else { None };
        let Some(end) = end else {
            out.push(tokens[at].clone());
            at += 1;
            continue;
        };
        let words: Vec<&str> = tokens[at..end].iter().map(|token| token.text.as_str()).collect();
        let test = words.starts_with(&["#", "[", "cfg", "(", "test"])
            || words.starts_with(&["#", "[", "cfg", "(", "all", "(", "test"]);
        if !test {
            out.extend_from_slice(&tokens[at..end]);
            at = end;
            continue;
        }
        at = skip_item(tokens, end, &mut modules);
    }
    (out, modules)
}

/// Where the item behind a test attribute ends; notes the module if it is one in a file of its own.
fn skip_item(tokens: &[Token], mut at: usize, modules: &mut Vec<String>) -> usize {
    let mut file = None;
    while let Some(end) = attribute_end(tokens, at) {
        if text(tokens, at + 2) == "path" {
            file = Some(text(tokens, at + 4).to_owned());
        }
        at = end;
    }
    let mut depth = 0;
    while let Some(token) = tokens.get(at) {
        match token.text.as_str() {
            "mod" if text(tokens, at + 2) == ";" => {
                modules.push(file.clone().unwrap_or_else(|| text(tokens, at + 1).to_owned()));
            }
            "{" | "(" | "[" => depth += 1,
            ")" | "]" => depth -= 1,
            "}" => {
                depth -= 1;
                if depth == 0 {
                    return at + 1;
                }
            }
            ";" | "," if depth == 0 => return at + 1,
            _ => {}
        }
        at += 1;
    }
    at
}

/// Where an attribute that starts at `at` ends; `None` if none starts there.
fn attribute_end(tokens: &[Token], at: usize) -> Option<usize> {
    let open = if text(tokens, at + 1) == "!" { at + 2 } else { at + 1 };
    if text(tokens, at) != "#" || text(tokens, open) != "[" {
        return None;
    }
    let mut depth = 0;
    for (index, token) in tokens.iter().enumerate().skip(open) {
        match token.text.as_str() {
            "[" => depth += 1,
            "]" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(index + 1);
        }
    }
    None
}

/// Words that are no names.
pub(crate) fn is_word(text: &str) -> bool {
    text.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// All words of some tokens.
pub(crate) fn words(tokens: &[Token]) -> BTreeSet<&str> {
    tokens.iter().map(|token| token.text.as_str()).filter(|text| is_word(text)).collect()
}

fn text(tokens: &[Token], at: usize) -> &str {
    tokens.get(at).map_or("", |token| token.text.as_str())
}

fn find(chars: &[char], from: usize, end: impl Fn(&[char]) -> bool) -> usize {
    (from..chars.len()).find(|at| end(&chars[*at..])).unwrap_or(chars.len())
}

fn block_comment(chars: &[char], from: usize) -> usize {
    let (mut depth, mut at) = (0, from);
    while at < chars.len() {
        match chars.get(at..at + 2) {
            Some(['/', '*']) => (depth, at) = (depth + 1, at + 2),
            Some(['*', '/']) => (depth, at) = (depth - 1, at + 2),
            Some(_) | None => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at.min(chars.len())
}

/// The end of an ordinary string whose first character is at `from`.
fn string(chars: &[char], from: usize) -> usize {
    let mut at = from;
    while let Some(c) = chars.get(at) {
        match c {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    chars.len()
}

/// Whether a string with a prefix (`r"`, `b"`, `br#"`, `c"`) or a byte (`b'x'`) starts here, and not a name.
fn starts_string(chars: &[char], at: usize) -> bool {
    if at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_') {
        return false;
    }
    let letters = find(chars, at, |rest| !matches!(rest[0], 'r' | 'b' | 'c'));
    let hashes = find(chars, letters, |rest| rest[0] != '#');
    let raw = chars[at..letters].contains(&'r');
    letters - at <= 2
        && (chars.get(hashes) == Some(&'"') && (hashes == letters || raw)
            || chars.get(letters) == Some(&'\'') && letters - at == 1 && chars[at] == 'b')
}

fn prefixed_string(chars: &[char], at: usize) -> usize {
    let letters = find(chars, at, |rest| !matches!(rest[0], 'r' | 'b' | 'c'));
    if chars.get(letters) == Some(&'\'') {
        return character_or_lifetime(chars, letters);
    }
    let hashes = find(chars, letters, |rest| rest[0] != '#');
    if !chars[at..letters].contains(&'r') {
        return string(chars, hashes + 1);
    }
    let mut close = vec!['"'];
    close.extend(std::iter::repeat_n('#', hashes - letters));
    (find(chars, hashes + 1, |rest| rest.starts_with(&close)) + close.len()).min(chars.len())
}

fn character_or_lifetime(chars: &[char], at: usize) -> usize {
    match (chars.get(at + 1), chars.get(at + 2)) {
        (Some('\\'), _) => find(chars, at + 3, |rest| rest[0] == '\'') + 1,
        (Some(_), Some('\'')) => at + 3,
        _ => find(chars, at + 1, |rest| !(rest[0].is_alphanumeric() || rest[0] == '_')),
    }
}
