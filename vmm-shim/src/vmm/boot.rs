//! Puts a Linux kernel into guest memory and describes the machine to it, by the 64-bit boot protocol
//! (Linux, Documentation/arch/x86/boot.rst). There is no firmware.

use super::layout::{self, ZERO_PAGE};
use super::memory;
use linux_loader::bootparam::boot_params;
use linux_loader::loader::{KernelLoader, bzimage::BzImage};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// Room that the kernel needs beyond its own image is in its header; this is for headers that say nothing.
const KERNEL_ROOM_MIN: u64 = 16 << 20;
const LOADER_UNDEFINED: u8 = 0xff;
/// `xloadflags`: the kernel has a 64-bit entry at 0x200.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64_OFFSET: u64 = 0x200;
const PAGE: u64 = 4096;

#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is not a bootable x86-64 Linux kernel: {detail}")]
    Kernel { path: PathBuf, detail: String },
    #[error("the kernel and its initrd need {needed} bytes of memory; the guest has {bytes}")]
    TooLarge { needed: u64, bytes: u64 },
    #[error("the kernel's command line has {len} bytes; {max} are possible")]
    CommandLine { len: usize, max: usize },
    #[error("cannot write guest memory: {0}")]
    Memory(String),
}

/// `setup_header` with bounds and page tables in place; answers the entry point.
pub fn load(
    memory: &GuestMemoryMmap,
    kernel: &Path,
    initrd: Option<&Path>,
    command_line: &str,
    rsdp: u64,
) -> Result<u64, BootError> {
    let read = |path: &Path| {
        let path = path.to_owned();
        move |source| BootError::Read { path, source }
    };
    let mut image = File::open(kernel).map_err(read(kernel))?;
    let refused = |detail: String| BootError::Kernel { path: kernel.to_owned(), detail };
    let at = GuestAddress(layout::KERNEL);
    let loaded = BzImage::load(memory, Some(at), &mut image, Some(at)).map_err(|e| refused(e.to_string()))?;
    let mut header = loaded.setup_header.ok_or_else(|| refused("it has no setup header".into()))?;
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(refused("it has no 64-bit entry point".into()));
    }

    let ranges = memory::ranges(memory);
    let low_end = ranges.first().map_or(0, |(_, bytes)| *bytes);
    // The kernel unpacks itself to its preferred address and uses `init_size` bytes there.
    let room = u64::from(header.init_size).max(KERNEL_ROOM_MIN);
    let kernel_end = header.pref_address.max(layout::KERNEL).saturating_add(room).max(loaded.kernel_end);
    let mut initrd_place = (0, 0);
    if let Some(path) = initrd {
        let mut file = File::open(path).map_err(read(path))?;
        let bytes = file.metadata().map_err(read(path))?.len();
        let top = low_end.min(u64::from(header.initrd_addr_max).max(layout::KERNEL) + 1);
        let start = top.saturating_sub(bytes) / PAGE * PAGE;
        if start < kernel_end {
            let needed = kernel_end.saturating_add(bytes);
            return Err(BootError::TooLarge { needed, bytes: low_end });
        }
        memory
            .read_exact_volatile_from(GuestAddress(start), &mut file, bytes as usize)
            .map_err(|e| BootError::Memory(e.to_string()))?;
        initrd_place = (start as u32, bytes as u32);
    } else if kernel_end > low_end {
        return Err(BootError::TooLarge { needed: kernel_end, bytes: low_end });
    }

    let max = (header.cmdline_size as usize).min(layout::COMMAND_LINE_BYTES_MAX - 1);
    if command_line.len() > max || command_line.contains('\0') {
        return Err(BootError::CommandLine { len: command_line.len(), max });
    }
    let write = |bytes: &[u8], at: u64| {
        memory.write_slice(bytes, GuestAddress(at)).map_err(|e| BootError::Memory(e.to_string()))
    };
    write(format!("{command_line}\0").as_bytes(), layout::COMMAND_LINE)?;

    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = layout::COMMAND_LINE as u32;
    (header.ramdisk_image, header.ramdisk_size) = initrd_place;
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    let mut entries = vec![
        (0, layout::LOW_MEMORY_END, E820_RAM),
        (layout::LOW_MEMORY_END, layout::KERNEL - layout::LOW_MEMORY_END, E820_RESERVED),
        (layout::KERNEL, low_end - layout::KERNEL, E820_RAM),
    ];
    entries.extend(ranges.iter().skip(1).map(|(start, bytes)| (*start, *bytes, E820_RAM)));
    params.e820_entries = entries.len() as u8;
    for (slot, (addr, size, kind)) in params.e820_table.iter_mut().zip(entries) {
        (slot.addr, slot.size, slot.r#type) = (addr, size, kind);
    }
    write(params.as_slice(), ZERO_PAGE)?;
    page_tables(memory)?;
    Ok(layout::KERNEL + ENTRY_64_OFFSET)
}

/// The first 4 GiB mapped to themselves: what the 64-bit protocol asks for and more.
fn page_tables(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let write = |value: u64, at: u64| {
        memory.write_obj(value, GuestAddress(at)).map_err(|e| BootError::Memory(e.to_string()))
    };
    write(layout::PDPT | PRESENT_WRITABLE, layout::PML4)?;
    for gib in 0..4 {
        let directory = layout::PAGE_DIRECTORIES + gib * PAGE;
        write(directory | PRESENT_WRITABLE, layout::PDPT + gib * 8)?;
        for entry in 0..512 {
            write(gib << 30 | entry << 21 | PRESENT_WRITABLE | LARGE, directory + entry * 8)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// A setup header that says "64-bit kernel" and one page of kernel.
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
        image
    }

    #[test]
    fn a_kernel_and_its_initrd_are_placed_and_described() {
        let memory = memory::create(64 << 20).unwrap();
        let (kernel, initrd) = (file(&kernel()), file(&[7; 5000]));
        let entry = load(&memory, kernel.path(), Some(initrd.path()), "console=ttyS0", 0xe0000).unwrap();
        assert_eq!(entry, layout::KERNEL + 0x200);
        let params: boot_params = memory.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        let (at, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
        assert_eq!((u64::from(at) % PAGE, size), (0, 5000));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(u64::from(at) + 4999)).unwrap(), 7);
        assert_eq!({ params.e820_entries }, 3);
        let mut line = [0; 14];
        memory.read_slice(&mut line, GuestAddress(layout::COMMAND_LINE)).unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
    }

    #[test]
    fn what_does_not_boot_or_fit_is_refused_with_its_reason() {
        let memory = memory::create(32 << 20).unwrap();
        let good = file(&kernel());
        let text = |kernel: &[u8]| load(&memory, file(kernel).path(), None, "", 0).unwrap_err().to_string();
        assert!(text(b"not a kernel").contains("is not a bootable"), "{}", text(b"not a kernel"));
        let mut old = kernel();
        old[0x236] = 0;
        assert!(text(&old).contains("no 64-bit entry"));
        let long = "x".repeat(300);
        assert!(matches!(load(&memory, good.path(), None, &long, 0), Err(BootError::CommandLine { .. })));
        let big = tempfile::NamedTempFile::new().unwrap();
        big.as_file().set_len(20 << 20).unwrap();
        let error = load(&memory, good.path(), Some(big.path()), "", 0).unwrap_err();
        assert!(matches!(error, BootError::TooLarge { .. }), "{error}");
        let missing = load(&memory, Path::new("/nonexistent"), None, "", 0).unwrap_err();
        assert_eq!(missing.to_string(), "cannot read /nonexistent");
    }
}
