//! One conversation, its store, its daemons and the network. A list of numbers chooses every step.

use std::time::Duration;

use super::daemon::{Copy, Daemon, QueueRow, Reading};
use super::oracle::{Acknowledged, Entry, IMPORTED, Kind, Op, Oracle, START, Seen, Violation, shown};
use super::rule::{Environment, Rule};
use super::store::SimStore;
use crate::model::version::{Timestamp, Version};
use crate::model::writer::WriterId;
use crate::outage::rules::{Placement, QueuedHead, Settlement, corrected, next_to_send, settle};
use crate::store::{Applied, Condition, WriteHead, WriteKind};

pub const STEP: Duration = Duration::from_millis(100);
const MARK_STEP: i64 = 1_000;
const LIFE: Duration = Duration::from_secs(30 * 86_400);
const SHORT_LIFE: Duration = Duration::from_millis(1_200);
const MAX_MESSAGES: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    Live,
    Replay,
    /// The network doubled the request. No process waits for the answer.
    Nowhere,
}

#[derive(Debug, Clone, Copy)]
enum Body {
    Request,
    Answer(Applied),
}

#[derive(Debug, Clone, Copy)]
struct Message {
    op: usize,
    head: WriteHead,
    daemon: usize,
    opening: i64,
    route: Route,
    body: Body,
}

#[derive(Debug, Clone, Copy)]
enum Action {
    Plain(usize, Kind),
    Append(usize),
    Import(usize),
    Read { daemon: usize, asks_store: bool },
    Update(usize, Kind),
    Abandon(usize),
    SoftTimeout(usize, usize),
    QueueRefuses(usize, usize),
    Replay(usize),
    ReplayDeadline(usize),
    Load { daemon: usize, is_saved: bool },
    SyncFile(usize),
    Crash(usize),
    PowerCut(usize),
    Jump(usize),
    SyncClock(usize),
    Clone,
    Deliver(usize),
    Drop(usize),
    Double(usize),
    Sql(Kind),
    Expire,
    Age,
    Purge,
}

pub struct World<'a> {
    environment: Environment,
    off: &'a [Rule],
    choices: &'a [u16],
    next_choice: usize,
    now: Timestamp,
    store: SimStore,
    daemons: Vec<Daemon>,
    messages: Vec<Message>,
    oracle: Oracle,
    /// Whether a write waited for more than seven days. Everything that is made of it may die, too.
    has_too_old: bool,
    /// The trace, if someone reads it.
    pub trace: Option<Vec<String>>,
}

macro_rules! say {
    ($world:expr, $($arguments:tt)*) => {
        if $world.trace.is_some() {
            let line = format!($($arguments)*);
            $world.say(line);
        }
    };
}

impl<'a> World<'a> {
    pub fn new(environment: Environment, off: &'a [Rule], choices: &'a [u16]) -> Self {
        let mut world = Self {
            environment,
            off,
            choices,
            next_choice: 0,
            now: START.plus(STEP),
            store: SimStore::default(),
            daemons: (0..environment.daemons).map(Daemon::new).collect(),
            messages: Vec::new(),
            oracle: Oracle::default(),
            has_too_old: false,
            trace: None,
        };
        for at in 0..world.daemons.len() {
            world.daemons[at].clock_error = world.small_error();
        }
        world
    }

    /// Runs a schedule, then lets everything arrive, and checks the promises.
    pub fn run(&mut self, steps: usize) -> Result<(), Violation> {
        for _ in 0..steps {
            let actions = self.actions();
            let action = actions[self.pick(actions.len())];
            self.now = self.now.plus(STEP);
            self.act(action)?;
            for daemon in &self.daemons {
                let rows: Vec<WriteHead> = daemon.file.rows.iter().map(|row| row.head.write).collect();
                self.oracle.check_rows(&rows)?;
            }
        }
        say!(self, "-- everything arrives");
        self.settle_all()?;
        for op in &mut self.oracle.ops {
            op.is_dead = self.daemons.iter().any(|daemon| daemon.file.dead_letters.contains(&op.id));
        }
        self.oracle.check_end(&self.environment)
    }

    fn pick(&mut self, count: usize) -> usize {
        let choice = self.choices.get(self.next_choice).copied().unwrap_or_default();
        self.next_choice += 1;
        usize::from(choice) % count
    }

