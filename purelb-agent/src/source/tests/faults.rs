//! Objects with faults, which stay theirs; and those that are unusual but right.

use purelb_plan::world::{EndpointState, Hook, Mode};

use super::*;

fn agent(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: purelb.io/v2\nkind: LBNodeAgent\nmetadata: {{name: {name}, namespace: purelb}}\nspec: {spec}\n"
    )
}

const NODE: &str = "apiVersion: v1\nkind: Node\nmetadata: {name: node1, labels: {rack: a, gpu: ''}}\n\
                    status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}\n";

/// Every row is one file beside a good one; its problem is named and the good one is served.
#[test]
fn each_fault_is_named_and_stays_alone() {
    let port = |ports: &str| service("bad", "203.0.113.9").replace("{name: http, port: 80}", ports);
    let at = |addresses: &str| slice_with("bad", "web", &format!("{{addresses: [{addresses}]}}"));
    let v6 = |addresses: &str| at(addresses).replace("IPv4", "IPv6");
    let unfit = "EndpointSlice default/bad endpoints[0].addresses: ";
    let rows = [
        (at("127.0.0.3"), format!("{unfit}127.0.0.3 is a loopback")),
        (v6("'::1'"), format!("{unfit}::1 is a loopback")),
        (at("0.0.0.0"), format!("{unfit}0.0.0.0 is an unspecified")),
        (v6("'::'"), format!("{unfit}:: is an unspecified")),
        (at("224.0.0.1"), format!("{unfit}224.0.0.1 is a multicast")),
        (v6("'ff02::1'"), format!("{unfit}ff02::1 is a multicast")),
        (at("169.254.1.1"), format!("{unfit}169.254.1.1 is a link-local")),
        (v6("'fe80::1'"), format!("{unfit}fe80::1 is a link-local")),
        (v6("'::ffff:10.0.0.9'"), format!("{unfit}::ffff:10.0.0.9 is an IPv4 address in IPv6 form")),
        (at("255.255.255.255"), format!("{unfit}255.255.255.255 is the broadcast")),
        (at("10.0.0.999"), format!("{unfit}\"10.0.0.999\" is no IPv4 address")),
        (at("'2001:db8::9'"), format!("{unfit}\"2001:db8::9\" is no IPv4 address")),
        (at(""), format!("{unfit}holds no address")),
        (at("web.example").replace("IPv4", "FQDN"), "EndpointSlice default/bad addressType: \"FQDN\"".to_owned()),
        (slice("bad", "''", "10.0.0.9"), "EndpointSlice default/bad metadata.labels: names no Service".to_owned()),
        (at("10.0.0.9").replace("port: 8080", "port: 0"), "EndpointSlice default/bad ports.port: 0".to_owned()),
        (at("10.0.0.9").replace("io/v1", "io/v1beta1"), "EndpointSlice of discovery.k8s.io/v1beta1".to_owned()),
        (service("bad", "169.254.0.9"), "Service default/bad status.loadBalancer.ingress: 169.254.0.9".to_owned()),
        (service("bad", "'::ffff:203.0.113.9'"), "ingress: ::ffff:203.0.113.9 is an IPv4".to_owned()),
        (service("bad", "203.0.113.256"), "Service default/bad status.loadBalancer.ingress.ip: ".to_owned()),
        (
            service("bad", "''").replace("[{ip: ''}]", "[]"),
            "bad status.loadBalancer.ingress: has no address".to_owned(),
        ),
        (
            port("{name: a, port: 80}, {name: b, port: 80, protocol: TCP}"),
            "spec.ports: port 80 TCP stands twice".to_owned(),
        ),
        (port("{port: 80}, {port: 81}"), "bad spec.ports.name: port 81 TCP has the name \"\"".to_owned()),
        (port("{name: a, port: 65536}"), "Service default/bad spec.ports[0].port: ".to_owned()),
        (port("{name: a, port: 80, protocol: TPC}"), "Service default/bad spec.ports.protocol: ".to_owned()),
        (
            service_with("bad", "203.0.113.9", "  loadBalancerSourceRanges: [10.0.0.0/40]\n"),
            "Service default/bad spec.loadBalancerSourceRanges: \"10.0.0.0/40\" is no CIDR".to_owned(),
        ),
        (
            service_with("bad", "203.0.113.1", "  loadBalancerClass: example.com/other\n"),
            "Service default/bad status.loadBalancer.ingress: 203.0.113.1 also belongs to Service default/web"
                .to_owned(),
        ),
        (agent("bad", "{datapath: {hook: fastest}}"), "LBNodeAgent purelb/bad spec.datapath.hook: ".to_owned()),
        (agent("bad", "{datapath: {hok: tcx}}"), "LBNodeAgent purelb/bad spec.datapath.hok: ".to_owned()),
        (agent("bad", "{datapath: {interfaces: [/eth(/]}}"), "bad spec.datapath.interfaces: /eth(/ is no".to_owned()),
        (agent("bad", "{datapath: {mode: fast}}"), "spec.datapath.mode: fast is not built yet".to_owned()),
        (agent("bad", "{datapath: {fragments: Balance}}"), "spec.datapath.fragments: Balance is not".to_owned()),
        (agent("bad", "{datapath: {fragments: Keep}}"), "spec.datapath.fragments: \"Keep\" is unknown".to_owned()),
        (agent("bad", "{dataPath: {hook: tcx}}"), "LBNodeAgent purelb/bad spec.dataPath: is unknown".to_owned()),
        (agent("bad", "{nodeSelector: {matchLabel: {a: b}}}"), "bad spec.nodeSelector.matchLabel: ".to_owned()),
        (
            agent("bad", "{nodeSelector: {matchExpressions: [{key: a, operator: In}]}}"),
            "spec.nodeSelector.matchExpressions[0]: In needs values".to_owned(),
        ),
        (
            agent("bad", "{nodeSelector: {matchExpressions: [{key: a, operator: Gt, values: ['1']}]}}"),
            "LBNodeAgent purelb/bad spec.nodeSelector.matchExpressions[0]".to_owned(),
        ),
        (
            agent("bad", "{nodeSelector: {matchLabels: {a: b}}, datapath: {}}"),
            "spec.nodeSelector: needs the labels of Node node1".to_owned(),
        ),
        (
            "apiVersion: v1\nkind: List\nitems: [{a: b}]\n".to_owned(),
            "bad.yaml:1 items[0] : is no Kubernetes".to_owned(),
        ),
        (NODE.replace("192.0.2.1", "192.0.2.x"), "Node node1 status.addresses: \"192.0.2.x\"".to_owned()),
    ];
    for (text, problem) in rows {
        let mut case = Case::new();
        case.write("web.yaml", &web());
        case.write("bad.yaml", &text);
        case.all();
        case.has_problem(&problem);
        assert_eq!(case.problems().len(), 1, "{problem}: {:#?}", case.problems());
        assert_eq!(case.endpoints("web"), ["10.0.0.1:8080"], "{problem}");
    }
}

