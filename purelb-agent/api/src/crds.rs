//! The CustomResourceDefinitions, as they are written to `deploy/crds`.

use kube::CustomResourceExt as _;
use serde_json::Value;

use crate::node_agent::LBNodeAgent;
use crate::service_group::ServiceGroup;

const HEAD: &str = "# Generated from purelb-agent/api by `cargo xtask codegen`; changes here are lost.\n";

/// File names and contents.
///
/// # Errors
/// A type cannot be written as YAML.
pub fn files() -> Result<Vec<(String, String)>, serde_yaml_ng::Error> {
    let error = <serde_yaml_ng::Error as serde::ser::Error>::custom;
    let groups = serde_json::to_value(ServiceGroup::crd()).map_err(error)?;
    let mut agents = serde_json::to_value(LBNodeAgent::crd()).map_err(error)?;
    // PureLB's has a status and no subresource for it.
    if let Some(version) = agents.pointer_mut("/spec/versions/0").and_then(Value::as_object_mut) {
        version.remove("subresources");
    }
    let file = |mut crd: Value| {
        tidy(&mut crd);
        let name = crd.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
        Ok((format!("{name}.yaml"), HEAD.to_owned() + &serde_yaml_ng::to_string(&crd)?))
    };
    [groups, agents].into_iter().map(file).collect()
}

