//! What the guest is told of its processor.
//!
//! | model | |
//! |---|---|
//! | `host` | everything that KVM can give |
//! | `generic` | the x86-64-v2 level and AES: a guest of any host of the last fifteen years |
//! | `kvm64` | the least that 64-bit systems need |
//!
//! Topology is always one package of single-threaded cores.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CpuModel {
    #[default]
    Host,
    Generic,
    Kvm64,
}

impl std::str::FromStr for CpuModel {
    type Err = String;
    fn from_str(text: &str) -> Result<CpuModel, String> {
        match text {
            "host" => Ok(CpuModel::Host),
            "generic" => Ok(CpuModel::Generic),
            "kvm64" => Ok(CpuModel::Kvm64),
            other => Err(format!("CPU model {other:?} is none of host, generic, kvm64")),
        }
    }
}

const fn bits<const N: usize>(all: [u32; N]) -> u32 {
    let (mut mask, mut i) = (0, 0);
    while i < N {
        mask |= 1 << all[i];
        i += 1;
    }
    mask
}

const HYPERVISOR: u32 = 1 << 31;
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HTT: u32 = 1 << 28;
/// FPU VME DE PSE TSC MSR PAE MCE CX8 APIC SEP MTRR PGE MCA CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2.
const EDX1: u32 = bits([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26]);
/// SSE3 CX16.
const ECX1_KVM64: u32 = bits([0, 13]);
/// And PCLMULQDQ SSSE3 SSE4.1 SSE4.2 POPCNT AES.
const ECX1_GENERIC: u32 = ECX1_KVM64 | bits([1, 9, 19, 20, 23, 25]);
/// What these models share beside: paravirtual aids that every KVM has.
const ECX1_VIRTUAL: u32 = HYPERVISOR | X2APIC | TSC_DEADLINE;
/// SYSCALL NX LM (and RDTSCP for generic), with the bits that AMD repeats from leaf 1.
const EDX_8000_0001_KVM64: u32 = bits([11, 20, 29]) | EDX1 & 0x0183_f3ff;
const EDX_8000_0001_GENERIC: u32 = EDX_8000_0001_KVM64 | bits([27]);
/// LAHF_LM.
const ECX_8000_0001: u32 = bits([0]);

/// The whole of CPUID for vCPU `id` of `vcpus`, from what KVM supports.
pub fn for_vcpu(supported: &CpuId, model: CpuModel, id: u32, vcpus: u32) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = supported.as_slice().to_vec();
    entries.retain(|e| e.function != 0x1f && e.function != 0xb);
    if model != CpuModel::Host {
        entries.retain(|e| is_plain(e.function));
    }
    for entry in &mut entries {
        restrict(entry, model);
        place(entry, id, vcpus);
    }
    if entries.iter().any(|e| e.function == 0 && e.eax >= 0xb) {
        entries.extend(topology(id, vcpus));
    }
    entries
}

/// Leaves that the smaller models keep: identity, features, caches, names, sizes, and KVM's own.
fn is_plain(function: u32) -> bool {
    matches!(function, 0..=2 | 4 | 0x4000_0000..=0x4000_00ff | 0x8000_0000..=0x8000_0008)
}

fn restrict(entry: &mut kvm_cpuid_entry2, model: CpuModel) {
    let generic = match model {
        CpuModel::Host => return,
        CpuModel::Generic => true,
        CpuModel::Kvm64 => false,
    };
    match entry.function {
        0 => entry.eax = entry.eax.min(4),
        1 => {
            entry.ecx &= ECX1_VIRTUAL | if generic { ECX1_GENERIC } else { ECX1_KVM64 };
            entry.edx &= EDX1;
        }
        0x8000_0000 => entry.eax = entry.eax.min(0x8000_0008),
        0x8000_0001 => {
            entry.ecx &= ECX_8000_0001;
            entry.edx &= if generic { EDX_8000_0001_GENERIC } else { EDX_8000_0001_KVM64 };
        }
        0x8000_0007 => (entry.ebx, entry.ecx, entry.edx) = (0, 0, entry.edx & 1 << 8),
        0x8000_0008 => entry.ebx = 0,
        _ => {}
    }
}

fn place(entry: &mut kvm_cpuid_entry2, id: u32, vcpus: u32) {
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0xffff | vcpus.min(255) << 16 | id << 24;
            // KVM's local APIC has the timer mode although the host may say nothing of it.
            entry.ecx |= HYPERVISOR | TSC_DEADLINE;
            entry.edx = if vcpus > 1 { entry.edx | HTT } else { entry.edx & !HTT };
        }
        // Intel's caches: cores in the package; which logical processors share is one each.
        4 if entry.eax & 0x1f != 0 => entry.eax = entry.eax & 0x3fff | (vcpus.min(64) - 1) << 26,
        0x8000_0008 => entry.ecx = (vcpus - 1) & 0xff | id_bits(vcpus) << 12,
        // AMD's caches: shared by one.
        0x8000_001d => entry.eax &= 0x3fff,
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
        _ => {}
    }
}

fn id_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

/// Extended topology: threads, then cores.
fn topology(id: u32, vcpus: u32) -> [kvm_cpuid_entry2; 2] {
    const SIGNIFICANT_INDEX: u32 = 1;
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: SIGNIFICANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        edx: id,
        ..Default::default()
    };
    [level(0, 0, 1, 1), level(1, id_bits(vcpus), vcpus, 2)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let all = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ebx: !0,
            ecx: !0,
            edx: !0,
            ..Default::default()
        };
        CpuId::from_entries(&[
            all(0, 0x20),
            all(1, 0),
            all(7, 0),
            all(0xb, 0),
            all(0xd, 0),
            all(0x4000_0001, !0),
            all(0x8000_0000, 0x8000_0020),
            all(0x8000_0001, 0),
            all(0x8000_000a, 0),
        ])
        .unwrap()
    }

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32) -> Option<kvm_cpuid_entry2> {
        entries.iter().find(|e| e.function == function).copied()
    }

    #[test]
    fn models_shrink_from_host_to_kvm64() {
        let of = |model| for_vcpu(&supported(), model, 1, 2);
        let (host, generic, kvm64) = (of(CpuModel::Host), of(CpuModel::Generic), of(CpuModel::Kvm64));
        assert!(leaf(&host, 7).is_some() && leaf(&generic, 7).is_none());
        let features = |e: &[kvm_cpuid_entry2]| leaf(e, 1).unwrap().ecx;
        assert_eq!(features(&host) & features(&generic), features(&generic));
        assert_eq!(features(&generic) & features(&kvm64), features(&kvm64));
        assert!(features(&generic) & 1 << 20 != 0 && features(&kvm64) & 1 << 20 == 0, "SSE4.2");
        // AVX, VMX: never without asking for the host's.
        assert_eq!(features(&generic) & (1 << 28 | 1 << 5), 0);
        assert!(leaf(&generic, 0x8000_000a).is_none(), "nested virtualization");
        assert!(leaf(&kvm64, 0x4000_0001).is_some());
    }

    #[test]
    fn each_vcpu_knows_its_place() {
        let entries = for_vcpu(&supported(), CpuModel::Host, 2, 3);
        let one = leaf(&entries, 1).unwrap();
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (2, 3));
        assert!(one.ecx & HYPERVISOR != 0);
        let levels: Vec<_> = entries.iter().filter(|e| e.function == 0xb).collect();
        assert_eq!((levels.len(), levels[1].eax, levels[1].ebx, levels[1].edx), (2, 2, 3, 2));
        assert!("sandybridge".parse::<CpuModel>().is_err());
    }
}