#[test]
fn what_is_normal_is_no_problem() {
    let rows = [
        ("a slice of a Service that went", slice("x", "gone", "10.0.0.9")),
        ("a hint that nobody knows", service_with("x", "203.0.113.9", "  trafficDistribution: PreferMoon\n")),
        (
            "another class without an address",
            service_with("x", "''", "  loadBalancerClass: a/b\n").replace("[{ip: ''}]", "[]"),
        ),
        ("another type", service("x", "''").replace("LoadBalancer", "ClusterIP").replace("[{ip: ''}]", "[]")),
        (
            "PureLB's own settings",
            agent("x", "{local: {localInterface: default, garpConfig: {count: 3}, interfaces: [eth1]}}"),
        ),
        (
            "one name with two protocols",
            service("x", "203.0.113.9")
                .replace("{name: http, port: 80}", "{name: dns, port: 53}, {name: dns, port: 53, protocol: UDP}"),
        ),
        (
            "being deleted",
            service("x", "203.0.113.9").replace("{name: x}", "{name: x, deletionTimestamp: '2024-01-01T00:00:00Z'}"),
        ),
        ("no endpoints yet", slice("x", "web", "").replace("[{addresses: [''], nodeName: node1}]", "null")),
    ];
    for (name, text) in rows {
        let mut case = Case::new();
        case.write("web.yaml", &web());
        case.write("x.yaml", &text);
        case.all();
        assert!(case.problems().is_empty(), "{name}: {:?}", case.problems());
        assert!(case.service("web").is_some(), "{name}");
    }
}

