//! Every tool the project needs, with its version: the only list.

/// 0.11 and newer want LLVM 23; this one uses the LLVM 22 that rustc 1.95 brings.
pub const BPF_LINKER: &str = "0.10.3";

/// Target of the kernel programs.
pub const BPF_TARGET: &str = "bpfel-unknown-none";

/// Debian suite that carries core's source for this rustc, used where rustup cannot fetch it.
pub const RUST_SRC_SUITE: &str = "trixie-backports";

/// A program of a Debian package that the tests call.
pub struct Tool {
    /// Name looked up in PATH, /usr/sbin, /sbin and /usr/lib/frr.
    pub program: &'static str,
    /// Debian package that brings it.
    pub package: &'static str,
}

/// Services that these packages bring, and that the machine shall not run: labs start the programs themselves.
pub const UNWANTED_SERVICES: &[(&str, &str)] = &[("bird2", "bird.service"), ("frr", "frr.service")];

/// What `cargo xtask test`, `demo` and `bench` need from the distribution, at the distribution's version.
pub const TEST_TOOLS: &[Tool] = &[
    Tool { program: "ip", package: "iproute2" },
    Tool { program: "nft", package: "nftables" },
    Tool { program: "iptables-restore", package: "iptables" },
    Tool { program: "bpftool", package: "bpftool" },
    Tool { program: "ethtool", package: "ethtool" },
    Tool { program: "openssl", package: "openssl" },
    Tool { program: "iperf3", package: "iperf3" },
    Tool { program: "tcpdump", package: "tcpdump" },
    Tool { program: "sysctl", package: "procps" },
    Tool { program: "c++", package: "g++" },
    Tool { program: "faketime", package: "faketime" },
    Tool { program: "bird", package: "bird2" },
    Tool { program: "bgpd", package: "frr" },
];

/// Emulates the guests of `cargo xtask vm`.
pub const QEMU: Tool = Tool { program: "qemu-system-x86_64", package: "qemu-system-x86" };

/// What `cargo xtask vm` needs beside [`TEST_TOOLS`].
pub const VM_TOOLS: &[Tool] = &[
    QEMU,
    Tool { program: "depmod", package: "kmod" },
    Tool { program: "strip", package: "binutils" },
    Tool { program: "ldd", package: "libc-bin" },
    Tool { program: "setpriv", package: "util-linux" },
    Tool { program: "nsenter", package: "util-linux" },
    Tool { program: "modprobe", package: "kmod" },
    Tool { program: "tc", package: "iproute2" },
    // kube-proxy's in its IPVS mode.
    Tool { program: "ipset", package: "ipset" },
];

/// A Debian kernel that tests run under.
pub struct Kernel {
    /// How its version begins.
    pub name: &'static str,
    /// The suite that has it.
    pub suite: &'static str,
    /// It has tcx, so agents run; on others they must say why not.
    pub serves: bool,
}

/// Names the newest kernel of a suite: that for virtual machines, which boots fastest.
pub const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";

/// What `cargo xtask vm` boots.
pub const KERNELS: &[Kernel] = &[
    Kernel { name: "6.1", suite: "bookworm", serves: false },
    Kernel { name: "6.12", suite: "trixie", serves: true },
    Kernel { name: "7", suite: "trixie-backports", serves: true },
];

/// A program that is built by Go from `tests/kube/go.mod`, which has its version.
pub struct GoProgram {
    /// Name of the file.
    pub name: &'static str,
    /// Package that it is built from.
    pub package: &'static str,
}

/// What the api tests run.
pub const CONTROL_PLANE: &[GoProgram] = &[
    GoProgram { name: "etcd", package: "go.etcd.io/etcd/server/v3" },
    GoProgram { name: "kube-apiserver", package: "k8s.io/kubernetes/cmd/kube-apiserver" },
    GoProgram { name: "kube-controller-manager", package: "k8s.io/kubernetes/cmd/kube-controller-manager" },
    GoProgram { name: "kube-proxy", package: "k8s.io/kubernetes/cmd/kube-proxy" },
];
