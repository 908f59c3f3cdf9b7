//! What a release of PureLB puts into a cluster, in our own words: its CRDs, roles and workloads, without our additions.

use serde_json::{Value, json};

use crate::cluster::tenant::INSTALL;

pub mod agent;

/// Its CustomResourceDefinitions, of groups and of agents.
#[must_use]
pub fn crds() -> [Value; 2] {
    let column = |(name, path, kind, priority): (&str, &str, &str, u8)| {
        let mut column = json!({"name": name, "jsonPath": path, "type": kind});
        if priority > 0 {
            column["priority"] = priority.into();
        }
        column
    };
    let columns = [
        ("Announce", ".status.announce", "string", 0),
        ("IPAM", ".status.ipam", "string", 0),
        ("Allocated-V4", ".status.allocatedIPv4", "integer", 0),
        ("Allocated-V6", ".status.allocatedIPv6", "integer", 0),
        ("Age", ".metadata.creationTimestamp", "date", 0),
        ("Addresses", ".status.addresses", "string", 1),
        ("Available-V4", ".status.availableIPv4", "integer", 1),
        ("Available-V6", ".status.availableIPv6", "integer", 1),
        ("Namespaces", ".spec.namespaces", "string", 1),
        ("Enforced", ".spec.enforceNamespaces", "boolean", 1),
        ("Bound", ".status.boundNamespaces", "string", 1),
    ];
    let mut groups = crd("ServiceGroup", "servicegroups", ["sg", "sgs"], group_spec(), group_status());
    groups["spec"]["versions"][0]["subresources"] = json!({"status": {}});
    groups["spec"]["versions"][0]["additionalPrinterColumns"] = columns.into_iter().map(column).collect();
    let status = json!({"type": "object", "properties": {"activeLeases": {"type": "integer"}}});
    [groups, crd("LBNodeAgent", "lbnodeagents", ["lbna", "lbnas"], agent_spec(), status)]
}

fn crd(kind: &str, plural: &str, short: [&str; 2], spec: Value, status: Value) -> Value {
    let text = json!({"type": "string"});
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.purelb.io")},
        "spec": {
            "group": "purelb.io", "scope": "Namespaced",
            "names": {
                "kind": kind, "listKind": format!("{kind}List"), "plural": plural, "shortNames": short,
                "singular": kind.to_lowercase(),
            },
            "versions": [{
                "name": "v2", "served": true, "storage": true,
                "schema": {"openAPIV3Schema": {
                    "type": "object", "required": ["spec"],
                    "properties": {
                        "apiVersion": text, "kind": text, "metadata": {"type": "object"}, "spec": spec, "status": status,
                    },
                }},
            }],
        },
    })
}

fn no() -> Value {
    json!({"type": "boolean", "default": false})
}

fn texts() -> Value {
    json!({"type": "array", "items": {"type": "string"}})
}

fn pools(local: bool) -> Value {
    let pool = json!({
        "type": "object", "required": ["pool", "subnet"],
        "properties": {
            "pool": {"type": "string"}, "subnet": {"type": "string"},
            "aggregation": {"type": "string", "pattern": "^(default|/([89]|[1-9][0-9]|1[01][0-9]|12[0-8]))$"},
        },
    });
    let list = json!({"type": "array", "items": pool});
    let mut properties = json!({
        "v4pool": pool, "v6pool": pool, "v4pools": list, "v6pools": list, "multiPool": no(), "balancePools": no(),
    });
    if local {
        properties["skipIPv6DAD"] = no();
    }
    json!({"type": "object", "properties": properties})
}

fn group_spec() -> Value {
    let name = json!({"type": "string", "maxLength": 63, "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"});
    let one = "(has(self.local) ? 1 : 0) + (has(self.remote) ? 1 : 0) + (has(self.external) ? 1 : 0) == 1";
    let named = "has(self.namespaces) && self.namespaces.size() > 0";
    json!({
        "type": "object",
        "properties": {
            "local": pools(true), "remote": pools(false),
            "external": {
                "type": "object", "required": ["announce", "provider"],
                "properties": {
                    "provider": {"type": "string", "minLength": 1},
                    "socket": {"type": "string", "default": "/var/run/purelb/ipam.sock"},
                    "announce": {"type": "string", "enum": ["local", "remote"]},
                },
            },
            "namespaces": {"type": "array", "maxItems": 1024, "items": name},
            "enforceNamespaces": no(), "namespaceDefault": no(),
        },
        "x-kubernetes-validations": [
            {"rule": one, "message": "one of local, remote, external"},
            {"rule": format!("!self.enforceNamespaces || ({named})"), "message": "enforceNamespaces without namespaces"},
            {"rule": format!("!self.namespaceDefault || ({named})"), "message": "namespaceDefault without namespaces"},
        ],
    })
}

