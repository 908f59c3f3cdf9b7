//! Reads and parses files, many at once on several threads.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use purelb_plan::problem::Problem;

use super::parse::{Found, Key, fault, parse};
use super::walk::Stamp;

/// Bytes of the largest manifest.
const LARGEST: u64 = 32 << 20;
/// So many files are not worth a thread.
const FEW: usize = 64;
const THREADS: usize = 4;

/// What one file gave.
#[derive(Debug)]
pub struct Reading {
    /// Of the file as it was read; `None`: read it again next time.
    pub stamp: Option<Stamp>,
    /// Its objects.
    pub objects: BTreeMap<Key, Arc<Found>>,
    /// Faults.
    pub problems: Vec<Problem>,
    /// Objects that it held before and that are not in `objects` may still be meant.
    pub partial: bool,
    /// Nothing but space: half written, if there was something before.
    pub blank: bool,
}

impl Reading {
    fn failed(path: &Path, stamp: Option<Stamp>, message: String, remedy: &str) -> Self {
        let name = path.display().to_string();
        let problems = vec![fault(&format!("file {name}"), &name, message, remedy)];
        Self { stamp, objects: BTreeMap::new(), problems, partial: true, blank: false }
    }

    /// What the file held before counts on.
    #[must_use]
    pub fn keeps(&self, old: &BTreeMap<Key, Arc<Found>>) -> bool {
        (self.partial || self.blank) && !old.is_empty()
    }

    /// Of something that is there and cannot be seen.
    #[must_use]
    pub fn hidden(path: &Path, error: &io::Error) -> Self {
        let remedy = "correct the link or make it readable; until then what was last read there counts";
        Self::failed(path, None, format!("cannot be read: {error}"), remedy)
    }
}

/// Reads files.
#[must_use]
pub fn read_all(mut files: Vec<(PathBuf, Stamp)>) -> Vec<(PathBuf, Option<Reading>)> {
    let threads = thread::available_parallelism().map_or(1, usize::from).clamp(1, THREADS);
    let share = files.len().div_ceil(threads).max(FEW);
    let mut parts = Vec::new();
    while files.len() > share {
        parts.push(files.split_off(files.len() - share));
    }
    let run = |part: Vec<(PathBuf, Stamp)>| -> Vec<_> { part.into_iter().map(read).collect() };
    thread::scope(|scope| {
        let others: Vec<_> = parts.into_iter().map(|part| scope.spawn(move || run(part))).collect();
        let mut all = run(files);
        all.extend(others.into_iter().flat_map(|other| other.join().unwrap_or_default()));
        all
    })
}

fn read((path, stamp): (PathBuf, Stamp)) -> (PathBuf, Option<Reading>) {
    let reading = reading(&path, stamp);
    (path, Some(reading))
}

fn reading(path: &Path, stamp: Stamp) -> Reading {
    let mut bytes = Vec::with_capacity(usize::try_from(stamp.length.min(LARGEST)).unwrap_or(0) + 1);
    // The file may have grown since it was looked at.
    let all = fs::File::open(path).and_then(|file| file.take(LARGEST + 1).read_to_end(&mut bytes));
    let text = match all.map(|_| String::from_utf8(bytes)) {
        Err(error) => return Reading::hidden(path, &error),
        Ok(Err(_)) => {
            return Reading::failed(path, Some(stamp), "is not UTF-8 text".to_owned(), "write YAML or JSON");
        }
        Ok(Ok(text)) if text.len() as u64 > LARGEST => {
            let message = format!("has more than {} MiB", LARGEST >> 20);
            return Reading::failed(path, Some(stamp), message, "spread the objects over several files");
        }
        Ok(Ok(text)) => text,
    };
    let parsed = parse(&path.display().to_string(), &text);
    let (partial, blank) = (!parsed.problems.is_empty(), parsed.blank);
    Reading { stamp: Some(stamp), objects: parsed.objects, problems: parsed.problems, partial, blank }
}
