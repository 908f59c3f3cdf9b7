//! What there is to allocate from, and who has what: read once, for commands that only look.

use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use purelb_plan::problem::Problem;

use crate::args::{Manifests, Place, place};
use crate::cluster::connect;
use crate::cluster::store::Store;
use crate::cluster::watch::{Feed, of_inventory};
use crate::source::claim::Home;
use crate::source::estate::{FolderEstate, Register};
use crate::source::parse::Kind;
use crate::source::{Look, Objects};

/// A cluster that does not answer for so long is given up.
const PATIENCE: Duration = Duration::from_secs(20);

/// Objects, and what the allocator reads of them.
pub struct Inventory {
    /// All of them.
    pub objects: Box<dyn Objects>,
    /// Groups and Services.
    pub register: Register,
    /// Faults of files, or of the way to the cluster.
    pub problems: Vec<Problem>,
}

/// Reads it.
///
/// # Errors
/// There is nothing, or the cluster does not answer.
pub async fn read(args: &Manifests) -> anyhow::Result<Inventory> {
    match place(&args.source, args.state.clone())? {
        Place::Folder(folder, state) => {
            let mut estate = FolderEstate::new(&folder, &state);
            let empty = || format!("{} holds no object: name the folder of the manifests", folder.display());
            ensure!(estate.look(&Look::All), empty());
            Ok(of_folder(estate))
        }
        Place::Kube => {
            let connection = connect::connect(&args.kube).await?;
            let kinds = of_inventory();
            let (mut store, mut feed) = (Store::new(&kinds), Feed::new(&connection.client, &kinds));
            let listing = async {
                while !store.is_listed(Instant::now()) {
                    let news = feed.next().await;
                    news.into_iter().for_each(|news| store.take(news, Instant::now()));
                }
            };
            let listed = tokio::time::timeout(PATIENCE, listing).await;
            let problems = store.problems(Instant::now());
            if listed.is_err() {
                let why: Vec<_> =
                    problems.iter().map(|problem| format!("{}: {}", problem.object, problem.message)).collect();
                bail!("the cluster could not be read in {PATIENCE:?}: {}", why.join("; "));
            }
            let mut register = Register::default();
            register.read_groups(&store, connection.installed.then_some(&*connection.namespace));
            let names: Vec<_> = store.all(Kind::Service).map(|(key, _)| key.1.clone()).collect();
            for name in names {
                register.read_service(&store, &name, Home::Cluster, false);
            }
            Ok(Inventory { objects: Box::new(store), register, problems })
        }
    }
}

/// Of a folder that was read.
#[must_use]
pub fn of_folder(mut estate: FolderEstate) -> Inventory {
    let (register, problems) = (std::mem::take(&mut estate.register), estate.dir.problems());
    Inventory { objects: Box::new(estate), register, problems }
}
