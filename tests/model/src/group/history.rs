//! Which version the object should have, from what members told (rule P3). Written after `osd/src/core/pg/history.rs`, without its code.

use super::state::*;

#[derive(Clone, Copy)]
struct Entry {
    activated: u8,
    /// What it has or should have.
    version: Version,
    missing: bool,
    uncertain: Option<Version>,
    /// What can be fetched there.
    copy: Option<Version>,
}

fn entry(told: &Told) -> Option<Entry> {
    let (activated, held) = (told.activated, Some(told.held).filter(|v| *v != Version::NONE));
    match told.missing {
        Some(n) => Some(Entry {
            activated,
            version: n.version,
            missing: true,
            uncertain: n.uncertain,
            copy: held.filter(|v| *v != n.version),
        }),
        None => held.map(|version| Entry {
            activated,
            version,
            missing: false,
            uncertain: None,
            copy: Some(version),
        }),
    }
}

/// Which rules hold, and what came of it.
#[derive(Clone, Copy, Default)]
pub struct Choice {
    pub needed: Needed,
    /// The version is rolled forward though somebody of the authority lacks it.
    pub forward: bool,
    /// An uncertain version was given up.
    pub back: bool,
    /// It goes on to a later version of the interval in which it was written.
    pub on: bool,
    /// It was a member of the last interval that may have served that raised the doubt.
    pub denied: bool,
}

/// Of which versions members are asked whether they were ever promised, by the interval that they were active in last.
pub struct Served<'a> {
    /// Intervals that may have served, newest last, and their members.
    pub intervals: &'a [(u8, Set)],
    /// Only the newest one's members can tell.
    pub only_last: bool,
}

impl Served<'_> {
    /// The lowest version that somebody has who must have this one if it was ever promised.
    fn denied(&self, told: &[Option<Told>; OSDS], version: Version) -> Option<Version> {
        let asked = if self.only_last { self.intervals.len().saturating_sub(1) } else { 0 };
        let denials = self.intervals[asked..].iter().flat_map(|(interval, acting)| {
            let there = members(*acting).filter_map(|m| told[m as usize]);
            there.filter(|t| t.activated == *interval).filter_map(|t| match t.missing {
                Some(n) => n.uncertain.filter(|_| n.version == version),
                None => Some(t.held).filter(|held| version.interval() == *interval && *held < version),
            })
        });
        denials.min()
    }
}

/// `None` while what is needed is with nobody who told.
pub fn choose(
    told: &[Option<Told>; OSDS],
    authority_rule: bool,
    only_doubt_goes_back: bool,
    served: Served<'_>,
    acting: Set,
) -> Option<Choice> {
    let mut choice = choose_hidden(told, authority_rule, only_doubt_goes_back, served)?;
    let needed = &mut choice.needed;
    let here = || members(acting).filter_map(|m| told[m as usize]).any(|t| has_it(&t, needed));
    // It is shown from there, and what is missed is that and nothing later.
    if needed.uncertain == Some(needed.version) && here() {
        needed.uncertain = None;
    }
    Some(choice)
}

fn choose_hidden(
    told: &[Option<Told>; OSDS],
    authority_rule: bool,
    only_doubt_goes_back: bool,
    served: Served<'_>,
) -> Option<Choice> {
    let mut all: Vec<Entry> = told.iter().flatten().filter_map(entry).collect();
    let mut denied = false;
    for e in &mut all {
        let denial = served.denied(told, e.version);
        denied |= e.uncertain.is_none() && denial.is_some();
        e.uncertain = e.uncertain.into_iter().chain(denial).min();
    }
    let highest = told.iter().flatten().map(|t| t.activated).max()?;
    let authority = || all.iter().filter(|e| e.activated == highest || !authority_rule);
    let holders = |version| all.iter().any(|e| e.copy == Some(version));
    let gives_up = |e: &Entry| (e.uncertain.is_some() || !only_doubt_goes_back) && !holders(e.version);
    let newest = |lost: bool| authority().filter(|e| gives_up(e) == lost).max_by_key(|e| e.version);
    let Some(best) = newest(false) else {
        let back = go_back(&all, newest(true)?, only_doubt_goes_back)?;
        return Some(Choice { denied, ..back });
    };
    let doubts = authority().filter_map(|e| match e.missing {
        true => e.uncertain.filter(|_| e.version == best.version),
        false => Some(e.version).filter(|v| *v != best.version),
    });
    let uncertain = doubts.chain(best.uncertain).min();
    let hidden = highest == best.version.interval();
    let uncertain = match (holders(best.version), uncertain) {
        (false, Some(_)) => {
            let lost = Entry { uncertain, ..*best };
            let back = go_back(&all, &lost, only_doubt_goes_back)?;
            return Some(Choice { denied, ..back });
        }
        (false, None) if hidden => Some(best.version),
        (_, uncertain) => uncertain,
    };
    let needed = Needed { version: best.version, uncertain };
    let forward = uncertain.is_some_and(|lowest| lowest < best.version);
    Some(Choice { needed, forward, back: newest(true).is_some(), on: false, denied })
}

fn go_back(all: &[Entry], lost: &Entry, only_doubt: bool) -> Option<Choice> {
    let lowest = lost.uncertain.or((!only_doubt).then_some(Version::NONE))?;
    let may = |v: Version| {
        // Also later ones, which have in them what is lost.
        let same = lowest < v && v != lost.version && v.interval() == lost.version.interval();
        v == lowest || same || (!only_doubt && v < lost.version)
    };
    let needed = match all.iter().filter_map(|e| e.copy).filter(|v| may(*v)).max() {
        Some(version) => {
            let hidden = version.interval() == lost.version.interval();
            let uncertain = Some(lowest.min(version)).filter(|l| hidden || *l < version);
            Needed { version, uncertain }
        }
        // Whoever holds another state of it may come back.
        None => Needed { version: lost.version, uncertain: lost.uncertain },
    };
    let (back, on) = (needed.version < lost.version, needed.version > lost.version);
    Some(Choice { needed, back, on, ..Choice::default() })
}

/// Whether a member that told so has the object as it should be.
pub fn has_it(told: &Told, needed: &Needed) -> bool {
    entry(told).is_some_and(|e| e.copy == Some(needed.version))
}
