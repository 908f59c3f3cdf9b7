//! A mounted ConfigMap, whose files are links through `..data`, which a kubelet renames.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::*;

/// What a kubelet does: a new folder, `..data` leads to it by one rename, then links come and go.
fn swap(root: &Path, version: u32, files: &[(&str, &str)]) {
    let folder = root.join(format!("..{version}"));
    fs::create_dir(&folder).unwrap();
    for (name, text) in files {
        fs::write(folder.join(name), text).unwrap();
    }
    symlink(format!("..{version}"), root.join("..data_tmp")).unwrap();
    fs::rename(root.join("..data_tmp"), root.join("..data")).unwrap();
    for (name, _) in files {
        drop(symlink(format!("..data/{name}"), root.join(name)));
    }
    for entry in fs::read_dir(root).unwrap().flatten() {
        if entry.path().is_symlink() && !entry.path().exists() {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    drop(fs::remove_dir_all(root.join(format!("..{}", version - 1))));
}

/// An object moves from one file to another by one rename, again and again, while the folder is read all the time.
#[test]
fn what_moves_is_never_gone() {
    let (moving, other) = (web(), service("other", "203.0.113.9"));
    let both = format!("{moving}---\n{other}");
    // To a file before it, and to one that comes while the old one goes.
    let layouts: [&[(&str, &str)]; 3] = [
        &[("a.yaml", &other), ("m.yaml", &service("m", "203.0.113.8")), ("z.yaml", &moving)],
        &[("a.yaml", &both), ("m.yaml", &service("m", "203.0.113.8")), ("z.yaml", &service("z", "203.0.113.7"))],
        &[("b.yaml", &both), ("m.yaml", &service("m", "203.0.113.8"))],
    ];
    let mut case = Case::new();
    swap(case.temp.path(), 1, layouts[0]);
    case.all();
    let (ended, root) = (AtomicBool::new(false), case.temp.path().to_owned());
    thread::scope(|scope| {
        scope.spawn(|| {
            for version in 2..200 {
                swap(&root, version, layouts[version as usize % 3]);
                thread::sleep(Duration::from_millis(5));
            }
            ended.store(true, Ordering::Relaxed);
        });
        let mut looks = 0;
        while !ended.load(Ordering::Relaxed) {
            case.all();
            looks += 1;
            if case.service("web").is_none() {
                ended.store(true, Ordering::Relaxed);
                panic!("gone in look {looks}");
            }
        }
    });
}
