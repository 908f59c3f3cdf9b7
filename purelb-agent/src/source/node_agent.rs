//! purelb.io/v2 LBNodeAgent as this source needs it.

use std::collections::BTreeMap;

use purelb_api::node_agent::{Datapath, LabelSelector};
use serde::Deserialize;
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

/// LBNodeAgent.spec, as [`purelb_api`] has it: but a fault in the section of addresses must not cost the settings of
/// the data path, and fields that nobody knows are reported.
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
