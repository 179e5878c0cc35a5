//! A guest of a few dozen instructions on the machine's own `/dev/kvm`: it carries out, at the
//! guest's lowest privilege, the port and memory accesses that the test asks for, so that our PCI bus,
//! virtio transport, MSI-X, doorbells and power registers are driven through real exits, a real
//! ioeventfd and a real irqfd. Says that it skips where there is no `/dev/kvm`.

use gabion_vmm_shim::vmm::board::{Board, End};
use gabion_vmm_shim::vmm::cpuid::CpuModel;
use gabion_vmm_shim::vmm::interrupts::KvmInterrupts;
use gabion_vmm_shim::vmm::machine::create_vm;
use gabion_vmm_shim::vmm::serial::Port;
use gabion_vmm_shim::vmm::virtio::transport::VirtioCard;
use gabion_vmm_shim::vmm::virtio::{Device, F_VERSION_1, Ring, Rings};
use gabion_vmm_shim::vmm::{layout, memory, vcpu};
use kvm_bindings::kvm_segment;
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

const LIMIT: Duration = Duration::from_secs(60);
const CODE: u64 = 0x10_0000;
const MAILBOX: u64 = 0x20_0000;
const INTERRUPTS: u64 = MAILBOX + 0x40;
const GDT: u64 = 0x20_1000;
const IDT: u64 = 0x20_2000;
const TSS: u64 = 0x20_4000;
/// The task state and its map of ports, all of them allowed.
const TSS_LIMIT: u32 = 0x68 + 0x2000;
const TABLES: u64 = 0x21_0000;
const STACK: u64 = 0x22_0000;
const QUEUE: u64 = 0x30_0000;
const VECTOR: u32 = 0x41;

// The guest: enters privilege level 3 with all ports allowed, then answers the mailbox for ever.
// Mailbox: +0 request number, +4 answered number, +8 operation, +16 address, +24 value, +32 result.
std::arch::global_asm!(
    ".global micro_start, micro_interrupt, micro_end",
    "micro_start:",
    "mov eax, 0xfee000f0", // local APIC: on
    "mov dword ptr [rax], 0x1ff",
    "push 0x23",
    "push 0x21f000",
    "push 0x3202", // interrupts on, IOPL 3
    "push 0x2b",
    "lea rax, [rip + 2f]",
    "push rax",
    "iretq",
    "2:",
    "mov ebx, 0x200000",
    "3:",
    "pause",
    "mov eax, [rbx]",
    "cmp eax, [rbx + 4]",
    "je 3b",
    "mov ecx, [rbx + 8]",
    "mov rdx, [rbx + 16]",
    "mov rax, [rbx + 24]",
    "cmp ecx, 1",
    "je 10f",
    "cmp ecx, 2",
    "je 11f",
    "cmp ecx, 3",
    "je 12f",
    "cmp ecx, 4",
    "je 13f",
    "cmp ecx, 5",
    "je 14f",
    "cmp ecx, 6",
    "je 15f",
    "cmp ecx, 7",
    "je 16f",
    "cmp ecx, 8",
    "je 17f",
    "cmp ecx, 9",
    "je 18f",
    "cmp ecx, 10",
    "je 19f",
    "4:",
    "mov [rbx + 32], rax",
    "mov eax, [rbx]",
    "mov [rbx + 4], eax",
    "jmp 3b",
    "10: out dx, al",
    "jmp 4b",
    "11: out dx, ax",
    "jmp 4b",
    "12: out dx, eax",
    "jmp 4b",
    "13: in eax, dx",
    "jmp 4b",
    "14: mov [rdx], al",
    "jmp 4b",
    "15: mov [rdx], ax",
    "jmp 4b",
    "16: mov [rdx], eax",
    "jmp 4b",
    "17: movzx eax, byte ptr [rdx]",
    "jmp 4b",
    "18: movzx eax, word ptr [rdx]",
    "jmp 4b",
    "19: mov eax, [rdx]",
    "jmp 4b",
    "micro_interrupt:",
    "push rax",
    "mov eax, 0x200040",
    "inc dword ptr [rax]",
    "mov eax, 0xfee000b0", // end of interrupt
    "mov dword ptr [rax], 0",
    "pop rax",
    "iretq",
    "micro_end:",
);

