//! `/livez`, `/readyz`, `/hearz` and `/metrics`, on PureLB's port.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::http::{StatusCode, header};
use axum::routing::get;
use prometheus_client::registry::Registry;

use crate::args::Http;
use crate::cluster::hearing::{self, Hearing};

/// What the pages show; the roles of this process fill it before it is served.
#[derive(Default)]
pub struct Pages {
    /// Metrics; their names begin with `purelb_`.
    pub registry: Registry,
    /// How a node hears the API server, for others that do not.
    pub hearing: Option<Hearing>,
    checks: Vec<(&'static str, Arc<AtomicBool>)>,
}

impl Pages {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self { registry: Registry::with_prefix("purelb"), hearing: None, checks: Vec::new() }
    }

    /// Something that must be so before the process is ready.
    pub fn check(&mut self, what: &'static str) -> Arc<AtomicBool> {
        let flag = Arc::new(AtomicBool::new(false));
        self.checks.push((what, Arc::clone(&flag)));
        flag
    }

    /// Those that are not so yet.
    fn missing(&self) -> Vec<&'static str> {
        let missing = self.checks.iter().filter(|(_, flag)| !flag.load(Ordering::Relaxed));
        missing.map(|(what, _)| *what).collect()
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        match prometheus_client::encoding::text::encode(&mut text, &self.registry) {
            Ok(()) => text,
            Err(_) => String::new(),
        }
    }
}

/// Serves them in the background. Where the port cannot be had that is said, and everything else goes on.
pub async fn serve(pages: Pages, at: &Http) {
    if at.port == 0 {
        return;
    }
    let address = SocketAddr::new(at.host, at.port);
    let listener = match tokio::net::TcpListener::bind(address).await {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(op = "serveHTTP", %address, %error, "no metrics and no health: choose another --port, or 0 for none");
            return;
        }
    };
    let router = router(Arc::new(pages));
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(op = "serveHTTP", %error, "metrics and health ended");
        }
    });
}

fn router(pages: Arc<Pages>) -> Router {
    let metrics = Arc::clone(&pages);
    let hearing = pages.hearing.clone();
    Router::new()
        .route(
            hearing::PAGE,
            get(move || async move {
                let none = (StatusCode::NOT_FOUND, "no API server is asked\n".to_owned());
                let silence = |hearing: Hearing| (StatusCode::OK, format!("{}\n", hearing.silence().as_millis()));
                hearing.map_or(none, silence)
            }),
        )
        .route("/livez", get(|| async { "ok\n" }))
        .route(
            "/readyz",
            get(move || async move {
                let missing = pages.missing();
                if missing.is_empty() {
                    return (StatusCode::OK, "ok\n".to_owned());
                }
                (StatusCode::SERVICE_UNAVAILABLE, format!("not yet: {}\n", missing.join(", ")))
            }),
        )
        .route(
            "/metrics",
            get(move || async move {
                let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                // Reading the maps takes milliseconds.
                let text = tokio::task::spawn_blocking(move || metrics.metrics()).await.unwrap_or_default();
                ([(header::CONTENT_TYPE, kind)], text)
            }),
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_every_part_is() {
        let mut pages = Pages::new();
        assert!(pages.missing().is_empty(), "nothing to wait for");
        let (tables, list) = (pages.check("tables"), pages.check("list"));
        assert_eq!(pages.missing(), ["tables", "list"]);
        tables.store(true, Ordering::Relaxed);
        assert_eq!(pages.missing(), ["list"]);
        list.store(true, Ordering::Relaxed);
        assert!(pages.missing().is_empty());
    }
}
