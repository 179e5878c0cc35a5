//! Which OSDs answer much slower than the others. Pure, like the rest of `decide`; volatile: a new leader begins anew.
//!
//! Every OSD tells how long operations took in windows of a few seconds: at its own disk, and at each peer (what it sent there,
//! until it was durable or read). Once a window each OSD is compared
//!
//! - by its own word with what the others say of theirs: a slow disk;
//! - by each peer's word with the others whom that peer works with, its own disk included: a slow disk, host or link. A
//!   peer that is slow itself finds everybody slow alike, and so accuses nobody.
//!
//! An OSD is an *outlier* of a window when its mean is `FACTOR` times that of the median of the others and above
//! `FLOOR_US`, by its own word or by that of most of its peers, two at least. It is not when it only has more to do: it
//! serves more than the others, and with what waits taken into account as fast as they do. When half of those that are known or more are
//! outliers, nobody is one: something else is wrong.
//!
//! The others may have had next to nothing to do in a window, above all when whom they are compared with leads the groups in use. What is
//! known of them from the minutes before counts then, and fades (`Known`); an OSD is judged by its last window alone.
//!
//! A window as an outlier adds to an OSD's score, one without takes away from it. It is *slow* from a score of
//! `SLOW_AT` until the score is back at zero, so that it takes a while both ways.

use crate::state::MonitorState;
use gabion_proto::ids::*;
use gabion_proto::limits::{LATENCY_PEERS_MAX, LATENCY_WINDOW, SLOW_OSDS_MAX};
use gabion_proto::pb;
use std::collections::{BTreeMap, BTreeSet};

/// So many times slower than the median of the others.
const FACTOR: u64 = 4;
/// Faster than this is never slow.
const FLOOR_US: u64 = 25_000;
/// Fewer operations than these in a window accuse nobody, unless they took very long.
const SAMPLES_MIN: u64 = 16;
/// Fewer than these say nothing of how fast the others are.
const COMPARED_MIN: u64 = 4;
/// Windows that are added up until there are enough.
const KNOWN_WINDOWS: u64 = 12;
const FEW_SAMPLES_MIN: u64 = 2;
const FEW_SAMPLES_US: u64 = 1_000_000;
/// Accusers that are needed, if the OSD's own word is not against it.
const ACCUSERS_MIN: usize = 2;
/// Windows as an outlier until an OSD is slow, and how far the score goes.
const SLOW_AT: u32 = 3;
const SCORE_MAX: u32 = 6;
/// Nothing is known of a slow OSD any more after so many windows in which nobody asked it for anything.
const FORGET_WINDOWS: u32 = 60;
const WINDOW_MS: u64 = LATENCY_WINDOW.as_millis() as u64;

/// Operations of one kind in one window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    pub count: u64,
    pub mean_us: u64,
}

impl Figures {
    fn of(f: Option<pb::LatencyFigures>) -> Option<Figures> {
        f.map(|f| Figures { count: f.count, mean_us: f.mean_us }).filter(|f| f.count > 0)
    }

    fn comparable(&self) -> bool {
        self.count >= COMPARED_MIN || self.says_enough()
    }

    fn spent_us(&self) -> u64 {
        self.count.saturating_mul(self.mean_us)
    }

    fn says_enough(&self) -> bool {
        self.count >= SAMPLES_MIN || (self.count >= FEW_SAMPLES_MIN && self.spent_us() >= FEW_SAMPLES_US)
    }

    /// What one operation takes of the time, given how many were there at once.
    fn served_us(&self, time_us: u64) -> u64 {
        let at_a_time_percent = (self.spent_us() / (time_us / 100).max(1)).max(100);
        self.mean_us.saturating_mul(100) / at_a_time_percent
    }
}

/// Operations of one kind: those of the last window, if they are enough to compare with, or else what several windows add up to.
#[derive(Clone, Copy, Debug)]
struct Known {
    figures: Figures,
    windows: u64,
    /// Of the last window alone.
    last: Option<Figures>,
}

