//! The short way between two workers on one machine.
//!
//! A Unix socket moves a byte for a third of the processor time of TCP over loopback (160 against 490 ms
//! a GB, measured on 2 cores), which on a CPU worker is time for computing. So a listener also listens
//! under an abstract name made from its TCP address, and a dialler that finds itself on the same machine
//! (its own address is the peer's) dials that for everything but control. Abstract names belong to a
//! network namespace, as addresses do: workers in different containers do not see each other's and stay
//! with TCP. Only processes of the same user are talked to, since anyone may take a name.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
};

use rustix::net::sockopt;
use socket2::{Domain, SockAddr, Socket, Type};

/// Room for a few frames, so that sender and receiver need not take turns. The kernel gives less where
/// `net.core.wmem_max` is smaller.
const SEND_BUFFER_BYTES: usize = 1 << 20;
/// Connections that may wait to be taken in; the listener never sleeps long.
const BACKLOG: i32 = 128;

/// The name of a listener with TCP address `address`. A listener on every address has a port for itself,
/// so the two forms cannot be taken for one another.
fn name_of(address: SocketAddr) -> io::Result<SockAddr> {
    // The leading zero makes it abstract.
    SockAddr::unix(match address.ip() {
        ip if ip.is_unspecified() => format!("\0takuma-ring/{}", address.port()),
        ip => format!("\0takuma-ring/{ip}:{}", address.port()),
    })
}

/// Listens under the name of `address`.
pub(super) fn listen(address: SocketAddr) -> io::Result<UnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&name_of(address)?)?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(OwnedFd::from(socket).into())
}

/// A connection to the listener that `control`, a TCP connection to it, has reached. Nothing if it is on
/// another machine or cannot be reached this way.
pub(super) fn dial(control: &Socket) -> Option<Socket> {
    let own = control.local_addr().ok()?.as_socket()?;
    let peer = control.peer_addr().ok()?.as_socket()?;
    if own.ip() != peer.ip() {
        return None;
    }
    let any: IpAddr = if peer.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    [peer.ip(), any].into_iter().find_map(|ip| {
        let socket = connect(SocketAddr::new(ip, peer.port())).ok()?;
        is_same_user(&socket).then_some(socket)
    })
}

/// Connects without waiting: a listener whose queue is full is not worth a wait, there is TCP.
fn connect(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&name_of(address)?)?;
    socket.set_nonblocking(false)?;
    socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    Ok(socket)
}

/// True if the process at the other end is of this process's user.
pub(super) fn is_same_user(stream: impl AsFd) -> bool {
    sockopt::socket_peercred(stream).is_ok_and(|peer| peer.uid == rustix::process::geteuid())
}
