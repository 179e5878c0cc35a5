//! One virtual CPU: its registers at the start and the thread that runs it.

use super::board::Board;
use super::cpuid::{self, CpuModel};
use super::layout;
use kvm_bindings::{CpuId, Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 2;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
/// Flat segments of the boot protocol: selectors 0x10 and 0x18.
const GDT: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const DELIVERY_EXTINT: u32 = 7 << 8;
const DELIVERY_NMI: u32 = 4 << 8;

#[derive(Debug, thiserror::Error)]
#[error("vCPU {id}: {what}")]
pub struct VcpuError {
    pub id: u32,
    pub what: &'static str,
    pub source: kvm_ioctls::Error,
}

/// Everything that all vCPUs have: CPUID, MSRs, interrupt pins.
pub fn set_up(
    vcpu: &VcpuFd,
    supported: &CpuId,
    model: CpuModel,
    id: u32,
    vcpus: u32,
) -> Result<(), VcpuError> {
    let failed = |what| move |source| VcpuError { id, what, source };
    let no_room = |_| VcpuError { id, what: "CPUID table", source: kvm_ioctls::Error::new(libc::E2BIG) };
    let entries = CpuId::from_entries(&cpuid::for_vcpu(supported, model, id, vcpus)).map_err(no_room)?;
    vcpu.set_cpuid2(&entries).map_err(failed("cannot set its CPUID"))?;
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let msrs = [msr(MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLED_WRITE_BACK), msr(MSR_MISC_ENABLE, FAST_STRINGS)];
    for entry in msrs {
        // One at a time: a processor without one of them is none the worse for it.
        let one = Msrs::from_entries(&[entry]).map_err(no_room)?;
        vcpu.set_msrs(&one).map_err(failed("cannot set its MSRs"))?;
    }
    vcpu.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() })
        .map_err(failed("cannot set its FPU"))?;
    let mut apic = vcpu.get_lapic().map_err(failed("cannot read its APIC"))?;
    for (register, mode) in [(APIC_LVT0, DELIVERY_EXTINT), (APIC_LVT1, DELIVERY_NMI)] {
        let bytes = mode.to_le_bytes().map(|b| b as std::ffi::c_char);
        apic.regs[register..register + 4].copy_from_slice(&bytes);
    }
    vcpu.set_lapic(&apic).map_err(failed("cannot set its APIC"))
}

/// Puts the first vCPU at the kernel's 64-bit entry; the others wait for their start-up interrupt.
pub fn enter_kernel(vcpu: &VcpuFd, memory: &GuestMemoryMmap, entry: u64) -> Result<(), VcpuError> {
    let failed = |what| move |source| VcpuError { id: 0, what, source };
    for (slot, descriptor) in GDT.iter().enumerate() {
        memory.write_obj(*descriptor, GuestAddress(layout::BOOT_GDT + slot as u64 * 8)).map_err(|_| {
            VcpuError { id: 0, what: "no memory for its GDT", source: kvm_ioctls::Error::new(libc::EFAULT) }
        })?;
    }
    let mut sregs = vcpu.get_sregs().map_err(failed("cannot read its registers"))?;
    let (code, data, task) = (segment(2), segment(3), segment(4));
    (sregs.cs, sregs.tr) = (code, task);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = layout::BOOT_GDT;
    sregs.gdt.limit = (GDT.len() * 8 - 1) as u16;
    (sregs.idt.base, sregs.idt.limit) = (layout::BOOT_IDT, 7);
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.cr3 = layout::PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).map_err(failed("cannot set its registers"))?;
    let regs = kvm_regs { rflags: RFLAGS_RESERVED, rip: entry, rsi: layout::ZERO_PAGE, ..Default::default() };
    vcpu.set_regs(&regs).map_err(failed("cannot set its registers"))
}

/// The hidden part of a segment register for entry `index` of the GDT.
fn segment(index: u16) -> kvm_segment {
    let descriptor = GDT[usize::from(index)];
    let bit = |n: u32| (descriptor >> n & 1) as u8;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index * 8,
        type_: (descriptor >> 40 & 0xf) as u8,
        present: bit(47),
        dpl: 0,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g: bit(55),
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// Runs until the machine ends; never returns before.
pub fn run(mut vcpu: VcpuFd, board: &Arc<Board>, id: u32) {
    while !board.has_ended() {
        match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => board.port_read(port, data),
            Ok(VcpuExit::IoOut(port, data)) => board.port_write(port, data),
            Ok(VcpuExit::MmioRead(address, data)) => board.memory_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => board.memory_write(address, data),
            Ok(VcpuExit::Hlt | VcpuExit::Intr) => {}
            // A triple fault: how a kernel without other means restarts, or a crash.
            Ok(VcpuExit::Shutdown) => board.restart_asked(),
            Ok(exit) => board.failed(format!("vCPU {id} ended with {exit:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => board.failed(format!("vCPU {id} does not run: {error}")),
        }
    }
}
