//! A Node's annotations, as `name=value` lines.

use std::collections::BTreeMap;

use warren::snapshot::MAX_LANES;
use warren::state::annotations::{MAX_ENDPOINTS, PREFIX, is_reachable, parse, render};

pub(crate) fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let annotations: BTreeMap<String, String> = text
        .split('\n')
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| {
            let prefix = if name.contains('/') { "" } else { PREFIX };
            (format!("{prefix}{name}"), value.replace('\u{1}', "\n"))
        })
        .collect();
    let (mut said, problems) = parse(&annotations);
    assert!(said.lanes.len() <= MAX_LANES);
    assert!(said.endpoints.len() <= MAX_ENDPOINTS);
    assert!(said.endpoints.iter().all(|endpoint| is_reachable(endpoint.ip()) && endpoint.port() != 0));
    for problem in &problems {
        assert!(problem.reason.chars().count() < 600, "a report of {} characters", problem.reason.len());
        assert!(!problem.reason.chars().any(char::is_control), "control characters reach a terminal");
    }
    // What was understood can be said again. Without encapsulations the rest of the sentence decides; and who says
    // something is no longer somebody whom a person has described.
    said.ordinary = false;
    if !said.encaps.is_empty() {
        let (again, problems) = parse(&render(&said));
        assert_eq!((again, problems), (said, Vec::new()));
    }
}
