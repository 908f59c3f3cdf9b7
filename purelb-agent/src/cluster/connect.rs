//! Where the API server is, and who we are to it.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use super::watch;
use crate::args::Kube;

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// A file that was named.
    #[error("kubeconfig {path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: kube::config::KubeconfigError,
    },
    /// Neither in a cluster nor a file.
    #[error("no Kubernetes: {0}; run in a pod with a service account, or name a file with --kubeconfig")]
    Nowhere(#[from] kube::config::InferConfigError),
    /// TLS or the token.
    #[error("cannot use the credentials for Kubernetes: {0}")]
    Client(#[from] kube::Error),
}

/// Where a service account's pod finds its namespace.
const OWN_NAMESPACE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";

/// A way to the API.
#[derive(Clone)]
pub struct Connection {
    /// The client.
    pub client: Client,
    /// The namespace that was named, else that of the pod, else that of the kubeconfig.
    pub namespace: String,
    /// It was named, or is that of the pod.
    pub installed: bool,
}

/// To the cluster of this pod, or of a kubeconfig. It speaks to nobody yet, so that works while the API server is away.
/// Must be called inside a tokio runtime.
///
/// # Errors
/// No configuration, or one that cannot be used.
pub async fn connect(args: &Kube) -> Result<Connection, ConnectError> {
    let mut config = match &args.kubeconfig {
        Some(path) => {
            let fail = |source| ConnectError::File { path: path.clone(), source };
            let file = Kubeconfig::read_from(path).map_err(fail)?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(fail)?
        }
        None => Config::infer().await?,
    };
    config.connect_timeout = Some(Duration::from_secs(5));
    // A list whose connection went silent would be waited for for ever; a watch says something within its life.
    config.read_timeout = Some(watch::LIFE + Duration::from_secs(10));
    config.reset_reader_on_write = true;
    let own = fs::read_to_string(OWN_NAMESPACE).ok().map(|text| text.trim().to_owned());
    let named = args.namespace.clone().or(own).filter(|namespace| !namespace.is_empty());
    let installed = named.is_some();
    let namespace = named.unwrap_or_else(|| config.default_namespace.clone());
    Ok(Connection { client: Client::try_from(config)?, namespace, installed })
}
