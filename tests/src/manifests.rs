//! Kubernetes objects as the API server writes them, from a short description.

use std::net::IpAddr;

use serde_json::{Value, json};

/// An endpoint: addresses of both families and its conditions.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Pod's name.
    pub pod: String,
    /// Addresses; each slice takes those of its family.
    pub addresses: Vec<IpAddr>,
    /// `nodeName`
    pub node: String,
    /// `conditions.ready`
    pub ready: bool,
    /// `conditions.serving`
    pub serving: bool,
    /// `conditions.terminating`
    pub terminating: bool,
}

/// Name, port, target port, protocol.
#[derive(Clone, Debug)]
pub struct Port {
    /// Port name.
    pub name: String,
    /// Port of the VIP.
    pub port: u16,
    /// Port of the pod.
    pub target: u16,
    /// `TCP` or `UDP`.
    pub protocol: String,
}

impl Port {
    /// A port.
    #[must_use]
    pub fn new(name: &str, port: u16, target: u16, protocol: &str) -> Self {
        Self { name: name.to_owned(), port, target, protocol: protocol.to_owned() }
    }
}

/// A Service with its endpoints.
#[derive(Clone, Debug)]
pub struct Service {
    /// Name in the namespace `default`.
    pub name: String,
    /// Its addresses.
    pub vips: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<Port>,
    /// Its endpoints.
    pub endpoints: Vec<Endpoint>,
    /// `externalTrafficPolicy: Local`
    pub local: bool,
    /// `sessionAffinity: ClientIP`
    pub affinity: bool,
    /// `loadBalancerSourceRanges`
    pub ranges: Vec<String>,
    /// The ServiceGroup that it asks for.
    pub group: Option<String>,
    /// It shares its addresses with others of this key.
    pub sharing: Option<String>,
}

impl Service {
    /// The Service object.
    #[must_use]
    pub fn service(&self) -> Value {
        let ports: Vec<_> = self
            .ports
            .iter()
            .map(|port| json!({"name": port.name, "port": port.port, "targetPort": port.target, "protocol": port.protocol}))
            .collect();
        let mut families: Vec<_> = self.vips.iter().map(|vip| family(vip)).collect();
        families.sort_unstable();
        families.dedup();
        let mut spec = json!({
            "type": "LoadBalancer",
            "loadBalancerClass": "purelb.io/purelbv2",
            "externalTrafficPolicy": if self.local { "Local" } else { "Cluster" },
            "ipFamilyPolicy": if families.len() > 1 { "RequireDualStack" } else { "SingleStack" },
            "ipFamilies": families,
            "selector": {"app": self.name},
            "ports": ports,
            "sessionAffinity": if self.affinity { "ClientIP" } else { "None" },
        });
        if let Some(fields) = spec.as_object_mut() {
            if self.affinity {
                fields.insert("sessionAffinityConfig".into(), json!({"clientIP": {"timeoutSeconds": 10_800}}));
            }
            if !self.ranges.is_empty() {
                fields.insert("loadBalancerSourceRanges".into(), json!(self.ranges));
            }
        }
        let ingress: Vec<_> = self.vips.iter().map(|vip| json!({"ip": vip.to_string()})).collect();
        let mut object = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": self.name, "namespace": "default"},
            "spec": spec,
            "status": {"loadBalancer": {"ingress": ingress}},
        });
        let asked = [("purelb.io/service-group", &self.group), ("purelb.io/allow-shared-ip", &self.sharing)];
        for (key, value) in asked {
            if let Some(value) = value {
                object["metadata"]["annotations"][key] = json!(value);
            }
        }
        object
    }

    /// One EndpointSlice for each family that has an endpoint.
    #[must_use]
    pub fn slices(&self) -> Vec<Value> {
        ["IPv4", "IPv6"].into_iter().map(|wanted| self.slice(wanted)).collect()
    }

    fn slice(&self, wanted: &str) -> Value {
        let endpoints: Vec<_> = self
            .endpoints
            .iter()
            .filter_map(|endpoint| {
                let addr = endpoint.addresses.iter().find(|addr| family(addr) == wanted)?;
                Some(json!({
                    "addresses": [addr.to_string()],
                    "conditions": {"ready": endpoint.ready, "serving": endpoint.serving, "terminating": endpoint.terminating},
                    "nodeName": endpoint.node,
                    "targetRef": {"kind": "Pod", "name": endpoint.pod, "namespace": "default"},
                }))
            })
            .collect();
        let ports: Vec<_> = self
            .ports
            .iter()
            .map(|port| json!({"name": port.name, "port": port.target, "protocol": port.protocol}))
            .collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{}-{}", self.name, wanted.to_lowercase()),
                "namespace": "default",
                "labels": {"kubernetes.io/service-name": self.name},
            },
            "addressType": wanted,
            "endpoints": endpoints,
            "ports": ports,
        })
    }
}

fn family(addr: &IpAddr) -> &'static str {
    if addr.is_ipv4() { "IPv4" } else { "IPv6" }
}

/// A Node with its addresses.
#[must_use]
pub fn node(name: &str, addresses: &[IpAddr]) -> Value {
    let addresses: Vec<_> =
        addresses.iter().map(|addr| json!({"type": "InternalIP", "address": addr.to_string()})).collect();
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": {"addresses": addresses}})
}

/// The agents' settings: uplinks and hook.
#[must_use]
pub fn node_agent(interfaces: &[&str], hook: &str) -> Value {
    json!({
        "apiVersion": "purelb.io/v2",
        "kind": "LBNodeAgent",
        "metadata": {"name": "default", "namespace": "purelb-system"},
        "spec": {"datapath": {"interfaces": interfaces, "hook": hook}},
    })
}

/// Agents announce remote addresses on that device.
#[must_use]
pub fn announcer(device: &str) -> Value {
    json!({
        "apiVersion": "purelb.io/v2",
        "kind": "LBNodeAgent",
        "metadata": {"name": "announce", "namespace": "purelb-system"},
        "spec": {"local": {"dummyInterface": device}},
    })
}

/// A local ServiceGroup named `default` with ranges of both families.
#[must_use]
pub fn service_group(v4: &str, v6: &str) -> Value {
    let pool = |pool: &str, subnet: &str| json!([{"pool": pool, "subnet": subnet}]);
    json!({
        "apiVersion": "purelb.io/v2",
        "kind": "ServiceGroup",
        "metadata": {"name": "default", "namespace": "purelb-system"},
        "spec": {"local": {"v4pools": pool(v4, "203.0.113.0/24"), "v6pools": pool(v6, "2001:db8:ffff::/64")}},
    })
}

/// A remote ServiceGroup: a pool, its subnet and its aggregation for each family.
#[must_use]
pub fn remote_group(name: &str, v4: [&str; 3], v6: [&str; 3]) -> Value {
    let pool =
        |[pool, subnet, aggregation]: [&str; 3]| json!({"pool": pool, "subnet": subnet, "aggregation": aggregation});
    json!({
        "apiVersion": "purelb.io/v2",
        "kind": "ServiceGroup",
        "metadata": {"name": name, "namespace": "purelb-system"},
        "spec": {"remote": {"v4pool": pool(v4), "v6pool": pool(v6)}},
    })
}
