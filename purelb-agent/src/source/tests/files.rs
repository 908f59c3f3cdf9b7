//! Files that come, go, break, move and hide.

use std::os::unix::fs::symlink;

use super::*;
use crate::source::state::{ServiceState, State};

#[test]
fn unchanged_services_are_the_same_again() {
    let mut case = Case::new();
    case.write("web.yaml", &web());
    case.write("db.yaml", &web().replace("web", "db").replace("113.1", "113.2"));
    assert_eq!(case.all().len(), 2);
    let (old_web, old_db) = (case.service("web").unwrap(), case.service("db").unwrap());
    case.write("web.yaml", &web().replace("10.0.0.1", "10.0.0.2"));
    assert_eq!(case.all(), BTreeSet::from(["default/web".to_owned()]));
    assert_eq!(case.endpoints("web"), ["10.0.0.2:8080"]);
    assert!(!Arc::ptr_eq(&old_web, &case.service("web").unwrap()));
    assert!(Arc::ptr_eq(&old_db, &case.service("db").unwrap()), "db did not change");
    // Written again, the same text is no change.
    case.write("web.yaml", &web().replace("10.0.0.1", "10.0.0.2"));
    let before = case.service("web").unwrap();
    assert!(case.named(&["web.yaml"]).is_empty());
    assert!(Arc::ptr_eq(&before, &case.service("web").unwrap()));
}

#[test]
fn named_files_alone_are_read() {
    let mut case = Case::new();
    case.write("a.yaml", &service("a", "203.0.113.1"));
    case.write("b.yaml", &service("b", "203.0.113.2"));
    case.all();
    for name in ["a", "b"] {
        case.write(&format!("{name}.yaml"), &service(name, "203.0.113.9"));
    }
    assert_eq!(case.named(&["a.yaml"]), BTreeSet::from(["default/a".to_owned()]));
    assert_eq!(case.named(&["b.txt", ".b.yaml.swp", "state/b.yaml"]), BTreeSet::new());
    assert_eq!(case.all(), BTreeSet::from(["default/b".to_owned()]), "the poll finds what no notice named");
    case.write("c.yaml", &service("c", "203.0.113.3"));
    fs::remove_file(case.path("a.yaml")).unwrap();
    assert_eq!(case.named(&["c.yaml", "a.yaml"]).len(), 2);
    assert!(case.service("a").is_none() && case.service("c").is_some());
}

#[test]
fn folders_and_links_lead_to_a_full_look() {
    let mut case = Case::new();
    case.write("a.yaml", &service("a", "203.0.113.1"));
    case.all();
    fs::create_dir(case.path("sub")).unwrap();
    case.write("sub/b.yaml", &service("b", "203.0.113.2"));
    assert!(case.named(&["sub/b.yaml"]).contains("default/b"), "a file in a folder that is not known yet");
    fs::rename(case.path("sub"), case.path("other")).unwrap();
    case.named(&["sub", "other"]);
    assert!(case.service("b").unwrap().origin.contains("other/b.yaml"), "{:?}", case.service("b"));
    // As the kubelet mounts a ConfigMap: a hidden link is swapped, the names stay.
    for (version, vip) in [("..1", "203.0.113.3"), ("..2", "203.0.113.4")] {
        fs::create_dir(case.path(version)).unwrap();
        case.write(&format!("{version}/map.yaml"), &service("map", vip));
    }
    symlink("..1", case.path("..data")).unwrap();
    symlink("..data/map.yaml", case.path("map.yaml")).unwrap();
    case.named(&["map.yaml"]);
    symlink("..2", case.path("..data_tmp")).unwrap();
    fs::rename(case.path("..data_tmp"), case.path("..data")).unwrap();
    assert!(case.named(&["..data_tmp", "..data"]).contains("default/map"));
    assert!(case.service("map").unwrap().vips.contains(&"203.0.113.4".parse().unwrap()));
    case.is_fine();
}

#[test]
fn a_broken_file_keeps_its_last_good_version() {
    let rows = [
        ("broken YAML", "apiVersion: v1\nkind: [\n", "web.yaml"),
        (
            "half of the documents",
            "apiVersion: v1\nkind: Service\nmetadata: {name: other}\nspec: {ports: 3}\n",
            "spec.ports",
        ),
        ("emptied", "", "is empty now"),
        ("only comments", "# nothing\n", "is empty now"),
        ("binary", "\u{1}\u{2}", "web.yaml"),
    ];
    for (name, text, problem) in rows {
        let mut case = Case::new();
        case.write("web.yaml", &web());
        case.write("other.yaml", &service("x", "203.0.113.8"));
        case.all();
        let before = case.service("web").unwrap();
        case.write("web.yaml", text);
        assert!(case.named(&["web.yaml"]).is_empty(), "{name}");
        assert!(Arc::ptr_eq(&before, &case.service("web").unwrap()), "{name}");
        case.has_problem(problem);
        assert!(case.all().is_empty() && case.service("web").is_some(), "{name}: looked at again");
        case.has_problem(problem);
        case.write("web.yaml", &web());
        case.all();
        case.is_fine();
    }
}

