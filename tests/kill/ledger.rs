//! Records the daemon's responses. The oracle judges by these alone and knows nothing of how the daemon works.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Every promise that the daemon made to the clients.
#[derive(Debug, Default)]
pub struct Ledger {
    pub conversations: BTreeMap<String, Conversation>,
    /// Texts of turns that the daemon refused or never received. No conversation may contain them.
    pub refused: BTreeSet<String>,
    /// Violations that the clients saw during the test.
    pub violations: Vec<String>,
    pub counts: Counts,
}

/// A conversation as its clients know it.
#[derive(Debug, Clone, Default)]
pub struct Conversation {
    pub turns: Vec<AcknowledgedTurn>,
    pub deletion: Deletion,
}

/// An acknowledged turn.
#[derive(Debug, Clone)]
pub struct AcknowledgedTurn {
    pub text: String,
    /// The answer in the daemon's response. The conversation holds it after the text.
    pub answer: String,
    /// The number of turns of its conversation that the daemon had acknowledged before the request. They stand before this one.
    pub earlier: usize,
    /// `stored` or `queued`.
    pub durability: String,
    /// The number of kills before the acknowledgement.
    pub kills: usize,
}

/// The outcome of a client's attempts to delete a conversation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Deletion {
    #[default]
    None,
    /// A client tried to delete the conversation and does not know the outcome.
    Unknown,
    /// The daemon acknowledged the deletion.
    Acknowledged,
}

#[derive(Debug, Default)]
pub struct Counts {
    pub stored: usize,
    pub queued: usize,
    pub unknown: usize,
    pub failed: usize,
    pub started: usize,
    pub deleted: usize,
    /// Reads by their outcome.
    pub reads: BTreeMap<String, usize>,
}

impl Ledger {
    pub fn acknowledge(&mut self, conversation: &str, turn: AcknowledgedTurn) {
        match turn.durability.as_str() {
            "stored" => self.counts.stored += 1,
            "queued" => self.counts.queued += 1,
            _ => self.violations.push(format!("{conversation}: malformed acknowledgement: {turn}")),
        }
        self.conversations.entry(conversation.to_owned()).or_default().turns.push(turn);
    }

    pub fn refuse(&mut self, text: String) {
        self.counts.failed += 1;
        self.refused.insert(text);
    }

    pub fn set_deletion(&mut self, conversation: &str, deletion: Deletion) {
        self.conversations.entry(conversation.to_owned()).or_default().deletion = deletion;
    }

    /// Returns a snapshot of a conversation.
    pub fn known(&self, conversation: &str) -> Conversation {
        self.conversations.get(conversation).cloned().unwrap_or_default()
    }
}

impl fmt::Display for AcknowledgedTurn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { text, earlier, durability, kills, .. } = self;
        write!(f, "{text:?} (after {earlier} others, {durability} after {kills} kills)")
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
