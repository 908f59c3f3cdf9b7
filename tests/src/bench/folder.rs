//! A folder of many Services with three endpoints each on one node, and changes of one of them.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::manifests::{self, Endpoint, Port, Service};

/// The node that all endpoints are on.
pub const NODE: &str = "node1";
/// Endpoints of a Service.
pub const ENDPOINTS: u32 = 3;
/// Port of every VIP.
pub const PORT: u16 = 80;
const TARGET_PORT: u16 = 8080;

/// The manifests below a folder of our own.
#[derive(Debug)]
pub struct Folder {
    manifests: PathBuf,
    drafts: PathBuf,
}

/// Address of a Service: each has its own.
#[must_use]
pub fn vip(service: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 19, 0, 0)) + service + 1)
}

/// Address of one of its endpoints.
#[must_use]
pub fn pod(service: u32, endpoint: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 244, 0, 0)) + service * ENDPOINTS + endpoint + 1)
}

impl Folder {
    /// Writes the node, its settings and that many Services, one file each.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(root: &Path, services: u32, uplink: &str, node: IpAddr) -> Result<Self> {
        let folder = Self { manifests: root.join("manifests"), drafts: root.join("drafts") };
        for path in [&folder.manifests, &folder.drafts] {
            fs::create_dir_all(path).with_context(|| format!("make {}", path.display()))?;
        }
        folder.place("node.yaml", &[manifests::node(NODE, &[node])])?;
        folder.place("lbnodeagent.yaml", &[manifests::node_agent(&[uplink], "xdp")])?;
        for service in 0..services {
            folder.service(service, None)?;
        }
        Ok(folder)
    }

    /// What the agent reads.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.manifests
    }

    /// Writes a Service anew, one of its endpoints not ready; its file is changed by rename, last of all.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn service(&self, number: u32, unready: Option<u32>) -> Result<()> {
        let endpoint = |n| Endpoint {
            pod: format!("web-{number}-{n}"),
            addresses: vec![pod(number, n).into()],
            node: NODE.to_owned(),
            ready: unready != Some(n),
            serving: unready != Some(n),
            terminating: false,
        };
        let service = Service {
            name: format!("web-{number}"),
            vips: vec![vip(number).into()],
            ports: vec![Port::new("http", PORT, TARGET_PORT, "TCP")],
            endpoints: (0..ENDPOINTS).map(endpoint).collect(),
            local: true,
            affinity: false,
            ranges: Vec::new(),
            group: None,
            sharing: None,
        };
        // Single-stack: the first slice is the IPv4 one, the other would be empty.
        let slice = service.slices().into_iter().next().context("a Service without slices")?;
        self.place(&format!("web-{number}.yaml"), &[service.service(), slice])
    }

    /// Written beside the folder, so the agent hears of it only when it is whole.
    fn place(&self, name: &str, objects: &[Value]) -> Result<()> {
        let documents: Vec<_> = objects.iter().map(serde_yaml_ng::to_string).collect::<Result<_, _>>()?;
        let draft = self.drafts.join(name);
        fs::write(&draft, documents.join("---\n")).with_context(|| format!("write {}", draft.display()))?;
        fs::rename(&draft, self.manifests.join(name)).with_context(|| format!("rename {}", draft.display()))
    }
}