impl Known {
    /// `None`: nothing is known any more.
    fn next(before: Option<Known>, last: Option<Figures>) -> Option<Known> {
        let before = match (before, last) {
            (Some(b), last) if !last.is_some_and(|l| l.comparable()) => b,
            (_, last) => return last.map(|figures| Known { figures, windows: 1, last: Some(figures) }),
        };
        let more = last.unwrap_or_default();
        let count = before.figures.count.saturating_add(more.count);
        let mean_us = before.figures.spent_us().saturating_add(more.spent_us()) / count.max(1);
        let windows = before.windows + 1;
        // What is older fades.
        let by = if windows > KNOWN_WINDOWS { 2 } else { 1 };
        let figures = Figures { count: count / by, mean_us };
        (figures.count > 0 || last.is_some()).then_some(Known { figures, windows: windows / by, last })
    }

    fn comparable(&self) -> Option<&Known> {
        self.figures.comparable().then_some(self)
    }

    /// How many there are in a window.
    fn per_window(&self) -> u64 {
        self.figures.count / self.windows
    }
}

/// Writes and reads.
type Both = [Option<Known>; 2];

/// What one OSD told of one window.
#[derive(Clone, Debug)]
struct Report {
    incarnation: Incarnation,
    number: u64,
    came_ms: u64,
    window_us: u64,
    /// Its own disk under its own number.
    peers: BTreeMap<OsdId, Both>,
}

/// Why an OSD is an outlier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evidence {
    pub reads: bool,
    pub mean_us: u64,
    /// Of the median of the others.
    pub others_us: u64,
    /// Peers that find it slow, of those that work with it; none: by its own word.
    pub accusers: usize,
    pub witnesses: usize,
}

#[derive(Clone, Debug)]
struct Record {
    incarnation: Incarnation,
    in_cluster: bool,
    score: u32,
    slow_since_ms: Option<u64>,
    last: Option<Evidence>,
    /// Windows without a word about it.
    silent: u32,
}

/// An OSD that is slow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slow {
    pub osd: OsdId,
    pub incarnation: Incarnation,
    pub since_ms: u64,
    pub evidence: Evidence,
}

/// See the module docs.
#[derive(Debug, Default)]
pub struct SlowDetector {
    reports: BTreeMap<OsdId, Report>,
    records: BTreeMap<OsdId, Record>,
    judged_ms: u64,
}

impl SlowDetector {
    /// Takes in the window of an OSD that is up as `incarnation`. What it says of OSDs that do not exist is dropped.
    pub fn report(
        &mut self,
        now_ms: u64,
        state: &MonitorState,
        osd: OsdId,
        incarnation: Incarnation,
        window: &pb::LatencyWindow,
    ) {
        let known = self.reports.get(&osd).filter(|r| r.incarnation == incarnation);
        if window.number == 0 || known.is_some_and(|r| r.number >= window.number) {
            return;
        }
        let told = window.peers.iter().take(LATENCY_PEERS_MAX).map(|p| (OsdId(p.osd), p));
        let told: BTreeMap<OsdId, [Option<Figures>; 2]> =
            told.map(|(o, p)| (o, [Figures::of(p.writes), Figures::of(p.reads)])).collect();
        let known = known.map(|r| &r.peers);
        let names: BTreeSet<OsdId> =
            told.keys().chain(known.iter().flat_map(|k| k.keys())).copied().collect();
        let peers = names.into_iter().filter(|o| state.map.up_osd(*o).is_some()).filter_map(|o| {
            let before = known.and_then(|k| k.get(&o)).copied().unwrap_or_default();
            let last = told.get(&o).copied().unwrap_or_default();
            let both = [Known::next(before[0], last[0]), Known::next(before[1], last[1])];
            both.iter().any(Option::is_some).then_some((o, both))
        });
        let report = Report {
            incarnation,
            number: window.number,
            came_ms: now_ms,
            window_us: window.length_ms.saturating_mul(1_000),
            peers: peers.collect(),
        };
        self.reports.insert(osd, report);
    }