#[test]
fn classes() {
    let rows = [("", true), ("purelb.io/purelbv2", true), ("purelb.io/purelb", true), ("example.com/lb", false)];
    for (class, ours) in rows {
        let mut case = Case::new();
        case.write("web.yaml", &web());
        case.write("x.yaml", &service_with("x", "203.0.113.7", &format!("  loadBalancerClass: '{class}'\n")));
        case.all();
        assert_eq!(case.service("x").is_some(), ours, "{class}");
        // Whoever comes first by name: a foreign Service's address is not judged unless it is ours too.
        let vips = case.folder.world().unwrap().services.values().flat_map(|s| s.vips.clone()).collect::<Vec<_>>();
        assert_eq!(vips.contains(&"203.0.113.7".parse().unwrap()), ours, "{class}");
    }
}

#[test]
fn conditions() {
    use EndpointState::{Ready, Terminating, Unready};
    // Conditions, publishNotReadyAddresses, state, serving.
    let rows = [
        ("{}", false, Ready, true),
        ("{ready: true}", false, Ready, true),
        ("{ready: false}", false, Unready, false),
        ("{ready: false, serving: true}", false, Unready, true),
        ("{ready: false, serving: true, terminating: true}", false, Terminating, true),
        ("{ready: false, serving: false, terminating: true}", false, Terminating, false),
        ("{terminating: true}", false, Terminating, true),
        ("{ready: true, terminating: true}", false, Ready, true),
        ("{ready: false}", true, Ready, true),
        ("{ready: false, serving: false, terminating: true}", true, Ready, true),
    ];
    for (conditions, publish, state, serving) in rows {
        let mut case = Case::new();
        let more = format!("  publishNotReadyAddresses: {publish}\n");
        case.write("web.yaml", &service_with("web", "203.0.113.1", &more));
        case.write(
            "slice.yaml",
            &slice_with("a", "web", &format!("{{addresses: [10.0.0.1], conditions: {conditions}}}")),
        );
        case.all();
        let service = case.service("web").unwrap();
        let e = service.endpoints.first().unwrap();
        assert_eq!((e.state, e.serving), (state, serving), "{conditions} {publish}");
    }
}

#[test]
fn endpoints_of_several_slices() {
    let mut case = Case::new();
    case.write("web.yaml", &service("web", "203.0.113.1"));
    case.write(
        "b.yaml",
        &slice_with("b", "web", "{addresses: [10.0.0.2, 10.0.0.3], nodeName: node1}, {addresses: [10.0.0.4]}"),
    );
    case.write("a.yaml", &slice("a", "web", "10.0.0.2"));
    case.all();
    assert_eq!(case.endpoints("web"), ["10.0.0.2:8080", "10.0.0.4:8080"], "the first address counts; once");
    let service = case.service("web").unwrap();
    assert_eq!(service.endpoints.last().unwrap().node, None, "without a node it is not local");
    // A slice that changes its Service leaves the old one.
    case.write("other.yaml", &super::service("other", "203.0.113.2"));
    case.write("b.yaml", &slice("b", "other", "10.0.0.5"));
    assert_eq!(case.all().len(), 2);
    assert_eq!(case.endpoints("web"), ["10.0.0.2:8080"]);
    assert_eq!(case.endpoints("other"), ["10.0.0.5:8080"]);
    // A Service that comes after its slices has them.
    fs::remove_file(case.path("web.yaml")).unwrap();
    case.all();
    assert!(case.service("web").is_none());
    case.write("web.yaml", &super::service("web", "203.0.113.1"));
    case.all();
    assert_eq!(case.endpoints("web"), ["10.0.0.2:8080"]);
    case.is_fine();
}

