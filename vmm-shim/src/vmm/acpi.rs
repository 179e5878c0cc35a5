//! The ACPI tables (ACPI 6.5): processors and interrupts, the power button, and PCI slots that take
//! and give up cards while the guest runs.
//!
//! A slot's change is a general-purpose event: the guest runs `_E01`, which reads which slots came and
//! which are asked to go, and tells the slots' devices; `_EJ0` of a slot says that the guest let go.
//! The registers behind it are in [`super::power`].

use super::layout;
use super::limits::{SLOT_FIRST, SLOT_LAST};
use super::power;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, Device, EISAName, Equal, Field, FieldAccessType,
    FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Method, MethodCall, Name, Notify,
    OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, ShiftLeft, Store, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const OEM: [u8; 6] = *b"GABION";
const OEM_TABLE: [u8; 8] = *b"GABIONVM";
const OEM_REVISION: u32 = 1;
const HEADER_BYTES: u32 = 36;
const RSDP_ROOM: u64 = 64;
/// `IAPC_BOOT_ARCH`: no VGA, no CMOS clock, and by a bit that is not set no keyboard controller.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;
/// A fixed-hardware platform without SMM is in ACPI mode from the start.
const PM1_EVENT_BYTES: u8 = 4;
const PM1_CONTROL_BYTES: u8 = 2;
pub const GPE0_BYTES: u8 = 4;
const NOTIFY_DEVICE_CHECK: u8 = 1;
const NOTIFY_EJECT_REQUEST: u8 = 3;

#[derive(Debug, thiserror::Error)]
#[error("the ACPI tables do not fit")]
pub struct AcpiError;