unsafe extern "C" {
    static micro_start: u8;
    static micro_interrupt: u8;
    static micro_end: u8;
}

/// Echoes what is offered on queue 0, at the test's thread's pace.
#[derive(Default)]
struct Echo {
    rings: Arc<Mutex<Option<Rings>>>,
}

impl Device for Echo {
    fn features(&self) -> u64 {
        F_VERSION_1
    }
    fn queue_count(&self) -> u16 {
        1
    }
    fn config_generation(&self) -> u8 {
        0
    }
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8 ^ 0xa5);
    }
    fn start(&mut self, rings: Rings) {
        *self.rings.lock().unwrap() = Some(rings);
    }
    fn stop(&mut self) {
        *self.rings.lock().unwrap() = None;
    }
    fn is_stopped(&self) -> bool {
        self.rings.lock().unwrap().is_none()
    }
}

struct Guest {
    memory: GuestMemoryMmap,
    request: u32,
    board: Arc<Board>,
}

impl Guest {
    fn ask(&mut self, operation: u32, address: u64, value: u64) -> u64 {
        self.request += 1;
        let put = |value: u64, offset| self.memory.write_obj(value, GuestAddress(MAILBOX + offset)).unwrap();
        put(u64::from(operation), 8);
        put(address, 16);
        put(value, 24);
        self.memory.store(self.request, GuestAddress(MAILBOX), Ordering::SeqCst).unwrap();
        let answered = MAILBOX + 4;
        self.until("the guest answers", |g| g.load(answered) == g.request);
        self.memory.read_obj(GuestAddress(MAILBOX + 32)).unwrap()
    }
    fn load(&self, at: u64) -> u32 {
        self.memory.load(GuestAddress(at), Ordering::SeqCst).unwrap()
    }
    fn until(&self, what: &str, done: impl Fn(&Guest) -> bool) {
        let end = Instant::now() + LIMIT;
        while !done(self) {
            let early = self.board.end();
            assert!(early.is_none() && Instant::now() < end, "{what}: not in time; the board says {early:?}");
            std::thread::yield_now();
        }
    }
    fn out(&mut self, port: u16, width: u32, value: u32) {
        let operation = match width {
            1 => 1,
            2 => 2,
            _ => 3,
        };
        self.ask(operation, u64::from(port), u64::from(value));
    }
    fn in32(&mut self, port: u16) -> u32 {
        self.ask(4, u64::from(port), 0) as u32
    }
    fn write(&mut self, address: u64, width: u32, value: u32) {
        let operation = match width {
            1 => 5,
            2 => 6,
            _ => 7,
        };
        self.ask(operation, address, u64::from(value));
    }
    fn read(&mut self, address: u64, width: u32) -> u32 {
        let operation = match width {
            1 => 8,
            2 => 9,
            _ => 10,
        };
        self.ask(operation, address, 0) as u32
    }
    fn config(&mut self, slot: u32, register: u32) -> u32 {
        self.out(layout::PCI_ADDRESS_PORT, 4, 1 << 31 | slot << 11 | register);
        self.in32(layout::PCI_DATA_PORT)
    }
    fn set_config(&mut self, slot: u32, register: u32, value: u32) {
        self.out(layout::PCI_ADDRESS_PORT, 4, 1 << 31 | slot << 11 | register);
        self.out(layout::PCI_DATA_PORT, 4, value);
    }
    fn interrupts(&self) -> u32 {
        self.load(INTERRUPTS)
    }
    /// Finds a capability; 5-bit types of virtio vendor capabilities are in the fourth byte.
    fn capability(&mut self, slot: u32, id: u8, kind: Option<u8>) -> u32 {
        let mut at = self.config(slot, 0x34) & 0xff;
        while at != 0 {
            let head = self.config(slot, at).to_le_bytes();
            if head[0] == id && kind.is_none_or(|kind| kind == head[3]) {
                return at;
            }
            at = u32::from(head[1]);
        }
        panic!("no capability {id} {kind:?}");
    }
}

