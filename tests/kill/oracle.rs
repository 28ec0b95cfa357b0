//! Compares the conversations with the acknowledged turns and lists the faults.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::ledger::{Conversation, Deletion, Ledger};

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// The conversations in the database, without expired ones and tombstones.
pub type Rows = BTreeMap<String, Vec<Message>>;

/// Lists all faults at the end of the test.
pub fn judge(ledger: &Ledger, rows: &Rows) -> Vec<String> {
    let mut faults = ledger.violations.clone();
    for (id, known) in &ledger.conversations {
        let found = match (known.deletion, rows.get(id)) {
            (Deletion::Acknowledged, Some(_)) => vec!["is in the database after its deletion".to_owned()],
            (Deletion::None, None) => {
                vec![format!("is missing with {} acknowledged turns", known.turns.len())]
            }
            (Deletion::Acknowledged | Deletion::Unknown, None) => vec![],
            (_, Some(messages)) => missing(known, messages),
        };
        faults.extend(found.iter().map(|fault| format!("conversation {id} {fault}")));
    }
    for (id, messages) in rows {
        faults.extend(malformed(messages).iter().map(|fault| format!("conversation {id} {fault}")));
    }
    faults.extend(misplaced(ledger, rows));
    faults
}

/// Lists the faults of a read that began after the acknowledgement of all turns in `known`.
pub fn judge_read(known: &Conversation, messages: &[Message]) -> Vec<String> {
    let mut faults = missing(known, messages);
    faults.extend(malformed(messages));
    if known.deletion == Deletion::Acknowledged {
        faults.push("is readable after its deletion".to_owned());
    }
    faults
}

/// Checks that each acknowledged turn exists at its acknowledged number, and in its client's order.
fn missing(known: &Conversation, messages: &[Message]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut last: BTreeMap<usize, usize> = BTreeMap::new();
    for turn in &known.turns {
        let Some(position) = user_texts(messages).position(|text| text == turn.text) else {
            faults.push(format!("has lost {turn} among {} turns", messages.len() / 2));
            continue;
        };
        if position + 1 != turn.number {
            faults.push(format!("has {turn} as turn {}", position + 1));
        }
        if last.insert(turn.client, position).is_some_and(|before| before >= position) {
            faults.push(format!("has {turn} before an earlier turn of client {}", turn.client));
        }
    }
    faults
}

/// Checks that user and assistant alternate, each reply quotes its turn, and no text occurs twice.
fn malformed(messages: &[Message]) -> Vec<String> {
    let mut faults = Vec::new();
    for (at, turn) in messages.chunks(2).enumerate() {
        let [user, assistant] = turn else {
            faults.push(format!("ends without a reply: {turn:?}"));
            continue;
        };
        let answer = format!("This is turn {}. You said: {}", at + 1, user.content);
        let is_answered = assistant.content == answer
            || assistant.content.strip_prefix(&answer).is_some_and(|rest| rest.starts_with(" (before that"));
        if (user.role.as_str(), assistant.role.as_str()) != ("user", "assistant") || !is_answered {
            faults.push(format!("has a malformed turn {}: {turn:?}", at + 1));
        }
    }
    let mut seen = BTreeSet::new();
    let twice = user_texts(messages).filter(|text| !seen.insert(*text));
    faults.extend(twice.map(|text| format!("has {text:?} twice")));
    faults
}

/// Checks that no text is in two conversations, and no refused text is in any.
fn misplaced(ledger: &Ledger, rows: &Rows) -> Vec<String> {
    let mut homes: BTreeMap<&str, &str> = BTreeMap::new();
    let mut faults = Vec::new();
    for (id, messages) in rows {
        for text in user_texts(messages) {
            if let Some(other) = homes.insert(text, id).filter(|other| other != id) {
                faults.push(format!("{text:?} is in both {other} and {id}"));
            }
            if ledger.refused.contains(text) {
                faults.push(format!("{text:?} is in {id} although the daemon refused it"));
            }
        }
    }
    faults
}

fn user_texts(messages: &[Message]) -> impl Iterator<Item = &str> {
    let of_user = messages.iter().filter(|message| message.role == "user");
    of_user.map(|message| message.content.as_str())
}

mod tests {
    use super::*;
    use crate::ledger::AcknowledgedTurn;

    fn conversation(texts: &[&str]) -> Vec<Message> {
        let message = |role: &str, content: String| Message { role: role.into(), content };
        let turn = |(at, text): (usize, &&str)| {
            let answer = format!("This is turn {}. You said: {text}", at + 1);
            [message("user", (*text).into()), message("assistant", answer)]
        };
        texts.iter().enumerate().flat_map(turn).collect()
    }

