//! A whole `gabion-vmm` process with a kernel of a few instructions, on the machine's own `/dev/kvm`: it prints,
//! waits for the power button and turns itself off. Says that it skips where there is no `/dev/kvm`.

use gabion_vmm_shim::console::Hub;
use gabion_vmm_shim::engine::native::NativeEngine;
use gabion_vmm_shim::engine::{Disk, Engine, Exit, Guest, Machine, Nic};
use gabion_vmm_shim::vmm::board::End;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(100);

/// A kernel by the 64-bit boot protocol (Linux, Documentation/arch/x86/boot.rst).
fn kernel() -> Vec<u8> {
    let mut image = vec![0u8; 0x400 + 4096];
    image[0x1f1] = 1;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    image[0x211] = 1;
    image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    image[0x236..0x238].copy_from_slice(&1u16.to_le_bytes());
    image[0x238..0x23c].copy_from_slice(&255u32.to_le_bytes());
    #[rustfmt::skip]
    let code = [
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xb0, b'O', 0xee, 0xb0, b'K', 0xee, // mov al, 'O'; out dx, al; ...
        0x66, 0xba, 0x00, 0x06, // mov dx, 0x600: PM1 status
        0x66, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xf9, // in ax, dx; test ah, 1; jz back to in
        0x66, 0xba, 0x04, 0x06, // mov dx, 0x604: PM1 control
        0x66, 0xb8, 0x00, 0x34, 0x66, 0xef, // mov ax, SLP_EN and S5; out dx, ax
        0xf4, 0xeb, 0xfd, // hlt, for ever
    ];
    image[0x600..0x600 + code.len()].copy_from_slice(&code);
    image
}

fn machine(dir: &Path) -> Machine {
    let path = dir.join("kernel");
    std::fs::write(&path, kernel()).unwrap();
    Machine {
        name: "tiny".into(),
        vcpus: 1,
        memory_bytes: 64 << 20,
        cpu_model: Default::default(),
        engine: None,
        kernel: path,
        initrd: None,
        kernel_args: String::new(),
        disks: Vec::new(),
        nics: Vec::new(),
        dir: dir.to_owned(),
    }
}

fn engine() -> Option<NativeEngine> {
    if std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        println!("SKIPPED: no usable /dev/kvm");
        return None;
    }
    Some(NativeEngine::with_program(env!("CARGO_BIN_EXE_gabion-vmm").into()))
}

/// Returns when the guest has printed what it prints.
async fn printed(guest: &dyn Guest) {
    let hub = Hub::open(guest.serial_socket(), guest.serial_log());
    let printed = async {
        loop {
            let mut view = hub.view();
            if view.replay.windows(2).any(|w| w == b"OK") {
                return;
            }
            view.live.recv().await.unwrap();
        }
    };
    tokio::time::timeout(LIMIT, printed).await.expect("the guest prints");
}

/// What a client of the control socket hears of the end; empty: nothing.
async fn heard_at_stop(guest: &dyn Guest, dir: &Path) -> String {
    let client = UnixStream::connect(dir.join("control.sock")).unwrap();
    let heard = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        BufReader::new(client).read_line(&mut line).unwrap();
        line
    });
    guest.stop().await.unwrap();
    tokio::time::timeout(LIMIT, heard).await.expect("it ends").unwrap()
}

async fn ended(guest: &dyn Guest) -> Exit {
    let mut exit = guest.exit();
    let how = tokio::time::timeout(LIMIT, exit.wait_for(Option::is_some)).await.expect("it ends").unwrap();
    how.clone().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_is_adopted_and_powered_off() {
    let Some(engine) = engine() else { return };
    let dir = tempfile::tempdir().unwrap();
    let first = engine.start(machine(dir.path())).await.unwrap();
    printed(&*first).await;
    drop(first);
    let guest = engine.adopt(dir.path()).await.unwrap().expect("it still runs");
    let heard = heard_at_stop(&*guest, dir.path()).await;
    assert!(heard.contains("\"ended\""), "{heard}");
    assert_eq!(ended(&*guest).await, Exit::Stopped(String::new()));
    let record = std::fs::read(dir.path().join("ended.json")).unwrap();
    assert_eq!(serde_json::from_slice::<End>(&record).unwrap(), End::PoweredOff);
    assert!(engine.adopt(dir.path()).await.unwrap().is_none());
}

/// An agent that hears of the end may find the process slow, and kill it: the record must be there by then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_hears_of_an_end_that_is_not_on_record() {
    let Some(engine) = engine() else { return };
    let dir = tempfile::tempdir().unwrap();
    let guest = engine.start(machine(dir.path())).await.unwrap();
    printed(&*guest).await;
    // Nothing can be written in its place.
    std::fs::create_dir(dir.path().join("ended.json")).unwrap();
    assert_eq!(heard_at_stop(&*guest, dir.path()).await, "");
    match ended(&*guest).await {
        Exit::Failed(why) => assert!(why.contains("ended.json"), "{why}"),
        Exit::Stopped(why) => panic!("stopped: {why}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_cannot_start_says_why() {
    let Some(engine) = engine() else { return };
    let dir = tempfile::tempdir().unwrap();
    let nobody = Disk { volume: "v".into(), socket: dir.path().join("nobody") };
    let nic = Nic { tap: "gabion-none".into(), mac: "02:00:00:00:00:01".into() };
    let plain = || machine(dir.path());
    for (machine, why) in [
        (Machine { kernel: "/no/kernel".into(), ..plain() }, "/no/kernel"),
        (Machine { disks: vec![nobody], ..plain() }, "nobody"),
        (Machine { nics: vec![nic], ..plain() }, "ip tuntap add dev gabion-none"),
        (Machine { vcpus: 65, ..plain() }, "vcpus"),
    ] {
        let error = engine.start(machine).await.err().unwrap().to_string();
        assert!(error.contains(why), "{error}");
    }
}
