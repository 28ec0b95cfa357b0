//! Holds what is there against what was acknowledged, and says what is wrong.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::ledger::{Conversation, Fate, Ledger};

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// The conversations in the database; those that are expired or have no value are not.
pub type Rows = BTreeMap<String, Vec<Message>>;

/// Everything that is wrong in the end.
pub fn judge(ledger: &Ledger, rows: &Rows) -> Vec<String> {
    let mut faults = ledger.complaints.clone();
    for (id, known) in &ledger.conversations {
        let wrong = match (known.fate, rows.get(id)) {
            (Fate::Deleted, Some(_)) => vec!["was deleted and is there".to_owned()],
            (Fate::Kept, None) => vec![format!("is gone with {} acknowledged turns", known.turns.len())],
            (Fate::Deleted | Fate::MayBeGone, None) => vec![],
            (_, Some(messages)) => missing(known, messages),
        };
        faults.extend(wrong.iter().map(|wrong| format!("conversation {id} {wrong}")));
    }
    for (id, messages) in rows {
        faults.extend(malformed(messages).iter().map(|wrong| format!("conversation {id} {wrong}")));
    }
    faults.extend(strays(ledger, rows));
    faults
}

/// What is wrong with a conversation that was read after all of `known` had been acknowledged.
pub fn judge_read(known: &Conversation, messages: &[Message]) -> Vec<String> {
    let mut faults = missing(known, messages);
    faults.extend(malformed(messages));
    if known.fate == Fate::Deleted {
        faults.push("was deleted and is read".to_owned());
    }
    faults
}

/// Each acknowledged turn is there, where its answer said, and each client's are in its order.
fn missing(known: &Conversation, messages: &[Message]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut last: BTreeMap<usize, usize> = BTreeMap::new();
    for turn in &known.turns {
        let Some(place) = said(messages).position(|text| text == turn.text) else {
            faults.push(format!("has lost {turn} among {} turns", messages.len() / 2));
            continue;
        };
        if place + 1 != turn.place {
            faults.push(format!("has {turn} as turn {}", place + 1));
        }
        if last.insert(turn.client, place).is_some_and(|before| before >= place) {
            faults.push(format!("has {turn} before what client {} said earlier", turn.client));
        }
    }
    faults
}

/// User and assistant take turns, the assistant answers what was said, and nothing was said twice.
fn malformed(messages: &[Message]) -> Vec<String> {
    let mut faults = Vec::new();
    for (at, turn) in messages.chunks(2).enumerate() {
        let [user, assistant] = turn else {
            faults.push(format!("ends without an answer: {turn:?}"));
            continue;
        };
        let answer = format!("This is turn {}. You said: {}", at + 1, user.content);
        let is_answered = assistant.content == answer
            || assistant.content.strip_prefix(&answer).is_some_and(|rest| rest.starts_with(" (before that"));
        if (user.role.as_str(), assistant.role.as_str()) != ("user", "assistant") || !is_answered {
            faults.push(format!("goes wrong in turn {}: {turn:?}", at + 1));
        }
    }
    let mut seen = BTreeSet::new();
    let twice = said(messages).filter(|text| !seen.insert(*text));
    faults.extend(twice.map(|text| format!("has {text:?} twice")));
    faults
}

/// No text is in two conversations, and none that was refused is anywhere.
fn strays(ledger: &Ledger, rows: &Rows) -> Vec<String> {
    let mut homes: BTreeMap<&str, &str> = BTreeMap::new();
    let mut faults = Vec::new();
    for (id, messages) in rows {
        for text in said(messages) {
            if let Some(other) = homes.insert(text, id).filter(|other| other != id) {
                faults.push(format!("{text:?} is in both {other} and {id}"));
            }
            if ledger.refused.contains(text) {
                faults.push(format!("{text:?} was refused and is in {id}"));
            }
        }
    }
    faults
}

fn said(messages: &[Message]) -> impl Iterator<Item = &str> {
    let of_user = messages.iter().filter(|message| message.role == "user");
    of_user.map(|message| message.content.as_str())
}

mod tests {
    use super::*;
    use crate::ledger::Turn;

    fn conversation(texts: &[&str]) -> Vec<Message> {
        let message = |role: &str, content: String| Message { role: role.into(), content };
        let turn = |(at, text): (usize, &&str)| {
            let answer = format!("This is turn {}. You said: {text}", at + 1);
            [message("user", (*text).into()), message("assistant", answer)]
        };
        texts.iter().enumerate().flat_map(turn).collect()
    }