/// Writes all tables; answers the address of the RSDP.
pub fn write(memory: &GuestMemoryMmap, vcpus: u32) -> Result<u64, AcpiError> {
    let mut at = layout::ACPI.start + RSDP_ROOM;
    let mut put = |bytes: &[u8]| {
        let here = at;
        at = (here + bytes.len() as u64).next_multiple_of(64);
        if at > layout::ACPI.end {
            return Err(AcpiError);
        }
        memory.write_slice(bytes, GuestAddress(here)).map_err(|_| AcpiError)?;
        Ok(here)
    };
    let facs = put(&facs())?;
    let dsdt = put(dsdt().as_slice())?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(put(&fadt(facs, dsdt))?);
    xsdt.add_entry(put(madt(vcpus).as_slice())?);
    let xsdt = put(&bytes(&xsdt))?;
    memory
        .write_slice(&bytes(&Rsdp::new(OEM, xsdt)), GuestAddress(layout::ACPI.start))
        .map_err(|_| AcpiError)?;
    Ok(layout::ACPI.start)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn facs() -> [u8; 64] {
    let mut facs = [0; 64];
    facs[..4].copy_from_slice(b"FACS");
    facs[4] = 64;
    facs[32] = 2;
    facs
}

fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    let port = |port: u16, bytes: u8, access: AccessSize| {
        GAS::new(GasSpace::SystemIo, bytes * 8, 0, access, u64::from(port))
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(facs as u32)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // Clear flags for both buttons would mean fixed ones; there is no sleep button.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .gpe_info(u32::from(layout::GPE0_PORT), 0, GPE0_BYTES, 0, 0);
    // The 32-bit field is used by systems that do not look at the 64-bit one.
    fadt.dsdt = (dsdt as u32).into();
    fadt.sci_int = (layout::SCI_IRQ as u16).into();
    fadt.pm1a_evt_blk = u32::from(layout::PM1_EVENT_PORT).into();
    fadt.pm1a_cnt_blk = u32::from(layout::PM1_CONTROL_PORT).into();
    fadt.pm1_evt_len = PM1_EVENT_BYTES;
    fadt.pm1_cnt_len = PM1_CONTROL_BYTES;
    fadt.x_pm1a_evt_blk = port(layout::PM1_EVENT_PORT, PM1_EVENT_BYTES, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(layout::PM1_CONTROL_PORT, PM1_CONTROL_BYTES, AccessSize::WordAccess);
    fadt.x_gpe0_blk = port(layout::GPE0_PORT, GPE0_BYTES, AccessSize::ByteAccess);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(layout::RESET_PORT, 1, AccessSize::ByteAccess);
    fadt.reset_value = power::RESET_VALUE;
    // No C2 and C3.
    fadt.p_lvl2_lat = 0xfff.into();
    fadt.p_lvl3_lat = 0xfff.into();
    bytes(&fadt.finalize())
}

fn madt(vcpus: u32) -> Sdt {
    const PC_COMPATIBLE: u32 = 1;
    let mut madt = Sdt::new(*b"APIC", HEADER_BYTES, 5, OEM, OEM_TABLE, OEM_REVISION);
    madt.append_slice(&layout::LOCAL_APIC.to_le_bytes());
    madt.append_slice(&PC_COMPATIBLE.to_le_bytes());
    for id in 0..vcpus as u8 {
        madt.append_slice(&[0, 8, id, id, 1, 0, 0, 0]);
    }
    let mut io_apic = vec![1, 12, 0, 0];
    io_apic.extend(layout::IO_APIC.to_le_bytes());
    io_apic.extend(0u32.to_le_bytes());
    madt.append_slice(&io_apic);
    // The SCI: level, active high.
    let sci = layout::SCI_IRQ as u8;
    madt.append_slice(&[2, 10, 0, sci, sci, 0, 0, 0, 0x0d, 0]);
    // NMI on LINT1 of every processor.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt
}

/// Names of the slot's device and of nothing else: `S00_` to `S1F_`.
fn slot_name(slot: u8) -> String {
    format!("S{slot:02X}_")
}

/// Everything inside one slot.
struct Slot(u8);

impl Aml for Slot {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let slot = self.0;
        let address = u32::from(slot) << 16;
        let eject = MethodCall::new("PCEJ".into(), vec![&slot]);
        Device::new(
            Path::new(&slot_name(slot)),
            vec![
                &Name::new("_ADR".into(), &address),
                &Name::new("_SUN".into(), &slot),
                &Method::new("_EJ0".into(), 1, true, vec![&eject]),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Tells a slot's device when its bit is set in `Local(0)` (came) or `Local(1)` (is to go).
struct TellSlot(u8);

impl Aml for TellSlot {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (device, bit) = (Path::new(&slot_name(self.0)), 1u32 << self.0);
        for (local, value) in [(Local(0), NOTIFY_DEVICE_CHECK), (Local(1), NOTIFY_EJECT_REQUEST)] {
            let masked = And::new(&ZERO, &local, &bit);
            let is_set = Equal::new(&masked, &bit);
            If::new(&is_set, vec![&Notify::new(&device, &value)]).to_aml_bytes(sink);
        }
    }
}

fn dsdt() -> Sdt {
    let slots: Vec<Slot> = (SLOT_FIRST..=SLOT_LAST).map(Slot).collect();
    let tell: Vec<TellSlot> = (SLOT_FIRST..=SLOT_LAST).map(TellSlot).collect();
    let (address, data_end) = (layout::PCI_ADDRESS_PORT, layout::PCI_ADDRESS_PORT + 8);
    let window_end = (layout::PCI_WINDOW.end - 1) as u32;
    let bus = AddressSpace::new_bus_number(0u16, 0u16);
    let config_ports = IO::new(address, address, 1, 8);
    let low_ports = AddressSpace::new_io(0u16, address - 1, None);
    let high_ports = AddressSpace::new_io(data_end, 0xffff, None);
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_WINDOW.start as u32,
        window_end,
        None,
    );
    let resources = ResourceTemplate::new(vec![&bus, &config_ports, &low_ports, &high_ports, &window]);

    let (port, size) = (layout::HOTPLUG_PORT, power::HOTPLUG_BYTES);
    let region = OpRegion::new("PCST".into(), OpRegionSpace::SystemIO, &port, &size);
    let fields = Field::new(
        "PCST".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![
            FieldEntry::Named(*b"PCIU", 32),
            FieldEntry::Named(*b"PCID", 32),
            FieldEntry::Named(*b"B0EJ", 32),
        ],
    );
    let (one, ejected) = (1u32, Path::new("B0EJ"));
    let eject_bit = ShiftLeft::new(&ejected, &one, &Arg(0));
    let eject = Method::new("PCEJ".into(), 1, true, vec![&eject_bit]);
    let (up, down) = (Path::new("PCIU"), Path::new("PCID"));
    let (read_up, read_down) = (Store::new(&Local(0), &up), Store::new(&Local(1), &down));
    let mut body: Vec<&dyn Aml> = vec![&read_up, &read_down];
    body.extend(tell.iter().map(|t| t as &dyn Aml));
    let changed = Method::new("PCNT".into(), 0, true, body);

    let hid = Name::new("_HID".into(), &EISAName::new("PNP0A03"));
    let (uid, bbn) = (Name::new("_UID".into(), &ZERO), Name::new("_BBN".into(), &ZERO));
    let crs = Name::new("_CRS".into(), &resources);
    let mut bridge: Vec<&dyn Aml> = vec![&hid, &uid, &bbn, &crs, &region, &fields, &eject];
    bridge.extend(slots.iter().map(|s| s as &dyn Aml));
    bridge.push(&changed);

    let serial_io = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8);
    let serial_irq = Interrupt::new(true, true, false, false, layout::SERIAL_IRQ);
    let serial = Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &1u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&serial_io, &serial_irq])),
        ],
    )
    .to_vec();
    let bridge = Device::new("PCI0".into(), bridge);
    let system = Scope::new("_SB_".into(), vec![&bridge, &serial]);
    let soft_off = power::SOFT_OFF;
    let s5 = Name::new("_S5_".into(), &Package::new(vec![&soft_off, &soft_off, &ZERO, &ZERO]));
    let call = MethodCall::new(Path::new("\\_SB_.PCI0.PCNT"), vec![]);
    let handler = Method::new("_E01".into(), 0, true, vec![&call]);
    let event = Scope::new("_GPE".into(), vec![&handler]);

    let mut dsdt = Sdt::new(*b"DSDT", HEADER_BYTES, 2, OEM, OEM_TABLE, OEM_REVISION);
    for part in [&system as &dyn Aml, &s5, &event] {
        dsdt.append_slice(&bytes(part));
    }
    dsdt
}