    /// Once a window: compares what has come since the last time.
    pub fn tick(&mut self, now_ms: u64, state: &MonitorState) {
        if now_ms < self.judged_ms + WINDOW_MS {
            return;
        }
        let since_ms = std::mem::replace(&mut self.judged_ms, now_ms);
        let up = |osd: &OsdId, inc: Incarnation| state.map.up_osd(*osd).is_some_and(|o| o.incarnation == inc);
        self.reports.retain(|osd, r| up(osd, r.incarnation));
        let fresh: BTreeMap<OsdId, &Report> =
            self.reports.iter().filter(|(_, r)| r.came_ms > since_ms).map(|(o, r)| (*o, r)).collect();
        let verdict = compare(&fresh);
        // Who has booted again or was taken in again is judged anew.
        self.records.retain(|osd, r| {
            let info = state.map.osds.get(osd);
            info.is_some_and(|o| o.incarnation == r.incarnation && (r.in_cluster || !o.in_cluster))
        });
        for (osd, info) in &state.map.osds {
            let word = verdict.get(osd);
            if word.is_none() && !self.records.contains_key(osd) {
                continue;
            }
            let record = self.records.entry(*osd).or_insert(Record {
                incarnation: info.incarnation,
                in_cluster: info.in_cluster,
                score: 0,
                slow_since_ms: None,
                last: None,
                silent: 0,
            });
            record.in_cluster = info.in_cluster;
            record.judge(now_ms, word);
        }
        self.records.retain(|_, r| r.score > 0);
    }

    /// Those that are slow now.
    pub fn slow(&self) -> impl Iterator<Item = Slow> + '_ {
        let slow = self.records.iter().filter_map(|(osd, r)| {
            let (since_ms, evidence) = (r.slow_since_ms?, r.last.clone()?);
            Some(Slow { osd: *osd, incarnation: r.incarnation, since_ms, evidence })
        });
        slow.take(SLOW_OSDS_MAX)
    }

    pub fn is_slow(&self, osd: OsdId, incarnation: Incarnation) -> bool {
        self.records.get(&osd).is_some_and(|r| r.incarnation == incarnation && r.slow_since_ms.is_some())
    }
}

impl Record {
    fn judge(&mut self, now_ms: u64, word: Option<&Word>) {
        match word {
            Some(Word::Outlier(evidence)) => {
                self.last = Some(evidence.clone());
                self.score = (self.score + 1).min(SCORE_MAX);
                self.silent = 0;
            }
            Some(Word::Well) => {
                self.score = self.score.saturating_sub(1);
                self.silent = 0;
            }
            Some(Word::Unclear) => self.silent = 0,
            None => self.silent += 1,
        }
        if self.silent >= FORGET_WINDOWS {
            self.score = 0;
        }
        match self.score {
            0 => self.slow_since_ms = None,
            SLOW_AT.. => _ = self.slow_since_ms.get_or_insert(now_ms),
            _ => {}
        }
    }
}

/// What one window says of an OSD.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Word {
    Well,
    Outlier(Evidence),
    /// Too many are outliers, or what was slow was too little to tell.
    Unclear,
}

/// The median of what the others took: of an even number, the slower one of the two.
fn median(mut others: Vec<u64>) -> Option<u64> {
    others.sort_unstable();
    (others.len() >= 2).then(|| others[others.len() / 2])
}

/// What was told of everybody.
type View = BTreeMap<OsdId, Known>;

fn last(osd: OsdId, view: &View) -> Option<Figures> {
    view.get(&osd)?.last.filter(Figures::comparable)
}

/// The median of what the others have.
fn of_others(osd: OsdId, view: &View, what: impl Fn(&Known) -> u64) -> Option<u64> {
    median(view.iter().filter(|(o, _)| **o != osd).filter_map(|(_, k)| k.comparable()).map(what).collect())
}

/// What it took, and the median of the others, if `osd` is an outlier among them.
fn outlier(osd: OsdId, view: &View) -> Option<(u64, u64)> {
    let mean_us = last(osd, view)?.mean_us;
    let others_us = of_others(osd, view, |k| k.figures.mean_us)?;
    (mean_us >= FLOOR_US && mean_us >= others_us.saturating_mul(FACTOR)).then_some((mean_us, others_us))
}

