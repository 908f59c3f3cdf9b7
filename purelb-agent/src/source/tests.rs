//! The folder source from files to the world: a folder, changes to it, and what must be seen then.

mod faults;
mod files;
mod speed;
mod swaps;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use purelb_plan::world::Service;
use tempfile::TempDir;

use super::{Folder, Look};

/// A folder of manifests and its source.
struct Case {
    temp: TempDir,
    folder: Folder,
}

impl Case {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        let folder = Folder::new(temp.path(), &temp.path().join("state"), "node1");
        Self { temp, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn all(&mut self) -> BTreeSet<String> {
        self.folder.look(&Look::All)
    }

    /// As inotify names the files.
    fn named(&mut self, names: &[&str]) -> BTreeSet<String> {
        let look = Look::Paths(names.iter().map(|name| self.path(name)).collect());
        self.folder.look(&look)
    }

    fn service(&self, name: &str) -> Option<Arc<Service>> {
        self.folder.world()?.services.get(&format!("default/{name}")).cloned()
    }

    fn endpoints(&self, name: &str) -> Vec<String> {
        let service = self.service(name).unwrap();
        service.endpoints.iter().map(|e| format!("{}:{}", e.addr, e.port)).collect()
    }

    /// `object field: message` without the folder's name.
    fn problems(&self) -> Vec<String> {
        let root = format!("{}/", self.temp.path().display());
        let line = |p: purelb_plan::problem::Problem| {
            assert!(!p.remedy.is_empty() && !p.message.is_empty(), "{p:?}");
            format!("{} {}: {}", p.object, p.field, p.message).replace(&root, "")
        };
        self.folder.problems().into_iter().map(line).collect()
    }

    #[track_caller]
    fn has_problem(&self, part: &str) {
        assert!(self.problems().iter().any(|p| p.contains(part)), "no {part:?} in {:#?}", self.problems());
    }

    #[track_caller]
    fn is_fine(&self) {
        assert!(self.problems().is_empty(), "{:#?}", self.problems());
    }
}

fn service(name: &str, vip: &str) -> String {
    service_with(name, vip, "")
}

/// `more`: lines of the spec, each indented by two.
fn service_with(name: &str, vip: &str, more: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  type: LoadBalancer\n  \
         ports: [{{name: http, port: 80}}]\n{more}status: {{loadBalancer: {{ingress: [{{ip: {vip}}}]}}}}\n"
    )
}

fn slice(name: &str, of: &str, address: &str) -> String {
    slice_with(name, of, &format!("{{addresses: ['{address}'], nodeName: node1}}"))
}

fn slice_with(name: &str, of: &str, endpoints: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}\n  \
         labels: {{kubernetes.io/service-name: {of}}}\naddressType: IPv4\nports: [{{name: http, port: 8080}}]\n\
         endpoints: [{endpoints}]\n"
    )
}

fn web() -> String {
    format!("{}---\n{}", service("web", "203.0.113.1"), slice("web-a", "web", "10.0.0.1"))
}