/// AML that is already made, to outlive the temporaries that it was made of.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

trait ToVec {
    fn to_vec(&self) -> Raw;
}

impl ToVec for Device<'_> {
    fn to_vec(&self) -> Raw {
        Raw(bytes(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::memory;

    #[test]
    fn every_table_is_found_from_the_rsdp_and_sums_to_zero() {
        let memory = memory::create(64 << 20).unwrap();
        let rsdp = write(&memory, 4).unwrap();
        let read = |at: u64, len: usize| {
            let mut bytes = vec![0; len];
            memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            bytes
        };
        let le64 = |b: &[u8]| u64::from_le_bytes(b[..8].try_into().unwrap());
        let table = |at: u64| {
            let len = u32::from_le_bytes(read(at + 4, 4).try_into().unwrap());
            let bytes = read(at, len as usize);
            assert_eq!(bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0, "checksum");
            bytes
        };
        let root = read(rsdp, 36);
        assert_eq!(&root[..8], b"RSD PTR ");
        let xsdt = table(le64(&root[24..]));
        let names: Vec<Vec<u8>> =
            xsdt[36..].chunks(8).map(|entry| table(le64(entry))[..4].to_vec()).collect();
        assert_eq!(names, [b"FACP".to_vec(), b"APIC".to_vec()]);
        let fadt = table(le64(&xsdt[36..]));
        assert_eq!(&table(le64(&fadt[140..]))[..4], b"DSDT");
        let madt = table(le64(&xsdt[44..]));
        assert_eq!(madt[44..].iter().filter(|b| **b == 8).count(), 4);
    }

    /// iasl would be the better judge; it is not always there.
    #[test]
    fn the_dsdt_names_every_slot_and_its_methods() {
        let dsdt = dsdt();
        let has = |name: &str| dsdt.as_slice().windows(name.len()).any(|w| w == name.as_bytes());
        for slot in SLOT_FIRST..=SLOT_LAST {
            assert!(has(&slot_name(slot)), "{slot}");
        }
        for name in ["PCI0", "_EJ0", "_E01", "PCNT", "B0EJ", "_S5_", "COM1"] {
            assert!(has(name), "{name}");
        }
    }
}
