//! Byte streams to a target: a socket of QEMU's, a serial device, or any pair of streams.
//!
//! Invariants: a [`Link`] is opened but nothing has been sent; who drops the [`Closer`] ends
//! both directions, so that a reader thread does not outlive its client.
//!
//! Concurrency: reader and writer are separate values for separate threads.

use crate::Error;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Speed of a serial device unless the port says `@BAUD`.
pub const DEFAULT_BAUD: u32 = 115_200;

/// How often a blocked read on a serial device looks whether it should end.
const SERIAL_POLL: Duration = Duration::from_millis(50);

/// Where a target is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Port {
    /// A Unix socket (`unix:PATH`).
    Unix(PathBuf),
    /// A TCP socket (`tcp:HOST:PORT`).
    Tcp(String),
    /// A serial device (`/dev/ttyUSB0`, `/dev/ttyUSB0@1500000`).
    Serial {
        /// The device.
        device: String,
        /// Its speed.
        baud: u32,
    },
}

impl FromStr for Port {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() {
                return Err("unix: needs a path, as in unix:/tmp/tidemark.sock".into());
            }
            return Ok(Self::Unix(path.into()));
        }
        if let Some(address) = text.strip_prefix("tcp:") {
            let port = address
                .rsplit_once(':')
                .and_then(|(_, port)| port.parse::<u16>().ok());
            return match port {
                Some(_) => Ok(Self::Tcp(address.into())),
                None => Err("tcp: needs a host and a port, as in tcp:localhost:4321".into()),
            };
        }
        let (device, baud) = match text.rsplit_once('@') {
            Some((device, baud)) => match baud.parse() {
                Ok(baud) => (device, baud),
                Err(_) => return Err(format!("{baud:?} is not a speed, as in @115200")),
            },
            None => (text, DEFAULT_BAUD),
        };
        if device.is_empty() {
            return Err("a port is unix:PATH, tcp:HOST:PORT or a serial device".into());
        }
        Ok(Self::Serial {
            device: device.into(),
            baud,
        })
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
            Self::Serial { device, baud } => write!(f, "{device}@{baud}"),
        }
    }
}

/// What a line can bear.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pace {
    /// A socket: lossless, with flow control.
    Socket,
    /// A UART: a small receive FIFO and no flow control.
    Uart,
}

impl Pace {
    /// Longest payload to ask for.
    #[must_use]
    pub fn max_payload(self) -> u16 {
        match self {
            Self::Socket => 8192,
            Self::Uart => 1024,
        }
    }

    /// Requests in flight. A UART's FIFO holds little more than one, and one answer ahead
    /// already keeps its line busy.
    #[must_use]
    pub fn window(self) -> usize {
        match self {
            Self::Socket => 8,
            Self::Uart => 2,
        }
    }

    /// Silence after which a request is sent again.
    #[must_use]
    pub fn retry(self) -> Duration {
        match self {
            Self::Socket => Duration::from_millis(500),
            Self::Uart => Duration::from_millis(750),
        }
    }
}

/// An open line.
pub struct Link {
    /// From the target.
    pub reader: Box<dyn Read + Send>,
    /// To the target.
    pub writer: Box<dyn Write + Send>,
    /// Ends it.
    pub closer: Closer,
    /// What it can bear.
    pub pace: Pace,
}

/// Ends both directions of a link when dropped.
pub struct Closer(Option<Box<dyn FnOnce() + Send>>);

impl Drop for Closer {
    fn drop(&mut self) {
        if let Some(close) = self.0.take() {
            close();
        }
    }
}

