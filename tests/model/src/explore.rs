//! A breadth-first search through every state that a model can reach.
//!
//! A state is remembered by a 64-bit fingerprint of its canonical form, with the state that it was first reached from and
//! which of its steps that was; the states themselves live only while they are on the frontier. What is found is so
//! reached by a shortest path, and the path can be told by walking it again. With n states the chance that two share a fingerprint is about
//! n²/2⁶⁵: one in ten thousand for 60 million.

use std::collections::HashSet;
use std::fmt::{self, Display};
use std::hash::{BuildHasherDefault, Hasher};

/// Something that goes from state to state.
pub trait Model {
    type State: Clone;
    type Action: Display;

    fn initial(&self) -> Self::State;

    /// Appends every step that may come next, in an order that depends on the state alone.
    fn next(&self, state: &Self::State, out: &mut Vec<Step<Self::State, Self::Action>>);

    /// What must hold in every state; the error names it.
    fn check(&self, state: &Self::State) -> Result<(), &'static str>;

    /// Equal for states that are the same up to names.
    fn fingerprint(&self, state: &Self::State) -> u64;

    /// One line for a trace.
    fn describe(&self, state: &Self::State) -> String;
}

/// One step of a model.
pub struct Step<S, A> {
    pub action: A,
    pub state: S,
    /// Interesting things that happened, as bits.
    pub events: u64,
    /// A property that the step itself breaks.
    pub broken: Option<&'static str>,
}

/// What a search found.
#[derive(Debug)]
pub struct Outcome {
    pub states: usize,
    pub transitions: u64,
    /// Steps from the initial state to the farthest one.
    pub depth: usize,
    /// The largest frontier.
    pub widest: usize,
    /// Everything interesting that happened anywhere.
    pub events: u64,
    /// All states were visited, or the search ended with a finding.
    pub complete: bool,
    pub found: Option<Finding>,
}

/// A broken property and the shortest way to it.
#[derive(Debug)]
pub struct Finding {
    pub property: &'static str,
    pub trace: Vec<String>,
}

impl Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broken: {}", self.property)?;
        self.trace.iter().enumerate().try_for_each(|(n, line)| write!(f, "\n{n:>4}. {line}"))
    }
}

/// Fingerprints are hashes already.
#[derive(Default)]
struct Ready(u64);

impl Hasher for Ready {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("only fingerprints are kept")
    }
    fn write_u64(&mut self, fingerprint: u64) {
        self.0 = fingerprint;
    }
}

/// A quick hash of many small fields.
#[derive(Default)]
pub struct Fingerprint {
    sum: u64,
    word: u64,
    bytes: u32,
}

impl Fingerprint {
    fn fold(&mut self, word: u64) {
        let product = u128::from(self.sum ^ word ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93;
        self.sum = (product as u64) ^ ((product >> 64) as u64).rotate_left(23);
    }
}

impl Hasher for Fingerprint {
    fn finish(&self) -> u64 {
        let mut last = Fingerprint { sum: self.sum, ..Fingerprint::default() };
        last.fold(self.word);
        last.fold(u64::from(self.bytes));
        last.fold(0);
        last.sum
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.write_u8(*b));
    }
    fn write_u8(&mut self, byte: u8) {
        self.word = self.word << 8 | u64::from(byte);
        self.bytes += 1;
        if self.bytes.is_multiple_of(8) {
            self.fold(self.word);
            self.word = 0;
        }
    }
    fn write_u32(&mut self, n: u32) {
        n.to_le_bytes().into_iter().for_each(|b| self.write_u8(b));
    }
    /// Discriminants and lengths: all are small.
    fn write_usize(&mut self, n: usize) {
        self.write_u8(n as u8);
    }
    fn write_isize(&mut self, n: isize) {
        self.write_u8(n as u8);
    }
}

struct Log {
    /// Where each state was first reached from, and by which of its steps.
    from: Vec<(u32, u16)>,
    seen: HashSet<u64, BuildHasherDefault<Ready>>,
}

