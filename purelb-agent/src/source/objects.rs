//! The fields of Kubernetes objects that the data path needs, in the form Kubernetes writes them.

use std::collections::BTreeMap;

use purelb_api::service_group::ServiceGroupSpec;
use serde::{Deserialize, Deserializer};

/// `metadata`
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Meta {
    /// Name.
    pub name: String,
    /// Namespace; empty counts as `default`.
    pub namespace: String,
    /// Which of the objects that ever had the name.
    pub uid: String,
    /// RFC 3339.
    pub creation_timestamp: String,
    /// Grows with `spec`.
    pub generation: i64,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Those of PureLB; others may be long and nothing here reads them.
    #[serde(deserialize_with = "of_purelb")]
    pub annotations: BTreeMap<String, String>,
}

fn of_purelb<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, String>, D::Error> {
    let mut all = BTreeMap::<String, String>::deserialize(from)?;
    all.retain(|key, _| key.starts_with("purelb.io/"));
    Ok(all)
}

/// v1 Service
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Service {
    /// metadata
    pub metadata: Meta,
    /// spec
    pub spec: ServiceSpec,
    /// status
    pub status: ServiceStatus,
}

/// Service.spec
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServiceSpec {
    /// `LoadBalancer`, or not ours.
    pub r#type: String,
    /// Unset or ours.
    pub load_balancer_class: Option<String>,
    /// `None` where it is headless.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    /// IPv4, IPv6.
    pub ip_families: Vec<String>,
    /// Addresses that are asked for, the old way.
    #[serde(rename = "loadBalancerIP")]
    pub load_balancer_ip: Option<String>,
    /// `Local` or `Cluster`.
    pub external_traffic_policy: Option<String>,
    /// `None` or `ClientIP`.
    pub session_affinity: Option<String>,
    /// Its timeout.
    pub session_affinity_config: Option<AffinityConfig>,
    /// CIDRs.
    pub load_balancer_source_ranges: Vec<String>,
    /// Unready endpoints count as ready.
    pub publish_not_ready_addresses: bool,
    /// `PreferSameNode`, ...
    pub traffic_distribution: Option<String>,
    /// Ports.
    pub ports: Vec<ServicePort>,
}

/// spec.sessionAffinityConfig
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct AffinityConfig {
    /// clientIP
    #[serde(rename = "clientIP")]
    pub client_ip: Option<ClientIp>,
}

/// spec.sessionAffinityConfig.clientIP
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ClientIp {
    /// Seconds.
    pub timeout_seconds: Option<u32>,
}

/// spec.ports[]
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct ServicePort {
    /// Name.
    #[serde(default)]
    pub name: Option<String>,
    /// Port.
    pub port: u16,
    /// TCP when absent.
    #[serde(default)]
    pub protocol: Option<String>,
}

/// Service.status
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServiceStatus {
    /// loadBalancer
    pub load_balancer: LoadBalancer,
    /// conditions
    pub conditions: Vec<Condition>,
}

/// status.conditions[]
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Condition {
    /// Type.
    pub r#type: String,
    /// True, False or Unknown.
    pub status: String,
    /// Reason.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// status.loadBalancer
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct LoadBalancer {
    /// ingress
    pub ingress: Vec<Ingress>,
}

/// status.loadBalancer.ingress[]
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Ingress {
    /// Address.
    pub ip: Option<String>,
    /// Name, of other load balancers.
    pub hostname: Option<String>,
}

/// discovery.k8s.io/v1 EndpointSlice
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSlice {
    /// metadata
    #[serde(default)]
    pub metadata: Meta,
    /// IPv4, IPv6 or FQDN.
    pub address_type: String,
    /// Endpoints.
    #[serde(default)]
    pub endpoints: Option<Vec<Endpoint>>,
    /// Ports.
    #[serde(default)]
    pub ports: Option<Vec<SlicePort>>,
}

/// endpoints[]
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Endpoint {
    /// Addresses; all lead to the same endpoint.
    pub addresses: Vec<String>,
    /// Conditions.
    pub conditions: Conditions,
    /// Node.
    pub node_name: Option<String>,
}

/// endpoints[].conditions
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Conditions {
    /// Unknown counts as true.
    pub ready: Option<bool>,
    /// Unknown counts as ready.
    pub serving: Option<bool>,
    /// Unknown counts as false.
    pub terminating: Option<bool>,
}

/// ports[]
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct SlicePort {
    /// Name of the Service's port.
    pub name: Option<String>,
    /// Target port.
    pub port: Option<u16>,
    /// TCP when absent.
    pub protocol: Option<String>,
}

/// purelb.io/v2 ServiceGroup
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct ServiceGroup {
    /// metadata
    #[serde(default)]
    pub metadata: Meta,
    /// spec
    pub spec: ServiceGroupSpec,
    /// What an allocator said last.
    #[serde(default)]
    pub status: Option<serde_json::Value>,
}

/// v1 Node
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Node {
    /// metadata
    pub metadata: Meta,
    /// spec
    pub spec: NodeSpec,
    /// status
    pub status: NodeStatus,
}

/// Node.spec
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct NodeSpec {
    /// Ranges of its pods' addresses, of both families; may be absent.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Option<Vec<String>>,
    /// Which pods are kept away.
    pub taints: Vec<Taint>,
}

/// Node.spec.taints[]
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Taint {
    /// Its name.
    pub key: String,
    /// `NoSchedule`, `PreferNoSchedule` or `NoExecute`.
    pub effect: String,
}

/// Node.status
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    /// addresses
    pub addresses: Vec<NodeAddress>,
    /// conditions
    pub conditions: Vec<Condition>,
}

/// Node.status.addresses[]
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct NodeAddress {
    /// InternalIP, ExternalIP, Hostname, ...
    pub r#type: String,
    /// The address.
    pub address: String,
}

/// coordination.k8s.io/v1 Lease
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Lease {
    /// metadata
    pub metadata: Meta,
    /// spec
    pub spec: LeaseSpec,
}

/// Lease.spec
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct LeaseSpec {
    /// Seconds.
    pub lease_duration_seconds: Option<u32>,
    /// RFC 3339 with microseconds.
    pub renew_time: Option<String>,
}
