//! Registers behind the ACPI tables: power button, soft off, reset, and slots that come and go
//! (ACPI 6.5, section 4.8). The system control interrupt is a level: it is asserted while a status bit
//! is set whose enable bit is set.
//!
//! Hotplug, three registers of 32 bits at [`super::layout::HOTPLUG_PORT`], one bit a slot:
//!
//! | offset | read | write |
//! |---|---|---|
//! | 0 | slots with a new card; reading clears | - |
//! | 4 | slots whose card is asked to go; reading clears | - |
//! | 8 | 0 | slots that the guest has let go of |

use super::layout;

pub const SOFT_OFF: u8 = 5;
pub const RESET_VALUE: u8 = 0x06;
pub const HOTPLUG_BYTES: u8 = 12;
const PM1_POWER_BUTTON: u16 = 1 << 8;
const PM1_SCI_ENABLED: u16 = 1;
const PM1_SLEEP: u16 = 1 << 13;
const GPE_HOTPLUG: u16 = 1 << 1;
const KEYBOARD_PULSE_RESET: u8 = 0xfe;

/// What a register access means beyond the registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    None,
    PowerOff,
    Reset,
    /// Bits of slots that the guest let go of.
    Ejected(u32),
}

#[derive(Debug, Default)]
pub struct Power {
    pm1_status: u16,
    pm1_enable: u16,
    pm1_control: u16,
    gpe_status: u16,
    gpe_enable: u16,
    up: u32,
    down: u32,
}

impl Power {
    /// Whether a port is one of ours.
    pub fn owns(port: u16) -> bool {
        (layout::PM1_EVENT_PORT..layout::PM1_CONTROL_PORT + 2).contains(&port)
            || (layout::GPE0_PORT..layout::GPE0_PORT + 4).contains(&port)
            || (layout::HOTPLUG_PORT..layout::HOTPLUG_PORT + u16::from(HOTPLUG_BYTES)).contains(&port)
            || port == layout::RESET_PORT
            || port == layout::KEYBOARD_COMMAND_PORT
    }

    /// The level of the system control interrupt.
    pub fn interrupt(&self) -> bool {
        self.pm1_status & self.pm1_enable & PM1_POWER_BUTTON != 0 || self.gpe_status & self.gpe_enable != 0
    }

    pub fn press_button(&mut self) {
        self.pm1_status |= PM1_POWER_BUTTON;
    }

    pub fn plugged(&mut self, slot: u8) {
        self.up |= 1 << slot;
        self.gpe_status |= GPE_HOTPLUG;
    }

    pub fn ask_to_unplug(&mut self, slot: u8) {
        self.down |= 1 << slot;
        self.gpe_status |= GPE_HOTPLUG;
    }

    pub fn read(&mut self, port: u16, data: &mut [u8]) {
        if let Some(offset @ (0 | 4 | 8)) = port.checked_sub(layout::HOTPLUG_PORT)
            && data.len() == 4
        {
            let value = match offset {
                0 => std::mem::take(&mut self.up),
                4 => std::mem::take(&mut self.down),
                _ => 0,
            };
            data.copy_from_slice(&value.to_le_bytes());
            return;
        }
        for (byte, port) in data.iter_mut().zip(ports_from(port)) {
            *byte = self.byte(port);
        }
    }

    fn byte(&self, port: u16) -> u8 {
        const PM1: u16 = layout::PM1_EVENT_PORT;
        const CONTROL: u16 = layout::PM1_CONTROL_PORT;
        const GPE: u16 = layout::GPE0_PORT;
        let (register, low) = match port {
            PM1 | 0x601 => (self.pm1_status, PM1),
            0x602 | 0x603 => (self.pm1_enable, 0x602),
            CONTROL | 0x605 => (self.pm1_control | PM1_SCI_ENABLED, CONTROL),
            GPE | 0x621 => (self.gpe_status, GPE),
            0x622 | 0x623 => (self.gpe_enable, 0x622),
            _ => return 0,
        };
        register.to_le_bytes()[usize::from(port - low)]
    }

