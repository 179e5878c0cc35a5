//! The Prometheus endpoint of a daemon: `GET /metrics` in the OpenMetrics text format over plain HTTP.
//!
//! A daemon describes its figures as a [`Source`], asked at every scrape; nothing is kept twice. Off unless an
//! address is given. It serves counters and no data, but anybody who connects: requests, connections and the
//! time that each may take are bounded.

use crate::addr_file;
use anyhow::Context as _;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Scrapes at a time.
const CONNECTIONS_MAX: usize = 16;
/// One request and its answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
const REQUEST_BYTES_MAX: usize = 16 << 10;
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The option of a daemon.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct MetricsArgs {
    /// Serve Prometheus metrics here, as plain HTTP under /metrics; port 0 picks one.
    #[arg(long, value_name = "ADDR")]
    pub metrics_listen: Option<SocketAddr>,
}

/// Label names and values.
pub type Labels<'a> = Vec<(&'static str, &'a str)>;

/// What a daemon has to show.
pub trait Source: fmt::Debug + Send + Sync + 'static {
    fn collect(&self, page: &mut Page<'_>) -> fmt::Result;
}

/// Takes the figures of one scrape. Names get the prefix `gabion_` and the unit as their end.
pub struct Page<'a> {
    encoder: DescriptorEncoder<'a>,
}

impl Page<'_> {
    /// A count since the start of the process: `gabion_NAME_total`.
    pub fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.counters(name, help, [(Vec::new(), value)])
    }

    /// The same for each of several things.
    pub fn counters<'a>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels<'a>, u64)>,
    ) -> fmt::Result {
        self.family(name, help, values.into_iter().map(|(labels, v)| (labels, ConstCounter::new(v))))
    }

    /// What is so now.
    pub fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.gauges(name, help, [(Vec::new(), value)])
    }

    pub fn gauges<'a>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels<'a>, u64)>,
    ) -> fmt::Result {
        // What is shown counts things or bytes: far from where a float loses the last digit.
        self.family(name, help, values.into_iter().map(|(labels, v)| (labels, ConstGauge::new(v as f64))))
    }

    fn family<'a, M: EncodeMetric>(
        &mut self,
        name: &str,
        help: &str,
        values: impl Iterator<Item = (Labels<'a>, M)>,
    ) -> fmt::Result {
        let mut values = values.peekable();
        let Some((_, first)) = values.peek() else { return Ok(()) };
        let kind = first.metric_type();
        let unit = name.ends_with("_bytes").then_some(Unit::Bytes);
        let name = format!("gabion_{}", if unit.is_some() { name.trim_end_matches("_bytes") } else { name });
        let mut metric = self.encoder.encode_descriptor(&name, help, unit.as_ref(), kind)?;
        if let Some((_, alone)) = values.next_if(|(labels, _)| labels.is_empty()) {
            return alone.encode(metric);
        }
        for (labels, value) in values {
            value.encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Shown<S> {
    source: S,
    daemon: &'static str,
    started_unix_s: u64,
}

impl<S: Source> Collector for Shown<S> {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let mut page = Page { encoder };
        let labels = vec![("daemon", self.daemon), ("version", env!("CARGO_PKG_VERSION"))];
        page.gauges("build_info", "What runs here", [(labels, 1)])?;
        page.gauge("start_time_seconds", "When the process started, since 1970", self.started_unix_s)?;
        self.source.collect(&mut page)
    }
}

/// A listening endpoint that does not serve yet.
pub struct Endpoint {
    listener: TcpListener,
    daemon: &'static str,
}

impl Endpoint {
    /// Listens where `args` say, if they do, and writes `dir/DAEMON-metrics.addr`.
    pub async fn bind(
        args: MetricsArgs,
        dir: &Path,
        daemon: &'static str,
    ) -> anyhow::Result<Option<Endpoint>> {
        let Some(addr) = args.metrics_listen else { return Ok(None) };
        let listener = TcpListener::bind(addr).await;
        let listener = listener.with_context(|| format!("cannot listen on {addr} for metrics"))?;
        let addr = listener.local_addr()?;
        addr_file::write(dir, &format!("{daemon}-metrics"), addr).context("cannot write its address")?;
        tracing::info!(%addr, "serving metrics");
        Ok(Some(Endpoint { listener, daemon }))
    }

    /// Serves `source` until the process ends.
    pub fn serve(self, source: impl Source) {
        let started_unix_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Shown { source, daemon: self.daemon, started_unix_s }));
        tokio::spawn(accept(self.listener, Arc::new(registry)));
    }
}