/// What Rust's types say about reading, and an API server does not take or does not need.
fn tidy(value: &mut Value) {
    match value {
        Value::Object(map) => {
            // `deny_unknown_fields`: an API server prunes them.
            if map.get("additionalProperties") == Some(&Value::Bool(false)) {
                map.remove("additionalProperties");
            }
            // `Option`: absent, not null.
            map.remove("nullable");
            if map.get("minimum").and_then(Value::as_f64) == Some(0.0) {
                map.insert("minimum".to_owned(), 0.into());
            }
            if let Some(Value::String(text)) = map.get_mut("description") {
                *text = text.replace('\n', " ");
            }
            map.values_mut().for_each(tidy);
        }
        Value::Array(items) => items.iter_mut().for_each(tidy),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use crate::node_agent::LBNodeAgentSpec;
    use crate::service_group::{ServiceGroupSpec, ServiceGroupStatus};

    fn crds() -> BTreeMap<String, Value> {
        let parse = |(name, text): (String, String)| (name, serde_yaml_ng::from_str(&text).unwrap());
        files().unwrap().into_iter().map(parse).collect()
    }

    fn group() -> Value {
        crds().remove("servicegroups.purelb.io.yaml").unwrap()
    }

    fn agent() -> Value {
        crds().remove("lbnodeagents.purelb.io.yaml").unwrap()
    }

    const SPEC: &str = "/spec/versions/0/schema/openAPIV3Schema/properties/spec";

    #[test]
    fn names_are_those_of_purelb() {
        for (crd, kind, short) in
            [(group(), "ServiceGroup", ["sg", "sgs"]), (agent(), "LBNodeAgent", ["lbna", "lbnas"])]
        {
            assert_eq!(crd.pointer("/spec/group").unwrap(), "purelb.io");
            assert_eq!(crd.pointer("/spec/scope").unwrap(), "Namespaced");
            assert_eq!(crd.pointer("/spec/names/kind").unwrap(), kind);
            assert_eq!(crd.pointer("/spec/names/shortNames").unwrap(), &json!(short));
            let version = crd.pointer("/spec/versions/0").unwrap();
            let served = ["name", "served", "storage"].map(|key| version.get(key).unwrap().clone());
            assert_eq!(served, [json!("v2"), json!(true), json!(true)]);
        }
        assert_eq!(group().pointer("/spec/versions/0/subresources").unwrap(), &json!({"status": {}}));
        assert!(agent().pointer("/spec/versions/0/subresources").is_none());
        assert!(agent().pointer("/spec/versions/0/additionalPrinterColumns").is_none_or(|c| c == &json!([])));
    }

    #[test]
    fn columns_are_those_of_purelb() {
        let columns = group().pointer("/spec/versions/0/additionalPrinterColumns").unwrap().clone();
        let columns: Vec<_> = columns.as_array().unwrap().iter().collect();
        let named = |priority: u64| -> Vec<&str> {
            let of = |c: &&&Value| c.get("priority").and_then(Value::as_u64).unwrap_or(0) == priority;
            columns.iter().filter(of).map(|c| c.get("name").unwrap().as_str().unwrap()).collect()
        };
        assert_eq!(named(0), ["Announce", "IPAM", "Allocated-V4", "Allocated-V6", "Age"]);
        assert_eq!(named(1), ["Addresses", "Available-V4", "Available-V6", "Namespaces", "Enforced", "Bound"]);
    }

    #[test]
    fn rules_defaults_and_limits() {
        let group = group();
        let at = |path: &str| group.pointer(&format!("{SPEC}{path}")).cloned().unwrap_or_else(|| panic!("no {path}"));
        assert_eq!(at("/x-kubernetes-validations").as_array().unwrap().len(), 3);
        for field in ["enforceNamespaces", "namespaceDefault"] {
            assert_eq!(at(&format!("/properties/{field}/default")), json!(false));
        }
        assert_eq!(at("/properties/namespaces/maxItems"), json!(1024));
        assert_eq!(at("/properties/namespaces/items/maxLength"), json!(63));
        assert!(at("/properties/namespaces/items/pattern").as_str().unwrap().starts_with("^[a-z0-9]"));
        assert_eq!(at("/properties/external/properties/socket/default"), json!("/var/run/purelb/ipam.sock"));
        assert_eq!(at("/properties/external/properties/announce/enum"), json!(["local", "remote"]));
        assert_eq!(at("/properties/external/properties/provider/minLength"), json!(1));
        for pools in ["local", "remote"] {
            for field in ["multiPool", "balancePools"] {
                assert_eq!(at(&format!("/properties/{pools}/properties/{field}/default")), json!(false));
            }
            let pool = at(&format!("/properties/{pools}/properties/v6pools/items"));
            assert_eq!(pool.get("required").unwrap(), &json!(["pool", "subnet"]));
            let pattern = pool.pointer("/properties/aggregation/pattern").unwrap().as_str().unwrap().to_owned();
            let pattern = regex::Regex::new(&pattern).unwrap();
            assert!(["default", "/8", "/32", "/128"].iter().all(|text| pattern.is_match(text)));
            assert!(["", "/7", "/129", "24", "/024"].iter().all(|text| !pattern.is_match(text)));
        }
        assert!(group.pointer(&format!("{SPEC}/properties/remote/properties/skipIPv6DAD")).is_none());
        let status = group.pointer("/spec/versions/0/schema/openAPIV3Schema/properties/status").unwrap();
        assert_eq!(status.get("required").unwrap(), &json!(["allocatedIPv4", "allocatedIPv6"]));
        for field in ["allocatedIPv4", "allocatedIPv6", "availableIPv4", "availableIPv6"] {
            let field = status.pointer(&format!("/properties/{field}")).unwrap();
            assert_eq!((field.get("minimum"), field.get("format")), (Some(&json!(0)), Some(&json!("int64"))));
        }
        assert_eq!(status.pointer("/properties/conditions/x-kubernetes-list-type").unwrap(), "map");
        let agent = agent();
        let local = |path: &str| agent.pointer(&format!("{SPEC}/properties/local/properties{path}")).unwrap().clone();
        assert_eq!(local("/localInterface/default"), json!("default"));
        assert_eq!(local("/dummyInterface/default"), json!("kube-lb0"));
        assert!(agent.pointer(&format!("{SPEC}/properties/local/properties/garpConfig/default")).is_none());
        let garp = ["enabled", "initialDelay", "count", "interval", "verifyBeforeSend"];
        let defaults = garp.map(|field| local(&format!("/garpConfig/properties/{field}/default")));
        assert_eq!(defaults, [json!(true), json!("100ms"), json!(3), json!("500ms"), json!(true)]);
        let count = local("/garpConfig/properties/count");
        assert_eq!((count.get("minimum").unwrap(), count.get("maximum").unwrap()), (&json!(1.0), &json!(10.0)));
    }

    /// As an API server wants it: every node has a type, no reference, and every property says what it is.
    #[test]
    fn schemas_are_structural() {
        fn walk(path: &str, schema: &Value) {
            let map = schema.as_object().unwrap();
            for word in ["$ref", "nullable", "definitions", "oneOf", "anyOf", "allOf", "not"] {
                assert!(!map.contains_key(word), "{path} has {word}");
            }
            assert!(map.contains_key("type"), "{path} has no type");
            let object = map.get("properties").and_then(Value::as_object);
            for (name, property) in object.into_iter().flatten() {
                let path = format!("{path}.{name}");
                assert!(property.get("description").is_some(), "{path} says nothing of itself");
                walk(&path, property);
            }
            for inner in ["items", "additionalProperties"] {
                if let Some(schema) = map.get(inner) {
                    walk(&format!("{path}.{inner}"), schema);
                }
            }
        }
        for (name, crd) in crds() {
            let schema = crd.pointer("/spec/versions/0/schema/openAPIV3Schema").unwrap();
            for part in ["spec", "status"] {
                walk(&format!("{name} {part}"), schema.pointer(&format!("/properties/{part}")).unwrap());
            }
        }
    }

    /// The words of `spec.datapath` that the schema lists are those that are read.
    #[test]
    fn words_of_the_schema_are_read() {
        let agent = agent();
        for field in ["mode", "hook", "clusterTraffic", "unknownPorts"] {
            let words = agent.pointer(&format!("{SPEC}/properties/datapath/properties/{field}/enum")).unwrap();
            for word in words.as_array().unwrap() {
                let spec = json!({"datapath": {field: word}});
                let read: LBNodeAgentSpec = serde_json::from_value(spec).unwrap();
                let written = serde_json::to_value(read).unwrap();
                assert_eq!(written.pointer(&format!("/datapath/{field}")), Some(word));
            }
        }
    }

    #[test]
    fn manifests_of_purelb_are_read_and_written_alike() {
        let pool = |pool: &str, subnet: &str| json!({"pool": pool, "subnet": subnet, "aggregation": "default"});
        let net = "192.168.254.0/24";
        let spec = json!({
            "local": {
                "v4pools": [pool("192.168.254.230/32", net), pool("192.168.254.231-192.168.254.240", net)],
                "v6pools": [pool("fd53:9ef0:8683::/120", "fd53:9ef0:8683::/120")],
                "skipIPv6DAD": false, "multiPool": false, "balancePools": true,
            },
            "namespaces": ["team"], "enforceNamespaces": true, "namespaceDefault": false,
        });
        let read: ServiceGroupSpec = serde_json::from_value(spec.clone()).unwrap();
        assert_eq!(serde_json::to_value(read).unwrap(), spec);
        let status = json!({
            "announce": "Local", "ipam": "Cluster", "addresses": [net], "allocatedIPv4": 1, "allocatedIPv6": 0,
            "availableIPv4": 255, "availableIPv6": i64::MAX, "boundNamespaces": ["team"],
        });
        let read: ServiceGroupStatus = serde_json::from_value(status.clone()).unwrap();
        assert_eq!(serde_json::to_value(read).unwrap(), status);
        let spec = json!({"local": {"localInterface": "default", "dummyInterface": "kube-lb0"}});
        let read: LBNodeAgentSpec = serde_json::from_value(spec.clone()).unwrap();
        assert_eq!(serde_json::to_value(read).unwrap(), spec);
    }
}
