//! Everything that can be wrong with the input, as data: it never stops anything else.

use serde::{Deserialize, Serialize};

/// One fault with the object, the field and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// `Service default/web`, `EndpointSlice default/web-x`, `file a.yaml:12`, `interface eth0`, ...
    pub object: String,
    /// Field path, or empty.
    pub field: String,
    /// What is wrong, in one sentence.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
    /// `file:line` where known, or empty.
    pub origin: String,
}
