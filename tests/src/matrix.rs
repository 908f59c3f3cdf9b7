//! One test function, run in all ways in which a node can be set up.

/// For every function `fn(Options) -> Result<()>` a module of its name with the tests `xdp` and `tcx`.
#[macro_export]
macro_rules! each_hook {
    ($($name:ident)*) => {
        $(mod $name {
            use $crate::lab::Options;

            #[test]
            fn xdp() -> anyhow::Result<()> {
                super::$name(Options::new("xdp"))
            }
            #[test]
            fn tcx() -> anyhow::Result<()> {
                super::$name(Options::new("tcx"))
            }
        })*
    };
}

/// The same, both without and beside kube-proxy-shaped rules (conntrack, `ct state invalid drop`).
#[macro_export]
macro_rules! each_hook_and_rules {
    ($($name:ident)*) => {
        $(mod $name {
            use $crate::lab::Options;

            #[test]
            fn xdp() -> anyhow::Result<()> {
                super::$name(Options::new("xdp"))
            }
            #[test]
            fn tcx() -> anyhow::Result<()> {
                super::$name(Options::new("tcx"))
            }
            #[test]
            fn xdp_beside_rules() -> anyhow::Result<()> {
                super::$name(Options::new("xdp").nft(true))
            }
            #[test]
            fn tcx_beside_rules() -> anyhow::Result<()> {
                super::$name(Options::new("tcx").nft(true))
            }
        })*
    };
}