fn put_tables(memory: &GuestMemoryMmap) {
    let put = |value: u64, at: u64| memory.write_obj(value, GuestAddress(at)).unwrap();
    // Identity for 4 GiB in 2 MiB pages, open to privilege level 3.
    put((TABLES + 0x1000) | 7, TABLES);
    for gib in 0..4 {
        put((TABLES + 0x2000 + gib * 0x1000) | 7, TABLES + 0x1000 + gib * 8);
        for entry in 0..512 {
            put(gib << 30 | entry << 21 | 0x87, TABLES + 0x2000 + gib * 0x1000 + entry * 8);
        }
    }
    // Null, kernel code and data, nothing, user data (0x20) and code (0x28), task (0x30).
    let gdt: [u64; 8] = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x0000_8b00_0000_0000 | TSS_LIMIT as u64 | (TSS & 0xff_ffff) << 16,
        0,
    ];
    for (slot, descriptor) in gdt.into_iter().enumerate() {
        put(descriptor, GDT + slot as u64 * 8);
    }
    put(STACK, TSS + 4);
    memory.write_obj(0x68u16, GuestAddress(TSS + 0x66)).unwrap();
    memory.write_obj(0xffu8, GuestAddress(TSS + u64::from(TSS_LIMIT))).unwrap();
    let (start, handler, end) = (&raw const micro_start, &raw const micro_interrupt, &raw const micro_end);
    let code_bytes = end as usize - start as usize;
    // SAFETY: the bytes between the symbols are the instructions above, readable for ever, and in this order in one section.
    let code = unsafe { std::slice::from_raw_parts(start, code_bytes) };
    memory.write_slice(code, GuestAddress(CODE)).unwrap();
    let handler = CODE + (handler as u64 - start as u64);
    let gate = (handler & 0xffff) | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    put(gate, IDT + u64::from(VECTOR) * 16);
    put(handler >> 32, IDT + u64::from(VECTOR) * 16 + 8);
}

fn enter(vcpu: &VcpuFd) {
    let segment = |selector: u16, type_: u8, long: bool| kvm_segment {
        selector,
        type_,
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        l: long.into(),
        db: (!long).into(),
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cs = segment(8, 0xb, true);
    let data = segment(0x10, 3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        base: TSS,
        limit: TSS_LIMIT,
        selector: 0x30,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 63);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 0xfff);
    sregs.cr3 = TABLES;
    sregs.cr0 |= 1 | 1 << 31;
    sregs.cr4 |= 1 << 5;
    sregs.efer |= 1 << 8 | 1 << 10;
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rsp, regs.rflags) = (CODE, STACK, 2);
    vcpu.set_regs(&regs).unwrap();
}

#[derive(Default)]
struct Exits {
    memory_writes: AtomicUsize,
    all: AtomicU32,
}

fn run(mut vcpu: VcpuFd, board: &Board, exits: &Exits) {
    while !board.has_ended() {
        exits.all.fetch_add(1, Ordering::SeqCst);
        match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => board.port_read(port, data),
            Ok(VcpuExit::IoOut(port, data)) => board.port_write(port, data),
            Ok(VcpuExit::MmioRead(address, data)) => board.memory_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => {
                exits.memory_writes.fetch_add(1, Ordering::SeqCst);
                board.memory_write(address, data);
            }
            Ok(VcpuExit::Intr) => {}
            Ok(exit) => {
                let exit = format!("{exit:?}");
                board.failed(format!("{exit} at {:#x?}", vcpu.get_regs()));
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => board.failed(error.to_string()),
        }
    }
}