async fn accept(listener: TcpListener, registry: Arc<Registry>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let slot = slots.clone().acquire_owned().await.expect("never closed");
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection for metrics");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let registry = registry.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let answer = answer(&request, &registry);
                async { Ok::<_, std::convert::Infallible>(answer) }
            });
            let mut http = http1::Builder::new();
            http.keep_alive(false).max_buf_size(REQUEST_BYTES_MAX).timer(TokioTimer::new());
            let served = http.serve_connection(TokioIo::new(stream), service);
            match tokio::time::timeout(REQUEST_TIMEOUT, served).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "a scrape ended early"),
                Err(_) => tracing::debug!("a scrape took too long"),
            }
            drop(slot);
        });
    }
}

fn answer(request: &Request<Incoming>, registry: &Registry) -> Response<Full<Bytes>> {
    let plain = |status, text: &'static str| (status, "text/plain; charset=utf-8", text.to_owned());
    let (status, kind, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => {
            let mut page = String::new();
            match text::encode(&mut page, registry) {
                Ok(()) => (StatusCode::OK, CONTENT_TYPE, page),
                Err(_) => plain(StatusCode::INTERNAL_SERVER_ERROR, "the page cannot be made\n"),
            }
        }
        (&Method::GET, _) => plain(StatusCode::NOT_FOUND, "see /metrics\n"),
        _ => plain(StatusCode::METHOD_NOT_ALLOWED, "GET only\n"),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    #[derive(Debug)]
    struct Figures;
    impl Source for Figures {
        fn collect(&self, page: &mut Page<'_>) -> fmt::Result {
            page.counter("reads", "Reads", 7)?;
            page.counters("written_bytes", "Written", [(vec![("volume", "a\"b\\c\n")], u64::MAX)])?;
            page.gauges(
                "pgs",
                "Groups",
                [(vec![("state", "active+clean")], 64), (vec![("state", "down")], 0)],
            )?;
            page.gauges("nothing", "None", std::iter::empty())
        }
    }

    async fn ask(addr: SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        // One that hangs up in the middle does the right thing.
        let _ = stream.write_all(request).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    }

    #[tokio::test]
    async fn a_scrape_gets_every_figure_and_garbage_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let off = Endpoint::bind(MetricsArgs::default(), dir.path(), "osd").await.unwrap();
        assert!(off.is_none());
        let args = MetricsArgs { metrics_listen: Some("127.0.0.1:0".parse().unwrap()) };
        Endpoint::bind(args, dir.path(), "osd").await.unwrap().unwrap().serve(Figures);
        let addr = std::fs::read_to_string(addr_file::path(dir.path(), "osd-metrics")).unwrap();
        let addr = addr.trim().parse().unwrap();

        let page = ask(addr, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(page.starts_with("HTTP/1.1 200") && page.contains(CONTENT_TYPE), "{page}");
        for line in [
            "# TYPE gabion_reads counter",
            "gabion_reads_total 7",
            "gabion_written_bytes_total{volume=\"a\\\"b\\\\c\\n\"} 18446744073709551615",
            "gabion_pgs{state=\"active+clean\"} 64.0",
            "gabion_pgs{state=\"down\"} 0.0",
            "# EOF",
        ] {
            assert!(page.lines().any(|l| l == line), "no line {line:?} in\n{page}");
        }
        assert!(page.contains("gabion_build_info{daemon=\"osd\",version="), "{page}");
        assert!(!page.contains("nothing"), "{page}");

        assert!(ask(addr, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.starts_with("HTTP/1.1 404"));
        assert!(
            ask(addr, b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
                .await
                .contains(" 405 ")
        );
        ask(addr, &[0xa5; 100_000]).await;
        // More silent ones than there are slots: the next waits for the first to be hung up on.
        let silent: Vec<_> =
            futures::future::join_all((0..CONNECTIONS_MAX).map(|_| TcpStream::connect(addr))).await;
        let page = ask(addr, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(page.contains("gabion_reads_total 7"), "{page}");
        drop(silent);
    }
}
