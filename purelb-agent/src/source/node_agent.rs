//! purelb.io/v2 LBNodeAgent: PureLB's settings of a node, and our section `datapath`.

use std::collections::BTreeMap;

use purelb_plan::world::{Hook, Mode};
use serde::{Deserialize, Deserializer, de};
use serde_yaml_ng::Value;

use super::objects::Meta;

/// purelb.io/v2 LBNodeAgent
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct NodeAgent {
    /// metadata
    pub metadata: Meta,
    /// spec
    pub spec: NodeAgentSpec,
}

/// LBNodeAgent.spec
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct NodeAgentSpec {
    /// Which nodes it is for; `None` or empty: all.
    pub node_selector: Option<LabelSelector>,
    /// PureLB's section about addresses, which the data path does not need: taken as it is.
    pub local: Option<Value>,
    /// Our section.
    pub datapath: Option<Datapath>,
    /// Fields that nobody knows.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, Value>,
}

/// Unknown fields are refused: a mistyped selector must not become one for all nodes.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct LabelSelector {
    /// Labels that must be there with these values.
    pub match_labels: BTreeMap<String, String>,
    /// More conditions; all must hold.
    pub match_expressions: Vec<Requirement>,
}

/// One of `matchExpressions`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "RawRequirement")]
pub struct Requirement {
    key: String,
    operator: Operator,
    values: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRequirement {
    key: String,
    operator: Operator,
    #[serde(default)]
    values: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
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

/// LBNodeAgent.spec.datapath
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Datapath {
    /// Names or /regex/.
    #[serde(deserialize_with = "patterns")]
    pub interfaces: Vec<String>,
    /// auto, stack, fast, off
    pub mode: Mode,
    /// auto, xdp, xdp-generic, tcx
    pub hook: Hook,
    /// KubeProxy or PreferLocal.
    pub cluster_traffic: Option<ClusterTraffic>,
    /// Drop or Pass.
    pub unknown_ports: UnknownPorts,
    /// Balance or Drop.
    pub fragments: Option<String>,
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

/// datapath.clusterTraffic
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum ClusterTraffic {
    /// Left to kube-proxy.
    KubeProxy,
    /// This node's endpoints first.
    PreferLocal,
}

/// datapath.unknownPorts
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum UnknownPorts {
    #[default]
    /// Default.
    Drop,
    /// To the host.
    Pass,
}
