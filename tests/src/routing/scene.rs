//! Three nodes with two pods each, whose daemons announce the addresses of two remote groups to the router.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{Kind, Routing};
use crate::lab::{Lab, Options};
use crate::manifests::{Service, announcer, remote_group};

/// The first addresses of the group `far`: host routes.
pub const FAR: [&str; 2] = ["203.0.113.64", "2001:db8:ffff::40"];
/// The first two of the group `wide`: one route for the whole subnet.
pub const WIDE: [[&str; 2]; 2] = [["198.51.100.1", "2001:db8:fffe::1"], ["198.51.100.2", "2001:db8:fffe::2"]];
/// The routes of the group `wide`.
pub const WIDE_ROUTES: [&str; 2] = ["198.51.100.0/24", "2001:db8:fffe::/64"];
/// All nodes.
pub const ALL: [usize; 3] = [1, 2, 3];
/// BGP and agents on a machine that is busy with other things.
pub const SOON: Duration = Duration::from_secs(20);

/// The lab, in which the Service `first` of the group `wide` has its route: sessions are up.
pub fn start(router: Kind, nodes: &[Kind], logs: bool) -> Result<(Lab, Routing)> {
    start_with(router, nodes, logs, false)
}

/// The same with BGP's graceful restart.
pub fn start_graceful(router: Kind, nodes: &[Kind]) -> Result<(Lab, Routing)> {
    start_with(router, nodes, true, true)
}

fn start_with(router: Kind, nodes: &[Kind], logs: bool, graceful: bool) -> Result<(Lab, Routing)> {
    // As on nodes that have run for a while: a reset of a pod that does not know the connection reaches the client.
    let agent_args = vec!["--reply-fallback", "0s", "--withdraw-wait", "6s"];
    let options =
        Options { standalone: true, routed: true, nodes: 3, pods: 2, agent_args, logs, ..Options::new("xdp") };
    let lab = Lab::start(options)?;
    lab.write_objects("announce.yaml", &[announcer("kube-lb0")])?;
    let far = [["203.0.113.64/28", "203.0.113.0/24", "/32"], ["2001:db8:ffff::40/124", "2001:db8:ffff::/64", "/128"]];
    let wide = ["198.51.100.1-198.51.100.9", "198.51.100.0/24", "default"];
    let wide6 = ["2001:db8:fffe::1-2001:db8:fffe::9", "2001:db8:fffe::/64", "default"];
    lab.write_objects("far.yaml", &[remote_group("far", far[0], far[1])])?;
    lab.write_objects("wide.yaml", &[remote_group("wide", wide, wide6)])?;
    let routing = Routing::start(&lab, router, nodes, graceful)?;
    lab.apply(&service(&lab, "first", "wide", WIDE[0])?)?;
    routing.wait_hops(&WIDE_ROUTES, &ALL, SOON)?;
    Ok((lab, routing))
}

/// A Service of all pods that will get these addresses of a group; its file is not written yet.
pub fn service(lab: &Lab, name: &str, group: &str, vips: [&str; 2]) -> Result<Service> {
    let vips = vips.iter().map(|ip| ip.parse().context("VIP")).collect::<Result<_>>()?;
    Ok(Service { name: name.to_owned(), vips, group: Some(group.to_owned()), ..lab.web()? })
}

/// Port 80 of both.
pub fn targets(vips: [&str; 2]) -> Result<Vec<SocketAddr>> {
    vips.iter().map(|ip| Ok(SocketAddr::new(ip.parse()?, 80))).collect()
}

/// The endpoints of these pods terminate, as Kubernetes says it of Pods that are deleted.
pub fn terminate(service: &mut Service, pods: &[&str]) {
    for endpoint in service.endpoints.iter_mut().filter(|endpoint| pods.contains(&endpoint.pod.as_str())) {
        (endpoint.ready, endpoint.terminating) = (false, true);
    }
}
