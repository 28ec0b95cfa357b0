//! The rules that a run can take away, and the environments of a run.

/// A rule of the protocol. A mutant runs without one or two of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    // The store: `decide`, the trigger of plain SQL, the purge.
    AppliesOnce,
    PlainByBase,
    BaseForPlain,
    PlainOwnRun,
    CoveredUpdate,
    OwnRun,
    RunBegan,
    BaseWasRow,
    DaemonPart,
    NewestWins,
    AppendAboveBase,
    OnlyIfPresent,
    RemoveRaisesBase,
    ExpiryAtVersion,
    ExpiryRaisesBase,
    OddVersions,
    PurgedBase,
    TooOld,
    SqlEndsRun,
    SqlRaisesBase,
    SqlTombstone,
    TombstonesLast,
    WritersLast,
    // The queue: `outage::rules`.
    Covered,
    Superseded,
    PlainReplaces,
    UpdateReplaces,
    BaseAnchor,
    CopyOverRow,
    ExactBehindOldPart,
    AppendsWait,
    AppendInCopy,
    CorrectedAboveRow,
    CorrectedBase,
    CorrectedToNow,
    Rebase,
    // The daemon.
    KeyLock,
    QueueFirst,
    SortedRows,
    OneInFlight,
    DeadLetterSynced,
    OldPartSynced,
    OpeningId,
    PartAfterCut,
    PartAfterClone,
    Mark,
    FileVersions,
    VersionKept,
    ProvisionalWaits,
    AppendDropsCopy,
    CopyBeforeAnswer,
}

/// What may happen in a run, besides puts, updates, appends, timeouts and the faults of the network.
#[derive(Debug, Clone, Copy, Default)]
pub struct Environment {
    pub daemons: usize,
    pub crash: bool,
    pub power: bool,
    pub sql: bool,
    pub skew: bool,
    pub jump: bool,
    pub expiry: bool,
    pub full: bool,
    pub clone: bool,
    pub purge: bool,
    /// An old conversation of another file is imported.
    pub import: bool,
    /// No appends, as in the API of this build.
    pub no_append: bool,
}

impl Environment {
    /// Reads the name of an environment: the number of daemons, then words.
    pub fn parse(name: &str) -> Self {
        let mut words = name.split(' ');
        let daemons = words.next().and_then(|count| count.parse().ok()).expect("a number of daemons");
        let mut found = Self { daemons, ..Self::default() };
        for word in words {
            let field = match word {
                "crash" => &mut found.crash,
                "power" => &mut found.power,
                "sql" => &mut found.sql,
                "skew" => &mut found.skew,
                "jump" => &mut found.jump,
                "expiry" => &mut found.expiry,
                "full" => &mut found.full,
                "clone" => &mut found.clone,
                "purge" => &mut found.purge,
                "import" => &mut found.import,
                "no-append" => &mut found.no_append,
                other => panic!("{other} is no environment"),
            };
            *field = true;
        }
        found
    }
}