#[test]
fn the_settings_in_force() {
    let tcx = "datapath: {hook: tcx}";
    let expressions = |e: &str| format!("{{nodeSelector: {{matchExpressions: [{e}]}}, {tcx}}}");
    let labels = |l: &str| format!("{{nodeSelector: {{matchLabels: {l}}}, {tcx}}}");
    // The spec of `b`, beside `a` for all nodes with xdp: which hook is in force.
    let rows = [
        (labels("{rack: a}"), Hook::Tcx),
        (labels("{rack: b}"), Hook::Xdp),
        (labels("{rack: a, zone: c}"), Hook::Xdp),
        (expressions("{key: rack, operator: In, values: [a, b]}"), Hook::Tcx),
        (expressions("{key: rack, operator: NotIn, values: [a]}"), Hook::Xdp),
        (expressions("{key: zone, operator: NotIn, values: [a]}"), Hook::Tcx),
        (expressions("{key: gpu, operator: Exists}"), Hook::Tcx),
        (expressions("{key: zone, operator: Exists}"), Hook::Xdp),
        (expressions("{key: zone, operator: DoesNotExist}"), Hook::Tcx),
        (expressions("{key: gpu, operator: Exists}, {key: rack, operator: In, values: [b]}"), Hook::Xdp),
    ];
    for (spec, hook) in rows {
        let mut case = Case::new();
        case.write("node.yaml", NODE);
        case.write("a.yaml", &agent("a", "{nodeSelector: {}, datapath: {hook: xdp, mode: stack}}"));
        case.write("b.yaml", &agent("b", &spec));
        case.all();
        assert_eq!(case.folder.world().unwrap().datapath.hook, hook, "{spec}");
        case.is_fine();
    }
    let mut case = Case::new();
    case.write("node.yaml", NODE);
    case.write("a.yaml", &agent("a", "{local: {}}"));
    case.write("c.yaml", &agent("c", "{datapath: {mode: 'off'}}"));
    case.write("b.yaml", &agent("b", "{datapath: {hook: xdp}}"));
    case.all();
    let datapath = |case: &Case| case.folder.world().unwrap().datapath.clone();
    assert_eq!((datapath(&case).hook, datapath(&case).mode), (Hook::Xdp, Mode::Auto), "the first with our section");
    case.has_problem("LBNodeAgent purelb/c spec.nodeSelector: is for this node as well as purelb/b");
    // The node's labels change.
    case.write("c.yaml", &agent("c", &labels("{rack: b}")));
    case.all();
    assert_eq!(datapath(&case).hook, Hook::Xdp);
    case.write("node.yaml", &NODE.replace("rack: a", "rack: b"));
    case.all();
    assert_eq!(datapath(&case).hook, Hook::Tcx);
    // What does not parse keeps its last good version.
    case.write("c.yaml", &agent("c", "{datapath: {hook: none}}"));
    case.all();
    assert_eq!(datapath(&case).hook, Hook::Tcx);
    case.has_problem("LBNodeAgent purelb/c spec.datapath.hook");
}

#[test]
fn a_node_that_nothing_names() {
    let mut case = Case::new();
    case.write("web.yaml", &web().replace("node1", "node2"));
    case.all();
    case.has_problem("Node node1 --node-name");
    case.write("node.yaml", "apiVersion: v1\nkind: Node\nmetadata: {name: node1}\n");
    case.all();
    assert!(case.problems().is_empty(), "a node without endpoints: {:?}", case.problems());
}
