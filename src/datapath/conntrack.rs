//! Stand-in.
/// T
#[derive(Debug)]
pub struct FlowTable;