    pub fn write(&mut self, port: u16, data: &[u8]) -> Effect {
        if port == layout::HOTPLUG_PORT + 8
            && let Ok(bits) = data.try_into()
        {
            return Effect::Ejected(u32::from_le_bytes(bits));
        }
        let mut effect = Effect::None;
        for (byte, port) in data.iter().zip(ports_from(port)) {
            let (high, value) = (port & 1 != 0, u16::from(*byte));
            let (bits, mask) = if high { (value << 8, 0xff00) } else { (value, 0x00ff) };
            match port {
                // Writing a one clears a status bit.
                0x600 | 0x601 => self.pm1_status &= !bits,
                0x602 | 0x603 => self.pm1_enable = self.pm1_enable & !mask | bits,
                0x604 | 0x605 => {
                    self.pm1_control = (self.pm1_control & !mask | bits) & !PM1_SLEEP;
                    let kind = (self.pm1_control >> 10) as u8 & 7;
                    if bits & PM1_SLEEP != 0 && kind == SOFT_OFF {
                        effect = Effect::PowerOff;
                    }
                }
                0x620 | 0x621 => self.gpe_status &= !bits,
                0x622 | 0x623 => self.gpe_enable = self.gpe_enable & !mask | bits,
                layout::RESET_PORT if *byte & 0x04 != 0 => effect = Effect::Reset,
                layout::KEYBOARD_COMMAND_PORT if *byte == KEYBOARD_PULSE_RESET => effect = Effect::Reset,
                _ => {}
            }
        }
        effect
    }
}

fn ports_from(first: u16) -> impl Iterator<Item = u16> {
    (0..).map(move |n| first.wrapping_add(n))
}

const _: () = assert!(layout::PM1_EVENT_PORT == 0x600 && layout::PM1_CONTROL_PORT == 0x604);
const _: () = assert!(layout::GPE0_PORT == 0x620);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read32(power: &mut Power, port: u16) -> u32 {
        let mut data = [0; 4];
        power.read(port, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_button_interrupts_until_the_guest_acknowledges_it() {
        let mut power = Power::default();
        power.press_button();
        assert!(!power.interrupt(), "not enabled yet");
        power.write(0x602, &PM1_POWER_BUTTON.to_le_bytes());
        assert!(power.interrupt());
        power.write(0x600, &PM1_POWER_BUTTON.to_le_bytes());
        assert!(!power.interrupt());
        let off = (PM1_SLEEP | u16::from(SOFT_OFF) << 10).to_le_bytes();
        assert_eq!(power.write(0x604, &off), Effect::PowerOff);
        assert_eq!(power.write(layout::RESET_PORT, &[RESET_VALUE]), Effect::Reset);
    }

    #[test]
    fn a_slots_change_is_told_once_and_its_ejection_is_heard() {
        let mut power = Power::default();
        power.write(0x622, &[2]);
        power.plugged(3);
        power.ask_to_unplug(5);
        assert!(power.interrupt());
        assert_eq!(read32(&mut power, layout::HOTPLUG_PORT), 1 << 3);
        assert_eq!(read32(&mut power, layout::HOTPLUG_PORT), 0);
        assert_eq!(read32(&mut power, layout::HOTPLUG_PORT + 4), 1 << 5);
        power.write(0x620, &[2]);
        assert!(!power.interrupt());
        assert_eq!(power.write(layout::HOTPLUG_PORT + 8, &(1u32 << 5).to_le_bytes()), Effect::Ejected(32));
    }

    proptest! {
        #[test]
        fn any_access_is_answered(ops in proptest::collection::vec((any::<bool>(), any::<u16>(), 0usize..9, any::<u8>()), 0..200)) {
            let mut power = Power::default();
            for (write, port, len, value) in ops {
                let port = 0x5f0u16.wrapping_add(port % 0x80);
                let mut data = vec![value; len];
                if write { power.write(port, &data); } else { power.read(port, &mut data); }
            }
            power.read(0xffff, &mut [0; 8]);
        }
    }
}
