//! Where things are in a guest's physical address space and on its ports.
//!
//! ```text
//!  0            low memory: GDT, boot parameters, page tables, command line (until the kernel has its own)
//!  0xe_0000     ACPI tables (the RSDP is found by scanning from here)
//!  0x10_0000    kernel, then RAM up to 3 GiB; the initrd ends where low RAM ends
//!  0xc000_0000  nothing
//!  0xd000_0000  PCI memory window
//!  0xfec0_0000  I/O APIC;  0xfee0_0000  local APICs;  0xfffb_c000  four pages that KVM uses on Intel
//!  4 GiB        the rest of the RAM
//! ```

use std::ops::Range;

pub const BOOT_GDT: u64 = 0x500;
pub const BOOT_IDT: u64 = 0x520;
pub const ZERO_PAGE: u64 = 0x7000;
pub const PML4: u64 = 0x9000;
pub const PDPT: u64 = 0xa000;
/// Four pages: the first 4 GiB in 2 MiB pages.
pub const PAGE_DIRECTORIES: u64 = 0xb000;
pub const COMMAND_LINE: u64 = 0x2_0000;
pub const COMMAND_LINE_BYTES_MAX: usize = 0x1000;
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
pub const ACPI: Range<u64> = 0xe_0000..0x10_0000;
pub const KERNEL: u64 = 0x10_0000;
pub const LOW_RAM_END: u64 = 0xc000_0000;
pub const PCI_WINDOW: Range<u64> = 0xd000_0000..0xe000_0000;
pub const IO_APIC: u32 = 0xfec0_0000;
pub const LOCAL_APIC: u32 = 0xfee0_0000;
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
pub const KVM_TSS: u64 = 0xfffb_d000;
pub const HIGH_RAM_START: u64 = 1 << 32;

pub const SERIAL_PORT: u16 = 0x3f8;
pub const SERIAL_IRQ: u32 = 4;
pub const SCI_IRQ: u32 = 9;
/// PM1 status and enable, then PM1 control.
pub const PM1_EVENT_PORT: u16 = 0x600;
pub const PM1_CONTROL_PORT: u16 = 0x604;
pub const GPE0_PORT: u16 = 0x620;
pub const HOTPLUG_PORT: u16 = 0x640;
pub const PCI_ADDRESS_PORT: u16 = 0xcf8;
pub const RESET_PORT: u16 = 0xcf9;
pub const PCI_DATA_PORT: u16 = 0xcfc;
pub const KEYBOARD_COMMAND_PORT: u16 = 0x64;
/// Interrupts from here on are MSI; below are the I/O APIC's pins.
pub const FIRST_MSI_GSI: u32 = 24;

const _: () = assert!(COMMAND_LINE + (COMMAND_LINE_BYTES_MAX as u64) < LOW_MEMORY_END);