#[test]
fn what_cannot_be_seen_is_not_gone() {
    type Hide = fn(&Case);
    let link: Hide = |case| {
        fs::remove_file(case.path("sub/web.yaml")).unwrap();
        symlink("web.yaml", case.path("sub/web.yaml")).unwrap();
    };
    let dangling: Hide = |case| {
        fs::remove_file(case.path("sub/web.yaml")).unwrap();
        symlink("nothing.yaml", case.path("sub/web.yaml")).unwrap();
    };
    let folder: Hide = |case| {
        fs::remove_dir_all(case.path("sub")).unwrap();
        symlink("sub", case.path("sub")).unwrap();
    };
    let rows = [("loop of links", link), ("link to nothing", dangling), ("folder that is a loop", folder)];
    for (name, hide) in rows {
        let mut case = Case::new();
        fs::create_dir(case.path("sub")).unwrap();
        case.write("sub/web.yaml", &web());
        case.write("other.yaml", &service("x", "203.0.113.8"));
        case.all();
        hide(&case);
        for look in 0..2 {
            assert!(case.all().is_empty(), "{name}");
            assert!(case.service("web").is_some(), "{name}, look {look}");
            case.has_problem("cannot be read");
        }
        let _ = fs::remove_file(case.path("sub/web.yaml"));
        let _ = fs::remove_file(case.path("sub"));
        assert_eq!(case.all(), BTreeSet::from(["default/web".to_owned()]), "{name}: gone now");
        case.is_fine();
    }
    let mut case = Case::new();
    case.write("web.yaml", &web());
    case.write("other.yaml", &service("x", "203.0.113.8"));
    case.all();
    link_loop(&case, "web.yaml");
    assert!(case.named(&["web.yaml"]).is_empty() && case.service("web").is_some(), "named by a notice");
    case.has_problem("cannot be read");
}

fn link_loop(case: &Case, name: &str) {
    fs::remove_file(case.path(name)).unwrap();
    symlink(name, case.path(name)).unwrap();
}

#[test]
fn nothing_is_concluded_from_an_empty_or_missing_folder() {
    let mut case = Case::new();
    assert!(case.all().is_empty() && case.folder.world().is_none());
    case.has_problem("is missing or holds no object");
    case.write("broken.yaml", "kind: [");
    assert!(case.all().is_empty() && case.folder.world().is_none(), "a broken file is no list either");
    case.has_problem("broken.yaml");
    case.write("web.yaml", &web());
    case.named(&["web.yaml"]);
    assert!(case.service("web").is_some());
    for name in ["web.yaml", "broken.yaml"] {
        fs::remove_file(case.path(name)).unwrap();
    }
    assert!(case.named(&["web.yaml", "broken.yaml"]).is_empty(), "emptied");
    assert!(case.service("web").is_some());
    case.has_problem("is missing or holds no object");
    fs::remove_dir_all(case.temp.path()).unwrap();
    assert!(case.all().is_empty() && case.service("web").is_some(), "removed");
    fs::create_dir(case.temp.path()).unwrap();
    case.write("db.yaml", &web().replace("web", "db"));
    assert_eq!(case.named(&["db.yaml"]).len(), 2, "the next list is a list again");
    assert!(case.service("web").is_none() && case.service("db").is_some());
    case.is_fine();
}

#[test]
fn the_first_file_by_name_counts_and_the_second_takes_its_place() {
    let mut case = Case::new();
    case.write("b.yaml", &service("web", "203.0.113.2"));
    case.write("a.yaml", &service("web", "203.0.113.1"));
    case.all();
    let vip = |case: &Case| case.service("web").unwrap().vips.first().unwrap().to_string();
    assert_eq!(vip(&case), "203.0.113.1");
    case.has_problem("Service default/web : is defined a second time; a.yaml:1 counts");
    case.write("b.yaml", &service("web", "203.0.113.3"));
    assert!(case.named(&["b.yaml"]).is_empty(), "the second changes nothing");
    fs::remove_file(case.path("a.yaml")).unwrap();
    assert_eq!(case.named(&["a.yaml"]).len(), 1);
    assert_eq!(vip(&case), "203.0.113.3");
    case.is_fine();
    case.write("a.yaml", &format!("{0}---\n{0}", service("web", "203.0.113.4")));
    case.all();
    assert_eq!(vip(&case), "203.0.113.4");
    case.has_problem("a.yaml:1 counts");
}

#[test]
fn a_renamed_file_is_the_same_objects() {
    let mut case = Case::new();
    case.write("a.yaml", &web());
    case.all();
    fs::rename(case.path("a.yaml"), case.path("b.yaml")).unwrap();
    case.named(&["a.yaml", "b.yaml"]);
    assert_eq!(case.endpoints("web"), ["10.0.0.1:8080"]);
    case.is_fine();
}

