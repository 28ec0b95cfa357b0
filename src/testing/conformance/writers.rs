//! Rules about writers: repeated writes, conditions, and runs of own writes.

use super::{DAY, Suite};
use crate::model::key::Key;
use crate::model::version::Version;
use crate::model::writer::WriterId;
use crate::store::Applied::{Conflict, Stored, Superseded};
use crate::store::{Applied, Loaded, Write};

/// Two daemons that write one conversation.
struct Writers<'a> {
    suite: &'a Suite,
    key: Key,
    ours: WriterId,
    /// A later opening of the same daemon's outage file.
    ours_reopened: WriterId,
    others: WriterId,
}

impl Suite {
    fn writers(&self, name: &str) -> Writers<'_> {
        let ours = WriterId::random();
        let ours_reopened = ours.next_opening();
        Writers { suite: self, key: self.key(name), ours, ours_reopened, others: WriterId::random() }
    }
}

impl Writers<'_> {
    /// Makes a put. The value is the version as text, because some servers round numbers.
    fn put(&self, writer: WriterId, version: Version) -> Write {
        Write::new(self.suite.record(&self.key, version, &format!("\"{version}\""))).with_writer(writer)
    }

    fn remove(&self, writer: WriterId, version: Version) -> Write {
        Write::new(self.suite.tombstone(&self.key, version)).with_writer(writer)
    }

    fn update(&self, writer: WriterId, version: Version, base: Version) -> Write {
        self.put(writer, version).with_if_version(base)
    }

    async fn apply(&self, write: &Write) -> Applied {
        self.suite.apply_write(write.clone()).await
    }

    async fn assert_holds(&self, version: Version) {
        self.suite.assert_value(&self.key, version, &format!("\"{version}\"")).await;
    }
}

impl Suite {
    pub(super) async fn repeated_put_is_stored_again(&self) {
        let writers = self.writers("repeated put");
        let [first, second, third, fourth] = self.versions();
        for _ in 0..3 {
            assert_eq!(writers.apply(&writers.put(writers.ours, first)).await, Stored);
        }
        assert_eq!(writers.apply(&writers.put(writers.ours_reopened, third)).await, Stored);
        // The own newer put took the place of both, also of the one that never arrived.
        assert_eq!(writers.apply(&writers.put(writers.ours, first)).await, Stored);
        assert_eq!(writers.apply(&writers.put(writers.ours, second)).await, Stored);
        writers.assert_holds(third).await;
        assert_eq!(writers.apply(&writers.put(writers.others, fourth)).await, Stored);
        assert_eq!(writers.apply(&writers.put(writers.ours, third)).await, Superseded(fourth));
        assert_eq!(writers.apply(&writers.put(writers.others, fourth)).await, Stored);
        writers.assert_holds(fourth).await;
    }

    pub(super) async fn repeated_update_is_stored_after_writes_of_others(&self) {
        let writers = self.writers("repeated update");
        let [first, second, put, third] = self.versions();
        let ours =
            [writers.update(writers.ours, first, Version::NONE), writers.update(writers.ours, second, first)];
        for write in &ours {
            assert_eq!(writers.apply(write).await, Stored);
        }
        assert_eq!(writers.apply(&writers.put(writers.others, put)).await, Stored);
        let theirs = writers.update(writers.others, third, put);
        assert_eq!(writers.apply(&theirs).await, Stored);
        for write in ours.iter().rev().chain([&theirs]).chain(&ours) {
            assert_eq!(writers.apply(write).await, Stored, "{write:?}");
        }
        writers.assert_holds(third).await;
    }

    pub(super) async fn condition_compares_versions(&self) {
        let writers = self.writers("condition");
        let [first, second, third, fourth] = self.versions();
        let update = |writer, version, base| writers.update(writer, version, base);
        assert_eq!(writers.apply(&update(writers.ours, second, first)).await, Conflict(Version::NONE));
        assert_eq!(writers.apply(&update(writers.ours, first, Version::NONE)).await, Stored);
        assert_eq!(writers.apply(&update(writers.others, second, Version::NONE)).await, Conflict(first));
        assert_eq!(writers.apply(&update(writers.others, second, first)).await, Stored);
        assert_eq!(writers.apply(&update(writers.ours, third, first)).await, Conflict(second));
        writers.assert_holds(second).await;
        // The condition holds, but a version never falls.
        assert_eq!(writers.apply(&writers.put(writers.ours, fourth)).await, Stored);
        assert_eq!(writers.apply(&update(writers.others, third, fourth)).await, Superseded(fourth));
        writers.assert_holds(fourth).await;
    }

    pub(super) async fn condition_holds_over_own_run(&self) {
        let writers = self.writers("own run");
        let [first, covered, put, late, second, third] = self.versions();
        assert_eq!(writers.apply(&writers.put(writers.others, first)).await, Stored);
        assert_eq!(writers.apply(&writers.put(writers.ours, put)).await, Stored);
        assert_eq!(writers.apply(&writers.update(writers.ours, second, put)).await, Stored);
        // A write of a later opening belongs to the same daemon. Its base is the version below the run.
        assert_eq!(writers.apply(&writers.update(writers.ours_reopened, third, first)).await, Stored);
        writers.assert_holds(third).await;
        // An update of the earlier opening arrives late. It must not undo the later writes.
        let late_update = writers.update(writers.ours.next_opening(), late, first);
        assert_eq!(writers.apply(&late_update).await, Conflict(third));
        // The own put took the place of an update before it.
        let covered_update = writers.update(writers.ours.next_opening(), covered, first);
        assert_eq!(writers.apply(&covered_update).await, Stored);
        writers.assert_holds(third).await;
    }

