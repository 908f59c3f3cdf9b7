//! Attaches the programs by pinned links, which outlive the agent; a restart swaps the program in them.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};

use purelb_plan::problem::Problem;
use purelb_plan::world::Hook as Wanted;

use super::load::Programs;
use super::sys::{self, Hook};
use crate::net::Uplink;

/// What is asked of [`Programs::attach`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Links {
    /// On every uplink by the hook that is set.
    AsSet,
    /// What hangs somewhere stays there, by the hook it has, and for this reason.
    Stay(&'static str),
    /// Nowhere, since `datapath.mode` is off.
    Gone,
}

/// How an uplink is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UplinkStatus {
    /// Interface.
    pub name: String,
    /// Its index.
    pub ifindex: u32,
    /// `xdp`, `xdp-generic`, `tcx` or `off`.
    pub hook: String,
    /// Why this hook.
    pub why: String,
    /// Ingress and egress programs are in place.
    pub attached: bool,
    /// What hinders it.
    pub problem: Option<Problem>,
}

const INGRESS_HOOKS: [Hook; 3] = [Hook::Xdp, Hook::XdpGeneric, Hook::Ingress];

impl Programs {
    /// Attaches to all uplinks, detaches from what is none any more. May be called as often as one likes.
    pub fn attach(&mut self, uplinks: &[Uplink], wanted: Wanted, links: Links) -> Vec<UplinkStatus> {
        self.pin_links_again();
        self.follow_names(uplinks);
        // Egress programs elsewhere are the business of `attach_exits`, as long as the interface lives.
        self.detach_others(|name, hook, index| {
            let stays = matches!(links, Links::Stay(_)) || hook == "egress";
            links != Links::Gone && (stays && index != 0 || uplinks.iter().any(|u| u.name == name))
        });
        let pinned = |uplink: &Uplink| {
            let hooks =
                [(Hook::Xdp, Wanted::Xdp), (Hook::XdpGeneric, Wanted::XdpGeneric), (Hook::Ingress, Wanted::Tcx)];
            let there = hooks.into_iter().find(|(hook, _)| self.link(&uplink.name, *hook).exists());
            there.map(|(_, wanted)| wanted)
        };
        let one = |uplink: &Uplink| match links {
            Links::Gone => status(uplink, "off", "datapath.mode is off"),
            Links::AsSet => self.attach_one(uplink, wanted),
            Links::Stay(why) => {
                let stayed = pinned(uplink).map(|hook| self.attach_one(uplink, hook));
                let stayed = stayed.unwrap_or_else(|| self.attach_one(uplink, wanted));
                UplinkStatus { why: why.to_owned(), ..stayed }
            }
        };
        uplinks.iter().map(one).collect()
    }

    /// Puts the egress program on other interfaces that replies may leave by.
    pub fn attach_exits(&mut self, uplinks: &[Uplink], exits: &[Uplink], links: Links) -> Vec<Problem> {
        if links == Links::Gone {
            return Vec::new();
        }
        self.detach_others(|name, hook, index| {
            matches!(links, Links::Stay(_)) && index != 0
                || uplinks.iter().any(|u| u.name == name)
                || hook == "egress" && exits.iter().any(|u| u.name == name)
        });
        let failed = exits.iter().filter_map(|exit| self.hang(exit, Hook::Egress).err().map(|e| (exit, e)));
        failed.map(|(exit, e)| problem(exit, Hook::Egress, &e)).collect()
    }

    /// Something hangs, or did when the last agent ended.
    #[must_use]
    pub fn hang_somewhere(&self) -> bool {
        std::fs::read_dir(self.root.join("links")).is_ok_and(|mut entries| entries.next().is_some())
    }

    /// Every link that this asks for is pinned. Without its pin a link is gone with its agent.
    #[must_use]
    pub fn all_hang(&self, uplinks: &[Uplink], exits: &[Uplink]) -> bool {
        let there = |interface: &Uplink, hook| self.link(&interface.name, hook).exists();
        uplinks.iter().all(|u| there(u, Hook::Egress) && INGRESS_HOOKS.into_iter().any(|hook| there(u, hook)))
            && exits.iter().all(|exit| there(exit, Hook::Egress))
    }

