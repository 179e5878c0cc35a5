//! Network cards of guests: what may name the host's end and the card's address.

use std::fmt;
use std::str::FromStr;

/// Cards of one VM.
pub const NICS_MAX: usize = 4;
/// Longest name of a network device (IFNAMSIZ less its end).
pub const TAP_NAME_BYTES_MAX: usize = 15;

/// An Ethernet address that one card can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// The address of a VM's card that asks for none: locally administered, always the same.
    pub fn derived(vm: &str, index: usize) -> MacAddress {
        // FNV-1a, 64 bits.
        let fold = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        let name = vm.bytes().chain([0, index as u8]);
        let [a, b, c, d, e, ..] = name.fold(0xcbf2_9ce4_8422_2325, fold).to_be_bytes();
        MacAddress([0x02, a, b, c, d, e])
    }
}

impl FromStr for MacAddress {
    type Err = String;
    fn from_str(text: &str) -> Result<MacAddress, String> {
        let wrong = || format!("{text:?} is no Ethernet address such as 02:00:5e:10:00:01");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() || text.contains('+') {
            return Err(wrong());
        }
        if bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(format!("{text} is not the address of one card: it is a group's or nobody's"));
        }
        Ok(MacAddress(bytes))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Whether a tap device can have this name; it becomes part of paths and of QEMU's options.
pub fn check_tap_name(name: &str) -> Result<(), String> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let good = (1..=TAP_NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(allowed)
        && !name.starts_with(['.', '-']);
    match good {
        true => Ok(()),
        false => Err(format!(
            "{name:?} cannot name a tap device: 1 to {TAP_NAME_BYTES_MAX} letters, digits and . _ - are allowed"
        )),
    }
}

/// A card as written on the command line: `tap=NAME[,mac=ADDRESS]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicSpec {
    pub tap: String,
    pub mac: Option<MacAddress>,
}

impl FromStr for NicSpec {
    type Err = String;
    fn from_str(text: &str) -> Result<NicSpec, String> {
        let (mut tap, mut mac) = (None, None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("tap", name)) if tap.is_none() => {
                    check_tap_name(name)?;
                    tap = Some(name.to_owned());
                }
                Some(("mac", address)) if mac.is_none() => mac = Some(address.parse()?),
                _ => return Err(format!("{part:?} is not understood: a card is tap=NAME[,mac=ADDRESS]")),
            }
        }
        Ok(NicSpec { tap: tap.ok_or("a card needs tap=NAME")?, mac })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cards_are_read_and_nonsense_is_named() {
        let spec: NicSpec = "tap=vm-1,mac=02:00:5e:10:00:01".parse().unwrap();
        assert_eq!(
            (spec.tap.as_str(), spec.mac.unwrap().to_string().as_str()),
            ("vm-1", "02:00:5e:10:00:01")
        );
        assert_eq!("tap=t".parse::<NicSpec>().unwrap().mac, None);
        for bad in [
            "",
            "t",
            "tap=",
            "tap=a/b",
            "tap=a,b",
            "tap=a,tap=b",
            "mac=02:00:5e:10:00:01",
            "tap=abcdefghijklmnop",
        ] {
            assert!(bad.parse::<NicSpec>().is_err(), "{bad}");
        }
        for bad in [
            "01:00:5e:10:00:01",
            "00:00:00:00:00:00",
            "02:00:5e:10:00",
            "02:00:5e:10:00:01:02",
            "2:0:5e:10:0:1",
            "+2:00:5e:10:00:01",
        ] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn derived_addresses_are_usable_and_differ() {
        let all: std::collections::BTreeSet<String> =
            (0..100).map(|n| MacAddress::derived(&format!("vm{}", n / 4), n % 4).to_string()).collect();
        assert_eq!(all.len(), 100);
        assert!(all.iter().all(|mac| mac.parse::<MacAddress>().is_ok()));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,40}") {
            let _ = (text.parse::<NicSpec>(), text.parse::<MacAddress>());
        }
    }
}
