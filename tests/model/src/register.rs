//! What clients may see of one block: every way to order its operations that is still possible.
//!
//! A block is a register. Each write takes effect at most once, at one moment between when it was issued and when it was answered or its
//! holder's attachment ended, and not after a later one of its client; a write that was not answered may never take effect. A *possibility* is a value and the set of writes that
//! have taken effect. Answers and reads rule possibilities out; when none is left, no order explains what clients saw.

/// Writes are numbered from 1; 0 is what was there before.
pub const WRITES: u8 = 3;
const SETS: u8 = 1 << WRITES;

/// The possibilities, one bit each.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Register(u32);

/// Writes that may take effect at any moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pending {
    pub writes: u8,
    /// Of each write, those that its client issued after it: once one of them has taken effect it cannot any more.
    pub later: [u8; WRITES as usize],
}

fn bit(value: u8, done: u8) -> u32 {
    1 << (value * SETS + done)
}

fn writes(set: u8) -> impl Iterator<Item = u8> {
    (1..=WRITES).filter(move |w| set >> (w - 1) & 1 == 1)
}

impl Default for Register {
    fn default() -> Register {
        Register(bit(0, 0))
    }
}

impl Register {
    /// What may be from now on.
    pub fn pending(self, pending: Pending) -> Register {
        let mut all = self.0;
        loop {
            let before = all;
            for done in 0..SETS {
                let here = (0..=WRITES).any(|v| all & bit(v, done) != 0);
                let in_order = |w: &u8| pending.later[*w as usize - 1] & done == 0;
                for w in writes(pending.writes & !done).filter(|w| here && in_order(w)) {
                    all |= bit(w, done | 1 << (w - 1));
                }
            }
            if all == before {
                return Register(all);
            }
        }
    }

    fn keep(self, possible: impl Fn(u8, u8) -> bool) -> Option<Register> {
        let pairs = (0..=WRITES).flat_map(|v| (0..SETS).map(move |d| (v, d)));
        let kept = pairs.filter(|(v, d)| possible(*v, *d)).fold(0, |set, (v, d)| set | bit(v, d)) & self.0;
        (kept != 0).then_some(Register(kept))
    }

    /// The write was answered.
    pub fn answered(self, write: u8) -> Option<Register> {
        self.keep(|_, done| done >> (write - 1) & 1 == 1)
    }

    /// Whether the value may be what the block holds.
    pub fn allows(self, value: u8) -> bool {
        (0..SETS).any(|done| self.0 & bit(value, done) != 0)
    }

    /// A read has returned `value`.
    pub fn read(self, value: u8, pending: Pending) -> Option<Register> {
        Some(self.keep(|v, _| v == value)?.pending(pending))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(writes: u8) -> Pending {
        Pending { writes, ..Pending::default() }
    }

    #[test]
    fn an_answered_write_is_read() {
        let r = Register::default().pending(of(0b1));
        let r = r.answered(1).unwrap();
        assert!(r.read(1, of(0)).is_some() && r.read(0, of(0)).is_none());
    }

    #[test]
    fn an_unanswered_write_is_read_or_not_and_stays_as_it_was_read() {
        let r = Register::default().pending(of(0b1));
        let seen = r.read(1, of(0b1)).unwrap();
        assert!(seen.read(0, of(0b1)).is_none());
        let unseen = r.read(0, of(0b1)).unwrap();
        assert!(unseen.read(1, of(0b1)).is_some(), "it may come later");
        // Its holder's attachment has ended before anybody saw it: the first read decides.
        let closed = r.read(0, of(0)).unwrap();
        assert!(closed.read(1, of(0)).is_none());
        assert!(r.read(1, of(0)).is_some());
    }

    #[test]
    fn a_write_takes_effect_once() {
        let r = Register::default().pending(of(0b1)).answered(1).unwrap();
        let r = r.pending(of(0b11)).answered(2).unwrap();
        assert!(r.read(2, of(0b11)).is_some() && r.read(1, of(0b11)).is_none());
    }

    #[test]
    fn concurrent_writes_have_either_order() {
        let r = Register::default().pending(of(0b11)).answered(1).unwrap().answered(2).unwrap();
        assert!(r.read(1, of(0)).is_some() && r.read(2, of(0)).is_some() && r.read(0, of(0)).is_none());
    }

    #[test]
    fn a_write_that_was_given_up_comes_before_the_next_one_or_never() {
        let both = Pending { writes: 0b11, later: [0b10, 0, 0] };
        let r = Register::default().pending(both);
        let r = r.read(0, both).unwrap().read(1, both).unwrap().answered(2).unwrap();
        assert!(r.read(2, both).unwrap().read(1, both).is_none());
        let r = Register::default().pending(both).answered(2).unwrap();
        assert!(r.read(1, both).is_none());
    }
}
