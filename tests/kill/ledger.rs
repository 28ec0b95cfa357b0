//! What the clients were told. The oracle knows nothing else, and nothing of how the daemon works.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// What there is to hold the daemon to.
#[derive(Debug, Default)]
pub struct Ledger {
    pub conversations: BTreeMap<String, Conversation>,
    /// Texts of turns that the daemon refused, or never received: they are nowhere.
    pub refused: BTreeSet<String>,
    /// What was wrong while it happened.
    pub complaints: Vec<String>,
    pub counts: Counts,
}

/// A conversation that somebody was told of.
#[derive(Debug, Clone, Default)]
pub struct Conversation {
    pub turns: Vec<Turn>,
    pub fate: Fate,
}

/// An acknowledged turn.
#[derive(Debug, Clone)]
pub struct Turn {
    pub client: usize,
    pub text: String,
    /// Which turn of the conversation it is, by the daemon's answer; the first is 1.
    pub place: usize,
    /// `stored` or `queued`.
    pub durability: String,
    /// How many times the daemon had been killed by then.
    pub kills: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Fate {
    #[default]
    Kept,
    /// Somebody tried to delete it and does not know whether that worked.
    MayBeGone,
    /// The daemon said that it is deleted.
    Deleted,
}

#[derive(Debug, Default)]
pub struct Counts {
    pub stored: usize,
    pub queued: usize,
    pub unknown: usize,
    pub failed: usize,
    pub started: usize,
    pub deleted: usize,
    /// Reads by what they said of themselves.
    pub reads: BTreeMap<String, usize>,
}

impl Ledger {
    pub fn acknowledge(&mut self, conversation: &str, turn: Turn) {
        match turn.durability.as_str() {
            "stored" if turn.place > 0 => self.counts.stored += 1,
            "queued" if turn.place > 0 => self.counts.queued += 1,
            _ => self.complaints.push(format!("{conversation}: acknowledged strangely: {turn}")),
        }
        self.conversations.entry(conversation.to_owned()).or_default().turns.push(turn);
    }

    pub fn refuse(&mut self, text: String) {
        self.counts.failed += 1;
        self.refused.insert(text);
    }

    pub fn doom(&mut self, conversation: &str, fate: Fate) {
        self.conversations.entry(conversation.to_owned()).or_default().fate = fate;
    }

    /// What is known of a conversation at this moment.
    pub fn known(&self, conversation: &str) -> Conversation {
        self.conversations.get(conversation).cloned().unwrap_or_default()
    }
}

impl fmt::Display for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { text, place, durability, kills, .. } = self;
        write!(f, "{text:?} (turn {place}, {durability} after {kills} kills)")
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stored, queued, unknown, failed, started, deleted, reads } = self;
        writeln!(f, "turns: {stored} stored, {queued} queued, {unknown} unknown, {failed} failed")?;
        writeln!(f, "conversations: {started} started, {deleted} deleted")?;
        write!(f, "reads: {reads:?}")
    }
}
