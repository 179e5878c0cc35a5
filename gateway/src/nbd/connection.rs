//! What carries the protocol, and how it is seen that the other side has left though not all that it sent has been read.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::future::Future;
use std::os::fd::AsFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest};
use tokio::net::{TcpStream, UnixStream, tcp, unix};

/// A connection with a client.
pub trait Connection: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    type Read: Incoming;
    type Write: AsyncWrite + Unpin + Send + 'static;

    fn halves(self) -> (Self::Read, Self::Write);
}

/// The half that is read.
pub trait Incoming: AsyncRead + Unpin + Send + Sync + 'static {
    /// Ends when the client sends nothing more, whether or not everything was read. Cancel safe.
    fn left(&self) -> impl Future<Output = ()> + Send;
    /// The same, as the kernel knows it at this moment.
    fn has_left(&self) -> bool;
}

fn hung_up(socket: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&socket, PollFlags::RDHUP)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    // An end is reported whatever is asked for. Who cannot be asked is better not believed.
    poll(&mut fds, Some(&at_once)).is_err() || !fds[0].revents().is_empty()
}

macro_rules! sockets {
    ($($stream:ty, $module:ident;)*) => {$(
        impl Connection for $stream {
            type Read = $module::OwnedReadHalf;
            type Write = $module::OwnedWriteHalf;

            fn halves(self) -> (Self::Read, Self::Write) {
                self.into_split()
            }
        }

        impl Incoming for $module::OwnedReadHalf {
            async fn left(&self) {
                // Of all that is asked for here a socket only ever reports its end: READABLE would be true at once while
                // something is unread. An error is an end, too.
                let _ = self.ready(Interest::PRIORITY).await;
            }

            fn has_left(&self) -> bool {
                hung_up(AsRef::<$stream>::as_ref(self))
            }
        }
    )*};
}

sockets! {
    TcpStream, tcp;
    UnixStream, unix;
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    async fn is_seen_to_leave(mut client: impl AsyncWrite + Unpin, server: impl Connection) {
        let (read, _write) = server.halves();
        client.write_all(&[7; 100]).await.unwrap();
        assert!(read.left().now_or_never().is_none() && !read.has_left());
        drop(client);
        tokio::time::timeout(std::time::Duration::from_secs(10), read.left()).await.expect("it has left");
        assert!(read.has_left());
    }

    #[tokio::test]
    async fn who_leaves_is_seen_to_though_something_is_unread() {
        let (client, server) = UnixStream::pair().unwrap();
        is_seen_to_leave(client, server).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        is_seen_to_leave(client, listener.accept().await.unwrap().0).await;
    }
}
