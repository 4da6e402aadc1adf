//! [`Front`]: a proxy between a wrapper and its service, which does to the traffic what the suite asks for.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// What a [`Front`] does with connections.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Passage {
    /// Passes every byte on, in both directions.
    Open,
    /// Does not listen: connections are refused.
    Refuse,
    /// Accepts, and closes when the first bytes have come, or after a tenth of a second without any.
    Reset,
    /// Accepts, reads, and never answers.
    Hang,
    /// Reads one HTTP/1.1 request, answers with these bytes, and closes.
    Answer(Vec<u8>),
}

/// A TCP proxy on 127.0.0.1. It is transparent to TLS, so [`Passage::Answer`] is for services without.
///
/// A change of passage closes every connection, so that none that was kept alive escapes it.
pub struct Front {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    upstream: SocketAddr,
    passage: Mutex<Passage>,
    /// Both ends of every connection, by number.
    open: Mutex<HashMap<u64, Vec<TcpStream>>>,
    next: AtomicU64,
    accepted: AtomicU64,
}

impl Front {
    /// Listens on a free port of 127.0.0.1, and passes everything on to `upstream`.
    ///
    /// # Errors
    /// The system's, if it gives no socket or thread.
    pub fn before(upstream: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream,
            passage: Mutex::new(Passage::Open),
            open: Mutex::default(),
            next: AtomicU64::new(0),
            accepted: AtomicU64::new(0),
        });
        let front = Self { address, shared };
        front.listen(listener)?;
        Ok(front)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections it has accepted.
    pub fn connections(&self) -> u64 {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// From now on, does so with every connection.
    ///
    /// # Panics
    /// If the port cannot be taken again after it was given up for [`Passage::Refuse`].
    pub fn set(&self, passage: Passage) {
        let before = std::mem::replace(&mut *self.shared.passage(), passage.clone());
        if before == passage {
            return;
        }
        for (_, ends) in self.shared.open().drain() {
            ends.iter().for_each(|end| _ = end.shutdown(Shutdown::Both));
        }
        if before == Passage::Refuse && passage != Passage::Refuse {
            self.listen(self.listen_again()).expect("the system has a thread left");
        } else if before != Passage::Refuse && passage == Passage::Refuse {
            // The thread that accepts sees the change with the next connection, and gives the port up.
            let gone = Instant::now() + Duration::from_secs(5);
            while TcpStream::connect(self.address).is_ok() && Instant::now() < gone {
                thread::sleep(Duration::from_millis(2));
            }
        }
    }

    fn listen_again(&self) -> TcpListener {
        let give_up = Instant::now() + Duration::from_secs(10);
        loop {
            match TcpListener::bind(self.address) {
                Ok(listener) => return listener,
                Err(error) if Instant::now() > give_up => panic!("the port {} is taken: {error}", self.address),
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn listen(&self, listener: TcpListener) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let accept = move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let passage = shared.passage().clone();
                if passage == Passage::Refuse {
                    return;
                }
                shared.accepted.fetch_add(1, Ordering::SeqCst);
                let shared = Arc::clone(&shared);
                // Without a thread the connection is dropped, which is what it would be at an exhausted server too.
                let _ = thread::Builder::new().name("front".into()).spawn(move || shared.serve(stream, &passage));
            }
        };
        thread::Builder::new().name("front".into()).spawn(accept).map(drop)
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.set(Passage::Refuse);
    }
}

impl Shared {
    fn serve(&self, client: TcpStream, passage: &Passage) {
        let number = self.next.fetch_add(1, Ordering::SeqCst);
        let outcome = match passage {
            Passage::Open => self.pass_on(number, &client, passage),
            Passage::Hang => self.keep(number, passage, [&client]).and_then(|()| drain(&client)),
            Passage::Answer(answer) => {
                read_request(&client).and_then(|()| (&client).write_all(answer)).and_then(|()| linger(&client))
            }
            // Not at once: where a request and the end of its connection cross, hyper may lose the request, and the caller
            // waits until the deadline.
            Passage::Reset => client
                .set_read_timeout(Some(Duration::from_millis(100)))
                .and_then(|()| (&client).read(&mut [0; 1024]))
                .map(drop),
            Passage::Refuse => Ok(()),
        };
        // Broken connections are this proxy's trade.
        let _ = outcome;
        let _ = client.shutdown(Shutdown::Both);
        self.open().remove(&number);
    }

    fn pass_on(&self, number: u64, client: &TcpStream, passage: &Passage) -> io::Result<()> {
        let upstream = TcpStream::connect(self.upstream)?;
        upstream.set_nodelay(true)?;
        client.set_nodelay(true)?;
        self.keep(number, passage, [client, &upstream])?;
        thread::scope(|scope| {
            scope.spawn(|| copy(client, &upstream));
            copy(&upstream, client);
        });
        Ok(())
    }

    /// Keeps handles by which a change of passage closes the connection; fails if it has changed already.
    fn keep<const N: usize>(&self, number: u64, passage: &Passage, ends: [&TcpStream; N]) -> io::Result<()> {
        let ends = ends.into_iter().map(TcpStream::try_clone).collect::<io::Result<Vec<_>>>()?;
        let mut open = self.open();
        if *self.passage() != *passage {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        open.insert(number, ends);
        Ok(())
    }

    fn passage(&self) -> MutexGuard<'_, Passage> {
        self.passage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> MutexGuard<'_, HashMap<u64, Vec<TcpStream>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Copies until either side ends, and then ends both: no service here speaks after its client has hung up.
fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

fn drain(mut stream: &TcpStream) -> io::Result<()> {
    let mut buffer = [0; 1024];
    while stream.read(&mut buffer)? > 0 {}
    Ok(())
}

/// Until the client hangs up, so that it does not see a reset before the answer; a client that keeps the connection waits
/// in vain for a second request to be answered, hence not for long.
fn linger(stream: &TcpStream) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    drain(stream)
}

/// Reads the head of a request, and as many bytes of body as it announces.
fn read_request(mut stream: &TcpStream) -> io::Result<()> {
    let (mut request, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        if let Some(end) = request.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&request[..end]).to_ascii_lowercase();
            let announced = head.lines().find_map(|line| line.strip_prefix("content-length:"));
            let body = announced.and_then(|length| length.trim().parse::<usize>().ok()).unwrap_or(0);
            if request.len() >= end + 4 + body {
                return Ok(());
            }
        }
        match stream.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => request.extend_from_slice(&buffer[..read]),
        }
    }
}

/// An HTTP/1.1 answer for [`Passage::Answer`]: `status` such as `429 Too Many Requests`, further headers, and the body.
pub fn http_answer(status: &str, headers: &[(&str, &str)], body: &str) -> Vec<u8> {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let length = body.len();
    format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}").into_bytes()
}
