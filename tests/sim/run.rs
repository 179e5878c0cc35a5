//! One run: storms of faults, calms between them, healing, the last reads and the comparison.

use crate::plan::{Form, Plan, Scenario};
use crate::rng::Rng;
use crate::tally::Tally;
use crate::world::{Pace, World};
use gabion_proto::map::Redundancy;

/// What a run has found.
pub type Finding = String;

/// Everything must be clean this long after the last fault.
const HEAL_MS: u64 = 120_000;

/// Longer than any pause.
const QUIET_MS: u64 = 10_000;

/// A broken link must be worked around within this time (rule P8).
const LINK_MS: u64 = 30_000;

/// Runs that do not come to enough operations, faults and map changes within so much virtual time are findings.
const RUN_MS_MAX: u64 = 4 * 3_600_000;

/// Runs one seed, of one kind of pool if it is given.
pub fn run(
    seed: u64,
    scenario: Scenario,
    pool: Option<Redundancy>,
    form: Form,
    trace: bool,
) -> Result<Tally, Finding> {
    let mut rng = Rng::new(seed);
    let plan = match (scenario, pool) {
        (Scenario::Faults, Some(redundancy)) => Plan::with(redundancy, &mut rng, form),
        (Scenario::Faults, None) => Plan::of(&mut rng, form),
        _ => Plan::in_scenario(scenario, pool, &mut rng),
    };
    finish(World::planned(plan, rng, trace))
}

/// Runs one seed of an erasure-coded pool whose groups are left with too few members.
pub fn undercut(seed: u64, pool: Redundancy, trace: bool) -> Result<Tally, String> {
    let mut rng = Rng::new(seed);
    let plan = Plan::with_too_few_members(pool, &mut rng);
    finish(World::planned(plan, rng, trace))
}

/// A run that is set up.
pub fn finish(mut w: World) -> Result<Tally, String> {
    let first_ms = w.plan.fault_phase_ms;
    go_on(&mut w, first_ms)?;
    match w.plan.scenario {
        Scenario::OneBrokenLink if w.longest_wait() > LINK_MS => {
            return Err(format!("one broken link, and a client has waited {} ms", w.longest_wait()));
        }
        Scenario::TooFewMembers => {
            w.undercut();
            go_on(&mut w, 0)?;
        }
        Scenario::StandIns => {
            w.let_others_stand_in();
            go_on(&mut w, 0)?;
        }
        Scenario::OneBrokenLink | Scenario::StaleCopies | Scenario::Damage => {}
        Scenario::Absence => {
            let measured = w.judge_absence()?;
            w.log(|| measured);
        }
        Scenario::Rebuild => {
            let measured = w.judge_rebuild()?;
            w.log(|| measured);
        }
        Scenario::SlowDisks { all } => {
            let measured = w.judge_slowness(all)?;
            w.log(|| measured);
        }
        Scenario::Faults => {
            while !w.has_seen_enough() {
                if w.now > RUN_MS_MAX {
                    return Err(format!("too little happens: {:?}", w.tally));
                }
                calm(&mut w)?;
                storm(&mut w)?;
            }
            if w.rng.chance(400) {
                settle(&mut w)?;
                w.clients.iter_mut().for_each(|c| c.draining = false);
                w.damage_something();
                undamaged(&mut w)?;
            }
        }
    }
    settle(&mut w)?;
    scrub_all(&mut w)?;
    read_all(&mut w)?;
    // What the last reads found bad is repaired meanwhile.
    go_on(&mut w, 5_000)?;
    w.compare_replicas()?;
    if let Redundancy::Erasure { m, .. } = w.redundancy()
        && !w.plan.rot
    {
        // Every row must decode without any of its shards. With min-size k the group still serves.
        w.may_serve_with_fewest();
        w.tally.degraded_checks += 1;
        for node in w.some_running(m as usize) {
            w.stop(node, false);
        }
        read_all(&mut w)?;
    }
    Ok(w.into_tally())
}

