//! Broken manifests are named in `status` while everything else keeps working (invariant I4); no list changes
//! nothing (I10).

use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use purelb_tests::clients;
use purelb_tests::lab::{Lab, Options};
use purelb_tests::manifests;
use purelb_tests::{each_hook, sys};
use serde_json::Value;

/// A Service at a VIP of its own with one field spoilt: the text replaces a line of this one.
fn service(name: &str, spec: &str, ingress: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: default\nspec:\n  type: LoadBalancer\n  \
         externalTrafficPolicy: Local\n{spec}\nstatus:\n  loadBalancer:\n    ingress:\n{ingress}\n"
    )
}

fn slice(name: &str, rest: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}\n  namespace: default\n  \
         labels: {{kubernetes.io/service-name: web}}\n{rest}\n"
    )
}

/// File name, content; each must be named (by file or by object name) in `status`.
fn broken() -> Vec<(&'static str, Vec<u8>)> {
    let port = "  ports: [{name: a, port: 80, protocol: TCP}]";
    let ip = "    - ip: 203.0.113.20";
    let good = service("bad-half", port, ip);
    let texts: Vec<(&str, String)> = vec![
        ("bad-tab.yaml", "apiVersion: v1\n\tkind: Service\n".into()),
        ("bad-indent.yaml", "apiVersion: v1\n  kind: Service\n metadata: x\n".into()),
        ("bad-colon.yaml", "apiVersion: v1\nkind: Service: twice\n".into()),
        ("bad-bracket.yaml", "apiVersion: v1\nkind: Service\nspec: [1, 2\n".into()),
        ("bad-quote.yaml", "apiVersion: v1\nkind: \"Service\nmetadata: {}\n".into()),
        ("bad-alias.yaml", "apiVersion: v1\nkind: *nothing\n".into()),
        ("bad-duplicate.yaml", "apiVersion: v1\nkind: Service\nkind: Service\n".into()),
        ("bad-list.yaml", "- a\n- b\n".into()),
        ("bad-scalar.yaml", "only words\n".into()),
        ("bad-nokind.yaml", "apiVersion: v1\nmetadata: {name: x}\n".into()),
        ("bad-noversion.yaml", "kind: Service\nmetadata: {name: x}\n".into()),
        ("bad-noname.yaml", "apiVersion: v1\nkind: Service\nmetadata: {}\nspec: {type: LoadBalancer}\n".into()),
        ("bad-half.yaml", good.get(..good.len() / 3).unwrap_or_default().to_owned() + "\n  ports: [{na"),
        ("bad-portword.yaml", service("bad-portword", "  ports: [{name: a, port: http, protocol: TCP}]", ip)),
        ("bad-portzero.yaml", service("bad-portzero", "  ports: [{name: a, port: 0, protocol: TCP}]", ip)),
        ("bad-portbig.yaml", service("bad-portbig", "  ports: [{name: a, port: 65536, protocol: TCP}]", ip)),
        ("bad-portneg.yaml", service("bad-portneg", "  ports: [{name: a, port: -1, protocol: TCP}]", ip)),
        ("bad-portsmap.yaml", service("bad-portsmap", "  ports: {a: 80}", ip)),
        ("bad-protocol.yaml", service("bad-protocol", "  ports: [{name: a, port: 80, protocol: TPC}]", ip)),
        ("bad-vip.yaml", service("bad-vip", port, "    - ip: 203.0.113.256")),
        ("bad-vipnet.yaml", service("bad-vipnet", port, "    - ip: 203.0.113.0/24")),
        ("bad-viploop.yaml", service("bad-viploop", port, "    - ip: 127.0.0.1")),
        ("bad-vipmulti.yaml", service("bad-vipmulti", port, "    - ip: 224.0.0.5")),
        ("bad-vipzero.yaml", service("bad-vipzero", port, "    - ip: 0.0.0.0")),
        ("bad-vipnode.yaml", service("bad-vipnode", port, "    - ip: 198.18.101.2")),
        ("bad-overlap.yaml", service("zz-overlap", port, "    - ip: 203.0.113.1")),
        (
            "bad-range.yaml",
            service("bad-range", &format!("{port}\n  loadBalancerSourceRanges: [10.0.0.0/40]"), "    - ip: 203.0.113.21"),
        ),
        ("bad-address.yaml", slice("bad-address", "addressType: IPv4\nports: []\nendpoints: [{addresses: [198.19.1.999]}]")),
        ("bad-family.yaml", slice("bad-family", "addressType: IPv4\nports: []\nendpoints: [{addresses: ['2001:db8::9']}]")),
        ("bad-ready.yaml", slice("bad-ready", "addressType: IPv4\nendpoints: [{addresses: [198.19.1.9], conditions: {ready: maybe}}]")),
        ("bad-hook.yaml", "apiVersion: purelb.io/v2\nkind: LBNodeAgent\nmetadata: {name: bad-hook, namespace: purelb-system}\nspec: {datapath: {hook: fastest}}\n".into()),
        ("bad-long.yaml", "  - [ x\n".repeat(65_536)),
    ];
    let mut all: Vec<_> = texts.into_iter().map(|(file, text)| (file, text.into_bytes())).collect();
    all.push(("bad-binary.yaml", (0..4_096_u32).map(|n| (n.wrapping_mul(197) >> 3) as u8).collect()));
    all.push(("bad-utf16.yaml", vec![0xff, 0xfe, 0x61, 0x00, 0xff, 0xdf]));
    all
}