/// Whether an OSD only has more to do than the others.
fn has_more_to_do(osd: OsdId, own: &View, window_us: u64) -> bool {
    let Some(mine) = last(osd, own) else { return false };
    let busier = of_others(osd, own, Known::per_window).is_some_and(|n| mine.count > n.saturating_add(n / 2));
    let served = of_others(osd, own, |k| k.figures.served_us(k.windows.saturating_mul(window_us)));
    busier && served.is_some_and(|others| mine.served_us(window_us) < others.saturating_mul(2))
}

/// Everybody of whom the last window says something.
fn compare(reports: &BTreeMap<OsdId, &Report>) -> BTreeMap<OsdId, Word> {
    let mut words: BTreeMap<OsdId, Word> = BTreeMap::new();
    let mut known: BTreeSet<OsdId> = BTreeSet::new();
    for (kind, reads) in [(0, false), (1, true)] {
        let of = |r: &Report, osd: &OsdId| r.peers.get(osd).and_then(|both| both[kind]);
        let own: View = reports.iter().filter_map(|(osd, r)| Some((*osd, of(r, osd)?))).collect();
        let views = reports.values().map(|r| {
            let told = r.peers.iter().filter_map(|(osd, both)| Some((*osd, both[kind]?)));
            told.collect::<View>()
        });
        let views: Vec<(OsdId, View)> = reports.keys().copied().zip(views).collect();
        let all = || views.iter().flat_map(|(_, v)| v.iter());
        known.extend(all().filter(|(_, k)| k.comparable().is_some()).map(|(o, _)| *o));
        let seen: BTreeSet<OsdId> =
            views.iter().flat_map(|(_, v)| v.keys().filter(|o| last(**o, v).is_some())).copied().collect();
        for osd in seen {
            let window_us = reports.get(&osd).map_or(WINDOW_MS * 1_000, |r| r.window_us);
            let excused = has_more_to_do(osd, &own, window_us);
            let looks_slow = outlier(osd, &own);
            let told_enough = last(osd, &own).is_some_and(|f| f.says_enough());
            let by_itself = looks_slow.filter(|_| told_enough);
            let compared = |v: &View| v.values().filter(|k| k.comparable().is_some()).count();
            let witnesses: Vec<&View> = views
                .iter()
                .filter(|(by, v)| {
                    *by != osd && last(osd, v).is_some_and(|f| f.says_enough()) && compared(v) > 2
                })
                .map(|(_, v)| v)
                .collect();
            let accusers: Vec<(u64, u64)> = witnesses.iter().filter_map(|v| outlier(osd, v)).collect();
            let accused = accusers.len() >= ACCUSERS_MIN && 2 * accusers.len() > witnesses.len();
            let evidence = match (by_itself, accused, excused) {
                (Some(evidence), _, false) => Some(evidence),
                (None, true, false) => accusers.iter().max().copied(),
                _ => None,
            };
            let word = match evidence {
                Some((mean_us, others_us)) => Word::Outlier(Evidence {
                    reads,
                    mean_us,
                    others_us,
                    accusers: accusers.len(),
                    witnesses: witnesses.len(),
                }),
                None if looks_slow.is_some() && !told_enough => Word::Unclear,
                None => Word::Well,
            };
            // One kind is enough.
            match words.get(&osd) {
                Some(Word::Outlier(_)) => {}
                Some(Word::Unclear) if word == Word::Well => {}
                _ => _ = words.insert(osd, word),
            }
        }
    }
    known.extend(words.keys());
    let outliers = words.values().filter(|w| matches!(w, Word::Outlier(_))).count();
    if 2 * outliers >= known.len() {
        words.values_mut().filter(|w| matches!(w, Word::Outlier(_))).for_each(|w| *w = Word::Unclear);
    }
    words
}

#[cfg(test)]
mod tests;
