//! What a machine is to be: a JSON file, checked once.

use super::cpuid::CpuModel;
use super::limits;
use gabion_proto::nic::{MacAddress, NICS_MAX, check_tap_name};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub name: String,
    pub vcpus: u32,
    pub memory_bytes: u64,
    #[serde(default)]
    pub cpu_model: CpuModel,
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    #[serde(default)]
    pub kernel_args: String,
    /// The first is the boot disk.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    #[serde(default)]
    pub nics: Vec<NicConfig>,
    /// For `control.sock`, `serial.sock`, `console.log` and `ended.json`.
    pub dir: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    pub volume: String,
    /// Where its gateway listens.
    pub socket: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicConfig {
    /// A tap device of the host.
    pub tap: String,
    pub mac: String,
}

impl Config {
    /// The first thing that is wrong with it.
    pub fn check(&self) -> Result<(), String> {
        let (vcpus, memory) = (self.vcpus, self.memory_bytes);
        let disks_max = usize::from(limits::SLOT_LAST - limits::SLOT_FIRST) + 1;
        if !(1..=limits::VCPUS_MAX).contains(&vcpus) {
            return Err(format!("vcpus is {vcpus}; 1 to {} are possible", limits::VCPUS_MAX));
        }
        let range = limits::MEMORY_BYTES_MIN..=limits::MEMORY_BYTES_MAX;
        if !range.contains(&memory) || !memory.is_multiple_of(2 << 20) {
            let (min, max) = (range.start() >> 20, range.end() >> 20);
            return Err(format!("memory_bytes is {memory}; {min} to {max} MiB are possible, even ones"));
        }
        if self.disks.len() > disks_max {
            return Err(format!("disks has {}; {disks_max} are possible", self.disks.len()));
        }
        for (i, disk) in self.disks.iter().enumerate() {
            check_volume(&disk.volume)?;
            if self.disks[..i].iter().any(|other| other.volume == disk.volume) {
                return Err(format!("disks names {} twice", disk.volume));
            }
        }
        if self.nics.len() > NICS_MAX {
            return Err(format!("nics has {}; {NICS_MAX} are possible", self.nics.len()));
        }
        for (i, nic) in self.nics.iter().enumerate() {
            check_tap_name(&nic.tap)?;
            nic.mac.parse::<MacAddress>()?;
            if self.nics[..i].iter().any(|other| other.tap == nic.tap || other.mac == nic.mac) {
                return Err(format!("nics has {} or {} twice", nic.tap, nic.mac));
            }
        }
        Ok(())
    }
}

pub fn check_volume(name: &str) -> Result<(), String> {
    let good = !name.is_empty() && name.len() <= limits::NAME_BYTES_MAX && !name.contains(char::is_control);
    if good { Ok(()) } else { Err(format!("{name:?} is no name of a volume")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_value_names_itself() {
        let disk = |volume: &str| DiskConfig { volume: volume.into(), socket: "/s".into() };
        let nic = |tap: &str, mac: &str| NicConfig { tap: tap.into(), mac: mac.into() };
        let good = Config {
            name: "g".into(),
            vcpus: 2,
            memory_bytes: 256 << 20,
            cpu_model: CpuModel::Host,
            kernel: "/k".into(),
            initrd: None,
            kernel_args: String::new(),
            disks: vec![disk("a"), disk("b")],
            nics: vec![nic("t0", "02:00:00:00:00:01"), nic("t1", "02:00:00:00:00:02")],
            dir: "/d".into(),
        };
        assert_eq!(good.check(), Ok(()));
        let wrong = |change: &dyn Fn(&mut Config)| {
            let mut config = good.clone();
            change(&mut config);
            config.check().unwrap_err()
        };
        assert!(wrong(&|c| c.vcpus = 0).starts_with("vcpus"));
        assert!(wrong(&|c| c.memory_bytes = 1 << 20).starts_with("memory_bytes"));
        assert!(wrong(&|c| c.memory_bytes += 4096).starts_with("memory_bytes"));
        assert!(wrong(&|c| c.disks.push(disk("a"))).contains("twice"));
        assert!(wrong(&|c| c.disks = (0..30).map(|n| disk(&n.to_string())).collect()).starts_with("disks"));
        assert!(wrong(&|c| c.disks[0].volume.clear()).contains("no name"));
        assert!(wrong(&|c| c.nics.push(nic("t0", "02:00:00:00:00:03"))).contains("twice"));
        assert!(wrong(&|c| c.nics[0].tap = "../x".into()).contains("tap device"));
        assert!(wrong(&|c| c.nics[0].mac = "ff:ff:ff:ff:ff:ff".into()).contains("ff:ff"));
        let unknown = serde_json::to_string(&good).unwrap().replacen("\"vcpus\"", "\"cpus\"", 1);
        assert!(serde_json::from_str::<Config>(&unknown).unwrap_err().to_string().contains("cpus"));
    }
}