fn group_status() -> Value {
    let number = json!({"type": "integer", "format": "int64", "minimum": 0});
    json!({
        "type": "object", "required": ["allocatedIPv4", "allocatedIPv6"],
        "properties": {
            "announce": {"type": "string"}, "ipam": {"type": "string"}, "addresses": texts(),
            "allocatedIPv4": number, "allocatedIPv6": number, "availableIPv4": number, "availableIPv6": number,
            "boundNamespaces": texts(),
        },
    })
}

fn agent_spec() -> Value {
    let number = json!({"type": "integer", "minimum": 0});
    let address = json!({
        "type": "object",
        "properties": {"validLifetime": number, "preferredLifetime": number, "noPrefixRoute": {"type": "boolean"}},
    });
    let text = |default: &str| json!({"type": "string", "default": default});
    let yes = json!({"type": "boolean", "default": true});
    let expression = json!({
        "type": "object", "required": ["key", "operator"],
        "properties": {"key": {"type": "string"}, "operator": {"type": "string"}, "values": texts()},
    });
    json!({
        "type": "object",
        "properties": {
            "nodeSelector": {
                "type": "object", "x-kubernetes-map-type": "atomic",
                "properties": {
                    "matchExpressions": {"type": "array", "items": expression},
                    "matchLabels": {"type": "object", "additionalProperties": {"type": "string"}},
                },
            },
            "local": {
                "type": "object",
                "properties": {
                    "localInterface": text("default"), "dummyInterface": text("kube-lb0"), "interfaces": texts(),
                    "garpConfig": {
                        "type": "object",
                        "properties": {
                            "enabled": yes, "verifyBeforeSend": yes, "initialDelay": text("100ms"),
                            "interval": text("500ms"),
                            "count": {"type": "integer", "minimum": 1, "maximum": 10, "default": 3},
                        },
                    },
                    "addressConfig": {
                        "type": "object", "properties": {"localInterface": address, "dummyInterface": address},
                    },
                },
            },
        },
    })
}

/// The rest of a release: namespace, roles, workloads, and the agents' settings.
#[must_use]
pub fn installation() -> Vec<Value> {
    let mut all = vec![
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": INSTALL, "labels": {"app": "purelb"}}}),
    ];
    all.extend(roles());
    all.extend([deployment(), daemon_set()]);
    all.push(json!({
        "apiVersion": "purelb.io/v2", "kind": "LBNodeAgent", "metadata": {"name": "default", "namespace": INSTALL},
        "spec": {"local": {"localInterface": "default", "dummyInterface": "kube-lb0"}},
    }));
    all
}

fn rule(group: &str, resources: &[&str], verbs: &str) -> Value {
    let verbs: Vec<_> = verbs.split(' ').collect();
    json!({"apiGroups": [group], "resources": resources, "verbs": verbs})
}

