//! A TCP proxy that a test can cut: between a worker's neighbours and its ring listener.
//!
//! [`Proxy::cut`] closes every connection and refuses new ones, as a pulled cable between two switches does;
//! [`Proxy::swallow`] keeps them open and passes nothing on, as a firewall that drops packets.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const OPEN: u8 = 0;
const CUT: u8 = 1;
const SWALLOWING: u8 = 2;
/// How soon a pump notices that its link was cut.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// See the module. Its threads end with the process.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: AtomicU8,
    bytes_per_s: AtomicU64,
    /// Cuts so far: a connection that has seen one is dead, however soon the link was healed.
    cuts: AtomicU64,
    target: Mutex<Option<SocketAddr>>,
}

impl Proxy {
    /// Listens on a free port; connections wait until [`Proxy::forward_to`].
    #[must_use]
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let serving = Arc::clone(&serving);
                std::thread::spawn(move || serving.serve(&connection));
            }
        });
        Self { address, shared }
    }

    /// Where the neighbours connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where connections go.
    pub fn forward_to(&self, target: SocketAddr) {
        *self.shared.target.lock().unwrap() = Some(target);
    }

    /// Breaks every connection, and refuses new ones until [`Proxy::heal`].
    pub fn cut(&self) {
        self.shared.state.store(CUT, Ordering::SeqCst);
        self.shared.cuts.fetch_add(1, Ordering::SeqCst);
    }

    /// Passes nothing on any more, without a word, until [`Proxy::heal`].
    pub fn swallow(&self) {
        self.shared.state.store(SWALLOWING, Ordering::SeqCst);
    }

    /// Lets so many bytes a second pass in each direction of each connection; 0 = as many as come.
    pub fn limit(&self, bytes_per_s: u64) {
        self.shared.bytes_per_s.store(bytes_per_s, Ordering::SeqCst);
    }

    /// New connections pass again.
    pub fn heal(&self) {
        self.shared.state.store(OPEN, Ordering::SeqCst);
    }
}

impl Shared {
    fn serve(self: &Arc<Self>, client: &TcpStream) {
        let Some(target) = *self.target.lock().unwrap() else { return };
        let cuts = self.cuts.load(Ordering::SeqCst);
        if self.state.load(Ordering::SeqCst) != OPEN {
            return;
        }
        let Ok(server) = TcpStream::connect(target) else { return };
        for stream in [client, &server] {
            stream.set_nodelay(true).unwrap();
            stream.set_read_timeout(Some(LOOK_EVERY)).unwrap();
        }
        let (there, back) = (Arc::clone(self), Arc::clone(self));
        let (client_copy, server_copy) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        let pump = std::thread::spawn(move || there.pump(&client_copy, &server_copy, cuts));
        back.pump(&server, client, cuts);
        pump.join().unwrap();
    }

    /// Passes bytes on until an end closes or the link is cut. A link that swallowed something stays dead.
    fn pump(&self, from: &TcpStream, to: &TcpStream, cuts: u64) {
        let mut buffer = vec![0; 64 << 10];
        let mut swallowed = false;
        let (mut from_end, mut to_end) = (from, to);
        while self.cuts.load(Ordering::SeqCst) == cuts {
            match from_end.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    swallowed |= self.state.load(Ordering::SeqCst) == SWALLOWING;
                    let bytes_per_s = self.bytes_per_s.load(Ordering::SeqCst);
                    if bytes_per_s > 0 {
                        std::thread::sleep(Duration::from_secs_f64(count as f64 / bytes_per_s as f64));
                    }
                    if !swallowed && to_end.write_all(&buffer[..count]).is_err() {
                        break;
                    }
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                    ) => {}
                Err(_) => break,
            }
        }
        for stream in [from, to] {
            // The other pump may have closed it.
            drop(stream.shutdown(Shutdown::Both));
        }
    }
}