fn bad_input(options: Options) -> Result<()> {
    let (lab, web) = Lab::serving(options)?;
    let files = broken();
    for (file, content) in &files {
        lab.write(file, content)?;
    }
    symlink("bad-loop.yaml", lab.manifests().join("bad-loop.yaml"))?;
    let mut wanted: Vec<&str> = files.iter().map(|(file, _)| file.trim_end_matches(".yaml")).collect();
    wanted.push("bad-loop");
    sys::wait_for("every broken manifest is named in status", Duration::from_secs(10), || {
        let status = lab.nodes[0].agent.query(&["status"])?;
        let problems = status.get("problems").and_then(Value::as_array).cloned().unwrap_or_default();
        let text = Value::Array(problems).to_string();
        let missing: Vec<_> = wanted.iter().filter(|file| !text.contains(*file)).collect();
        ensure!(missing.is_empty(), "{} of {} not named: {missing:?}", missing.len(), wanted.len());
        Ok(true)
    })?;
    // The rest works, changes too.
    for to in lab.targets(80)? {
        let found = clients::spread(&lab.client, to, 40)?;
        ensure!(found.len() == 3, "beside broken files clients found {found:?}");
    }
    let mut fewer = web.clone();
    fewer.endpoints.truncate(2);
    lab.apply(&fewer)?;
    for to in lab.targets(80)? {
        let found = clients::spread(&lab.client, to, 40)?;
        ensure!(found.len() == 2, "a change beside broken files was not followed: {found:?}");
    }
    // A file that breaks keeps its last good version.
    lab.write("web.yaml", "apiVersion: v1\nkind: [\n")?;
    sys::pause(500);
    for to in lab.targets(80)? {
        let found = clients::spread(&lab.client, to, 20)?;
        ensure!(found.len() == 2, "the last good version was lost: {found:?}");
    }
    Ok(())
}

/// An agent whose folder is empty or missing writes nothing, and leaves what is pinned alone.
#[test]
fn empty_folder_is_no_list() -> Result<()> {
    let (mut lab, _) = Lab::serving(Options::new("xdp"))?;
    lab.nodes[0].agent.stop(nix::sys::signal::Signal::SIGKILL)?;
    for file in std::fs::read_dir(lab.manifests())?.flatten() {
        std::fs::remove_file(file.path())?;
    }
    let age = |lab: &Lab| -> Result<f64> {
        // Not ready: the command says so by its exit code, too.
        let node = &lab.nodes[0];
        let root = node.agent.bpf_root().display().to_string();
        let args = ["status", "-o", "json", "--bpf-root", &root];
        let out = node.netns.command(purelb_tests::agent::binary()?).args(args).output()?;
        let status: Value = serde_json::from_slice(&out.stdout)?;
        status.pointer("/tables/heartbeat_age").and_then(Value::as_f64).context("status: no heartbeat_age")
    };
    let before = age(&lab)?;
    lab.nodes[0].agent.start()?;
    sys::wait_for("/readyz says what is missing", Duration::from_secs(60), || {
        let (code, text) = lab.nodes[0].agent.page("/readyz")?;
        ensure!(code == 503 && text.contains("tables"), "/readyz without a list: {code} {text}");
        Ok(true)
    })?;
    sys::pause(2_500);
    let after = age(&lab)?;
    ensure!(after > before + 2.0, "without a list the tables count as fresh: {before} s, then {after} s old");
    for to in lab.targets(80)? {
        let found = clients::spread(&lab.client, to, 40)?;
        ensure!(found.len() == 3, "an empty folder took endpoints away: {found:?}");
    }
    lab.write_objects("again.yaml", &[manifests::node("node9", &["198.18.109.2".parse()?])])?;
    Ok(())
}

/// The folder is replaced by another one, and again: its files are noticed at once, not at the next poll.
#[test]
fn folder_is_replaced() -> Result<()> {
    let (lab, mut web) = Lab::serving(Options::new("tcx"))?;
    let (folder, old) = (lab.manifests(), lab.manifests().with_file_name("old"));
    for _ in 0..2 {
        std::fs::rename(&folder, &old)?;
        std::fs::create_dir(&folder)?;
        for file in std::fs::read_dir(&old)?.flatten() {
            std::fs::copy(file.path(), folder.join(file.file_name()))?;
        }
        std::fs::remove_dir_all(&old)?;
        // The poll finds the new folder, and this in it.
        web.endpoints[1].ready = !web.endpoints[1].ready;
        lab.apply(&web)?;
        sys::pause(1_500);
        let mut slowest = Duration::ZERO;
        for ready in [false, true, false, true] {
            web.endpoints[0].ready = ready;
            let began = Instant::now();
            lab.apply(&web)?;
            slowest = slowest.max(began.elapsed());
        }
        ensure!(slowest < Duration::from_secs(2), "a change in the new folder took {slowest:?}");
    }
    Ok(())
}

each_hook! { bad_input }