    /// Returns a ledger in which client 1 has the acknowledged turns `a`, `b` and `c` of conversation `x`.
    fn ledger() -> Ledger {
        let mut ledger = Ledger::default();
        for (at, text) in ["a", "b", "c"].into_iter().enumerate() {
            let durability = "stored".to_owned();
            let turn =
                AcknowledgedTurn { client: 1, text: text.into(), number: at + 1, durability, kills: 0 };
            ledger.acknowledge("x", turn);
        }
        ledger
    }

    fn rows(of_x: &[&str]) -> Rows {
        Rows::from([("x".to_owned(), conversation(of_x))])
    }

    #[track_caller]
    fn assert_finds(ledger: &Ledger, rows: &Rows, text: &str) {
        let faults = judge(ledger, rows);
        assert!(faults.iter().any(|fault| fault.contains(text)), "{text:?} is not among {faults:?}");
    }

    #[test]
    fn judge_acknowledged_turns_and_unknown_one_finds_no_fault() {
        assert_eq!(judge(&ledger(), &rows(&["a", "b", "c"])), [""; 0]);
        assert_eq!(judge(&ledger(), &rows(&["a", "b", "c", "unknown"])), [""; 0]);
    }

    #[test]
    fn judge_lost_turn_finds_fault() {
        assert_finds(&ledger(), &rows(&["a", "b"]), "lost \"c\"");
        assert_finds(&ledger(), &rows(&["a", "c"]), "lost \"b\"");
        assert_finds(&ledger(), &Rows::new(), "missing with 3");
    }

    #[test]
    fn judge_doubled_turn_finds_fault_even_if_unacknowledged() {
        assert_finds(&ledger(), &rows(&["a", "b", "c", "c"]), "\"c\" twice");
        assert_finds(&ledger(), &rows(&["a", "b", "c", "unknown", "unknown"]), "\"unknown\" twice");
        let mut elsewhere = rows(&["a", "b", "c"]);
        elsewhere.insert("y".to_owned(), conversation(&["c"]));
        assert_finds(&ledger(), &elsewhere, "both x and y");
    }

    #[test]
    fn judge_turns_in_other_order_or_position_finds_fault() {
        assert_finds(&ledger(), &rows(&["a", "c", "b"]), "before an earlier turn of client 1");
        assert_finds(
            &ledger(),
            &rows(&["other", "a", "b", "c"]),
            "\"a\" (turn 1, stored after 0 kills) as turn 2",
        );
    }

    #[test]
    fn judge_conversation_after_acknowledged_delete_finds_fault() {
        let mut ledger = ledger();
        ledger.set_deletion("x", Deletion::Unknown);
        assert_eq!(judge(&ledger, &rows(&["a", "b", "c"])), [""; 0]);
        assert_eq!(judge(&ledger, &Rows::new()), [""; 0]);
        assert_finds(&ledger, &rows(&["a"]), "lost \"b\"");
        ledger.set_deletion("x", Deletion::Acknowledged);
        assert_eq!(judge(&ledger, &Rows::new()), [""; 0]);
        assert_finds(&ledger, &rows(&["a", "b", "c"]), "is in the database after its deletion");
    }

    #[test]
    fn judge_refused_turn_in_database_finds_fault() {
        let mut ledger = ledger();
        ledger.refuse("no".to_owned());
        assert_finds(&ledger, &rows(&["a", "b", "c", "no"]), "\"no\" is in x although the daemon refused it");
    }

    #[test]
    fn judge_messages_that_do_not_alternate_finds_fault() {
        let mut half = rows(&["a", "b", "c"]);
        half.get_mut("x").unwrap().pop();
        assert_finds(&ledger(), &half, "ends without a reply");
        let mut swapped = rows(&["a", "b", "c"]);
        swapped.get_mut("x").unwrap().swap(3, 5);
        assert_finds(&ledger(), &swapped, "malformed turn 2");
    }

    #[test]
    fn judge_read_with_lost_turn_or_after_delete_finds_fault() {
        let mut known = ledger().known("x");
        assert_eq!(judge_read(&known, &conversation(&["a", "b", "c", "d"])), [""; 0]);
        assert_eq!(judge_read(&known, &conversation(&["a", "b"])).len(), 1);
        assert_eq!(judge_read(&known, &conversation(&["a", "b", "c", "c"])).len(), 1);
        known.deletion = Deletion::Acknowledged;
        assert_eq!(judge_read(&known, &conversation(&["a", "b", "c"])).len(), 1);
    }

    #[test]
    fn judge_keeps_violations_recorded_during_the_test() {
        let mut ledger = ledger();
        ledger.violations.push("a strange answer".to_owned());
        assert_finds(&ledger, &rows(&["a", "b", "c"]), "a strange answer");
    }
}
