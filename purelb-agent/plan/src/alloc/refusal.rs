//! Why a Service gets no address: a closed list, one name each for conditions, metrics and people.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

/// Reason of [`Refusal::Foreign`].
pub const FOREIGN: &str = "ForeignAddress";

/// Why a Service gets no address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No such group.
    Unknown(String),
    /// The group has a fault.
    Unusable(String),
    /// A fence is between them.
    Denied {
        /// Group.
        group: String,
        /// Of the Service.
        namespace: String,
        /// It is the namespace that is fenced in, not the group.
        confined: bool,
    },
    /// These serve the namespace, none is its default, and it is fenced in.
    Ambiguous(BTreeSet<String>),
    /// Nothing is free.
    Exhausted {
        /// Group.
        group: String,
        /// `IPv4` or `IPv6`.
        family: &'static str,
    },
    /// Another user of the shared address has the port.
    PortConflict {
        /// The address.
        ip: IpAddr,
        /// `namespace/name`
        user: String,
    },
    /// The address has users with another key, or without one.
    SharingKeyConflict {
        /// The address.
        ip: IpAddr,
        /// `namespace/name`
        user: String,
    },
    /// What is asked for cannot be meant.
    Invalid(String),
    /// No group has the address.
    OutsidePools(IpAddr),
    /// The group excludes the address.
    Excluded(IpAddr),
    /// Multi-pool does not go with it.
    MultiPoolRefused(String),
    /// The addresses it has are of several groups, so none can be extended.
    MultiPoolMismatch,
    /// The group's sidecar was not heard yet.
    Awaiting(String),
    /// The group's sidecar gives none.
    Sidecar {
        /// Group.
        group: String,
        /// It has no room.
        exhausted: bool,
        /// What it answered.
        answer: String,
    },
    /// The status names addresses that we did not give.
    Foreign(BTreeSet<IpAddr>),
}

impl Refusal {
    /// Reason of the condition.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Unknown(_) => "UnknownGroup",
            Self::Unusable(_) => "NoUsableGroup",
            Self::Denied { .. } => "NamespaceDenied",
            Self::Ambiguous(_) => "AmbiguousNamespaceDefault",
            Self::Exhausted { .. } => "PoolExhausted",
            Self::PortConflict { .. } => "PortConflict",
            Self::SharingKeyConflict { .. } => "SharingKeyConflict",
            Self::Invalid(_) => "InvalidRequest",
            Self::OutsidePools(_) => "AddressOutsidePools",
            Self::Excluded(_) => "AddressExcluded",
            Self::MultiPoolRefused(_) => "MultiPoolRefused",
            Self::MultiPoolMismatch => "MultiPoolMismatch",
            Self::Awaiting(_) => "AwaitingSidecar",
            Self::Sidecar { .. } => "SidecarFailed",
            Self::Foreign(_) => FOREIGN,
        }
    }

    /// PureLB's label of the metric `address_pool_allocation_rejected_total`.
    #[must_use]
    pub const fn metric(&self) -> &'static str {
        match self {
            Self::Unknown(_) => "unknown_pool",
            Self::Unusable(_) => "no_usable_pool",
            Self::Denied { .. } => "namespace_denied",
            Self::Ambiguous(_) => "ambiguous_namespace_default",
            Self::Exhausted { .. } | Self::Sidecar { exhausted: true, .. } => "exhausted",
            Self::PortConflict { .. } => "port_conflict",
            Self::SharingKeyConflict { .. } => "sharing_key_conflict",
            Self::MultiPoolRefused(_) => "multipool_refused",
            Self::MultiPoolMismatch => "multipool_pool_mismatch",
            Self::Invalid(_)
            | Self::OutsidePools(_)
            | Self::Excluded(_)
            | Self::Awaiting(_)
            | Self::Sidecar { .. }
            | Self::Foreign(_) => "other",
        }
    }
}

/// With the remedy.
impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(group) => write!(f, "unknown pool {group:?}: create the ServiceGroup, or name another one"),
            Self::Unusable(group) => write!(f, "no usable pool: ServiceGroup {group} has a fault; see its conditions"),
            Self::Denied { group, namespace, confined: true } => {
                write!(f, "namespace {namespace} may only use the ServiceGroups that list it, and {group} does not")
            }
            Self::Denied { group, namespace, confined: false } => {
                write!(f, "ServiceGroup {group} is kept for other namespaces than {namespace}")
            }
            Self::Ambiguous(groups) => {
                let names: Vec<_> = groups.iter().map(String::as_str).collect();
                write!(
                    f,
                    "{} serve the namespace and none is its default: set namespaceDefault on one, or name one in \
                     purelb.io/service-group",
                    names.join(", ")
                )
            }
            Self::Exhausted { group, family } => {
                write!(f, "no {family} address is free in ServiceGroup {group}: add a pool, or delete a Service")
            }
            Self::PortConflict { ip, user } => {
                write!(f, "port conflict on {ip} with Service {user}: use another port or sharing key")
            }
            Self::SharingKeyConflict { ip, user } => {
                write!(f, "{ip} is in use by Service {user}, which has not the same sharing key")
            }
            Self::Invalid(message) => f.write_str(message),
            Self::OutsidePools(ip) => write!(f, "{ip} does not belong to any group"),
            Self::Excluded(ip) => write!(f, "{ip} is excluded by its ServiceGroup"),
            Self::MultiPoolRefused(why) => write!(f, "multi-pool {why}"),
            Self::MultiPoolMismatch => {
                f.write_str("its addresses are of several ServiceGroups, so multi-pool can add none")
            }
            Self::Awaiting(group) => write!(f, "the sidecar of ServiceGroup {group} is asked for an address"),
            Self::Sidecar { group, answer, .. } => {
                write!(f, "the sidecar of ServiceGroup {group} {answer}: see its log, and spec.external of the group")
            }
            Self::Foreign(ips) if ips.is_empty() => {
                f.write_str("status.loadBalancer names a host, which was not given here: remove it there")
            }
            Self::Foreign(ips) => {
                let ips: Vec<_> = ips.iter().map(IpAddr::to_string).collect();
                write!(f, "status.loadBalancer names {}, which was not given here: remove it there", ips.join(", "))
            }
        }
    }
}
