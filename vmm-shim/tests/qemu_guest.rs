//! A real QEMU with a kernel of a few bytes: it starts, prints, is adopted by a second engine, and
//! ends when it is killed or fails to start with a reason.

use gabion_vmm_shim::console::Hub;
use gabion_vmm_shim::engine::qemu::QemuEngine;
use gabion_vmm_shim::engine::{Disk, Engine, Exit, Machine};
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

/// A kernel by the Linux boot protocol (Documentation/arch/x86/boot.rst): its real-mode entry prints
/// `OK` on the first serial port and halts.
fn kernel() -> Vec<u8> {
    let mut image = vec![0u8; 4096];
    image[0x1f1] = 1;
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x200..0x202].copy_from_slice(&[0xeb, 0x7e]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x0206u16.to_le_bytes());
    image[0x211] = 1;
    // mov dx,0x3f8; mov al,'O'; out dx,al; mov al,'K'; out dx,al; cli; hlt; jmp $-1
    let code = [0xba, 0xf8, 0x03, 0xb0, b'O', 0xee, 0xb0, b'K', 0xee, 0xfa, 0xf4, 0xeb, 0xfd];
    image[0x280..0x280 + code.len()].copy_from_slice(&code);
    image
}

fn machine(dir: &Path) -> Machine {
    let path = dir.join("kernel");
    std::fs::write(&path, kernel()).unwrap();
    Machine {
        name: "tiny".into(),
        vcpus: 1,
        memory_bytes: 128 << 20,
        cpu_model: Default::default(),
        engine: None,
        kernel: path,
        initrd: None,
        kernel_args: "console=ttyS0".into(),
        disks: Vec::new(),
        nics: Vec::new(),
        dir: dir.to_owned(),
    }
}

fn is_missing() -> bool {
    let missing = std::process::Command::new("qemu-system-x86_64").arg("--version").output().is_err();
    if missing {
        println!("SKIPPED: qemu-system-x86_64 is not installed");
    }
    missing
}

#[tokio::test]
async fn a_guest_outlives_its_agent_and_is_adopted() {
    if is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let engine = QemuEngine::detect();
    let first = engine.start(machine(dir.path())).await.unwrap();
    let hub = Hub::open(first.serial_socket(), first.serial_log());
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
    drop((hub, first));

    let mut second = engine.adopt(dir.path()).await.unwrap().expect("it still runs");
    // A disk without a gateway behind it is refused; the guest goes on.
    let nobody = Disk { volume: "v".into(), socket: dir.path().join("nobody") };
    assert!(second.attach(nobody).await.is_err());
    assert!(second.volumes().is_empty() && second.exit().borrow().is_none());

    second.kill().await.unwrap();
    let mut exit = second.exit();
    let how = tokio::time::timeout(LIMIT, exit.wait_for(Option::is_some)).await.unwrap().unwrap().clone();
    assert_eq!(how, Some(Exit::Stopped(String::new())));
    assert!(engine.adopt(dir.path()).await.unwrap().is_none());
}

#[tokio::test]
async fn a_guest_that_cannot_start_says_why() {
    if is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine { kernel: dir.path().join("no-such-kernel"), ..machine(dir.path()) };
    let error = QemuEngine::detect().start(machine).await.err().expect("no kernel").to_string();
    assert!(error.contains("no-such-kernel"), "{error}");
}
