//! Compares the conversations with the acknowledged turns and lists the faults.

use std::collections::BTreeMap;

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

/// Checks that each acknowledged turn exists with its answer, and after the turns that were acknowledged before its request.
fn missing(known: &Conversation, messages: &[Message]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut last_of_earlier = vec![None];
    for turn in &known.turns {
        let position = user_texts(messages).position(|text| text == turn.text);
        let last = last_of_earlier.last().copied().flatten();
        last_of_earlier.push(last.max(position));
        let Some(position) = position else {
            faults.push(format!("has lost {turn} among {} turns", messages.len() / 2));
            continue;
        };
        let answer = messages.get(2 * position + 1).map(|message| message.content.as_str());
        if answer != Some(&turn.answer) {
            faults.push(format!("has {turn} with the answer {answer:?} instead of {:?}", turn.answer));
        }
        if Answer::of(&turn.answer).is_none_or(|answer| answer.number <= turn.earlier) {
            faults.push(format!("has {turn}, whose answer {:?} ignores an earlier turn", turn.answer));
        }
        if last_of_earlier[turn.earlier].is_some_and(|earlier| earlier >= position) {
            faults.push(format!("has {turn} before an earlier turn"));
        }
    }
    faults
}

/// Checks that user and assistant alternate, each reply fits its turn, and no text occurs twice.
fn malformed(messages: &[Message]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut places = BTreeMap::new();
    for (at, turn) in messages.chunks(2).enumerate() {
        let [user, assistant] = turn else {
            faults.push(format!("ends without a reply: {turn:?}"));
            continue;
        };
        let is_answered = Answer::of(&assistant.content).is_some_and(|answer| answer.fits(user, at, &places));
        if (user.role.as_str(), assistant.role.as_str()) != ("user", "assistant") || !is_answered {
            faults.push(format!("has a malformed turn {}: {turn:?}", at + 1));
        }
        if places.insert(user.content.as_str(), at).is_some() {
            faults.push(format!("has {:?} twice", user.content));
        }
    }
    faults
}

/// The parts of a reply of the daemon: "This is turn 2. You said: b (before that: a)".
struct Answer<'a> {
    /// One more than the turns that the daemon had read. Others may append between the read and the append.
    number: usize,
    text: &'a str,
    before: Option<&'a str>,
}

impl<'a> Answer<'a> {
    fn of(reply: &'a str) -> Option<Self> {
        let (number, text) = reply.strip_prefix("This is turn ")?.split_once(". You said: ")?;
        let number = number.parse().ok()?;
        Some(match text.split_once(" (before that: ") {
            Some((text, before)) => Self { number, text, before: Some(before.strip_suffix(')')?) },
            None => Self { number, text, before: None },
        })
    }

    /// Checks the reply to the turn at this place. `places` has the turns before it.
    fn fits(&self, user: &Message, at: usize, places: &BTreeMap<&str, usize>) -> bool {
        let is_quote_before = match self.before {
            // The last turn that the daemon had read. A late turn of another request may come before it.
            Some(before) => places.get(before).is_some_and(|place| place + 2 >= self.number),
            None => self.number == 1,
        };
        self.text == user.content && self.number <= at + 1 && is_quote_before
    }
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
            let before = at.checked_sub(1).map(|before| texts[before]);
            [message("user", (*text).into()), message("assistant", answer(at + 1, text, before))]
        };
        texts.iter().enumerate().flat_map(turn).collect()
    }

    fn answer(number: usize, text: &str, before: Option<&str>) -> String {
        let quote = before.map(|before| format!(" (before that: {before})")).unwrap_or_default();
        format!("This is turn {number}. You said: {text}{quote}")
    }

    /// Returns a ledger in which one client has the acknowledged turns `a`, `b` and `c` of conversation `x`.
    fn ledger() -> Ledger {
        ledger_of(&[("a", 1, None, 0), ("b", 2, Some("a"), 1), ("c", 3, Some("b"), 2)])
    }

    /// Returns a ledger of acknowledged turns: text, number and quote of the answer, and turns acknowledged before the request.
    fn ledger_of(turns: &[(&str, usize, Option<&str>, usize)]) -> Ledger {
        let mut ledger = Ledger::default();
        for (text, number, before, earlier) in turns {
            let (text, answer) = ((*text).to_owned(), answer(*number, text, *before));
            let durability = "stored".to_owned();
            ledger
                .acknowledge("x", AcknowledgedTurn { text, answer, earlier: *earlier, durability, kills: 0 });
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

    /// `b` and `c` ran at once: both had read `a` alone.
    #[test]
    fn judge_concurrent_turns_accepts_each_order() {
        let ledger = ledger_of(&[("a", 1, None, 0), ("b", 2, Some("a"), 1), ("c", 2, Some("a"), 1)]);
        let mut rows = rows(&["a", "b", "c"]);
        let messages = rows.get_mut("x").unwrap();
        messages[5].content = answer(2, "c", Some("a"));
        assert_eq!(judge(&ledger, &rows), [""; 0]);
        let messages = rows.get_mut("x").unwrap();
        messages[2..].rotate_left(2);
        assert_eq!(judge(&ledger, &rows), [""; 0]);
    }

    #[test]
    fn judge_turns_in_other_order_finds_fault() {
        let mut rows = rows(&["a", "b", "c"]);
        rows.get_mut("x").unwrap()[2..].rotate_left(2);
        assert_finds(&ledger(), &rows, "\"c\" (after 2 others, stored after 0 kills) before an earlier turn");
        assert_finds(&ledger(), &rows, "malformed turn 2");
    }

    #[test]
    fn judge_answer_that_ignores_an_acknowledged_turn_finds_fault() {
        let ledger = ledger_of(&[("a", 1, None, 0), ("b", 2, Some("a"), 1), ("c", 2, Some("a"), 2)]);
        let mut rows = rows(&["a", "b", "c"]);
        rows.get_mut("x").unwrap()[5].content = answer(2, "c", Some("a"));
        assert_finds(&ledger, &rows, "ignores an earlier turn");
    }

    #[test]
    fn judge_answer_other_than_acknowledged_or_too_high_finds_fault() {
        let mut rows = rows(&["a", "b", "c"]);
        rows.get_mut("x").unwrap()[5].content = answer(2, "c", Some("a"));
        assert_finds(&ledger(), &rows, "with the answer");
        for (number, before) in [(4, Some("b")), (3, Some("d")), (3, Some("a")), (3, None)] {
            rows.get_mut("x").unwrap()[5].content = answer(number, "c", before);
            assert_finds(&Ledger::default(), &rows, "malformed turn 3");
        }
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
