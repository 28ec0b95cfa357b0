//! Compares the conversations with what the daemons have acknowledged, and lists the faults.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::daemon::Document;
use crate::log::{Ack, Line};

#[derive(Debug, Default)]
pub struct Counts {
    pub stored: usize,
    pub queued: usize,
    pub refused: usize,
    pub dead: usize,
}

pub fn judge(logs: &[Vec<Line>], documents: &BTreeMap<String, Document>) -> (Vec<String>, Counts) {
    let (mut faults, mut counts) = (Vec::new(), Counts::default());
    let mut places = HashMap::new();
    for (key, document) in documents {
        let updates = document.messages.iter().filter(|text| text.starts_with('u')).count();
        if updates != document.updates {
            faults.push(format!("{key} has {updates} texts of updates, and counts {}", document.updates));
        }
        for (place, text) in document.messages.iter().enumerate() {
            if places.insert(text.as_str(), (key.as_str(), place)).is_some() {
                faults.push(format!("{key} has {text} twice"));
            }
        }
    }
    for log in logs {
        faults.extend(judge_daemon(log, &places, &mut counts));
    }
    (faults, counts)
}

/// Checks the writes of one daemon. `places` has the conversation of each text, and its place in it.
fn judge_daemon(log: &[Line], places: &HashMap<&str, (&str, usize)>, counts: &mut Counts) -> Vec<String> {
    let dead: BTreeSet<&str> = texts(log, |line| if let Line::Dead(text) = line { Some(text) } else { None });
    let buried = texts(log, |line| if let Line::Buried(text) = line { Some(text) } else { None });
    counts.dead += dead.len();
    let mut faults = Vec::new();
    // Of each conversation: the lines with acknowledged writes, and the last place of all until there.
    let mut last_places: BTreeMap<&str, Vec<(usize, usize)>> = BTreeMap::new();
    for (at, line) in log.iter().enumerate() {
        let ack = match line {
            Line::Done(ack) => ack,
            Line::Fault(fault) => {
                faults.push(fault.clone());
                continue;
            }
            Line::Refused(text) => {
                counts.refused += 1;
                faults.extend(
                    places.contains_key(text.as_str()).then(|| format!("{text} is refused and present")),
                );
                continue;
            }
            _ => continue,
        };
        *if ack.is_queued { &mut counts.queued } else { &mut counts.stored } += 1;
        let place = places.get(ack.text.as_str()).filter(|(key, _)| *key == ack.key).map(|(_, place)| *place);
        let text = ack.text.as_str();
        // A queued update of a conversation takes the place of the one before it, and has its text too.
        let is_dead = dead.contains(text) || place.is_none() && buried.contains(text);
        faults.extend(presence_fault(ack, place, is_dead));
        let Some(place) = place else { continue };
        let before = last_places.entry(&ack.key).or_default();
        let earlier = before[..before.partition_point(|(line, _)| *line < ack.earlier)].last();
        if earlier.is_some_and(|(_, earlier)| *earlier > place) {
            faults.push(format!("{ack:?} stands before an earlier write of its daemon"));
        }
        let last = before.last().map_or(place, |(_, last)| place.max(*last));
        before.push((at, last));
    }
    faults
}

fn texts(log: &[Line], text: impl Fn(&Line) -> Option<&String>) -> BTreeSet<&str> {
    log.iter().filter_map(|line| text(line).map(String::as_str)).collect()
}

/// A queued update loses against a change of another daemon, and is then a dead letter. Nothing else may be missing.
fn presence_fault(ack: &Ack, place: Option<usize>, is_dead: bool) -> Option<String> {
    let may_be_dead = ack.is_queued && ack.is_update();
    match (place, is_dead) {
        (Some(_), false) => None,
        (None, true) if may_be_dead => None,
        (Some(_), true) => Some(format!("{ack:?} is present and a dead letter")),
        (None, true) => Some(format!("{ack:?} is a dead letter")),
        (None, false) => Some(format!("{ack:?} is lost")),
    }
}