    fn say(&mut self, line: String) {
        let step = (self.now.0 - START.0) / 100;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{step:>5}: {line}"));
        }
    }

    fn is_on(&self, rule: Rule) -> bool {
        !self.off.contains(&rule)
    }

    fn small_error(&mut self) -> i64 {
        match self.environment.skew {
            true => (i64::try_from(self.pick(3)).unwrap() - 1) * 400,
            false => 0,
        }
    }

    fn expires_at(&self, at: Timestamp) -> Timestamp {
        at.plus(if self.environment.expiry { SHORT_LIFE } else { LIFE })
    }

    fn actions(&self) -> Vec<Action> {
        let mut actions = Vec::with_capacity(64);
        for at in 0..self.daemons.len() {
            self.actions_of(at, &mut actions);
        }
        for at in 0..self.messages.len() {
            actions.extend([Action::Deliver(at), Action::Deliver(at), Action::Drop(at)]);
            if matches!(self.messages[at].body, Body::Request) && self.messages.len() < MAX_MESSAGES {
                actions.push(Action::Double(at));
            }
        }
        let environment = &self.environment;
        if environment.sql {
            actions.extend([Kind::SqlPut, Kind::SqlUpdate, Kind::SqlDelete].map(Action::Sql));
        }
        if environment.expiry {
            actions.push(Action::Expire);
        }
        if environment.purge {
            actions.extend([Action::Age, Action::Purge, Action::Purge]);
        }
        let is_final = |row: &QueueRow| !row.head.is_provisional;
        if environment.clone
            && self.daemons.len() == environment.daemons
            && self.daemons[0].file.rows.iter().all(is_final)
        {
            actions.push(Action::Clone);
        }
        actions
    }

    fn actions_of(&self, at: usize, actions: &mut Vec<Action>) {
        let (daemon, environment) = (&self.daemons[at], &self.environment);
        let has_counted = daemon.live.iter().any(|op| self.oracle.ops[*op].head.is_counted());
        let is_locked = self.is_on(Rule::KeyLock);
        let is_exclusive = has_counted || daemon.reading.is_some();
        let can_share = !is_locked || !is_exclusive;
        let can_own = !is_locked || !is_exclusive && daemon.live.is_empty();
        if can_share && daemon.live.len() < 3 {
            actions.extend([
                Action::Plain(at, Kind::Put),
                Action::Plain(at, Kind::Put),
                Action::Plain(at, Kind::Remove),
            ]);
        }
        if can_own && daemon.live.len() < 3 && !environment.no_append {
            actions.extend([Action::Append(at); 2]);
        }
        if can_own && daemon.reading.is_none() {
            actions.extend([true, false, false].map(|asks_store| Action::Read { daemon: at, asks_store }));
        }
        if daemon.reading.is_some() && daemon.live.len() < 3 {
            actions.extend([Action::Update(at, Kind::Update); 3]);
            actions.extend([Action::Update(at, Kind::UpdateRemove), Action::Abandon(at)]);
        }
        for op in &daemon.live {
            actions.push(Action::SoftTimeout(at, *op));
            if environment.full {
                actions.push(Action::QueueRefuses(at, *op));
            }
        }
        if daemon.in_replay.is_some() && self.is_on(Rule::OneInFlight) {
            actions.push(Action::ReplayDeadline(at));
        } else if (daemon.is_synced || !self.is_on(Rule::ProvisionalWaits)) && !daemon.file.rows.is_empty() {
            actions.extend([Action::Replay(at); 2]);
        }
        actions.extend([true, false].map(|is_saved| Action::Load { daemon: at, is_saved }));
        if environment.crash {
            actions.push(Action::Crash(at));
        }
        if environment.power {
            actions.extend([Action::PowerCut(at), Action::SyncFile(at)]);
        }
        let is_import = |op: &Op| op.kind == Kind::Import;
        let is_known = daemon.file.copy.is_some_and(|copy| copy.version > IMPORTED);
        if environment.import
            && !is_known
            && daemon.file.rows.is_empty()
            && !self.oracle.ops.iter().any(is_import)
        {
            actions.push(Action::Import(at));
        }
        if environment.jump {
            actions.push(if daemon.is_synced { Action::Jump(at) } else { Action::SyncClock(at) });
        }
    }

    fn act(&mut self, action: Action) -> Result<(), Violation> {
        match action {
            Action::Plain(at, kind) => self.write(at, kind, None),
            Action::Append(at) => self.write(at, Kind::Append, None),
            Action::Import(at) => self.import(at),
            Action::Read { daemon, asks_store } => self.read(daemon, asks_store)?,
            Action::Update(at, kind) => {
                let reading = self.daemons[at].reading.take();
                self.write(at, kind, reading);
            }
            Action::Abandon(at) => self.daemons[at].reading = None,
            Action::SoftTimeout(at, op) => self.soft_timeout(at, op),
            Action::QueueRefuses(at, op) => {
                self.daemons[at].live.retain(|live| *live != op);
                say!(self, "the queue refuses {}, its attempt travels on", self.oracle.name(op));
            }
            Action::Replay(at) => self.replay(at),
            Action::ReplayDeadline(at) => self.daemons[at].in_replay = None,
            Action::Load { daemon, is_saved } => self.load(daemon, is_saved),
            Action::SyncFile(at) => self.daemons[at].sync(),
            Action::Crash(at) => self.crash(at),
            Action::PowerCut(at) => self.power_cut(at),
            Action::Jump(at) => self.jump(at),
            Action::SyncClock(at) => self.sync_clock(at),
            Action::Clone => self.clone_file(),
            Action::Deliver(at) => {
                let message = self.messages.remove(at);
                self.deliver(message)?;
            }
            Action::Drop(at) => {
                let message = self.messages.remove(at);
                say!(self, "the network drops {:?} of {}", message.body, self.oracle.name(message.op));
            }
            Action::Double(at) => {
                let message = Message { route: Route::Nowhere, ..self.messages[at] };
                self.messages.push(message);
                say!(self, "the network doubles {}", self.oracle.name(message.op));
            }
            Action::Sql(kind) => self.plain_sql(kind),
            Action::Expire => self.now = self.now.plus(8 * STEP),
            Action::Age => {
                self.now = self.now.plus(Duration::from_secs(3 * 86_400));
                say!(self, "three days pass");
            }
            Action::Purge => self.store.purge(self.now, self.off),
        }
        Ok(())
    }

    // --- calls of callers

    fn read(&mut self, at: usize, asks_store: bool) -> Result<(), Violation> {
        if asks_store && self.daemons[at].is_synced {
            self.load(at, false);
        }
        let has_old_attempt = self.has_old_attempt(at);
        let mut reading = self.daemons[at].read(&self.oracle, self.now, self.off);
        if let Some(reading) = &mut reading {
            reading.is_excused |= has_old_attempt;
            self.daemons[at].observe(reading.base);
            say!(self, "d{at} reads {} under the key lock", shown(reading.base));
            self.oracle.check_read(reading)?;
        }
        self.daemons[at].reading = reading;
        Ok(())
    }

    /// Whether an attempt from before a power cut is under way. It is not an own one any more.
    fn has_old_attempt(&self, at: usize) -> bool {
        let cut_at = self.daemons[at].cut_at;
        self.messages.iter().any(|message| message.daemon == at && message.opening < cut_at)
    }

    fn write(&mut self, at: usize, kind: Kind, reading: Option<Reading>) {
        let (off, now) = (self.off, self.now);
        let is_only_if_present = kind == Kind::Append && self.pick(4) == 0;
        let daemon = &mut self.daemons[at];
        let version = daemon.issue(now, off);
        let mut is_excused = false;
        let mut condition = Condition::Any;
        if let Some(reading) = &reading {
            condition = Condition::IfVersion(reading.base);
            is_excused |= reading.is_excused;
        } else if is_only_if_present {
            condition = Condition::IfPresent;
            // It asks for a conversation that may be absent.
            is_excused = true;
        }
        let write_kind = match kind {
            Kind::Append => WriteKind::Append,
            Kind::Remove | Kind::UpdateRemove => WriteKind::Remove,
            _ => WriteKind::Put,
        };
        let head =
            WriteHead { kind: write_kind, version, writer: daemon.writer(off), condition, expires_at: START };
        let is_live = daemon.is_synced && (daemon.file.rows.is_empty() || off.contains(&Rule::QueueFirst));
        let is_provisional = !daemon.is_synced;
        let op = self.new_op(kind, Some(at), head, reading.map(|reading| reading.seen).unwrap_or_default());
        self.oracle.ops[op].is_excused = is_excused;
        if is_live && self.pick(3) > 0 {
            self.daemons[at].live.push(op);
            say!(self, "{} is sent, {:?}", self.oracle.name(op), ShownCondition(condition));
            self.send(at, op, head, Route::Live);
        } else if self.goes_past_the_queue(at, &head) {
            self.daemons[at].live.push(op);
            say!(self, "the queue refuses {}, it goes directly", self.oracle.name(op));
            self.send(at, op, head, Route::Live);
        } else {
            self.enqueue(at, op, is_provisional);
        }
    }

    /// Queues an old conversation of another file, while no process has the queue open. It may die: the store can hold something
    /// newer.
    fn import(&mut self, at: usize) {
        self.crash(at);
        let (off, now) = (self.off, self.now);
        let daemon = &mut self.daemons[at];
        let (version, is_provisional) = (daemon.issue(now, off), !daemon.is_synced);
        let (writer, condition) = (WriterId::from_raw(9_999 << 24), Condition::IfVersion(IMPORTED));
        let head = WriteHead { kind: WriteKind::Put, version, writer, condition, expires_at: START };
        let op = self.new_op(Kind::Import, Some(at), head, Seen::default());
        self.oracle.ops[op].is_excused = true;
        self.enqueue(at, op, is_provisional);
    }

    /// Whether the queue refuses a put or remove, which then goes to the store past the queued rows.
    fn goes_past_the_queue(&mut self, at: usize, head: &WriteHead) -> bool {
        let daemon = &self.daemons[at];
        let is_own = |row: &QueueRow| row.head.write.writer.daemon() == daemon.part;
        let may_go = self.environment.full && daemon.is_synced && head.is_plain();
        may_go && daemon.file.rows.iter().all(is_own) && self.pick(2) > 0
    }

    fn new_op(&mut self, kind: Kind, daemon: Option<usize>, head: WriteHead, seen: Seen) -> usize {
        let id = self.oracle.ops.len();
        let expires_at = match head.kind {
            WriteKind::Remove => head.version.at(),
            _ => self.expires_at(head.version.at()),
        };
        self.oracle.ops.push(Op {
            id,
            kind,
            daemon,
            head,
            expires_at,
            seen,
            acknowledged: Acknowledged::No,
            is_dead: false,
            replaced_by: None,
            is_excused: false,
            is_outdated: false,
        });
        id
    }

    fn soft_timeout(&mut self, at: usize, op: usize) {
        self.daemons[at].live.retain(|live| *live != op);
        say!(self, "soft timeout of {}", self.oracle.name(op));
        if !self.is_on(Rule::VersionKept) {
            let (now, off) = (self.now, self.off);
            self.oracle.ops[op].head.version = self.daemons[at].issue(now, off);
        }
        self.enqueue(at, op, false);
    }

    fn enqueue(&mut self, at: usize, op: usize, is_provisional: bool) {
        let write = self.oracle.ops[op].head;
        let head = QueuedHead { write, is_provisional };
        let placement = self.daemons[at].place(&head, self.off);
        say!(
            self,
            "{} goes to the queue, {:?}: {placement:?}",
            self.oracle.name(op),
            ShownCondition(write.condition)
        );
        let daemon = &mut self.daemons[at];
        match placement {
            Placement::Insert { replaced } => {
                let (out, kept) =
                    daemon.file.rows.iter().partition(|row| replaced.contains(&row.head.write.version));
                daemon.file.rows = kept;
                let out: Vec<QueueRow> = out;
                for row in out {
                    self.oracle.ops[row.op].replaced_by = Some(op);
                }
                daemon.file.rows.push(QueueRow { head, op });
                if !self.off.contains(&Rule::SortedRows) {
                    daemon.file.rows.sort_by_key(|row| row.head.write.version);
                }
                daemon.sync();
            }
            Placement::Covered => {
                let covers =
                    |row: &&QueueRow| row.head.write.version >= write.version && row.head.write.is_plain();
                let by = daemon.file.rows.iter().find(covers).map(|row| row.op);
                self.oracle.ops[op].replaced_by = by;
            }
            Placement::Superseded(_) => return,
        }
        let stored = daemon.file.copy.map_or(Version::NONE, |copy| copy.version);
        self.oracle.ops[op].is_outdated = !is_provisional && stored > write.version;
        self.oracle.ops[op].acknowledged = Acknowledged::Queued;
    }

    fn load(&mut self, at: usize, is_saved: bool) {
        if !self.daemons[at].is_synced {
            return;
        }
        let copy = Copy {
            version: self.store.version(),
            entries: self.oracle.history.len(),
            has_value: self.store.row.is_some_and(|row| row.has_value),
            expires_at: self.store.row.map_or(START, |row| row.state.expires_at),
        };
        let has_old_attempt = self.has_old_attempt(at);
        let daemon = &mut self.daemons[at];
        daemon.observe(copy.version);
        if copy.version == Version::NONE {
            // A purged row. The store is right.
            daemon.drop_copies_below(Version::from_raw(i64::MAX));
        }
        daemon.save_copy(copy, is_saved);
        // A copy in memory alone does not outlive the next crash.
        daemon.is_doubtful &= has_old_attempt || !is_saved;
        say!(self, "d{at} loads {}", shown(copy.version));
    }

    // --- the network

    fn send(&mut self, at: usize, op: usize, head: WriteHead, route: Route) {
        let daemon = &mut self.daemons[at];
        if head.version > daemon.file.mark {
            // Not a second above the version: quick restarts would lead the versions further and further ahead.
            let ahead = Version::min_at(Timestamp(self.now.0 + daemon.clock_error + MARK_STEP));
            daemon.file.mark = head.version.shifted(1).max(ahead);
        }
        let opening = daemon.opening;
        self.messages.push(Message { op, head, daemon: at, opening, route, body: Body::Request });
    }

    fn replay(&mut self, at: usize) {
        let rows = self.daemons[at].heads();
        let mut next = next_to_send(&rows).copied();
        if !self.is_on(Rule::ProvisionalWaits) {
            next = rows.first().copied();
        }
        if !self.is_on(Rule::OneInFlight) {
            next = Some(rows[self.pick(rows.len())]);
        }
        let Some(head) = next else { return };
        let daemon = &mut self.daemons[at];
        let row = daemon.file.rows.iter().find(|row| row.head == head).copied();
        let Some(row) = row else { return };
        daemon.in_replay = Some(head.write.version);
        say!(self, "replay of {}", self.oracle.name(row.op));
        self.send(at, row.op, row.head.write, Route::Replay);
    }

    fn deliver(&mut self, message: Message) -> Result<(), Violation> {
        match message.body {
            Body::Request => {
                let applied = self.apply(&message)?;
                if message.route != Route::Nowhere {
                    self.messages.push(Message { body: Body::Answer(applied), ..message });
                }
            }
            Body::Answer(applied) if self.daemons[message.daemon].opening == message.opening => {
                self.on_answer(&message, applied);
            }
            Body::Answer(_) => {}
        }
        Ok(())
    }

    fn apply(&mut self, message: &Message) -> Result<Applied, Violation> {
        let before = self.store.row;
        let expires_at = self.expires_at(message.head.version.at());
        let (applied, has_changed) = self.store.apply(&message.head, expires_at, self.now, self.off);
        say!(
            self,
            "store: {} -> {}",
            self.oracle.name(message.op),
            ShownApplied(&applied, has_changed, &self.store)
        );
        if has_changed {
            let after = self.store.version();
            self.oracle.on_applied(message.op, message.head.version, before, after)?;
        }
        self.has_too_old |= applied == Applied::TooOld;
        if let Applied::Conflict(_) = applied
            && !self.has_too_old
        {
            self.oracle.on_conflict(message.op)?;
        }
        Ok(applied)
    }

    fn on_answer(&mut self, message: &Message, applied: Applied) {
        let (at, op) = (message.daemon, message.op);
        if message.route == Route::Replay && self.daemons[at].in_replay == Some(message.head.version) {
            self.daemons[at].in_replay = None;
        }
        let newer = match applied {
            Applied::Superseded(version) | Applied::Conflict(version) => version,
            _ => Version::NONE,
        };
        self.daemons[at].observe(newer);
        self.daemons[at].drop_copies_below(newer);
        let is_live = self.daemons[at].live.contains(&op);
        if message.route == Route::Live && is_live {
            self.daemons[at].live.retain(|live| *live != op);
            match applied {
                Applied::Stored | Applied::Appended { .. } | Applied::AppendedBefore(_) => {
                    self.oracle.ops[op].acknowledged = Acknowledged::Stored;
                    self.on_stored(at, op, &message.head, applied);
                }
                Applied::VersionInFuture => self.enqueue(at, op, false),
                _ => {}
            }
        } else {
            self.settle(at, &message.head, applied);
        }
    }

    fn settle(&mut self, at: usize, head: &WriteHead, applied: Applied) {
        let is_of_head = |row: &QueueRow| row.head.write.version == head.version;
        let Some(index) = self.daemons[at].file.rows.iter().position(is_of_head) else { return };
        let rows = &mut self.daemons[at].file.rows;
        let mut settlement = settle(&rows[index].head.write, applied, self.now);
        if matches!(settlement, Settlement::Rebased(_)) && self.off.contains(&Rule::Rebase) {
            settlement = Settlement::DeadLetter;
        }
        match settlement {
            Settlement::Stays => return,
            Settlement::Rebased(base) => {
                rows[index].head.write.condition = Condition::IfVersion(base);
                return;
            }
            Settlement::Stored | Settlement::Appended | Settlement::DeadLetter => {}
        }
        let QueueRow { op, .. } = rows.remove(index);
        // The next part does not know writes of this part as own ones. So a row must not come back after them.
        if head.writer.daemon() != self.daemons[at].part && self.is_on(Rule::OldPartSynced) {
            self.daemons[at].sync();
        }
        if matches!(settlement, Settlement::Stored | Settlement::Appended) {
            return self.on_stored(at, op, head, applied);
        }
        say!(self, "dead letter of {}", self.oracle.name(op));
        if self.has_too_old {
            self.oracle.ops[op].is_excused = true;
        }
        let is_synced = self.is_on(Rule::DeadLetterSynced);
        let daemon = &mut self.daemons[at];
        daemon.file.dead_letters.push(op);
        if is_synced {
            daemon.sync();
        }
    }

    /// The store has the write. The copy is known. After an append it is known only if the daemon had the copy before.
    fn on_stored(&mut self, at: usize, op: usize, head: &WriteHead, applied: Applied) {
        if head.kind == WriteKind::Append {
            return self.on_appended(at, op, head, applied);
        }
        if !self.is_on(Rule::CopyBeforeAnswer) {
            return;
        }
        let history = &self.oracle.history;
        let above = |entry: &Entry| entry.row_version > head.version;
        let first_above = || history.iter().position(above).unwrap_or(history.len());
        let entries = self.oracle.entry_of(op).map_or_else(first_above, |entry| entry + 1);
        let expires_at = self.oracle.ops[op].expires_at;
        let copy =
            Copy { version: head.version, entries, has_value: head.kind == WriteKind::Put, expires_at };
        let has_old_attempt = self.has_old_attempt(at);
        let daemon = &mut self.daemons[at];
        let is_old = has_old_attempt || head.writer.daemon() != daemon.part;
        daemon.save_copy(copy, true);
        daemon.is_doubtful &= is_old;
    }

    fn on_appended(&mut self, at: usize, op: usize, head: &WriteHead, applied: Applied) {
        let (is_dropped, entry) = (self.is_on(Rule::AppendDropsCopy), self.oracle.entry_of(op));
        let expires_at = self.oracle.ops[op].expires_at;
        let daemon = &mut self.daemons[at];
        let (version, over) = match applied {
            Applied::Appended { version, over, .. } => (version, Some(over)),
            Applied::AppendedBefore(version) => (version, None),
            _ => (head.version, None),
        };
        let held = daemon.copy().filter(|held| over == Some(held.version));
        if is_dropped {
            daemon.drop_copies_below(version);
        }
        if let (Some(held), Some(entry)) = (held, entry) {
            let life = if held.expires_at > head.version.at() { held.expires_at } else { expires_at };
            let expires_at = life.max(expires_at);
            daemon.save_copy(Copy { version, entries: entry + 1, has_value: true, expires_at }, true);
        }
    }

    // --- faults

    fn crash(&mut self, at: usize) {
        let error = self.small_error();
        let is_unsynced = self.environment.jump && self.pick(2) == 0;
        let off = self.off;
        let daemon = &mut self.daemons[at];
        daemon.open(off);
        let was_synced = daemon.is_synced;
        say!(self, "d{at} crashes and opens its file again");
        if is_unsynced {
            self.jump(at);
        } else {
            // Rows from an unsynced life are corrected, also if this life knows the time from the start.
            self.daemons[at].clock_error = error;
            if !was_synced {
                self.sync_clock(at);
            }
        }
    }

    fn power_cut(&mut self, at: usize) {
        let is_in_flight = self.messages.iter().any(|message| message.daemon == at);
        let known = self.daemons[at].synced_file.copy.map_or(0, |copy| copy.entries);
        let is_own = |entry: &Entry| self.oracle.ops[entry.op].daemon == Some(at);
        let is_unknown = self.oracle.history[known..].iter().any(is_own);
        let is_new_part = self.is_on(Rule::PartAfterCut);
        let daemon = &mut self.daemons[at];
        let is_lossy =
            is_in_flight || is_unknown || !daemon.live.is_empty() || daemon.file != daemon.synced_file;
        daemon.is_doubtful |= is_lossy;
        daemon.file = daemon.synced_file.clone();
        if is_new_part {
            daemon.part += 100;
            daemon.cut_at = daemon.opening + 1;
        }
        self.now = self.now.plus(30 * STEP);
        say!(self, "power cut, and 3 s until the machine has started");
        self.crash(at);
    }

    /// The clock may be hours off until the next answer of the store.
    fn jump(&mut self, at: usize) {
        let error = [-7_200_000, 3_600_000, -5_000, 400][self.pick(4)];
        let daemon = &mut self.daemons[at];
        daemon.clock_error = error;
        daemon.is_synced = false;
        let millis = daemon.shows(self.now);
        say!(self, "the clock of d{at} jumps and shows {}", millis / 100);
    }

    /// The one transition: all provisional versions get their final values.
    fn sync_clock(&mut self, at: usize) {
        let error = self.small_error();
        let (off, now) = (self.off, self.now);
        let daemon = &mut self.daemons[at];
        let millis = error - daemon.clock_error;
        daemon.clock_error = error;
        daemon.is_synced = true;
        let stored = daemon.file.copy.map_or(Version::NONE, |copy| copy.version).max(daemon.stored());
        let real = |row: &&QueueRow| !row.head.is_provisional;
        let queued = daemon.file.rows.iter().filter(real).map(|row| row.head.write.version).max();
        let floor = daemon.file.mark.max(stored).max(queued.unwrap_or_default());
        daemon.last_version = floor;
        let rows = daemon.heads();
        let (mut floor, mut latest) = (floor, Timestamp(now.0 + error));
        if off.contains(&Rule::CorrectedAboveRow) {
            floor = Version::NONE;
        }
        if off.contains(&Rule::CorrectedToNow) {
            latest = Timestamp(i64::MAX);
        }
        for (row, write) in daemon.file.rows.iter_mut().zip(corrected(&rows, millis, floor, latest)) {
            let mut write = write;
            if off.contains(&Rule::CorrectedBase) {
                write.condition = row.head.write.condition;
            }
            row.head = QueuedHead { write, is_provisional: false };
            daemon.last_version = daemon.last_version.max(write.version);
            self.oracle.ops[row.op].expires_at = Timestamp(self.oracle.ops[row.op].expires_at.0 + millis);
            self.oracle.ops[row.op].head = write;
        }
        daemon.sync();
        // An update that is being made goes on from a corrected base: it reads again.
        daemon.reading = None;
        let lines: Vec<String> = daemon.file.rows.iter().map(|row| self.oracle.name(row.op)).collect();
        say!(self, "d{at} syncs its clock: {lines:?}");
    }

    fn clone_file(&mut self) {
        let off = self.off;
        let mut clone = Daemon::new(self.daemons.len());
        clone.file = self.daemons[0].file.clone();
        clone.synced_file = clone.file.clone();
        clone.opening = 1_000;
        if off.contains(&Rule::PartAfterClone) {
            clone.part = self.daemons[0].part;
        }
        clone.open(off);
        self.daemons.push(clone);
        say!(self, "the file of d0 is copied, and d{} opens the copy", self.daemons.len() - 1);
    }

    fn plain_sql(&mut self, kind: Kind) {
        let held = self.store.row.is_some_and(|row| !row.is_gone(self.now));
        if kind != Kind::SqlPut && !held {
            return;
        }
        let expires_at = self.expires_at(self.now);
        let version = self.store.plain_sql(kind != Kind::SqlDelete, expires_at, self.now, self.off);
        let write_kind = if kind == Kind::SqlDelete { WriteKind::Remove } else { WriteKind::Put };
        let head = WriteHead {
            kind: write_kind,
            version,
            writer: WriterId::NONE,
            condition: Condition::Any,
            expires_at: START,
        };
        let op = self.new_op(kind, None, head, Seen::default());
        self.oracle.history.push(Entry { op, version, row_version: version });
        say!(self, "plain SQL: {}", self.oracle.name(op));
    }

    // --- the end

    fn settle_all(&mut self) -> Result<(), Violation> {
        for _ in 0..60 {
            self.now = self.now.plus(10 * STEP);
            for at in 0..self.daemons.len() {
                self.daemons[at].reading = None;
                if !self.daemons[at].is_synced {
                    self.sync_clock(at);
                }
                for op in self.daemons[at].live.clone() {
                    self.soft_timeout(at, op);
                }
            }
            if !self.messages.is_empty() && self.pick(2) == 1 {
                let message = self.pick(self.messages.len());
                let message = self.messages.remove(message);
                self.deliver(message)?;
            }
            for at in 0..self.daemons.len() {
                self.replay_now(at)?;
            }
            let is_idle = |daemon: &Daemon| daemon.file.rows.is_empty() && daemon.live.is_empty();
            if self.messages.is_empty() && self.daemons.iter().all(is_idle) {
                return Ok(());
            }
        }
        if let Some(daemon) = self.daemons.iter().find(|daemon| !daemon.file.rows.is_empty()) {
            let text = format!("d{}: {:?}", daemon.index, daemon.file.rows);
            return Err(Violation { kind: "the queue never empties", text });
        }
        Ok(())
    }

    fn replay_now(&mut self, at: usize) -> Result<(), Violation> {
        let Some(row) = self.daemons[at].file.rows.first().copied() else { return Ok(()) };
        self.daemons[at].in_replay = Some(row.head.write.version);
        self.send(at, row.op, row.head.write, Route::Replay);
        let Some(message) = self.messages.pop() else { return Ok(()) };
        let applied = self.apply(&message)?;
        self.on_answer(&message, applied);
        Ok(())
    }
}

/// A condition as a trace shows it.
struct ShownCondition(Condition);

impl std::fmt::Debug for ShownCondition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Condition::IfPresent => f.write_str("if present"),
            Condition::Any => write!(f, "plain"),
            Condition::IfVersion(base) => write!(f, "if {}", shown(base)),
        }
    }
}

/// An answer and the row after it.
struct ShownApplied<'a>(&'a Applied, bool, &'a SimStore);

impl std::fmt::Display for ShownApplied<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self.0 {
            Applied::Stored if self.1 => "stored",
            Applied::Appended { .. } => "appended",
            Applied::AppendedBefore(_) => "appended (already)",
            Applied::Stored => "stored (already)",
            Applied::Superseded(_) => "superseded",
            Applied::Conflict(_) => "conflict",
            Applied::VersionInFuture => "version in future",
            Applied::Absent => "absent",
            _ => "too old",
        };
        let Some(row) = self.2.row else { return write!(f, "{name}, no row") };
        let state = row.state;
        let (version, base, began) =
            (shown(state.version), shown(state.base_version), shown(state.run_began));
        write!(f, "{name}; row {version} base {base} last {} began {began}", state.last_writer)
    }
}
