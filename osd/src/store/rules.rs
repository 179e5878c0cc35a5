//! The rules that keep acknowledged data, by name, so that tests can switch one off and see what breaks.

/// See `osd/docs/format.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// S1: replay verifies fresh slots of records that no flush mark covers.
    FreshSlotsVerified,
    /// S1: a mark is durable before in-place writes change verified slots.
    MarkBeforeWriteBack,
    /// S1: a record with fresh slots is acknowledged after a flush.
    FlushBeforeAnswer,
    /// S2: a dropped slot waits for the trim.
    SlotReuse,
    /// S3: records are chained, under a new nonce after each start.
    Chain,
    /// S4: slots are flushed before the index forgets the journal.
    FlushBeforeIndex,
    /// S4: the index is durable before the tail moves.
    IndexBeforeTrim,
    /// S5: a discarded block is zero, not absent.
    DiscardIsZero,
    /// Answers go out in the order of the records.
    AnswersInOrder,
    /// The journal is applied from where the index ends.
    AppliedOnce,
}

#[cfg(not(test))]
pub const fn holds(_: Rule) -> bool {
    true
}

#[cfg(test)]
thread_local! {
    static OFF: std::cell::Cell<Option<Rule>> = const { std::cell::Cell::new(None) };
}

#[cfg(test)]
pub fn holds(rule: Rule) -> bool {
    OFF.get() != Some(rule)
}

/// Runs `f` without a rule, on this thread.
#[cfg(test)]
pub fn without<T>(rule: Rule, f: impl FnOnce() -> T) -> T {
    OFF.set(Some(rule));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
    OFF.set(None);
    result.unwrap_or_else(|e| std::panic::resume_unwind(e))
}
