//! The log: lines for people on stderr, or what PureLB's programs write on stdout, one flat JSON object a line.
//!
//! PureLB's form: `level` is info or debug, and what went wrong has an `error`; `caller` is file and line; `op` or `event`
//! says what happened in one word, `msg` in several; the rest are its fields (`svc`, `pool`, `ip`, `node`). No time: whoever
//! collects the lines knows it.

use std::fmt;
use std::io::IsTerminal as _;

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::args::LogFormat;

/// A build of a release sets both.
const COMMIT: Option<&str> = option_env!("PURELB_COMMIT");
const BRANCH: Option<&str> = option_env!("PURELB_GIT_BRANCH");

/// Begins the log of this process.
pub fn begin(format: LogFormat) {
    let [rust_log, level] = ["RUST_LOG", "PURELB_LOG_LEVEL"].map(|name| std::env::var(name).ok());
    let (filter, level) = choose(rust_log.as_deref(), level.as_deref());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    match format {
        LogFormat::Text => log.with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => log.with_writer(std::io::stdout).with_ansi(false).event_format(Flat).init(),
    }
    tracing::info!(
        release = env!("CARGO_PKG_VERSION"),
        commit = COMMIT.unwrap_or("unknown"),
        "git-branch" = BRANCH.unwrap_or("unknown"),
        "log-level" = level,
        "starting"
    );
}

/// What is logged, and how that is called: `RUST_LOG` before `PURELB_LOG_LEVEL`.
fn choose(rust_log: Option<&str>, level: Option<&str>) -> (EnvFilter, String) {
    if let Some(text) = rust_log.filter(|text| !text.is_empty())
        && let Ok(filter) = EnvFilter::try_new(text)
    {
        return (filter, text.to_owned());
    }
    // The watches tell what the client's own words would repeat.
    let (ours, level) =
        if level == Some("debug") { (",purelb_agent=debug,purelb_plan=debug", "debug") } else { ("", "info") };
    (EnvFilter::new(format!("info{ours},kube_client=off,kube_runtime=off")), level.to_owned())
}

/// PureLB's form of an event.
struct Flat;

impl<S, N> FormatEvent<S, N> for Flat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = Fields(Map::new());
        event.record(&mut fields);
        writeln!(writer, "{}", Value::Object(fields.finish(event.metadata())))
    }
}

/// An event's own.
struct Fields(Map<String, Value>);

impl Fields {
    /// Beside them what every line has.
    fn finish(self, metadata: &Metadata<'_>) -> Map<String, Value> {
        let Self(mut map) = self;
        // What comes by the crate `log` brings its place as fields.
        let file = map.remove("log.file").and_then(|file| Some(file.as_str()?.to_owned()));
        let line = map.remove("log.line").and_then(|line| line.as_u64());
        map.retain(|key, _| !key.starts_with("log."));
        let file = file.or_else(|| metadata.file().map(str::to_owned)).unwrap_or_default();
        let line = line.or_else(|| metadata.line().map(u64::from)).unwrap_or_default();
        let file = file.rsplit_once("src/").map_or(file.as_str(), |(_, file)| file);
        map.insert("caller".to_owned(), format!("{file}:{line}").into());
        let level = if *metadata.level() > Level::INFO { "debug" } else { "info" };
        map.insert("level".to_owned(), level.into());
        if *metadata.level() < Level::INFO && !map.contains_key("error") {
            let message = map.get("msg").cloned().unwrap_or_default();
            map.insert("error".to_owned(), message);
        }
        map
    }

    fn put(&mut self, field: &Field, value: Value) {
        let name = if field.name() == "message" { "msg" } else { field.name() };
        self.0.insert(name.to_owned(), value);
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use serde_json::json;

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// The lines that something logs.
    fn lines(filter: EnvFilter, work: impl FnOnce()) -> Vec<Value> {
        let sink = Sink::default();
        let writer = sink.clone();
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).event_format(Flat);
        tracing::subscriber::with_default(log.with_writer(move || writer.clone()).finish(), work);
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn without_caller(line: &Value) -> Value {
        let mut line = line.clone();
        line.as_object_mut().unwrap().remove("caller");
        line
    }

    #[test]
    fn flat_and_with_purelbs_names() {
        let found = lines(EnvFilter::new("info"), || {
            let (svc, ip) = ("default/web", "192.0.2.1".parse::<std::net::IpAddr>().unwrap());
            tracing::info!(svc, %ip, event = "AddressAssigned", new = true, count = 2, less = -1, "two\nlines \"{}\"", 7);
            tracing::debug!("not shown");
        });
        let want = json!({
            "level": "info", "svc": "default/web", "ip": "192.0.2.1", "event": "AddressAssigned", "new": true,
            "count": 2, "less": -1, "msg": "two\nlines \"7\"",
        });
        assert_eq!(found.iter().map(without_caller).collect::<Vec<_>>(), [want]);
        let caller = found[0]["caller"].as_str().unwrap();
        assert!(caller.starts_with("log.rs:") && caller.split(':').nth(1).unwrap().parse::<u32>().is_ok(), "{caller}");
    }

    #[test]
    fn what_went_wrong_has_an_error() {
        let found = lines(EnvFilter::new("debug"), || {
            let error = std::io::Error::other("disk");
            tracing::warn!(%error, op = "writeState", "cannot write");
            tracing::error!("it ended");
            tracing::debug!(?error, "later");
        });
        let want = [
            json!({"level": "info", "op": "writeState", "error": "disk", "msg": "cannot write"}),
            json!({"level": "info", "error": "it ended", "msg": "it ended"}),
            json!({"level": "debug", "error": "Custom { kind: Other, error: \"disk\" }", "msg": "later"}),
        ];
        assert_eq!(found.iter().map(without_caller).collect::<Vec<_>>(), want);
    }

    /// As tracing-log hands them on.
    #[test]
    fn what_comes_by_the_crate_log() {
        let found = lines(EnvFilter::new("info"), || {
            tracing::info!(log.target = "a", log.file = "x/src/a/b.rs", log.line = 7, log.module_path = "a::b", "said");
        });
        assert_eq!(found, [json!({"level": "info", "caller": "a/b.rs:7", "msg": "said"})]);
    }

    #[test]
    fn the_level_is_chosen() {
        let rows = [
            (None, None, "info"),
            (None, Some("info"), "info"),
            (None, Some("debug"), "debug"),
            (None, Some("loud"), "info"),
            (Some(""), Some("debug"), "debug"),
            (Some("purelb_agent=debug"), None, "purelb_agent=debug"),
            (Some("error"), Some("debug"), "error"),
            (Some("[broken"), Some("debug"), "debug"),
        ];
        for (rust_log, level, want) in rows {
            assert_eq!(choose(rust_log, level).1, want, "{rust_log:?} {level:?}");
        }
        let count = |rust_log, level| {
            lines(choose(rust_log, level).0, || {
                tracing::debug!("ours");
                tracing::debug!(target: "hyper", "theirs");
                tracing::error!(target: "kube_client", "repeated");
            })
            .len()
        };
        assert_eq!([count(None, None), count(None, Some("debug")), count(Some("debug"), None)], [0, 1, 3]);
    }
}