/// Waits for the doorbell; true when it rang.
fn rings(fd: &EventFd) -> bool {
    let mut poll = libc::pollfd { fd: std::os::fd::AsRawFd::as_raw_fd(fd), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd that lives on this frame.
    unsafe { libc::poll(&mut poll, 1, LIMIT.as_millis() as i32) };
    fd.read().is_ok()
}

/// Takes one descriptor chain head from the ring and gives it back, as a device does.
fn serve(memory: &GuestMemoryMmap, ring: &Ring) {
    assert!(rings(&ring.kick), "the doorbell rings");
    let available: u16 = memory.read_obj(GuestAddress(ring.available + 2)).unwrap();
    let slot = u64::from(available.wrapping_sub(1) % ring.size);
    let head: u16 = memory.read_obj(GuestAddress(ring.available + 4 + slot * 2)).unwrap();
    memory.write_obj(u32::from(head), GuestAddress(ring.used + 4 + slot * 8)).unwrap();
    memory.write_obj(4u32, GuestAddress(ring.used + 8 + slot * 8)).unwrap();
    memory.store(available, GuestAddress(ring.used + 2), Ordering::SeqCst).unwrap();
    ring.call.write(1).unwrap();
}

#[test]
fn a_guest_drives_our_devices_through_kvm() {
    if std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        println!("SKIPPED: no usable /dev/kvm");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let log_path = dir.path().join("console.log");
    let event_fd = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let memory = memory::create(32 << 20).unwrap();
    let (kvm, vm) = create_vm(&memory).unwrap();
    let vm = Arc::new(vm);
    let line = event_fd();
    vm.register_irqfd(&line, layout::SERIAL_IRQ).unwrap();
    let port = Port::new(line, std::fs::File::create(&log_path).unwrap(), event_fd());
    let board = Arc::new(Board::new(vm.clone(), port, event_fd()));
    let interrupts = Arc::new(KvmInterrupts::new(vm.clone()));
    let echo = Echo::default();
    let rings = echo.rings.clone();
    let bar = layout::PCI_WINDOW.start as u32;
    let card = VirtioCard::new(2, 0x01_8000, bar, Box::new(echo), memory.clone(), interrupts).unwrap();
    board.plug(1, Box::new(card), false);

    put_tables(&memory);
    let vcpu = vm.create_vcpu(0).unwrap();
    let supported = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
    vcpu::set_up(&vcpu, &supported, CpuModel::Host, 0, 1).unwrap();
    enter(&vcpu);
    let exits = Arc::new(Exits::default());
    let (thread_board, thread_exits) = (board.clone(), exits.clone());
    let thread = std::thread::spawn(move || run(vcpu, &thread_board, &thread_exits));
    let mut guest = Guest { memory: memory.clone(), request: 0, board: board.clone() };

    // Ports: the console, PCI configuration, nothing.
    for byte in b"OK" {
        guest.out(layout::SERIAL_PORT, 1, u32::from(*byte));
    }
    board.serial.drain();
    assert_eq!(std::fs::read(&log_path).unwrap(), b"OK");
    assert_eq!(guest.config(1, 0), 0x1042_1af4);
    assert_eq!(guest.config(2, 0), !0);
    assert_eq!(guest.in32(0x1234), !0);

    // The device's memory, where the BAR says.
    let notify = guest.capability(1, 9, Some(2));
    let (doorbells, multiplier) = (guest.config(1, notify + 8), guest.config(1, notify + 16));
    assert_eq!(multiplier, 4);
    let msix = guest.capability(1, 0x11, None);
    let table = guest.config(1, msix + 4);
    guest.set_config(1, 4, 2);
    let base = u64::from(bar);
    assert_eq!(guest.read(base + 0x12, 2), 1, "queues");
    assert_eq!(guest.read(base + 0x2003, 1), 0xa6, "the device's own configuration");
    for status in [1, 3] {
        guest.write(base + 0x14, 1, status);
    }
    guest.write(base + 0x08, 4, 1);
    guest.write(base + 0x0c, 4, 1);
    guest.write(base + 0x14, 1, 11);
    assert_eq!(guest.read(base + 0x14, 1), 11);

    // One queue, its interrupt by message 1.
    guest.write(base + 0x16, 2, 0);
    guest.write(base + 0x18, 2, 8);
    guest.write(base + 0x1a, 2, 1);
    for (register, at) in [(0x20, QUEUE), (0x28, QUEUE + 0x1000), (0x30, QUEUE + 0x2000)] {
        guest.write(base + register, 4, at as u32);
    }
    guest.write(base + 0x1c, 2, 1);
    let entry = base + u64::from(table & !7) + 16;
    guest.write(entry, 4, layout::LOCAL_APIC);
    guest.write(entry + 8, 4, VECTOR);
    guest.write(entry + 12, 4, 0);
    let control = guest.config(1, msix);
    guest.set_config(1, msix, control | 1 << 31);
    guest.write(base + 0x14, 1, 15);
    guest.until("the device starts", |_| rings.lock().unwrap().is_some());

    // A request: the doorbell is no exit, the answer is an interrupt.
    let offer = |head: u16, index: u16| {
        memory.write_obj(head, GuestAddress(QUEUE + 0x1000 + 4 + u64::from(index % 8) * 2)).unwrap();
        memory.store(index + 1, GuestAddress(QUEUE + 0x1002), Ordering::SeqCst).unwrap();
    };
    let before = exits.memory_writes.load(Ordering::SeqCst);
    let doorbell = u64::from(doorbells);
    offer(5, 0);
    guest.write(base + doorbell, 2, 0);
    serve(&memory, &rings.lock().unwrap().as_ref().unwrap().rings[0]);
    guest.until("the interrupt arrives", |g| g.interrupts() == 1);
    assert_eq!(exits.memory_writes.load(Ordering::SeqCst), before, "no exit for the doorbell");
    assert_eq!(memory.read_obj::<u32>(GuestAddress(QUEUE + 0x2004)).unwrap(), 5);

    // A masked interrupt waits, shows as pending, and comes when it is unmasked.
    guest.write(entry + 12, 4, 1);
    offer(6, 1);
    guest.write(base + doorbell, 2, 0);
    serve(&memory, &rings.lock().unwrap().as_ref().unwrap().rings[0]);
    assert_eq!(guest.read(base + 0x5000, 4), 2);
    assert_eq!(guest.interrupts(), 1);
    guest.write(entry + 12, 4, 0);
    guest.until("the interrupt arrives after all", |g| g.interrupts() == 2);

    // The guest moves the device; its doorbell moves along.
    let moved = base + 0x10_0000;
    guest.set_config(1, 0x10, moved as u32);
    let before = exits.memory_writes.load(Ordering::SeqCst);
    offer(7, 2);
    guest.write(moved + doorbell, 2, 0);
    serve(&memory, &rings.lock().unwrap().as_ref().unwrap().rings[0]);
    guest.until("the interrupt arrives", |g| g.interrupts() == 3);
    assert_eq!(exits.memory_writes.load(Ordering::SeqCst), before);
    guest.write(moved + 0x14, 1, 0);
    assert_eq!(guest.read(moved + 0x14, 1), 0, "reset");

    // Asked to go, ejected, gone.
    board.ask_to_unplug(1);
    assert_eq!(guest.in32(layout::HOTPLUG_PORT + 4), 2);
    assert_eq!(guest.in32(layout::HOTPLUG_PORT + 4), 0);
    guest.out(layout::HOTPLUG_PORT + 8, 4, 2);
    assert_eq!(guest.config(1, 0), !0);
    assert_eq!(guest.read(moved, 4), !0);

    board.press_power_button();
    assert_eq!(guest.in32(layout::PM1_EVENT_PORT) & 0x100, 0x100);
    // Off. The guest does not get to answer this one.
    guest.request += 1;
    let put = |value: u64, offset| memory.write_obj(value, GuestAddress(MAILBOX + offset)).unwrap();
    put(2, 8);
    put(u64::from(layout::PM1_CONTROL_PORT), 16);
    put(1 << 13 | 5 << 10, 24);
    memory.store(guest.request, GuestAddress(MAILBOX), Ordering::SeqCst).unwrap();
    thread.join().unwrap();
    assert_eq!(board.end(), Some(End::PoweredOff));
    assert!(exits.all.load(Ordering::SeqCst) > 50);
}