impl Link {
    /// Opens `port`.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn open(port: &Port) -> crate::Result<Self> {
        let opened = match port {
            Port::Unix(path) => UnixStream::connect(path).and_then(Self::from_unix),
            Port::Tcp(address) => TcpStream::connect(address).and_then(Self::from_tcp),
            Port::Serial { device, baud } => Self::open_serial(device, *baud),
        };
        opened.map_err(|source| Error::Open {
            port: port.to_string(),
            source,
        })
    }

    /// Uses a connected Unix socket.
    ///
    /// # Errors
    /// When its handle cannot be duplicated.
    pub fn from_unix(stream: UnixStream) -> io::Result<Self> {
        let (reader, end) = (stream.try_clone()?, stream.try_clone()?);
        Ok(Self {
            reader: Box::new(reader),
            writer: Box::new(stream),
            closer: Closer(Some(Box::new(move || drop(end.shutdown(Shutdown::Both))))),
            pace: Pace::Socket,
        })
    }

    fn from_tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let (reader, end) = (stream.try_clone()?, stream.try_clone()?);
        Ok(Self {
            reader: Box::new(reader),
            writer: Box::new(stream),
            closer: Closer(Some(Box::new(move || drop(end.shutdown(Shutdown::Both))))),
            pace: Pace::Socket,
        })
    }

    /// Uses any two streams, such as a child's standard output and input. The reader ends
    /// when its stream does.
    pub fn from_pair(
        reader: impl Read + Send + 'static,
        writer: impl Write + Send + 'static,
        pace: Pace,
    ) -> Self {
        let closer = Closer(None);
        Self {
            reader: Box::new(reader),
            writer: Box::new(writer),
            closer,
            pace,
        }
    }

    fn open_serial(device: &str, baud: u32) -> io::Result<Self> {
        // 8N1 and no software flow control: frames contain 0x11 and 0x13.
        let port = serialport::new(device, baud).timeout(SERIAL_POLL).open()?;
        let writer = port.try_clone()?;
        let ended = Arc::new(AtomicBool::new(false));
        let (end, writer_ended) = (Arc::clone(&ended), Arc::clone(&ended));
        Ok(Self {
            reader: Box::new(SerialReader { port, ended }),
            writer: Box::new(SerialWriter {
                port: writer,
                ended: writer_ended,
            }),
            closer: Closer(Some(Box::new(move || end.store(true, Ordering::Relaxed)))),
            pace: Pace::Uart,
        })
    }
}

/// Blocks as a socket does, though the port's reads time out.
struct SerialReader {
    port: Box<dyn serialport::SerialPort>,
    ended: Arc<AtomicBool>,
}

impl Read for SerialReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !self.ended.load(Ordering::Relaxed) {
            match self.port.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
                done => return done,
            }
        }
        Ok(0)
    }
}

/// Goes on writing where the port's writes time out.
struct SerialWriter {
    port: Box<dyn serialport::SerialPort>,
    ended: Arc<AtomicBool>,
}

impl Write for SerialWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        while !self.ended.load(Ordering::Relaxed) {
            match self.port.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
                done => return done,
            }
        }
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        // A drain would wait for the wire; the bytes are on their way already.
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_as_they_are_written() {
        for (text, port) in [
            ("unix:/tmp/a b.sock", Port::Unix("/tmp/a b.sock".into())),
            ("tcp:localhost:4321", Port::Tcp("localhost:4321".into())),
            ("tcp:[::1]:80", Port::Tcp("[::1]:80".into())),
            (
                "/dev/ttyUSB0@1500000",
                Port::Serial {
                    device: "/dev/ttyUSB0".into(),
                    baud: 1_500_000,
                },
            ),
        ] {
            assert_eq!(text.parse::<Port>().as_ref(), Ok(&port));
            assert_eq!(port.to_string(), text);
        }
        let plain = Port::Serial {
            device: "/dev/ttyS1".into(),
            baud: DEFAULT_BAUD,
        };
        assert_eq!("/dev/ttyS1".parse(), Ok(plain));
        for wrong in [
            "",
            "unix:",
            "tcp:localhost",
            "tcp:a:b",
            "/dev/x@fast",
            "@115200",
        ] {
            assert!(wrong.parse::<Port>().is_err(), "{wrong}");
        }
    }
}
