//! LBNodeAgent: settings of nodes.

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use purelb_plan::world::{Hook, Mode};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de};

/// Settings of the nodes that it selects.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "purelb.io",
    version = "v2",
    kind = "LBNodeAgent",
    plural = "lbnodeagents",
    shortname = "lbna",
    shortname = "lbnas",
    namespaced,
    doc = "Settings of the nodes that it selects.",
    status = "LBNodeAgentStatus"
)]
#[serde(rename_all = "camelCase")]
pub struct LBNodeAgentSpec {
    /// The nodes that it is for, by their labels; absent or empty: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<LabelSelector>,
    /// How addresses are announced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<Local>,
    /// How packets are taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datapath: Option<Datapath>,
}

/// Nobody writes it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LBNodeAgentStatus {
    /// Unused, as in PureLB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_leases: Option<i64>,
}

/// How addresses are announced.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Local {
    /// Interface for local addresses: "default" is the one with the default route, anything else a regular expression
    /// on interface names.
    #[serde(default = "default_interface")]
    pub local_interface: String,
    /// Name of the dummy interface for remote addresses.
    #[serde(default = "dummy_interface")]
    pub dummy_interface: String,
    /// Further interfaces by their exact names, tried in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<String>,
    /// Gratuitous ARP and unsolicited neighbour advertisements.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub garp_config: Option<GarpConfig>,
    /// Kernel options of the addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address_config: Option<AddressConfig>,
}

fn default_interface() -> String {
    "default".to_owned()
}

fn dummy_interface() -> String {
    "kube-lb0".to_owned()
}

/// Gratuitous ARP and unsolicited neighbour advertisements.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GarpConfig {
    /// They are sent.
    #[serde(default = "yes")]
    pub enabled: Option<bool>,
    /// Time before the first one.
    #[serde(default = "initial_delay")]
    pub initial_delay: String,
    /// How many.
    #[serde(default = "count")]
    #[schemars(range(min = 1, max = 10))]
    pub count: Option<i64>,
    /// Time between two.
    #[serde(default = "interval")]
    pub interval: String,
    /// Looks before each whether the node still has the address.
    #[serde(default = "yes")]
    pub verify_before_send: Option<bool>,
}

#[expect(clippy::unnecessary_wraps, reason = "serde wants the field's type")]
const fn yes() -> Option<bool> {
    Some(true)
}

#[expect(clippy::unnecessary_wraps, reason = "serde wants the field's type")]
const fn count() -> Option<i64> {
    Some(3)
}

fn initial_delay() -> String {
    "100ms".to_owned()
}

fn interval() -> String {
    "500ms".to_owned()
}

/// Kernel options of addresses, by interface.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AddressConfig {
    /// Of local addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_interface: Option<AddressOptions>,
    /// Of remote addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dummy_interface: Option<AddressOptions>,
}

/// Kernel options of an address.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AddressOptions {
    /// Seconds until the kernel removes the address unless it is renewed; 0: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub valid_lifetime: Option<i64>,
    /// Seconds until new connections of the node prefer another source address; 0: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub preferred_lifetime: Option<i64>,
    /// Adds no route to the subnet with the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_prefix_route: Option<bool>,
}

/// Which nodes. Unknown fields are refused: a mistyped selector must not become one for all nodes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct LabelSelector {
    /// Labels that must be there with these values.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub match_labels: BTreeMap<String, String>,
    /// More conditions; all must hold.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub match_expressions: Vec<Requirement>,
}

/// A condition on a label.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "RawRequirement")]
pub struct Requirement {
    /// The label.
    key: String,
    /// How it is compared.
    operator: Operator,
    /// With what; empty for Exists and DoesNotExist.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    values: Vec<String>,
}

/// A condition on a label.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct RawRequirement {
    /// The label.
    key: String,
    /// How it is compared.
    operator: Operator,
    /// With what; empty for Exists and DoesNotExist.
    #[serde(default)]
    values: Vec<String>,
}

/// How a label is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

impl TryFrom<RawRequirement> for Requirement {
    type Error = String;

    fn try_from(raw: RawRequirement) -> Result<Self, String> {
        let RawRequirement { key, operator, values } = raw;
        match (operator, values.is_empty()) {
            (Operator::In | Operator::NotIn, true) => Err(format!("{operator:?} needs values")),
            (Operator::Exists | Operator::DoesNotExist, false) => Err(format!("{operator:?} takes no values")),
            _ => Ok(Self { key, operator, values }),
        }
    }
}

impl LabelSelector {
    /// It selects every node.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.match_labels.is_empty() && self.match_expressions.is_empty()
    }

    /// All its conditions hold for these labels, as Kubernetes judges them.
    #[must_use]
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.match_expressions.iter().all(|r| {
                let label = labels.get(&r.key);
                match r.operator {
                    Operator::In => label.is_some_and(|l| r.values.contains(l)),
                    Operator::NotIn => label.is_none_or(|l| !r.values.contains(l)),
                    Operator::Exists => label.is_some(),
                    Operator::DoesNotExist => label.is_none(),
                }
            })
    }
}

/// How packets are taken.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Datapath {
    /// Uplinks by name, or by a regular expression between slashes over whole names; empty: every interface with a
    /// default route.
    #[serde(deserialize_with = "patterns", skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<String>,
    /// auto and stack: packets go on through the kernel's forwarding; off: everything is left to kube-proxy. fast is not
    /// built yet.
    #[schemars(schema_with = "modes")]
    pub mode: Mode,
    /// Where the program hangs; auto takes native XDP where the device has it, and tcx elsewhere.
    #[schemars(schema_with = "hooks")]
    pub hook: Hook,
    /// The policy Cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_traffic: Option<ClusterTraffic>,
    /// What happens to packets for ports of a VIP that no Service has.
    pub unknown_ports: UnknownPorts,
    /// What happens to fragmented packets. Balance is not built yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "fragments")]
    pub fragments: Option<String>,
}

fn words(words: &[&str]) -> Schema {
    json_schema!({ "type": "string", "enum": words })
}

fn modes(_: &mut SchemaGenerator) -> Schema {
    words(&["auto", "stack", "fast", "off"])
}

fn hooks(_: &mut SchemaGenerator) -> Schema {
    words(&["auto", "xdp", "xdp-generic", "tcx"])
}

fn fragments(_: &mut SchemaGenerator) -> Schema {
    words(&["Balance", "Drop"])
}

/// A regular expression that is none would leave the node without uplinks, so it is refused here.
fn patterns<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    let entries = Vec::<String>::deserialize(from)?;
    for entry in &entries {
        if let Some(pattern) = entry.strip_prefix('/').and_then(|e| e.strip_suffix('/')) {
            regex::Regex::new(pattern)
                .map_err(|e| de::Error::custom(format!("{entry} is no regular expression: {e}")))?;
        }
    }
    Ok(entries)
}

/// Who gets the traffic of Services with the policy Cluster: KubeProxy, or with PreferLocal this node's endpoints as
/// long as there are any. Absent: KubeProxy where one runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ClusterTraffic {
    /// kube-proxy.
    KubeProxy,
    /// This node's endpoints first.
    PreferLocal,
}

/// What happens to packets for ports of a VIP that no Service has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum UnknownPorts {
    /// They are dropped, with a reason.
    #[default]
    Drop,
    /// They go to the host.
    Pass,
}
