//! ServiceGroup: addresses, who may have them, and where they go.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Addresses for Services of type LoadBalancer. Exactly one of local, remote and external must be set.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "purelb.io",
    version = "v2",
    kind = "ServiceGroup",
    plural = "servicegroups",
    shortname = "sg",
    shortname = "sgs",
    namespaced,
    doc = "Addresses for Services of type LoadBalancer.",
    status = "ServiceGroupStatus",
    printcolumn = r#"{"name": "Announce", "type": "string", "jsonPath": ".status.announce"}"#,
    printcolumn = r#"{"name": "IPAM", "type": "string", "jsonPath": ".status.ipam"}"#,
    printcolumn = r#"{"name": "Allocated-V4", "type": "integer", "jsonPath": ".status.allocatedIPv4"}"#,
    printcolumn = r#"{"name": "Allocated-V6", "type": "integer", "jsonPath": ".status.allocatedIPv6"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name": "Addresses", "type": "string", "jsonPath": ".status.addresses", "priority": 1}"#,
    printcolumn = r#"{"name": "Available-V4", "type": "integer", "jsonPath": ".status.availableIPv4", "priority": 1}"#,
    printcolumn = r#"{"name": "Available-V6", "type": "integer", "jsonPath": ".status.availableIPv6", "priority": 1}"#,
    printcolumn = r#"{"name": "Namespaces", "type": "string", "jsonPath": ".spec.namespaces", "priority": 1}"#,
    printcolumn = r#"{"name": "Enforced", "type": "boolean", "jsonPath": ".spec.enforceNamespaces", "priority": 1}"#,
    printcolumn = r#"{"name": "Bound", "type": "string", "jsonPath": ".status.boundNamespaces", "priority": 1}"#
)]
#[x_kube(
    validation = ("[has(self.local), has(self.remote), has(self.external)].filter(set, set).size() == 1",
        "exactly one of local, remote and external must be set"),
    validation = ("!self.enforceNamespaces || has(self.namespaces) && size(self.namespaces) > 0",
        "enforceNamespaces needs namespaces"),
    validation = ("!self.namespaceDefault || has(self.namespaces) && size(self.namespaces) > 0",
        "namespaceDefault needs namespaces")
)]
#[serde(rename_all = "camelCase")]
pub struct ServiceGroupSpec {
    /// Addresses of subnets that nodes have an interface in: each is announced by one node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<LocalPools>,
    /// Addresses that every node has on its dummy interface kube-lb0, from where routing announces them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<RemotePools>,
    /// Addresses that a sidecar of the allocator hands out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<External>,
    /// Addresses, networks (CIDR) and ranges (from-to) that are never handed out: gateways, hosts, reservations.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024))]
    pub exclude: Vec<String>,
    /// The namespaces that it serves; empty: all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024), inner(length(max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")))]
    pub namespaces: Vec<String>,
    /// Makes the list a fence: Services of other namespaces are refused, and those of listed ones may use no group that
    /// does not list them.
    #[serde(default)]
    pub enforce_namespaces: bool,
    /// Of several groups that serve a namespace, Services that name none get this one.
    #[serde(default)]
    pub namespace_default: bool,
}

/// Pools of a local group.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LocalPools {
    /// Pools of IPv4 and IPv6, and how addresses are taken from them.
    #[serde(flatten)]
    pub pools: Pools,
    /// Adds IPv6 addresses without duplicate address detection.
    #[serde(default, rename = "skipIPv6DAD")]
    pub skip_ipv6_dad: bool,
}

/// Pools of a remote group.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RemotePools {
    /// Pools of IPv4 and IPv6, and how addresses are taken from them.
    #[serde(flatten)]
    pub pools: Pools,
}

/// Pools of both families.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Pools {
    /// One pool of IPv4 addresses; taken from after those of v4pools.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v4pool: Option<AddressPool>,
    /// One pool of IPv6 addresses; taken from after those of v6pools.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v6pool: Option<AddressPool>,
    /// Pools of IPv4 addresses, in the order in which they are taken from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub v4pools: Vec<AddressPool>,
    /// Pools of IPv6 addresses, in the order in which they are taken from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub v6pools: Vec<AddressPool>,
    /// A Service gets one address of every pool of its families; of a local group, of those whose subnet a node is in.
    #[serde(default)]
    pub multi_pool: bool,
    /// The pool with the fewest addresses in use comes first.
    #[serde(default)]
    pub balance_pools: bool,
}

/// A range of addresses.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AddressPool {
    /// A network in CIDR form, or the first and the last address with a dash between them.
    pub pool: String,
    /// The network, in CIDR form, that the addresses belong to.
    pub subnet: String,
    /// Prefix length that remote addresses are announced with: "default" is that of the subnet, else a slash and a
    /// number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^(default|/([89]|[1-9][0-9]|1[01][0-9]|12[0-8]))$"))]
    pub aggregation: Option<String>,
}

/// Addresses of a sidecar.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct External {
    /// Name of the sidecar, for people.
    #[schemars(length(min = 1))]
    pub provider: String,
    /// Path of its unix socket.
    #[serde(default = "socket")]
    pub socket: String,
    /// How its addresses are announced.
    pub announce: Announce,
}

fn socket() -> String {
    "/var/run/purelb/ipam.sock".to_owned()
}

/// How addresses are announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Announce {
    /// By one node.
    Local,
    /// By routing, from every node.
    Remote,
}

/// What the allocator says of a group.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceGroupStatus {
    /// Local or Remote.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub announce: String,
    /// Who hands out the addresses: Cluster, or the provider of an external group.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub ipam: String,
    /// Its pools as they are written, IPv4 before IPv6.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// IPv4 addresses in use; one that Services share counts once.
    #[serde(rename = "allocatedIPv4")]
    #[schemars(range(min = 0))]
    pub allocated_ipv4: i64,
    /// IPv6 addresses in use; one that Services share counts once.
    #[serde(rename = "allocatedIPv6")]
    #[schemars(range(min = 0))]
    pub allocated_ipv6: i64,
    /// IPv4 addresses that are left; absent when that is not known.
    #[serde(default, rename = "availableIPv4", skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub available_ipv4: Option<i64>,
    /// IPv6 addresses that are left, at most 9223372036854775807; absent when that is not known.
    #[serde(default, rename = "availableIPv6", skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub available_ipv6: Option<i64>,
    /// The namespaces that it serves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bound_namespaces: Vec<String>,
    /// Ready, and what is wrong.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