    /// Client 1 was told that `a`, `b` and `c` are kept in `x`.
    fn ledger() -> Ledger {
        let mut ledger = Ledger::default();
        for (at, text) in ["a", "b", "c"].into_iter().enumerate() {
            let durability = "stored".to_owned();
            let turn = Turn { client: 1, text: text.into(), place: at + 1, durability, kills: 0 };
            ledger.acknowledge("x", turn);
        }
        ledger
    }

    fn rows(of_x: &[&str]) -> Rows {
        Rows::from([("x".to_owned(), conversation(of_x))])
    }

    #[track_caller]
    fn assert_complains(ledger: &Ledger, rows: &Rows, of: &str) {
        let faults = judge(ledger, rows);
        assert!(faults.iter().any(|fault| fault.contains(of)), "{of:?} is not among {faults:?}");
    }

    #[test]
    fn what_was_acknowledged_and_perhaps_more_is_no_fault() {
        assert_eq!(judge(&ledger(), &rows(&["a", "b", "c"])), [""; 0]);
        assert_eq!(judge(&ledger(), &rows(&["a", "b", "c", "unknown"])), [""; 0]);
    }

    #[test]
    fn a_lost_turn_is_a_fault() {
        assert_complains(&ledger(), &rows(&["a", "b"]), "lost \"c\"");
        assert_complains(&ledger(), &rows(&["a", "c"]), "lost \"b\"");
        assert_complains(&ledger(), &Rows::new(), "gone with 3");
    }

    #[test]
    fn a_doubled_turn_is_a_fault_also_where_it_was_not_acknowledged() {
        assert_complains(&ledger(), &rows(&["a", "b", "c", "c"]), "\"c\" twice");
        assert_complains(&ledger(), &rows(&["a", "b", "c", "unknown", "unknown"]), "\"unknown\" twice");
        let mut elsewhere = rows(&["a", "b", "c"]);
        elsewhere.insert("y".to_owned(), conversation(&["c"]));
        assert_complains(&ledger(), &elsewhere, "both x and y");
    }

    #[test]
    fn turns_in_another_order_or_place_are_a_fault() {
        assert_complains(&ledger(), &rows(&["a", "c", "b"]), "before what client 1 said");
        assert_complains(
            &ledger(),
            &rows(&["other", "a", "b", "c"]),
            "\"a\" (turn 1, stored after 0 kills) as turn 2",
        );
    }

    #[test]
    fn a_resurrected_conversation_is_a_fault_and_a_doubtful_one_is_not() {
        let mut ledger = ledger();
        ledger.doom("x", Fate::MayBeGone);
        assert_eq!(judge(&ledger, &rows(&["a", "b", "c"])), [""; 0]);
        assert_eq!(judge(&ledger, &Rows::new()), [""; 0]);
        assert_complains(&ledger, &rows(&["a"]), "lost \"b\"");
        ledger.doom("x", Fate::Deleted);
        assert_eq!(judge(&ledger, &Rows::new()), [""; 0]);
        assert_complains(&ledger, &rows(&["a", "b", "c"]), "was deleted and is there");
    }

    #[test]
    fn what_was_refused_and_is_there_is_a_fault() {
        let mut ledger = ledger();
        ledger.refuse("no".to_owned());
        assert_complains(&ledger, &rows(&["a", "b", "c", "no"]), "\"no\" was refused");
    }

    #[test]
    fn messages_that_do_not_take_turns_are_a_fault() {
        let mut half = rows(&["a", "b", "c"]);
        half.get_mut("x").unwrap().pop();
        assert_complains(&ledger(), &half, "ends without an answer");
        let mut swapped = rows(&["a", "b", "c"]);
        swapped.get_mut("x").unwrap().swap(3, 5);
        assert_complains(&ledger(), &swapped, "goes wrong in turn 2");
    }

    #[test]
    fn a_read_without_an_acknowledged_turn_is_a_fault_and_so_is_one_after_a_delete() {
        let mut known = ledger().known("x");
        assert_eq!(judge_read(&known, &conversation(&["a", "b", "c", "d"])), [""; 0]);
        assert_eq!(judge_read(&known, &conversation(&["a", "b"])).len(), 1);
        assert_eq!(judge_read(&known, &conversation(&["a", "b", "c", "c"])).len(), 1);
        known.fate = Fate::Deleted;
        assert_eq!(judge_read(&known, &conversation(&["a", "b", "c"])).len(), 1);
    }

    #[test]
    fn what_was_wrong_while_it_happened_is_still_wrong_in_the_end() {
        let mut ledger = ledger();
        ledger.complaints.push("a strange answer".to_owned());
        assert_complains(&ledger, &rows(&["a", "b", "c"]), "a strange answer");
    }
}
