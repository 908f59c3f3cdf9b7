//! kube-proxy's IPVS mode beside our agents, on a real API server: other machines' kernels often lack `ip_vs`.

use anyhow::{Context as _, Result, ensure};
use purelb_tests::scenario::Scene;

/// In that mode kube-proxy has every VIP on a dummy device of every node, and its tables answer whatever gets that far.
#[test]
fn beside_kube_proxy() -> Result<()> {
    let mut scene = Scene::new("ipvs", "xdp")?;
    let mut all = || -> Result<()> {
        scene.restore()?;
        for node in &scene.lab.nodes {
            let said = node.netns.ip("-br address show dev kube-ipvs0")?;
            ensure!(said.contains(&scene.local.vips[0].to_string()), "no IPVS at {}: {said}", node.name);
        }
        scene.pods_of_all_nodes(&scene.cluster, true)?;
        scene.pods_of_the_node(&scene.local)?;
        println!("{} ways from inside and by node ports are served by kube-proxy's IPVS", scene.inside()?);
        Ok(())
    };
    all().with_context(|| scene.logs())
}
