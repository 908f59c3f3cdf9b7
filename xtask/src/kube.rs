//! The Kubernetes of the api tests: etcd, kube-apiserver, kube-controller-manager and kube-proxy, built once from
//! `tests/kube/go.mod`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::sh::{self, cache_dir, quiet, say, workspace};
use crate::tools::{CONTROL_PLANE, GoProgram};

/// Folder with the programs: the one that KUBEBUILDER_ASSETS names, else that of the cache.
pub fn control_plane() -> Result<PathBuf> {
    if let Some(given) = env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from) {
        if let Some(missing) = missing(&given).first() {
            bail!(
                "KUBEBUILDER_ASSETS is {}, where {} is missing: add it or unset the variable",
                given.display(),
                missing.name
            );
        }
        return Ok(given);
    }
    let _lock = sh::lock()?;
    let module = workspace().join("tests/kube");
    let text = fs::read_to_string(module.join("go.mod")).context("read tests/kube/go.mod")?;
    let version = version(&text).context("tests/kube/go.mod requires no k8s.io/kubernetes")?;
    let place = cache_dir()?.join(format!("kubernetes-{version}"));
    // All of them on a new machine; a cache that is older than this list lacks some.
    let missing = missing(&place);
    if !missing.is_empty() {
        build(&missing, &module, &place, version)?;
    }
    Ok(place)
}

fn missing(folder: &Path) -> Vec<&'static GoProgram> {
    CONTROL_PLANE.iter().filter(|program| !folder.join(program.name).is_file()).collect()
}

fn build(programs: &[&GoProgram], module: &Path, place: &Path, version: &str) -> Result<()> {
    let Some(go) = sh::find("go") else {
        bail!(
            "the api tests build Kubernetes {version} and need Go: install it, or let KUBEBUILDER_ASSETS name its programs"
        );
    };
    let beside = place.with_extension("building");
    drop(fs::remove_dir_all(&beside));
    fs::create_dir_all(&beside).with_context(|| format!("create {}", beside.display()))?;
    let mut command = Command::new(go);
    command.current_dir(module).env("CGO_ENABLED", "0").env_remove("GOFLAGS");
    command.args(["build", "-mod=readonly", "-buildvcs=false", "-trimpath", "-ldflags", "-s -w", "-o"]);
    command.arg(&beside).args(programs.iter().map(|program| program.package));
    let names: Vec<_> = programs.iter().map(|program| program.name).collect();
    let names = names.join(", ");
    quiet(&format!("building {names} of Kubernetes {version} for the api tests (minutes, once)"), &mut command)?;
    fs::create_dir_all(place).with_context(|| format!("create {}", place.display()))?;
    for GoProgram { name, package } in programs {
        let built = beside.join(built_as(package));
        fs::rename(&built, place.join(name)).with_context(|| format!("rename {}", built.display()))?;
    }
    drop(fs::remove_dir_all(&beside));
    say(format!("Kubernetes {version}: {}", place.display()));
    Ok(())
}

/// Go names a program after its folder; the last part of a module's path may only be its version.
fn built_as(package: &str) -> &str {
    let is_version = |part: &&str| {
        part.strip_prefix('v').is_some_and(|n| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit()))
    };
    package.rsplit('/').find(|part| !is_version(part)).unwrap_or(package)
}

/// `1.36.3`
fn version(text: &str) -> Option<&str> {
    let mut lines = text.lines().map(|line| line.trim().trim_start_matches("require "));
    lines.find_map(|line| line.strip_prefix("k8s.io/kubernetes v")?.split_whitespace().next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing() {
        let folder = env::temp_dir().join(format!("purelb-kube-{}", std::process::id()));
        let names = || missing(&folder).into_iter().map(|program| program.name).collect::<Vec<_>>();
        assert_eq!(names().len(), CONTROL_PLANE.len());
        fs::create_dir_all(&folder).unwrap();
        for old in ["etcd", "kube-apiserver", "kube-controller-manager"] {
            fs::write(folder.join(old), "").unwrap();
        }
        assert_eq!(names(), ["kube-proxy"]);
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn version_and_names() {
        assert_eq!(version("module x\n\nrequire k8s.io/kubernetes v1.36.3\n"), Some("1.36.3"));
        assert_eq!(version("require (\n\tk8s.io/kubernetes v1.36.3 // indirect\n)"), Some("1.36.3"));
        assert_eq!(version("require k8s.io/api v0.1.0"), None);
        assert_eq!(built_as("go.etcd.io/etcd/server/v3"), "server");
        assert_eq!(built_as("k8s.io/kubernetes/cmd/kube-apiserver"), "kube-apiserver");
    }
}