fn roles() -> Vec<Value> {
    let read = "get list watch";
    let write = "get list watch update";
    let own = ["servicegroups", "lbnodeagents"];
    let everywhere = [
        (
            "allocator",
            vec![
                rule("purelb.io", &own, write),
                rule("purelb.io", &["servicegroups/status"], "update patch"),
                rule("", &["services"], write),
                rule("", &["services/status"], "update"),
                rule("", &["events"], "create patch"),
            ],
        ),
        (
            "lbnodeagent",
            vec![
                rule("purelb.io", &own, write),
                rule("", &["nodes"], read),
                rule("discovery.k8s.io", &["endpointslices"], read),
                rule("", &["services"], write),
                rule("", &["events"], "create patch"),
                rule("coordination.k8s.io", &["leases"], "create get list watch update delete"),
            ],
        ),
    ];
    let inside = [
        ("allocator", "purelb:allocator:leases", vec![rule("coordination.k8s.io", &["leases"], "get list")]),
        ("lbnodeagent", "pod-lister", vec![rule("", &["pods"], "list")]),
    ];
    let mut all = Vec::new();
    let bound = |kind: &str, role: &str, account: &str, rules: Vec<Value>| {
        let meta = json!({"name": role, "namespace": INSTALL, "labels": {"app": "purelb"}});
        let version = "rbac.authorization.k8s.io/v1";
        [
            json!({"apiVersion": version, "kind": kind, "metadata": meta, "rules": rules}),
            json!({
                "apiVersion": version, "kind": format!("{kind}Binding"), "metadata": meta,
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role},
                "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": INSTALL}],
            }),
        ]
    };
    for (account, rules) in everywhere {
        all.push(json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": account, "namespace": INSTALL, "labels": {"app": "purelb"}},
        }));
        let mut pair = bound("ClusterRole", &format!("purelb:{account}"), account, rules);
        for object in &mut pair {
            object["metadata"].as_object_mut().map(|meta| meta.remove("namespace"));
        }
        all.extend(pair);
    }
    for (account, role, rules) in inside {
        all.extend(bound("Role", role, account, rules));
    }
    all
}

fn workload(kind: &str, name: &str, more: Value, pod: Value) -> Value {
    let labels = json!({"app": "purelb", "component": name});
    let mut spec = json!({
        "selector": {"matchLabels": labels},
        "template": {
            "metadata": {
                "labels": labels, "annotations": {"prometheus.io/port": "7472", "prometheus.io/scrape": "true"},
            },
            "spec": pod,
        },
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    json!({
        "apiVersion": "apps/v1", "kind": kind,
        "metadata": {"name": name, "namespace": INSTALL, "labels": labels}, "spec": spec,
    })
}

fn from(name: &str, path: &str) -> Value {
    json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}})
}

fn text(name: &str, value: &str) -> Value {
    json!({"name": name, "value": value})
}

fn container(name: &str, env: &[Value], security: Value) -> Value {
    json!({
        "name": name, "image": format!("ghcr.io/purelb/purelb/{name}:v0.17.0"), "imagePullPolicy": "IfNotPresent",
        "env": env, "ports": [{"name": "monitoring", "containerPort": 7472}],
        "resources": {"limits": {"memory": "100Mi"}}, "securityContext": security,
    })
}

fn deployment() -> Value {
    let env = [text("DEFAULT_ANNOUNCER", "PureLB"), from("PURELB_NAMESPACE", "metadata.namespace")];
    let security = json!({
        "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]},
    });
    let pod = json!({
        "serviceAccountName": "allocator", "terminationGracePeriodSeconds": 0,
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "securityContext": {"runAsNonRoot": true, "runAsUser": 65534, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container("allocator", &env, security)],
    });
    let more = json!({"replicas": 1, "revisionHistoryLimit": 3, "strategy": {"type": "Recreate"}});
    workload("Deployment", "allocator", more, pod)
}

fn daemon_set() -> Value {
    let env = [
        text("DEFAULT_ANNOUNCER", "PureLB"),
        from("PURELB_NODE_NAME", "spec.nodeName"),
        from("PURELB_HOST", "status.hostIP"),
        from("PURELB_NAMESPACE", "metadata.namespace"),
        from("PURELB_POD_UID", "metadata.uid"),
        text("PURELB_LEASE_DURATION", "10s"),
        text("PURELB_RENEW_DEADLINE", "7s"),
        text("PURELB_RETRY_PERIOD", "2s"),
    ];
    let security = json!({
        "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "seccompProfile": {"type": "RuntimeDefault"},
        "appArmorProfile": {"type": "Unconfined"},
        "capabilities": {"add": ["NET_ADMIN", "NET_RAW"], "drop": ["ALL"]},
    });
    let pod = json!({
        "serviceAccountName": "lbnodeagent", "hostNetwork": true, "terminationGracePeriodSeconds": 30,
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "node-role.kubernetes.io/master", "effect": "NoSchedule"}],
        "containers": [container("lbnodeagent", &env, security)],
    });
    workload("DaemonSet", "lbnodeagent", json!({}), pod)
}
