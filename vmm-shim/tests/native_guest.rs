//! A stock Linux in `gabion-vmm` on a disk that a gateway serves: what the guest sees on its console
//! while disks come and go, the gateway dies under load, the agent is replaced, and at the power button.
//!
//! Needs hardware virtualization and the images that `tests/vm/nested.sh` makes (it runs this inside a
//! machine that has both); says that it skips otherwise.

use gabion_vmm_shim::console::{Hub, View};
use gabion_vmm_shim::engine::choice::HostOffer;
use gabion_vmm_shim::engine::native::NativeEngine;
use gabion_vmm_shim::engine::{Disk, Engine, Exit, Guest, Machine, Nic};
use gabion_vmm_shim::vmm::cpuid::CpuModel;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::broadcast;

/// Emulated processors on a busy machine are slow.
const LIMIT: Duration = Duration::from_secs(400);
const MIB: u64 = 1 << 20;
/// What each of two writers writes while the gateway dies, and how much at a time.
const LOAD_BYTES: u64 = 2 * MIB;
const LOAD_WRITE_BYTES: u64 = 16 << 10;

struct Images {
    dir: PathBuf,
    vmm: PathBuf,
    vhost_file: PathBuf,
    tap: String,
    /// The first three numbers of its network; .1 is this machine.
    network: String,
}

/// None, loudly, where guests cannot run.
fn images() -> Option<Images> {
    let all = || {
        let text = |name: &str| std::env::var(name).ok();
        Some(Images {
            dir: text("GABION_VM_IMAGES")?.into(),
            vmm: text("GABION_VMM")?.into(),
            vhost_file: text("GABION_VHOST_FILE")?.into(),
            tap: text("GABION_VM_TAP")?,
            network: text("GABION_VM_NETWORK")?,
        })
    };
    if HostOffer::of_this_host().hardware_virtualization()
        && let Some(images) = all()
    {
        return Some(images);
    }
    println!("SKIPPED: no hardware virtualization or no guest images here; `make test-vm` has both");
    None
}

/// A gateway process with a file behind it.
struct Gateway {
    child: Child,
}

