//! Arbitrary bytes as what the allocator keeps: the journal in its Lease, and the files of a folder's state.
#![no_main]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::{Arc, LazyLock};

use k8s_openapi::api::coordination::v1::Lease;
use libfuzzer_sys::fuzz_target;
use purelb_agent::cluster::journal::{DEBTS, Grants, Journal};
use purelb_agent::source::Objects as _;
use purelb_agent::source::claim::Home;
use purelb_agent::source::convert::Whose;
use purelb_agent::source::look::Look;
use purelb_agent::source::parse::{Found, Kind, object, parse};
use purelb_agent::source::state::{ServiceState, State};
use purelb_fuzz::laws;
use purelb_fuzz::objects::{Shelf, converted};
use purelb_plan::alloc::allocator::{Allocator, Estate, Settings};
use purelb_plan::alloc::external::{Sidecars, What};
use purelb_plan::apply::Twin;
use serde_json::json;
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder for files"));

const GROUP: &str = "apiVersion: purelb.io/v2\nkind: ServiceGroup\nmetadata: {name: default, namespace: purelb}\n\
                     spec: {local: {v4pools: [{pool: 192.0.2.0/29, subnet: 192.0.2.0/24}]}}\n";

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let mut lease = Lease::default();
    let annotations = lease.metadata.annotations.get_or_insert_default();
    annotations.extend(["grants", "releases"].map(|key| (format!("purelb.io/{key}"), text.to_string())));
    let journal = Journal::read(&lease);
    journal.write(&mut lease).expect("a journal can be written");
    let again = Journal::read(&lease);
    assert!(again == journal || journal.debts.len() > DEBTS, "what is written is not read: {journal:?}");
    granted(&journal.grants);
    owed(&journal);
    file(data);
});

/// Services as the grants name them, and as many that ask for something new.
fn granted(grants: &Grants) {
    let mut shelf = Shelf { objects: parse("g.yaml", GROUP).objects, ..Shelf::default() };
    let others = grants.keys().enumerate().map(|(index, _)| (format!("x/{index}"), String::new()));
    let named = grants.iter().map(|(name, grant)| (name.clone(), grant.uid.clone()));
    for (name, uid) in named.chain(others).take(16) {
        put(&mut shelf, &name, &uid);
    }
    let inherited = grants.iter().map(|(name, grant)| (name.clone(), (grant.uid.clone(), grant.ips.clone())));
    laws::allocate(&shelf, Home::Folder, inherited.collect());
}

/// All that sidecars have to take back they are told, and then nothing is left.
fn owed(journal: &Journal) {
    let mut sidecars = Sidecars::new(journal.debts.iter().cloned().collect());
    let settings = Settings { class: "c".to_owned(), default_announcer: true, cool_down: 0 };
    let mut allocator = Allocator::new(settings, BTreeMap::new());
    let estate = Estate::default();
    for now in 0.. {
        assert!(now <= 2 * journal.debts.len() as u64 + 2, "never ends: {:?}", sidecars.debts());
        allocator.look(&estate, now);
        let calls = sidecars.look(&estate, &allocator, now);
        if calls.is_empty() {
            break;
        }
        for call in calls {
            assert!(matches!(call.what, What::Release(_)), "{call:?}");
            sidecars.done(&call, Ok(Vec::new()), now);
        }
    }
    allocator.look(&estate, u64::MAX / 2);
    sidecars.look(&estate, &allocator, u64::MAX / 2);
    assert!(sidecars.debts().is_empty(), "is not taken back: {:?}", sidecars.debts());
}

fn put(shelf: &mut Shelf, name: &str, uid: &str) {
    let value = json!({
        "metadata": {"name": name, "uid": uid},
        "spec": {"type": "LoadBalancer", "ipFamilies": ["IPv4"], "ports": [{"port": 80}]},
    });
    let object = object(Kind::Service, value).expect("a good object can be read");
    shelf.objects.insert((Kind::Service, name.to_owned()), Arc::new(Found { object, origin: String::new() }));
}

/// What is written by hand is read, or is a problem; what one writes another one reads.
fn file(data: &[u8]) {
    let root = FOLDER.path();
    let services = root.join("services");
    let _ = fs::remove_dir_all(&services);
    fs::create_dir_all(&services).expect("a folder for files");
    fs::write(services.join("a.json"), data).expect("a file");
    fs::write(root.join("allocator.json"), data).expect("a file");
    fs::write(root.join("sidecars.json"), data).expect("a file");
    let mut state = State::new(root);
    let changed = state.scan(&Look::All);
    drop(State::new(root).debts());
    let Some(read) = state.services().next().cloned() else {
        assert!(changed.is_empty() && !state.problems().is_empty(), "neither a state nor a problem");
        return;
    };
    let mut shelf = Shelf { objects: parse("g.yaml", GROUP).objects, ..Shelf::default() };
    put(&mut shelf, &read.service, &read.uid);
    shelf.states.insert(read.service.clone(), (*read).clone());
    laws::allocate(&shelf, Home::Folder, [].into());
    let converter = converted(&shelf, Whose::OfClass);
    laws::come_to_rest(converter.world(), &mut Twin::new(1 << 17), 100);
    assert!(shelf.state(&read.service).is_some());
    // Of several Services at once.
    let of = |name: &str| ServiceState { service: name.to_owned(), ..(*read).clone() };
    let states: BTreeSet<String> =
        read.service.split(';').map(str::to_owned).filter(|name| name.contains('/')).collect();
    let written: Vec<_> = states.iter().map(|name| of(name)).filter(|new| state.write(new.clone()).is_ok()).collect();
    let mut other = State::new(root);
    other.scan(&Look::All);
    for new in written {
        assert_eq!(other.service(&new.service).map(|state| &**state), Some(&new), "what one writes another reads");
    }
}