    fn attach_one(&self, uplink: &Uplink, wanted: Wanted) -> UplinkStatus {
        let (hook, mut why) = choose(uplink, wanted);
        let mut used = hook;
        let other = if hook == Hook::Xdp { Hook::XdpGeneric } else { Hook::Xdp };
        if matches!(hook, Hook::Xdp | Hook::XdpGeneric) && self.link(&uplink.name, other).exists() {
            // Native and generic exclude each other: tcx stands in while they change places.
            let _ = self.hang(uplink, Hook::Ingress);
        }
        if let Err(error) = self.maps().set_uplink(uplink.index, uplink.mac) {
            tracing::warn!(op = "setUplink", iface = uplink.name, %error, "frames for other hosts are not told apart");
        }
        // Before the first request is rewritten its reply must be.
        let egress = self.hang(uplink, Hook::Egress);
        let mut result = self.hang(uplink, hook);
        if let Err(e) = &result
            && hook == Hook::Xdp
            && wanted == Wanted::Auto
        {
            why = format!("tcx, since {}", refusal(hook, e));
            used = Hook::Ingress;
            result = self.hang(uplink, used);
        }
        if result.is_ok() {
            // Only now: between two hooks there is never none.
            for other in INGRESS_HOOKS.into_iter().filter(|other| *other != used) {
                let _ = self.take_down(&self.link(&uplink.name, other));
            }
        }
        let problem = match (result, egress) {
            (Err(e), _) => Some(problem(uplink, used, &e)),
            (Ok(()), Err(e)) => Some(problem(uplink, Hook::Egress, &e)),
            (Ok(()), Ok(())) => None,
        };
        UplinkStatus { attached: problem.is_none(), problem, ..status(uplink, name_of(used), &why) }
    }

    /// Makes sure that the link is there and runs our program.
    fn hang(&self, uplink: &Uplink, hook: Hook) -> io::Result<()> {
        let path = self.link(&uplink.name, hook);
        let program = self.program(hook);
        if let Ok(link) = sys::get(&path) {
            // A link whose interface is gone refuses (ENOLINK), though a new one may have its name.
            if sys::link_ifindex(link.as_fd()).is_ok_and(|index| index == uplink.index)
                && sys::link_update(link.as_fd(), program).is_ok()
            {
                self.held.borrow_mut().insert(path, link);
                return Ok(());
            }
            self.take_down(&path)?;
        }
        if matches!(hook, Hook::Xdp | Hook::XdpGeneric) {
            // Native and generic exclude each other.
            let other = if hook == Hook::Xdp { Hook::XdpGeneric } else { Hook::Xdp };
            self.take_down(&self.link(&uplink.name, other))?;
        }
        let link = sys::link_create(program, uplink.index, hook)?;
        sys::pin(link.as_fd(), &path)?;
        self.held.borrow_mut().insert(path, link);
        Ok(())
    }

    /// Somebody who removes pins, or unmounts their file system, detaches nothing while we hold the links too.
    fn pin_links_again(&self) {
        for (path, link) in self.held.borrow().iter().filter(|(path, _)| !path.exists()) {
            if let Err(error) = sys::pin(link.as_fd(), path) {
                tracing::warn!(op = "pin", path = %path.display(), %error, "cannot pin again");
            }
        }
    }

    /// Detaches a pinned link, at once, and removes the pin.
    fn take_down(&self, path: &Path) -> io::Result<()> {
        self.held.borrow_mut().remove(path);
        if let Ok(link) = sys::get(path) {
            // Refused when the interface is gone, and then there is nothing to detach.
            let _ = sys::link_detach(link.as_fd());
        }
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    fn program(&self, hook: Hook) -> BorrowedFd<'_> {
        match hook {
            Hook::Xdp | Hook::XdpGeneric => self.xdp.as_fd(),
            Hook::Ingress => self.ingress.as_fd(),
            Hook::Egress => self.egress.as_fd(),
        }
    }

    fn link(&self, interface: &str, hook: Hook) -> PathBuf {
        let kind = match hook {
            Hook::Xdp => "xdp",
            Hook::XdpGeneric => "generic",
            Hook::Ingress => "ingress",
            Hook::Egress => "egress",
        };
        // bpffs takes no dots, interface names no colons.
        self.root.join("links").join(format!("{}-{kind}", interface.replace('.', ":")))
    }

