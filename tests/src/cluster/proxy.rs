//! A proxy in front of the API server, where rules say what happens to requests on their way. Who asks is known by his own
//! token.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::body::Body;
use axum::http::{Request, Response, StatusCode, header};
use futures::StreamExt as _;
use http_body_util::BodyExt as _;
use regex::Regex;
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};

use super::Cluster;

/// A request of which the rule with this expression for `METHOD PATH` is the first that matches...
#[derive(Clone, Debug)]
pub struct Rule(pub &'static str, pub Fate);

/// ... has this fate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It takes so long to the API server, whatever its sender does meanwhile.
    Delay(Duration),
    /// It waits as long as the rule is there.
    Hold,
    /// The proxy answers with this code instead.
    Answer(u16),
    /// It is carried out, and nothing more of the answer arrives as long as the rule is there.
    Silence,
    /// The same, and then still nothing: the connection is dead.
    Death,
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<(Regex, Fate)>,
    seen: Vec<String>,
}

/// A running proxy; it ends with this.
#[derive(Debug)]
pub struct Proxy {
    /// It listens here, at every address of the control plane's namespace, without TLS.
    pub port: u16,
    state: Arc<Mutex<State>>,
    _runtime: Runtime,
}

impl Proxy {
    /// Starts it.
    pub fn start(cluster: &Cluster) -> Result<Self> {
        let state = Arc::new(Mutex::new(State::default()));
        let runtime = cluster.netns.enter(|| Builder::new_multi_thread().worker_threads(2).enable_all().build())??;
        let client = cluster.nobody_on(&runtime)?;
        let shared = Arc::clone(&state);
        let bound = runtime.spawn(async move { tokio::net::TcpListener::bind(("0.0.0.0", 0)).await });
        let listener = runtime.block_on(bound)?.context("a port for the proxy")?;
        let port = listener.local_addr()?.port();
        runtime.spawn(async move {
            let handler = move |request: Request<Body>| carry(client.clone(), Arc::clone(&shared), request);
            axum::serve(listener, axum::Router::new().fallback(handler)).await
        });
        Ok(Self { port, state, _runtime: runtime })
    }

    /// The same kubeconfig with the proxy in the API server's place.
    pub fn before(&self, kubeconfig: &Path) -> Result<PathBuf> {
        let direct = std::fs::read_to_string(kubeconfig)?;
        let parsed: Value = serde_json::from_str(&direct)?;
        let server = parsed["clusters"][0]["cluster"]["server"].as_str().context("a kubeconfig with a server")?;
        let host = server.trim_start_matches("https://").trim_end_matches(":6443");
        let behind = kubeconfig.with_extension(self.port.to_string());
        std::fs::write(&behind, direct.replace(server, &format!("http://{host}:{}", self.port)))?;
        Ok(behind)
    }

    /// From now on these rules are there.
    pub fn rules(&self, rules: &[Rule]) -> Result<()> {
        let parsed = rules.iter().map(|Rule(text, fate)| Ok((Regex::new(text)?, *fate))).collect::<Result<_>>()?;
        if let Ok(mut state) = self.state.lock() {
            state.rules = parsed;
        }
        Ok(())
    }

    /// How many requests with these words there were.
    #[must_use]
    pub fn count(&self, words: &str) -> usize {
        self.state.lock().map_or(0, |state| state.seen.iter().filter(|line| line.contains(words)).count())
    }

    /// How many requests there were, events apart: those name each group of every other tenant once.
    #[must_use]
    pub fn asked(&self) -> usize {
        self.count("") - self.count("/events")
    }
}

fn fate(state: &Mutex<State>, line: &str) -> Option<Fate> {
    let state = state.lock().ok()?;
    state.rules.iter().find(|(pattern, _)| pattern.is_match(line)).map(|(_, fate)| *fate)
}

async fn carry(client: kube::Client, state: Arc<Mutex<State>>, request: Request<Body>) -> Response<Body> {
    let line = format!("{} {}", request.method(), request.uri());
    if let Ok(mut state) = state.lock() {
        state.seen.push(line.clone());
    }
    // Its sender may give up: what is on its way arrives all the same.
    let on_its_way = tokio::spawn(async move { forward(client, state, line, request).await });
    let failed = |why: String| answer(StatusCode::BAD_GATEWAY.as_u16(), &why);
    match on_its_way.await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => failed(format!("{error:#}")),
        Err(error) => failed(error.to_string()),
    }
}

async fn forward(
    client: kube::Client,
    state: Arc<Mutex<State>>,
    line: String,
    request: Request<Body>,
) -> Result<Response<Body>> {
    let (mut parts, body) = request.into_parts();
    let bytes = body.collect().await?.to_bytes();
    match fate(&state, &line) {
        Some(Fate::Answer(code)) => return Ok(answer(code, "the proxy says so")),
        Some(Fate::Delay(time)) => tokio::time::sleep(time).await,
        _ => {}
    }
    while fate(&state, &line) == Some(Fate::Hold) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for name in [header::HOST, header::CONTENT_LENGTH, header::TRANSFER_ENCODING] {
        parts.headers.remove(name);
    }
    let sent = Request::from_parts(parts, kube::client::Body::from(bytes.to_vec()));
    let (mut parts, body) = client.send(sent).await?.into_parts();
    parts.headers.remove(header::CONTENT_LENGTH);
    silence(&state, &line).await;
    let frames = body.into_data_stream().then(move |frame| {
        let (state, line) = (Arc::clone(&state), line.clone());
        async move {
            silence(&state, &line).await;
            frame
        }
    });
    Ok(Response::from_parts(parts, Body::from_stream(frames)))
}

async fn silence(state: &Mutex<State>, line: &str) {
    let mut dead = false;
    while let Some(fate @ (Fate::Silence | Fate::Death)) = fate(state, line) {
        dead |= fate == Fate::Death;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    if dead {
        std::future::pending::<()>().await;
    }
}

fn answer(code: u16, message: &str) -> Response<Body> {
    let status: Value = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message, "reason": "",
    });
    let mut response = Response::new(Body::from(status.to_string()));
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::BAD_GATEWAY);
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}