/// Time passes.
fn go_on(w: &mut World, ms: u64) -> Result<(), String> {
    let end = w.now + ms;
    w.run_until(end);
    match w.finding.take() {
        Some(f) => Err(format!("{f} (at {} ms)", w.now)),
        None => Ok(()),
    }
}

/// Time passes until something is so, or the bound is reached. False: it is not.
fn wait_until(w: &mut World, bound_ms: u64, done: impl Fn(&mut World) -> bool) -> Result<bool, String> {
    let deadline = w.now + bound_ms;
    while !done(w) {
        if w.now >= deadline {
            return Ok(false);
        }
        go_on(w, 500)?;
    }
    Ok(true)
}

fn storm(w: &mut World) -> Result<(), String> {
    w.make_trouble(Pace::Storm);
    let ms = w.rng.range(40_000, 120_000);
    go_on(w, ms)
}

/// Everything heals, and for a while nothing goes wrong, or little.
fn calm(w: &mut World) -> Result<(), String> {
    settle(w)?;
    w.tally.calms += 1;
    if w.rng.chance(300) {
        // What was paused sleeps on, and may take part in writes of clients that have died since.
        go_on(w, QUIET_MS)?;
        // What rots is bad until a scrub, or a read, has seen it.
        if w.all_clean() && !w.plan.rot && w.scrubs_done() {
            w.compare_replicas()?;
        }
    }
    w.tidy();
    for c in &mut w.clients {
        c.draining = false;
    }
    if w.rng.chance(500) {
        w.damage_something();
    }
    if !w.plan.form.quiet {
        let ms = w.rng.range(5_000, 20_000);
        return go_on(w, ms);
    }
    w.make_trouble(Pace::Quiet);
    let ms = w.rng.range(240_000, 960_000);
    go_on(w, ms)
}

/// What is damaged is whole again, before anything else happens to it.
fn undamaged(w: &mut World) -> Result<(), String> {
    w.faults_on = false;
    match wait_until(w, HEAL_MS, |w| w.damage.is_none())? {
        true => Ok(()),
        false => Err(format!("an object is still damaged\n{}", w.describe())),
    }
}

/// Faults stop. Soon everything is clean, every operation answered and nothing left of what was removed.
fn settle(w: &mut World) -> Result<(), String> {
    undamaged(w)?;
    w.heal();
    for c in &mut w.clients {
        c.draining = true;
    }
    if w.plan.scenario == Scenario::TooFewMembers && !wait_until(w, HEAL_MS, |w| w.all_clean())? {
        w.relieve();
    }
    let idle = |w: &World| w.clients.iter().all(|c| c.idle());
    wait_until(w, HEAL_MS, |w| w.all_clean() && idle(w) && w.leftovers() == 0)?;
    if !w.all_clean() {
        return Err(format!("not clean {HEAL_MS} ms after the last fault\n{}", w.describe()));
    }
    if !idle(w) {
        return Err(format!("operations unanswered {HEAL_MS} ms after the last fault\n{}", w.describe()));
    }
    match w.leftovers() {
        0 => Ok(()),
        n => Err(format!("{n} objects of removed volumes are still there")),
    }
}

/// What nobody reads rots; a deep scrub of everything must find it, and what rotted before.
fn scrub_all(w: &mut World) -> Result<(), String> {
    // What was paused when everything healed sleeps on: nobody may be away when only one good copy is left.
    go_on(w, QUIET_MS)?;
    wait_until(w, HEAL_MS, |w| w.all_clean())?;
    w.rot_cold();
    match wait_until(w, HEAL_MS, |w| w.scrubs_done())? {
        true => w.nothing_is_damaged(),
        false => Err(format!("scrubs do not end\n{}", w.describe())),
    }
}

/// Reads back everything that was ever written.
fn read_all(w: &mut World) -> Result<(), String> {
    for id in w.oracle.blocks() {
        let holder = w.seats[w.volume_of(id.volume)].holder;
        w.clients[holder].final_reads.push(id);
    }
    match wait_until(w, HEAL_MS, |w| w.clients.iter().all(|c| c.idle()))? {
        true => Ok(()),
        false => Err(format!("the last reads were not answered\n{}", w.describe())),
    }
}