impl Gateway {
    fn start(images: &Images, socket: &Path, file: &Path) -> Gateway {
        let mut child = Command::new(&images.vhost_file)
            .args([socket, file])
            .stdout(Stdio::piped())
            .spawn()
            .expect("the gateway starts");
        // It prints its socket when it listens.
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the gateway listens");
        Gateway { child }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// The guest's shell on its console.
struct Console {
    _hub: Hub,
    view: View,
    seen: String,
    /// Up to here `seen` has been looked at.
    read: usize,
}

/// Numbers commands over all consoles: a new one sees the marks of earlier ones.
static COMMANDS: AtomicU32 = AtomicU32::new(1);

impl Console {
    fn open(guest: &dyn Guest) -> Console {
        let hub = Hub::open(guest.serial_socket(), guest.serial_log());
        let view = hub.view();
        let seen = String::from_utf8_lossy(&view.replay).into_owned();
        Console { _hub: hub, view, seen, read: 0 }
    }

    /// What came up to `text`, which is taken.
    async fn until(&mut self, text: &str) -> String {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(at) = self.seen[self.read..].find(text) {
                let before = self.seen[self.read..self.read + at].to_owned();
                self.read += at + text.len();
                return before;
            }
            match tokio::time::timeout_at(end.into(), self.view.live.recv()).await {
                Ok(Ok(bytes)) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Ok(Err(broadcast::error::RecvError::Lagged(_))) => {}
                _ => panic!("the guest did not print {text:?}; it printed:\n{}", self.tail()),
            }
        }
    }

    fn tail(&self) -> &str {
        let from = self.seen.len().saturating_sub(4000);
        &self.seen[self.seen.ceil_char_boundary(from)..]
    }

    async fn type_in(&self, text: &str) {
        self.view.input.send(text.to_owned().into()).await.unwrap();
    }

    /// Runs a command in the guest; what it prints. It must succeed.
    async fn run(&mut self, command: &str) -> String {
        let n = COMMANDS.fetch_add(1, Ordering::Relaxed);
        let mark = format!("<{n}>");
        // The marks are put together by the shell, so that an echo of this line is none.
        self.type_in(&format!("echo '<'{n}'>'; ({command}) 2>&1; echo \"<\"{n}\">$?\"\n")).await;
        self.until(&mark).await;
        let output = self.until(&mark).await;
        let status = self.until("\n").await;
        assert_eq!(status.trim(), "0", "{command}: {output}");
        output.trim().replace('\r', "")
    }
}

fn machine(images: &Images, dir: &Path, disks: Vec<Disk>) -> Machine {
    Machine {
        name: "guest".into(),
        vcpus: 2,
        memory_bytes: 256 * MIB,
        cpu_model: CpuModel::Host,
        engine: None,
        kernel: images.dir.join("vmlinuz"),
        initrd: Some(images.dir.join("initrd")),
        kernel_args: "console=ttyS0 panic=-1 cryptomgr.notests quiet".into(),
        disks,
        nics: vec![Nic { tap: images.tap.clone(), mac: "02:00:5e:10:00:01".into() }],
        dir: dir.to_owned(),
    }
}

fn blank(path: &Path, bytes: u64) {
    File::create(path).unwrap().set_len(bytes).unwrap();
}

/// Bytes as the guest's `yes TEXT` writes them.
fn yes(text: &str, bytes: usize) -> Vec<u8> {
    format!("{text}\n").into_bytes().into_iter().cycle().take(bytes).collect()
}

/// The guest's network card: a ping, then a few MB each way over TCP, in segments that the host and the guest
/// leave uncut for each other.
async fn talk(console: &mut Console, network: &str) {
    const LINES: u32 = 300_000;
    let host = format!("{network}.1");
    let lines: Vec<u8> = (1..=LINES).flat_map(|n| format!("{n}\n").into_bytes()).collect();
    assert_eq!(console.run("cat /sys/class/net/eth0/address").await, "02:00:5e:10:00:01");
    console
        .run(&format!("ifconfig eth0 {network}.2 netmask 255.255.255.0 up; ping -c 2 -W 100 {host}"))
        .await;

    let listener = TcpListener::bind((host.as_str(), 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let from_guest = tokio::spawn(async move {
        let (mut first, _) = listener.accept().await.unwrap();
        let mut received = Vec::new();
        first.read_to_end(&mut received).await.unwrap();
        (listener, received)
    });
    console.run(&format!("seq 1 {LINES} > /tmp/lines; nc {host} {port} < /tmp/lines")).await;
    let (listener, received) = tokio::time::timeout(LIMIT, from_guest).await.expect("it sends").unwrap();
    assert!(received == lines, "what the guest sent arrives: {} bytes of {}", received.len(), lines.len());

    let to_guest = tokio::spawn(async move {
        let (mut second, _) = listener.accept().await.unwrap();
        second.write_all(&lines).await.unwrap();
        second.shutdown().await.unwrap();
    });
    console.run(&format!("nc {host} {port} < /dev/null | cmp - /tmp/lines")).await;
    tokio::time::timeout(LIMIT, to_guest).await.expect("it is sent").unwrap();
}

async fn ended(guest: &dyn Guest) -> Exit {
    let mut exit = guest.exit();
    let how = tokio::time::timeout(LIMIT, exit.wait_for(Option::is_some)).await.expect("it ends").unwrap();
    how.clone().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_lives_on_its_disks_and_through_their_gateways() {
    let Some(images) = images() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let disk = |name: &str| Disk { volume: name.into(), socket: path(&format!("{name}.sock")) };
    std::fs::copy(images.dir.join("root.ext4"), path("root")).unwrap();
    blank(&path("data"), 32 * MIB);
    let _root = Gateway::start(&images, &disk("root").socket, &path("root"));
    let data = Gateway::start(&images, &disk("data").socket, &path("data"));

    let engine = NativeEngine::with_program(images.vmm.clone());
    let started = Instant::now();
    let mut guest = engine.start(machine(&images, dir.path(), vec![disk("root")])).await.unwrap();
    let mut console = Console::open(&*guest);
    console.until("GUEST: ready").await;
    println!("booted in {:.1} s", started.elapsed().as_secs_f64());

    assert_eq!(console.run("grep -c ^processor /proc/cpuinfo").await, "2");
    assert_eq!(console.run("cut -d' ' -f1 /proc/mounts | grep vda").await, "/dev/vda");
    // Each queue of the disk interrupts by a message of its own.
    let lines = console.run("grep -c 'PCI-MSI.*virtio0-req' /proc/interrupts").await;
    assert_eq!(lines, "2");

    println!("== network");
    talk(&mut console, &images.network).await;

    println!("== attach while it runs");
    assert_eq!(console.run("ls /sys/block").await, "vda");
    guest.attach(disk("data")).await.unwrap();
    assert_eq!(guest.volumes(), ["root", "data"]);
    console.run("while ! [ -b /dev/vdb ]; do sleep 1; done").await;
    assert_eq!(console.run("cat /sys/block/vdb/size").await, (32 * MIB / 512).to_string());
    console.run("yes before | dd of=/dev/vdb bs=1M count=4 iflag=fullblock conv=fsync").await;
    let mut bytes = vec![0; 4 * MIB as usize];
    File::open(path("data")).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == yes("before", bytes.len()), "what the guest wrote is on the disk");

    println!("== a gateway dies under load and comes back");
    // Two writers, so that both queues are busy, over and over until they are told that it is enough;
    // the host sees on the disk that they are under way.
    let writer = |n: u64| {
        let seek = n * LOAD_BYTES / LOAD_WRITE_BYTES;
        let count = LOAD_BYTES / LOAD_WRITE_BYTES;
        format!(
            "{{ (while ! [ -e /tmp/enough ]; do yes load{n} | dd of=/dev/vdb bs={LOAD_WRITE_BYTES} count={count} \
             seek={seek} oflag=direct iflag=fullblock 2>/dev/null || exit 1; done); echo $? > /tmp/load{n}; }} &\n"
        )
    };
    console.type_in(&writer(0)).await;
    console.type_in(&writer(1)).await;
    let is_at = |offset: u64, text: &str| {
        let mut start = vec![0; LOAD_WRITE_BYTES as usize];
        File::open(path("data")).unwrap().read_exact_at(&mut start, offset).unwrap();
        String::from_utf8_lossy(&start).contains(text)
    };
    let end = Instant::now() + LIMIT;
    while !is_at(LOAD_BYTES / 4 / LOAD_WRITE_BYTES * LOAD_WRITE_BYTES, "load0") {
        assert!(Instant::now() < end, "the load is under way");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(data);
    // The guest goes on; only this disk's I/O waits.
    console.run("ls / | grep -q init").await;
    let data = Gateway::start(&images, &disk("data").socket, &path("data"));
    console.run("touch /tmp/enough").await;
    for n in 0..2 {
        console.run(&format!("while ! [ -s /tmp/load{n} ]; do sleep 1; done; grep -qx 0 /tmp/load{n}")).await;
    }
    let mut bytes = vec![0; 2 * LOAD_BYTES as usize];
    File::open(path("data")).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    for (n, half) in bytes.chunks(LOAD_BYTES as usize).enumerate() {
        assert!(half == yes(&format!("load{n}"), half.len()), "every byte of writer {n} is on the disk");
        let same = format!(
            "yes load{n} | head -c {LOAD_BYTES} > /tmp/expected; dd if=/dev/vdb bs=1M skip={skip} count={count} \
             iflag=direct 2>/dev/null | cmp - /tmp/expected",
            skip = n as u64 * LOAD_BYTES / MIB,
            count = LOAD_BYTES / MIB
        );
        console.run(&same).await;
    }

    println!("== another agent takes over");
    drop((console, guest));
    let mut guest = engine.adopt(dir.path()).await.unwrap().expect("it still runs");
    assert_eq!(guest.volumes(), ["root", "data"]);
    let mut console = Console::open(&*guest);
    console.run("true").await;

    println!("== detach while it runs");
    assert!(guest.detach("root").await.unwrap_err().to_string().contains("boot disk"));
    guest.detach("data").await.unwrap();
    assert_eq!(guest.volumes(), ["root"]);
    assert_eq!(console.run("ls /sys/block").await, "vda");
    let nobody = Disk { volume: "x".into(), socket: path("nobody") };
    assert!(guest.attach(nobody).await.unwrap_err().to_string().contains("nobody"));
    guest.attach(disk("data")).await.unwrap();
    console.run("while ! [ -b /dev/vdb ]; do sleep 1; done").await;
    console.run("dd if=/dev/vdb bs=64k count=1 2>/dev/null | head -n 1 | grep -qx load0").await;

    println!("== power button");
    guest.stop().await.unwrap();
    console.until("GUEST: power button").await;
    assert_eq!(ended(&*guest).await, Exit::Stopped(String::new()));
    assert!(engine.adopt(dir.path()).await.unwrap().is_none());
    drop(data);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_cannot_start_says_why_in_one_line() {
    let Some(images) = images() else { return };
    let dir = tempfile::tempdir().unwrap();
    let engine = NativeEngine::with_program(images.vmm.clone());
    let nobody = Disk { volume: "v".into(), socket: dir.path().join("nobody") };
    let error = engine.start(machine(&images, dir.path(), vec![nobody])).await.err().unwrap().to_string();
    assert!(error.contains("v at ") && error.contains("cannot connect"), "{error}");
    let no_kernel = Machine { kernel: "/no/kernel".into(), ..machine(&images, dir.path(), Vec::new()) };
    let error = engine.start(no_kernel).await.err().unwrap().to_string();
    assert!(error.contains("/no/kernel"), "{error}");
}
