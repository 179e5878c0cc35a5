//! `gabion-vmm`: one guest on KVM, one process. Built from rust-vmm crates; PCI and the virtio transport
//! are ours.
//!
//! ```text
//!            gabion-host                 console viewers
//!                 │ control.sock              │ serial.sock
//!  ┌──────────────▼───────────────────────────▼────────┐
//!  │ main: control, console, disks that come and go    │◄─ wake ─┐
//!  └───────────────────────────────────────────────────┘         │
//!  ┌ vcpu0 ┐ ┌ vcpu1 ┐   exits: ports, PCI, device memory ── Board
//!  └───┬───┘ └───┬───┘                                     │ start, stop
//!      │ KVM_RUN │                                  ┌ disk ▼──────────────┐
//!  ════▼═════════▼════ KVM ════════════════         │ vhost-user handshake│── gateway's socket
//!   guest ── doorbell ─► ioeventfd ───────────────────────────────────────► gateway: virtqueues in
//!   guest ◄─ MSI ◄────── irqfd ◄──────────────────────────────────────────  shared guest memory
//! ```
//!
//! Nothing of a disk's reads and writes passes a thread of this process. What a guest writes to ports,
//! configuration space and device memory is bounded and never ends this process; only its vCPUs' state
//! that KVM cannot go on with does, as a failed machine.
//!
//! How a machine ends is in [`board::End`]; each kind of thread has its system call filter in [`seccomp`].

pub mod acpi;
pub mod board;
pub mod boot;
pub mod config;
pub mod control;
pub mod cpuid;
pub mod interrupts;
pub mod layout;
pub mod limits;
pub mod machine;
pub mod memory;
pub mod net;
pub mod pci;
pub mod power;
pub mod seccomp;
pub mod serial;
pub mod vcpu;
pub mod vhost;
pub mod virtio;
