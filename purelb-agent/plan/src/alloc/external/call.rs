//! Questions to sidecars, their answers, and what is left to be told.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::observed::Family;

/// What a sidecar has no room for at the moment is asked again after so many milliseconds at most, ...
const LATER: u64 = 60_000;
/// ... and what it says is wrong after so many.
pub(super) const LAST: u64 = 600_000;

/// What a Service wants from the sidecar of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Of the Service.
    pub uid: String,
    /// The group.
    pub group: String,
    /// Families that it has no address of; empty: one of any.
    pub families: Vec<Family>,
    /// Sharing key.
    pub key: Option<String>,
}

/// What a sidecar answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The question.
    pub ask: Ask,
    /// Its addresses, or why there are none.
    pub result: Result<Vec<IpAddr>, Fault>,
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// By the name of gRPC, `Unavailable`; or `InvalidAnswer`.
    pub code: &'static str,
    /// For people.
    pub message: String,
    /// The sidecar said so; else there was no answer.
    pub answered: bool,
}

impl Fault {
    /// It is the sidecar that is away, not this one call that failed.
    #[must_use]
    pub const fn is_outage(&self) -> bool {
        !self.answered
    }

    /// The connection broke: behind the next one may be a sidecar that remembers nothing.
    pub(super) fn is_break(&self) -> bool {
        !self.answered && self.code == "Unavailable"
    }

    /// The sidecar may have done what it was asked for.
    pub(super) fn is_doubtful(&self) -> bool {
        !self.answered || matches!(self.code, "InvalidAnswer" | "Internal")
    }

    /// In milliseconds: it is tried again after so long at most. PureLB tries these again, too.
    pub(super) fn longest(&self) -> u64 {
        let may_pass = matches!(self.code, "ResourceExhausted" | "Aborted" | "Unavailable" | "DeadlineExceeded");
        if may_pass { LATER } else { LAST }
    }
}

/// A call to a sidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// `namespace/name`
    pub service: String,
    /// Name of the ServiceGroup.
    pub group: String,
    /// Path of the sidecar's socket.
    pub socket: String,
    /// What it is asked for.
    pub what: What,
}

/// What a sidecar is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// Addresses.
    Allocate(Ask),
    /// To know that the Service has this one.
    Hold {
        /// The address.
        ip: IpAddr,
        /// Sharing key.
        key: Option<String>,
    },
    /// To take one address back, or all that the Service has.
    Release(Option<IpAddr>),
}

/// What a sidecar was to take back and perhaps did not: for the next allocator.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Debt {
    /// `namespace/name`
    pub service: String,
    /// Name of the ServiceGroup.
    pub group: String,
    /// Path of the sidecar's socket.
    pub socket: String,
    /// The address; `None`: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
}
