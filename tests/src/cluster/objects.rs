//! Kinds of objects and where the API has them; manifests of the repository.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize as _;
use serde_json::Value;

/// apiVersion, kind, plural, namespaced.
type Kind = (&'static str, &'static str, &'static str, bool);

const KINDS: &[Kind] = &[
    ("v1", "Namespace", "namespaces", false),
    ("v1", "Node", "nodes", false),
    ("v1", "Service", "services", true),
    ("v1", "Pod", "pods", true),
    ("v1", "ServiceAccount", "serviceaccounts", true),
    ("v1", "Event", "events", true),
    ("v1", "ConfigMap", "configmaps", true),
    ("apps/v1", "Deployment", "deployments", true),
    ("apps/v1", "DaemonSet", "daemonsets", true),
    ("coordination.k8s.io/v1", "Lease", "leases", true),
    ("discovery.k8s.io/v1", "EndpointSlice", "endpointslices", true),
    ("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets", true),
    ("scheduling.k8s.io/v1", "PriorityClass", "priorityclasses", false),
    ("rbac.authorization.k8s.io/v1", "ClusterRole", "clusterroles", false),
    ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "clusterrolebindings", false),
    ("rbac.authorization.k8s.io/v1", "Role", "roles", true),
    ("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings", true),
    ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy", "validatingadmissionpolicies", false),
    ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicyBinding", "validatingadmissionpolicybindings", false),
    ("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions", false),
    ("purelb.io/v2", "ServiceGroup", "servicegroups", true),
    ("purelb.io/v2", "LBNodeAgent", "lbnodeagents", true),
];

/// The path of an object, or of all of its kind where it has no name.
pub fn path(kind: &str, namespace: &str, name: &str) -> Result<String> {
    let found = KINDS.iter().find(|(_, word, ..)| *word == kind).with_context(|| format!("unknown kind {kind}"))?;
    let (version, _, plural, namespaced) = found;
    let group = if version.contains('/') { format!("/apis/{version}") } else { format!("/api/{version}") };
    let scope = if *namespaced && !namespace.is_empty() { format!("/namespaces/{namespace}") } else { String::new() };
    let name = if name.is_empty() { String::new() } else { format!("/{name}") };
    Ok(format!("{group}{scope}/{plural}{name}"))
}

/// The path of this very object.
pub fn path_of(object: &Value) -> Result<String> {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let namespace = match text("/metadata/namespace") {
        "" => "default",
        namespace => namespace,
    };
    path(text("/kind"), namespace, text("/metadata/name"))
}

/// All objects of the YAML files in a folder of the repository.
pub fn manifests(folder: &str) -> Result<Vec<Value>> {
    // Not through `..`: a guest has no folder of this crate.
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace")?.join(folder);
    let mut objects = Vec::new();
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .with_context(|| format!("list {}", folder.display()))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    files.sort();
    for file in files.into_iter().filter(|file| file.extension().is_some_and(|end| end == "yaml")) {
        let text = std::fs::read_to_string(&file)?;
        for document in serde_yaml_ng::Deserializer::from_str(&text) {
            let object = Value::deserialize(document).with_context(|| format!("read {}", file.display()))?;
            // kustomize's own file is no object.
            if object.get("kind").is_some_and(|kind| kind != "Kustomization") {
                objects.push(object);
            }
        }
    }
    // As kustomize orders them.
    objects.sort_by_key(|object| object["kind"] != "Namespace");
    Ok(objects)
}