    /// An interface that was renamed keeps its links: their pins get its new name. By a name that no interface can
    /// have, since two may have changed places.
    fn follow_names(&self, uplinks: &[Uplink]) {
        let links = self.root.join("links");
        let mut moves = Vec::new();
        for entry in std::fs::read_dir(&links).into_iter().flatten().flatten() {
            let file = entry.file_name().to_string_lossy().into_owned();
            let Some((name, kind)) = file.rsplit_once('-') else { continue };
            let index = sys::get(&entry.path()).and_then(|link| sys::link_ifindex(link.as_fd())).unwrap_or(0);
            if let Some(uplink) = uplinks.iter().find(|u| u.index == index && u.name != name.replace(':', ".")) {
                let between = links.join(format!(":{index}-{kind}"));
                let to = links.join(format!("{}-{kind}", uplink.name.replace('.', ":")));
                if std::fs::rename(entry.path(), &between).is_ok() {
                    let held = self.held.borrow_mut().remove(&entry.path());
                    moves.push((between, to, held));
                }
            }
        }
        for (from, to, held) in moves {
            let _ = std::fs::rename(from, &to);
            self.held.borrow_mut().extend(held.map(|link| (to, link)));
        }
    }

    fn detach_others(&self, keep: impl Fn(&str, &str, u32) -> bool) {
        let Ok(entries) = std::fs::read_dir(self.root.join("links")) else { return };
        for entry in entries.flatten() {
            let file = entry.file_name().to_string_lossy().into_owned();
            let Some((name, hook)) = file.rsplit_once('-') else { continue };
            let index = sys::get(&entry.path()).and_then(|link| sys::link_ifindex(link.as_fd())).unwrap_or(0);
            if !keep(&name.replace(':', "."), hook, index)
                && let Err(e) = self.take_down(&entry.path())
            {
                tracing::warn!(op = "detach", iface = name, error = %e, "cannot detach");
            }
        }
    }
}

/// D15: native XDP where the driver is made for it.
fn choose(uplink: &Uplink, wanted: Wanted) -> (Hook, String) {
    match wanted {
        Wanted::Xdp => (Hook::Xdp, "datapath.hook is xdp".to_owned()),
        Wanted::XdpGeneric => (Hook::XdpGeneric, "datapath.hook is xdp-generic".to_owned()),
        Wanted::Tcx => (Hook::Ingress, "datapath.hook is tcx".to_owned()),
        Wanted::Auto => match uplink.kind.as_str() {
            "" => (Hook::Xdp, "a device with a driver of its own".to_owned()),
            "bond" => (Hook::Xdp, "bonds pass XDP on to their drivers".to_owned()),
            "veth" => (Hook::Ingress, "senders into a veth leave partial checksums, and XDP costs it GRO".to_owned()),
            kind => (Hook::Ingress, format!("{kind} devices have no XDP of their own")),
        },
    }
}

fn status(uplink: &Uplink, hook: &str, why: &str) -> UplinkStatus {
    UplinkStatus {
        name: uplink.name.clone(),
        ifindex: uplink.index,
        hook: hook.to_owned(),
        why: why.to_owned(),
        attached: false,
        problem: None,
    }
}

const fn name_of(hook: Hook) -> &'static str {
    match hook {
        Hook::Xdp => "xdp",
        Hook::XdpGeneric => "xdp-generic",
        Hook::Ingress => "tcx",
        Hook::Egress => "tcx egress",
    }
}

fn refusal(hook: Hook, e: &io::Error) -> String {
    match (hook, e.raw_os_error()) {
        (Hook::Xdp | Hook::XdpGeneric, Some(libc::EBUSY | libc::EEXIST)) => {
            "another XDP program owns the device".to_owned()
        }
        (Hook::Xdp, Some(libc::EOPNOTSUPP)) => "the driver has no native XDP".to_owned(),
        (Hook::Xdp, Some(libc::ERANGE | libc::EINVAL | libc::E2BIG)) => {
            format!("the driver refuses XDP with this MTU or these offloads ({e})")
        }
        _ => e.to_string(),
    }
}

fn problem(uplink: &Uplink, hook: Hook, e: &io::Error) -> Problem {
    let remedy = match (hook, e.raw_os_error()) {
        (Hook::Xdp | Hook::XdpGeneric, Some(libc::EBUSY | libc::EEXIST)) => {
            "remove the other program (bpftool net list) or set datapath.hook: tcx"
        }
        (Hook::Xdp, _) => "set datapath.hook: auto or tcx, or lower the MTU",
        (Hook::XdpGeneric, _) => "set datapath.hook: tcx",
        _ => "tcx needs Linux 6.6 or newer; see `bpftool net list` for what hangs there",
    };
    Problem {
        object: format!("interface {}", uplink.name),
        field: "spec.datapath.hook".to_owned(),
        message: format!("cannot attach {} (MTU {}): {}", name_of(hook), uplink.mtu, refusal(hook, e)),
        remedy: remedy.to_owned(),
        origin: String::new(),
    }
}
