//! A lab whose agents read a real API server, beside real controllers: Pods whose status is set here, as kubelets would.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Lab, Options};
use crate::cluster::proxy::Proxy;
use crate::cluster::tenant::{Allocator, INSTALL, ingress};
use crate::cluster::{Client, Cluster, manifests as repository};
use crate::lab::wire::API;
use crate::manifests;
use crate::sys;

/// Where Services and Pods are.
pub const NAMESPACE: &str = "default";

impl Lab {
    /// The same lab, whose agents read an API server with Nodes, an LBNodeAgent and a ServiceGroup of the first VIPs in
    /// it; they run, and so does an allocator.
    pub fn on_cluster(options: Options) -> Result<(Self, Client, Allocator)> {
        let mut lab = Self::build(options)?;
        let cluster = Cluster::start()?;
        lab.wire_api(&cluster.netns)?;
        let admin = cluster.admin()?;
        for object in repository("deploy/base")? {
            let kind = object["kind"].as_str().unwrap_or_default();
            // Nothing here runs the Pods of workloads.
            if kind != "Deployment" && kind != "DaemonSet" && kind != "LBNodeAgent" {
                admin.apply(&object)?;
            }
        }
        for node in &lab.nodes {
            let object = manifests::node(&node.name, &node.addresses);
            admin.apply(&json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name}}))?;
            admin.patch_status("Node", "", &node.name, &object["status"])?;
        }
        let interfaces: Vec<_> = lab.options.interfaces.iter().map(String::as_str).collect();
        let mut agents = manifests::node_agent(&interfaces, &lab.options.hook);
        let mut group = manifests::service_group("203.0.113.1-203.0.113.9", "2001:db8:ffff::1-2001:db8:ffff::9");
        if lab.options.lan {
            agents["spec"]["local"] = json!({});
            let pool = |pool: &str, subnet: &str| json!([{"pool": pool, "subnet": subnet}]);
            group["spec"]["local"] = json!({
                "v4pools": pool("198.18.50.200-198.18.50.209", "198.18.50.0/24"),
                "v6pools": pool("2001:db8:50::200-2001:db8:50::209", "2001:db8:50::/64"),
            });
        }
        admin.apply(&agents)?;
        admin.apply(&group)?;
        if let Some(mode) = lab.options.kube_proxy {
            lab.start_kube_proxies(&cluster, mode)?;
        }
        let allocator = Allocator::start(&cluster, INSTALL, &[])?;
        for node in &mut lab.nodes {
            let mut config = cluster.agent_on(&admin, API, &node.name)?;
            if lab.options.proxied {
                let proxy = Proxy::start(&cluster)?;
                config = proxy.before(&config)?;
                lab.proxies.push(proxy);
            }
            node.agent.read_cluster(&config);
            node.agent.add_args(&["--namespace", INSTALL]);
        }
        lab.cluster = Some(cluster);
        for node in &mut lab.nodes {
            node.agent.start()?;
        }
        lab.nodes.iter_mut().try_for_each(|node| node.agent.wait_ready())?;
        // Without it no Pod is admitted; the controllers make it.
        sys::wait_for("Pods have an account", Duration::from_secs(60), || {
            admin.get("ServiceAccount", NAMESPACE, "default").map(|_| true)
        })?;
        Ok((lab, admin, allocator))
    }

    /// The Pod object of a lab's pod, running, and ready or not.
    pub fn pod(&self, admin: &Client, node: usize, index: usize, app: &str, ready: bool) -> Result<()> {
        let node = self.nodes.get(node).context("no such node")?;
        let pod = node.pods.get(index).context("no such pod")?;
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": pod.name, "namespace": NAMESPACE, "labels": {"app": app}},
            "spec": {
                "nodeName": node.name, "automountServiceAccountToken": false, "enableServiceLinks": false,
                "terminationGracePeriodSeconds": 30, "containers": [{"name": "server", "image": "server"}],
            },
        });
        admin.apply(&object)?;
        set_ready(admin, &pod.name, &pod.addresses, ready)
    }

    /// Makes a dual-stack Service of the Pods with that label and waits for its addresses.
    pub fn service(&self, admin: &Client, name: &str, spec: Value) -> Result<Vec<IpAddr>> {
        self.service_of(admin, name, "default", spec)
    }

    /// The same with addresses of that ServiceGroup.
    pub fn service_of(&self, admin: &Client, name: &str, group: &str, spec: Value) -> Result<Vec<IpAddr>> {
        let annotations = json!({"purelb.io/service-group": group});
        let mut object = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": NAMESPACE, "annotations": annotations},
            "spec": {
                "type": "LoadBalancer", "externalTrafficPolicy": "Local", "ipFamilyPolicy": "RequireDualStack",
                "allocateLoadBalancerNodePorts": false, "selector": {"app": name},
                "ports": [
                    {"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"},
                    {"name": "dns", "port": 80, "targetPort": 8080, "protocol": "UDP"},
                ],
            },
        });
        for (key, value) in spec.as_object().into_iter().flatten() {
            object["spec"][key] = value.clone();
        }
        admin.create(&object)?;
        let made = admin.wait("Service", (NAMESPACE, name), "has addresses", |object| ingress(object).len() == 2)?;
        ingress(&made).iter().map(|ip| ip.parse().context("VIP")).collect()
    }

    /// Waits until a node has these endpoints of a VIP's port 80, in any order.
    pub fn wait_endpoints(&self, node: usize, vip: IpAddr, wanted: &[(IpAddr, &str)]) -> Result<()> {
        let node = self.nodes.get(node).context("no such node")?;
        let mut wanted: Vec<_> = wanted.iter().map(|(ip, state)| (ip.to_string(), (*state).to_owned())).collect();
        wanted.sort();
        let waited = sys::wait_for(&format!("{vip} at {} has {wanted:?}", node.name), Duration::from_secs(60), || {
            let mut found = node.agent.endpoints(&vip.to_string(), 80)?;
            found.retain(|(_, state)| state != "gone");
            anyhow::ensure!(found == wanted, "it has {found:?}");
            Ok(true)
        });
        waited.with_context(|| node.agent.log_tail())
    }
}

/// What a kubelet says of a running Pod.
pub fn set_ready(admin: &Client, pod: &str, addresses: &[IpAddr], ready: bool) -> Result<()> {
    let ips: Vec<_> = addresses.iter().map(|ip| json!({"ip": ip.to_string()})).collect();
    let status = json!({
        "phase": "Running",
        "podIP": addresses.first().map(ToString::to_string),
        "podIPs": ips,
        "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}],
    });
    admin.patch_status("Pod", NAMESPACE, pod, &status).map(drop)
}
