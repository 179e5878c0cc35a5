//! The serial console of a guest, from its host's agent.

use anyhow::{Context, Result, bail};
use gabion_common::grpc::Connector;
use gabion_common::tls::{Role, Security};
use gabion_proto::pb::console_service_client::ConsoleServiceClient;
use gabion_proto::pb::{ConsoleInput, ConsoleOutput, VmInfo};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use std::io::{IsTerminal, Read, Write};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Endpoint;

/// Ctrl-].
const ESCAPE: u8 = 0x1d;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const INPUTS_MAX: usize = 16;
/// What was printed before comes at once; then it is quiet.
const QUIET: Duration = Duration::from_millis(500);

/// Both directions, until the guest ends, Ctrl-], or the end of a piped input and of the output
/// that it causes.
pub async fn attach(vm: &VmInfo, security: Security) -> Result<()> {
    let (input, mut output) = open(vm, security).await?;
    let tty = std::io::stdin().is_terminal();
    let _raw = if tty { Some(RawTerminal::new()?) } else { None };
    if tty {
        crate::output::note("connected; Ctrl-] leaves\r");
    }
    let (typed, mut keys) = mpsc::channel::<Vec<u8>>(INPUTS_MAX);
    // A read of the terminal cannot be cancelled: the thread ends with the process.
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok(n @ 1..) = std::io::stdin().read(&mut buffer) {
            if typed.blocking_send(buffer[..n].to_vec()).is_err() {
                return;
            }
        }
    });
    let mut input_open = true;
    loop {
        let quiet =
            async { if input_open { std::future::pending().await } else { tokio::time::sleep(QUIET).await } };
        tokio::select! {
            message = output.message() => match message.map_err(|s| failed(vm, &s))? {
                Some(message) => print(&message)?,
                None => return Ok(()),
            },
            bytes = keys.recv(), if input_open => match bytes {
                Some(bytes) => {
                    let escape = tty.then(|| bytes.iter().position(|b| *b == ESCAPE)).flatten();
                    let data = bytes[..escape.unwrap_or(bytes.len())].to_vec();
                    if !data.is_empty() && input.send(ConsoleInput { vm: String::new(), data }).await.is_err() {
                        return Ok(());
                    }
                    if escape.is_some() {
                        return Ok(());
                    }
                }
                None => input_open = false,
            },
            () = quiet => return Ok(()),
        }
    }
}

/// What the guest printed.
pub async fn logs(vm: &VmInfo, security: Security, follow: bool) -> Result<()> {
    let (_input, mut output) = open(vm, security).await?;
    loop {
        let message = if follow {
            output.message().await
        } else {
            match tokio::time::timeout(QUIET, output.message()).await {
                Ok(message) => message,
                Err(_) => return Ok(()),
            }
        };
        match message.map_err(|s| failed(vm, &s))? {
            Some(message) => print(&message)?,
            None => return Ok(()),
        }
    }
}

async fn open(
    vm: &VmInfo,
    security: Security,
) -> Result<(mpsc::Sender<ConsoleInput>, Streaming<ConsoleOutput>)> {
    let Ok(addr) = vm.agent_addr.parse::<SocketAddr>() else {
        bail!("vm {}: the agent of host {} does not report; see gabion host ls", vm.name, vm.host);
    };
    let endpoint = Endpoint::from_shared(format!("http://{addr}"))?;
    let channel = endpoint
        .connect_with_connector(Connector::new(addr, security, Role::Host, CONNECT_TIMEOUT))
        .await
        .with_context(|| {
            format!("vm {}: the agent of host {} at {addr} does not answer", vm.name, vm.host)
        })?;
    let (input, inputs) = mpsc::channel(INPUTS_MAX);
    input.send(ConsoleInput { vm: vm.name.clone(), data: Vec::new() }).await?;
    let mut client = ConsoleServiceClient::new(channel);
    let reply = client.console(ReceiverStream::new(inputs)).await.map_err(|s| failed(vm, &s))?;
    Ok((input, reply.into_inner()))
}

fn failed(vm: &VmInfo, status: &tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("vm {}: console: {}; see gabion vm show {}", vm.name, status.message(), vm.name)
}

fn print(output: &ConsoleOutput) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(&output.data)?;
    Ok(stdout.flush()?)
}

/// The terminal as it was comes back when this is dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn new() -> Result<RawTerminal> {
        let before = tcgetattr(std::io::stdin()).context("cannot read the terminal's mode")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw).context("cannot set the terminal's mode")?;
        Ok(RawTerminal { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing else can be done about a terminal that refuses.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.before);
    }
}