    pub(super) async fn write_of_another_ends_the_run(&self) {
        let writers = self.writers("broken run");
        let [first, late, between, second, third] = self.versions();
        assert_eq!(writers.apply(&writers.put(writers.ours, first)).await, Stored);
        assert_eq!(writers.apply(&writers.put(writers.others, between)).await, Stored);
        assert_eq!(writers.apply(&writers.put(writers.ours, second)).await, Stored);
        assert_eq!(writers.apply(&writers.put(writers.ours, late)).await, Superseded(second));
        assert_eq!(writers.apply(&writers.update(writers.ours, third, first)).await, Conflict(second));
        // The daemon has seen the other write, so nothing is lost.
        assert_eq!(writers.apply(&writers.update(writers.ours, third, between)).await, Stored);
        writers.assert_holds(third).await;
    }

    pub(super) async fn writer_without_daemon_is_never_recognised(&self) {
        let writers = self.writers("no daemon");
        let [first, second, late, third, fourth] = self.versions();
        let none = WriterId::NONE;
        assert_eq!(writers.apply(&writers.put(none, first)).await, Stored);
        assert_eq!(writers.apply(&writers.put(none, second)).await, Stored);
        assert_eq!(writers.apply(&writers.put(none, first)).await, Superseded(second));
        assert_eq!(writers.apply(&writers.update(none, fourth, first)).await, Conflict(second));
        assert_eq!(writers.apply(&writers.update(none, third, second)).await, Stored);
        assert_eq!(writers.apply(&writers.update(none, late, second)).await, Conflict(third));
        writers.assert_holds(third).await;
    }

    pub(super) async fn remove_is_not_undone(&self) {
        let writers = self.writers("removed");
        let [first, late, removal, next] = self.versions();
        assert_eq!(writers.apply(&writers.put(writers.ours, first)).await, Stored);
        let remove = writers.remove(writers.ours, removal).with_if_version(first);
        assert_eq!(writers.apply(&remove).await, Stored);
        assert_eq!(writers.apply(&writers.put(writers.others, late)).await, Superseded(removal));
        // The own remove took the place of the own late put.
        assert_eq!(writers.apply(&writers.put(writers.ours, late)).await, Stored);
        assert_eq!(writers.apply(&remove).await, Stored);
        assert_eq!(writers.apply(&writers.update(writers.others, next, first)).await, Conflict(removal));
        assert_eq!(self.load(&writers.key).await, Loaded::Absent(removal));
        assert_eq!(writers.apply(&writers.update(writers.others, next, removal)).await, Stored);
        assert_eq!(writers.apply(&remove).await, Stored);
        writers.assert_holds(next).await;
    }

    pub(super) async fn late_put_does_not_undo_an_update(&self) {
        let writers = self.writers("mixed");
        let [first, late, update, last] = self.versions();
        let theirs = writers.update(writers.others, update, first);
        assert_eq!(writers.apply(&writers.put(writers.ours, first)).await, Stored);
        assert_eq!(writers.apply(&theirs).await, Stored);
        assert_eq!(writers.apply(&writers.put(writers.ours, late)).await, Superseded(update));
        assert_eq!(writers.apply(&writers.put(writers.ours, first)).await, Stored);
        writers.assert_holds(update).await;
        assert_eq!(writers.apply(&writers.put(writers.ours, last)).await, Stored);
        assert_eq!(writers.apply(&theirs).await, Stored);
        writers.assert_holds(last).await;
    }

    pub(super) async fn own_put_behind_own_update_is_not_swallowed(&self) {
        let writers = self.writers("put behind update");
        let [first, late, update] = self.versions();
        assert_eq!(writers.apply(&writers.put(writers.ours, first)).await, Stored);
        assert_eq!(writers.apply(&writers.update(writers.ours, update, first)).await, Stored);
        // No update covers a put: its value is nowhere, so the answer must say so.
        assert_eq!(writers.apply(&writers.put(writers.ours, late)).await, Superseded(update));
        writers.assert_holds(update).await;
    }

    pub(super) async fn update_of_a_missing_row_follows_its_base(&self) {
        let now = self.store.clock().now_for_versions();
        let (forgotten, recent) = (Version::min_at(now.minus(9 * DAY)), Version::min_at(now.minus(DAY)));
        for (base, expected) in
            [(Version::NONE, Stored), (forgotten, Stored), (recent, Conflict(Version::NONE))]
        {
            let writers = self.writers(&format!("missing {base}"));
            let [version] = self.versions();
            assert_eq!(writers.apply(&writers.update(writers.ours, version, base)).await, expected);
        }
    }

    pub(super) async fn purge_keeps_young_notes_of_writers(&self) {
        let writers = self.writers("noted");
        let [other] = self.versions();
        let old = Version::min_at(self.store.clock().now_for_versions().minus(6 * DAY));
        let update = writers.update(writers.ours, old, Version::NONE);
        assert_eq!(writers.apply(&update).await, Stored);
        assert_eq!(writers.apply(&writers.put(writers.others, other)).await, Stored);
        self.store.purge(1_000).await.unwrap();
        assert_eq!(writers.apply(&update).await, Stored);
        writers.assert_holds(other).await;
    }
}