#[test]
fn documents_lists_and_other_forms() {
    let item = |text: &str| {
        let lines = text.lines().filter(|l| !l.starts_with("kind:") && !l.starts_with("apiVersion:"));
        lines.enumerate().map(|(i, l)| format!("{}{l}\n", if i == 0 { "- " } else { "  " })).collect::<String>()
    };
    let whole = |text: &str| {
        text.lines().enumerate().map(|(i, l)| format!("{}{l}\n", if i == 0 { "- " } else { "  " })).collect::<String>()
    };
    let (service, slice) = (service("web", "203.0.113.1"), slice("web-a", "web", "10.0.0.1"));
    let value: serde_json::Value = serde_yaml_ng::from_str(&service).unwrap();
    let json = serde_json::json!({"kind": "List", "apiVersion": "v1", "items": [value]});
    let rows = [
        ("two documents", format!("{service}---\n{slice}"), true),
        ("markers around", format!("---\n{service}--- # next\n{slice}---\n"), true),
        (
            "a directive, a BOM and CRLF",
            format!("\u{feff}%YAML 1.1\n---\n{service}---\n{slice}").replace('\n', "\r\n"),
            true,
        ),
        ("a document behind its marker", format!("{slice}--- {value}\n"), true),
        ("List", format!("kind: List\napiVersion: v1\nitems:\n{}{}", whole(&service), whole(&slice)), true),
        (
            "typed lists",
            format!(
                "kind: ServiceList\napiVersion: v1\nmetadata: {{resourceVersion: '1'}}\nitems:\n{}---\n\
             kind: EndpointSliceList\napiVersion: discovery.k8s.io/v1\nitems:\n{}",
                item(&service),
                item(&slice)
            ),
            true,
        ),
        ("JSON", json.to_string(), false),
        (
            "nulls",
            service.replace("spec:\n", "spec:\n  publishNotReadyAddresses: null\n  loadBalancerSourceRanges:\n"),
            false,
        ),
        (
            "kinds of others",
            format!("{service}---\nkind: Service\napiVersion: serving.knative.dev/v1\nspec: 3\n"),
            false,
        ),
    ];
    for (name, text, endpoints) in rows {
        let mut case = Case::new();
        case.write("web.yml", &text);
        case.all();
        assert!(case.service("web").is_some(), "{name}: {:?}", case.problems());
        assert_eq!(case.endpoints("web").len(), usize::from(endpoints), "{name}");
        case.is_fine();
    }
}

/// At the start a file cannot be read: what it may hold is not gone. One that was read once counts as it was.
#[test]
fn what_was_never_read_is_known_to_be_unknown() {
    let mut case = Case::new();
    case.write("a.yaml", &service("a", "203.0.113.1"));
    case.write("b.yaml", "apiVersion: v1\n\tkind: Service\n");
    case.all();
    let unread = |case: &Case| case.folder.world().unwrap().unread;
    assert!(unread(&case), "broken from the start");
    case.write("b.yaml", &format!("{}---\nkind: {{\n", service("b", "203.0.113.2")));
    case.named(&["b.yaml"]);
    assert!(unread(&case) && case.service("b").is_some(), "half of it is read");
    case.write("b.yaml", &service("b", "203.0.113.2"));
    case.named(&["b.yaml"]);
    assert!(!unread(&case));
    case.write("b.yaml", "apiVersion: v1\n\tkind: Service\n");
    case.named(&["b.yaml"]);
    assert!(!unread(&case) && case.service("b").is_some(), "it was read once");
    symlink("nowhere", case.path("c.yaml")).unwrap();
    case.all();
    assert!(unread(&case), "a link to nothing");
    fs::remove_file(case.path("c.yaml")).unwrap();
    case.named(&["c.yaml"]);
    case.all();
    assert!(!unread(&case), "removed");
}

/// What the allocator says of a Service stands in its annotations on a cluster, and beside it here.
#[test]
fn what_the_allocator_says_counts() {
    let mut case = Case::new();
    case.write("web.yaml", &web());
    case.all();
    let before = case.service("web").unwrap();
    assert!(!before.remote && !before.skip_dad);
    let says = [("purelb.io/pool-type", "remote"), ("purelb.io/skip-ipv6-dad", "true")];
    let annotations = says.map(|(key, value)| (key.to_owned(), Some(value.to_owned()))).into();
    let ingress = before.vips.iter().copied().collect();
    let state = ServiceState { service: "default/web".to_owned(), ingress, annotations, ..ServiceState::default() };
    State::new(&case.path("state")).write(state).unwrap();
    case.all();
    let after = case.service("web").unwrap();
    assert!(after.remote && after.skip_dad, "{after:?}");
}
