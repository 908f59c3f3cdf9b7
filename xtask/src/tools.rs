//! Every tool the project needs, with its version: the only list.

/// 0.11 and newer want LLVM 23; this one uses the LLVM 22 that rustc 1.95 brings.
pub const BPF_LINKER: &str = "0.10.3";

/// Target of the kernel programs.
pub const BPF_TARGET: &str = "bpfel-unknown-none";

/// Debian suite that carries core's source for this rustc, used where rustup cannot fetch it.
pub const RUST_SRC_SUITE: &str = "trixie-backports";

/// A program of a Debian package that the tests call.
pub struct Tool {
    /// Name looked up in PATH, /usr/sbin and /sbin.
    pub program: &'static str,
    /// Debian package that brings it.
    pub package: &'static str,
}

/// What `cargo xtask test`, `demo` and `bench` need from the distribution, at the distribution's version.
pub const TEST_TOOLS: &[Tool] = &[
    Tool { program: "ip", package: "iproute2" },
    Tool { program: "nft", package: "nftables" },
    Tool { program: "bpftool", package: "bpftool" },
    Tool { program: "ethtool", package: "ethtool" },
    Tool { program: "openssl", package: "openssl" },
    Tool { program: "iperf3", package: "iperf3" },
    Tool { program: "tcpdump", package: "tcpdump" },
    Tool { program: "sysctl", package: "procps" },
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
];
