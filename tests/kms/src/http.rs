//! A small HTTP/1.1 server, with or without TLS, for the fakes: each request goes to a closure.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use pageseal::testing::conformance::http_answer;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// What a client asked for.
#[derive(Debug)]
pub struct Request {
    /// `GET`, `POST`, ...
    pub method: String,
    /// The path with its query.
    pub target: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// As announced by Content-Length.
    pub body: Vec<u8>,
}

impl Request {
    /// The value of a header, by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|header| header.0 == name).map(|header| header.1.as_str())
    }

    /// The path without its query.
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// The body as JSON; null if it is none.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

/// What the server says.
#[derive(Clone, Debug)]
pub struct Answer {
    /// With its reason: `200 OK`.
    pub status: String,
    /// Beside Content-Length and Content-Type.
    pub headers: Vec<(String, String)>,
    /// JSON, unless the headers say otherwise.
    pub body: String,
}

impl Answer {
    /// An answer of JSON.
    pub fn json(status: &str, body: impl ToString) -> Self {
        Self { status: status.into(), headers: Vec::new(), body: body.to_string() }
    }

    /// The same with one header more.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }
}

/// A running server; its threads end with the process.
pub struct HttpServer {
    address: SocketAddr,
    certificate: Option<PathBuf>,
}

/// The page of HTML that proxies and load balancers send for a service that is down, as bytes.
pub fn proxy_error() -> Vec<u8> {
    let body = "<html><body><h1>503 Service Unavailable</h1></body></html>";
    http_answer("503 Service Unavailable", &[("Content-Type", "text/html")], body)
}

type Handler = dyn Fn(&Request) -> Answer + Send + Sync;

impl HttpServer {
    /// Without TLS, on a free port of 127.0.0.1.
    pub fn plain(handler: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        Self::start(Arc::new(handler), None)
    }

    /// With TLS, for `localhost` and 127.0.0.1, under a new certificate that is also written to a file for clients to trust.
    pub fn tls(name: &str, handler: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let path = crate::server::scratch().join(format!("{name}-{}.pem", crate::server::free_port()));
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let made = rcgen::generate_simple_self_signed(names).expect("a certificate can be made");
        std::fs::write(&path, made.cert.pem()).expect("the temporary directory can be written");
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).expect("rcgen made this key");
        let chain: Vec<CertificateDer<'static>> = vec![made.cert.der().clone()];
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("ring has the safe versions")
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .expect("the key is the certificate's");
        Self { certificate: Some(path), ..Self::start(Arc::new(handler), Some(Arc::new(config))) }
    }

    fn start(handler: Arc<Handler>, tls: Option<Arc<ServerConfig>>) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("there are free ports");
        let address = listener.local_addr().expect("a bound socket has an address");
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (handler, tls) = (Arc::clone(&handler), tls.clone());
                // A connection that breaks is the client's affair.
                thread::spawn(move || _ = serve(stream, tls, &*handler));
            }
        });
        Self { address, certificate: None }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The file with its certificate, in PEM.
    pub fn certificate(&self) -> Option<&Path> {
        self.certificate.as_deref()
    }
}

fn serve(stream: TcpStream, tls: Option<Arc<ServerConfig>>, handler: &Handler) -> io::Result<()> {
    stream.set_nodelay(true)?;
    match tls {
        None => converse(stream, handler),
        Some(config) => {
            let connection = ServerConnection::new(config).map_err(io::Error::other)?;
            converse(StreamOwned::new(connection, stream), handler)
        }
    }
}

/// Answers one request after the other, as clients that keep connections expect.
fn converse(mut stream: impl Read + Write, handler: &Handler) -> io::Result<()> {
    let mut received = Vec::new();
    while let Some(request) = read_request(&mut stream, &mut received)? {
        let answer = handler(&request);
        let mut head = format!("HTTP/1.1 {}\r\nContent-Length: {}\r\n", answer.status, answer.body.len());
        if !answer.headers.iter().any(|header| header.0.eq_ignore_ascii_case("content-type")) {
            head.push_str("Content-Type: application/json\r\n");
        }
        for (name, value) in &answer.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        stream.write_all(format!("{head}\r\n{}", answer.body).as_bytes())?;
        stream.flush()?;
    }
    Ok(())
}

/// The next request; none if the client has hung up. What was received beyond it stays in `received`.
fn read_request(stream: &mut impl Read, received: &mut Vec<u8>) -> io::Result<Option<Request>> {
    let mut buffer = [0; 8192];
    loop {
        if let Some(end) = received.windows(4).position(|window| window == b"\r\n\r\n") {
            let (mut request, length) = head(&String::from_utf8_lossy(&received[..end]));
            if let Some(body) = received.get(end + 4..end + 4 + length) {
                request.body = body.to_vec();
                received.drain(..end + 4 + length);
                return Ok(Some(request));
            }
        }
        match stream.read(&mut buffer)? {
            0 => return Ok(None),
            read => received.extend_from_slice(&buffer[..read]),
        }
    }
}

fn head(text: &str) -> (Request, usize) {
    let mut lines = text.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let headers: Vec<_> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let request = Request { method, target, headers, body: Vec::new() };
    let length = request.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    (request, length)
}