/// Visits everything, or stops at the first broken property or beyond `states_max` states.
pub fn explore<M: Model>(model: &M, states_max: usize) -> Outcome {
    let first = model.initial();
    let mut log = Log { from: vec![(0, 0)], seen: HashSet::default() };
    log.seen.insert(model.fingerprint(&first));
    let mut outcome =
        Outcome { states: 1, transitions: 0, depth: 0, widest: 1, events: 0, complete: false, found: None };
    let mut frontier = vec![(0u32, first)];
    let mut steps = Vec::new();
    while !frontier.is_empty() {
        let mut ahead = Vec::new();
        for (at, state) in &frontier {
            model.next(state, &mut steps);
            for (n, step) in steps.drain(..).enumerate() {
                outcome.transitions += 1;
                outcome.events |= step.events;
                let broken = step.broken.or_else(|| model.check(&step.state).err());
                if let Some(property) = broken {
                    let trace = tell(model, &log, *at, n);
                    outcome.states = log.from.len();
                    outcome.depth += 1;
                    outcome.complete = true;
                    outcome.found = Some(Finding { property, trace });
                    return outcome;
                }
                if log.seen.insert(model.fingerprint(&step.state)) {
                    ahead.push((log.from.len() as u32, step.state));
                    log.from.push((*at, n as u16));
                }
            }
            if log.from.len() > states_max {
                outcome.states = log.from.len();
                return outcome;
            }
        }
        outcome.depth += usize::from(!ahead.is_empty());
        outcome.widest = outcome.widest.max(ahead.len());
        frontier = ahead;
    }
    outcome.states = log.from.len();
    outcome.complete = true;
    outcome
}

/// Walks to a state again and takes one more step.
fn tell<M: Model>(model: &M, log: &Log, at: u32, last: usize) -> Vec<String> {
    let mut path = vec![last];
    let mut at = at;
    while at != 0 {
        let (from, step) = log.from[at as usize];
        path.push(usize::from(step));
        at = from;
    }
    let mut state = model.initial();
    let mut lines = vec![model.describe(&state)];
    let mut steps = Vec::new();
    for n in path.into_iter().rev() {
        model.next(&state, &mut steps);
        let step = steps.swap_remove(n);
        steps.clear();
        state = step.state;
        lines.push(format!("{}\n        {}", step.action, model.describe(&state)));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two counters up to a limit; their order does not matter.
    struct Counters(u8);

    impl Model for Counters {
        type State = [u8; 2];
        type Action = String;

        fn initial(&self) -> [u8; 2] {
            [0, 0]
        }
        fn next(&self, s: &[u8; 2], out: &mut Vec<Step<[u8; 2], String>>) {
            for i in (0..2).filter(|i| s[*i] < self.0) {
                let mut state = *s;
                state[i] += 1;
                let events = u64::from(state[0] == state[1]);
                out.push(Step { action: format!("count {i}"), state, events, broken: None });
            }
        }
        fn check(&self, s: &[u8; 2]) -> Result<(), &'static str> {
            if s[0] + s[1] < 7 { Ok(()) } else { Err("less than seven") }
        }
        fn fingerprint(&self, s: &[u8; 2]) -> u64 {
            u64::from(s[0].min(s[1])) << 8 | u64::from(s[0].max(s[1]))
        }
        fn describe(&self, s: &[u8; 2]) -> String {
            format!("{s:?}")
        }
    }

    #[test]
    fn every_state_is_visited_once() {
        let all = explore(&Counters(3), 100);
        assert!(all.complete && all.found.is_none());
        // Unordered pairs of 0 to 3.
        assert_eq!((all.states, all.depth, all.events), (10, 6, 1));
        assert!(!explore(&Counters(3), 5).complete);
    }

    #[test]
    fn a_finding_comes_with_a_shortest_way() {
        let found = explore(&Counters(9), 1_000).found.expect("seven is reached");
        assert_eq!(found.property, "less than seven");
        assert_eq!(found.trace.len(), 8, "{found}");
        assert!(
            found.trace[7].ends_with("[7, 0]")
                || found.trace[7].contains('7')
                || found.trace[7].contains('4')
        );
    }

    #[test]
    fn fingerprints_tell_fields_apart() {
        let of = |bytes: &[u8]| {
            let mut h = Fingerprint::default();
            h.write(bytes);
            h.finish()
        };
        let all = [&[][..], &[0], &[0, 0], &[1, 0], &[0, 1], &[0; 8], &[0; 9], &[0; 16]];
        let distinct: HashSet<u64> = all.iter().map(|b| of(b)).collect();
        assert_eq!(distinct.len(), all.len());
    }
}
