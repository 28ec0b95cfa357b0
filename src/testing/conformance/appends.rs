//! Rules about appends: their content, their order, and their repetition.

use super::{HOUR, Suite};
use crate::model::append::{Append, ArrayPath};
use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::Version;
use crate::model::writer::WriterId;
use crate::store::Applied::{
    Absent, Appended, AppendedBefore, Conflict, NotAnArray, Stored, Superseded, TooLarge,
};
use crate::store::{Loaded, Write};

/// The bytes that an append of these rules may reach.
const MAX_BYTES: usize = 1_000;

impl Suite {
    fn append(&self, key: &Key, version: Version, path: &[&str], items: &str) -> Write {
        let at: ArrayPath = path.iter().copied().collect();
        let items = self.record(key, version, items);
        Write::new(items).with_append(Append::new(at, MAX_BYTES)).with_writer(WriterId::random())
    }

    fn append_if_present(&self, key: &Key, version: Version) -> Write {
        let append = Append { only_if_present: true, ..Append::new(ArrayPath::default(), MAX_BYTES) };
        self.append(key, version, &[], "[1]").with_append(append)
    }

    pub(super) async fn append_is_applied_once(&self) {
        let (key, [first, second, third]) = (self.key("append"), self.versions());
        let create = self.append(&key, first, &[], "[1, 2]");
        let none = Version::NONE;
        assert_eq!(
            self.apply_write(create.clone()).await,
            Appended { version: first, over: none, length: 2 }
        );
        let follow = self.append(&key, second, &[], "[3]").with_writer(create.writer);
        let appended = Appended { version: second, over: first, length: 3 };
        assert_eq!(self.apply_write(follow.clone()).await, appended);
        let other = self.append(&key, third, &[], "[4]");
        assert_eq!(
            self.apply_write(other.clone()).await,
            Appended { version: third, over: second, length: 4 }
        );
        for repeated in [&create, &follow, &other, &create] {
            assert_eq!(self.apply_write(repeated.clone()).await, AppendedBefore(third));
        }
        self.assert_value(&key, third, "[1, 2, 3, 4]").await;
    }

    pub(super) async fn appends_commute_in_any_order_of_arrival(&self) {
        let (key, [first, late, second]) = (self.key("late append"), self.versions());
        assert_eq!(self.apply(self.record(&key, first, "[0]")).await, Stored);
        let newer = self.append(&key, second, &[], "[2]");
        assert_eq!(
            self.apply_write(newer.clone()).await,
            Appended { version: second, over: first, length: 2 }
        );
        let older = self.append(&key, late, &[], "[1]");
        let Appended { version, over, length: 3 } = self.apply_write(older.clone()).await else {
            panic!("a late append is applied, because no put replaced the conversation")
        };
        assert!(over == second && version > second && version.raw() % 2 == 1, "{version} over {over}");
        assert_eq!(self.apply_write(older).await, AppendedBefore(version));
        self.assert_value(&key, version, "[0, 2, 1]").await;
        // The update of a daemon that saw less conflicts.
        let update = Write::new(self.record(&key, self.version(), "[]")).with_if_version(second);
        assert_eq!(self.apply_write(update).await, Conflict(version));
    }

    pub(super) async fn append_loses_against_a_newer_put_or_remove(&self) {
        let (key, [late, put, later, removal, after]) = (self.key("replaced"), self.versions());
        assert_eq!(self.apply(self.record(&key, put, "[0]")).await, Stored);
        assert_eq!(self.apply_write(self.append(&key, late, &[], "[1]")).await, Superseded(put));
        assert_eq!(self.apply(self.tombstone(&key, removal)).await, Stored);
        assert_eq!(self.apply_write(self.append(&key, later, &[], "[1]")).await, Superseded(removal));
        assert_eq!(self.load(&key).await, Loaded::Absent(removal));
        let revive = self.append(&key, after, &["a", "b"], "[1]");
        assert!(matches!(self.apply_write(revive).await, Appended { length: 1, .. }));
        self.assert_value(&key, after, r#"{"a": {"b": [1]}}"#).await;
    }

    pub(super) async fn append_finds_its_array_or_rejects_the_record_alone(&self) {
        let (key, beside) = (self.key("target"), self.key("beside"));
        let put = self.version();
        let document = r#"{"messages": ["a"], "text": "b", "list": [[1]], "none": null, "n": 1}"#;
        assert_eq!(self.apply(self.record(&key, put, document)).await, Stored);
        for path in [&[][..], &["text"], &["text", "x"], &["list", "0"], &["none"], &["n", "x"]] {
            let bad = self.append(&key, self.version(), path, "[2]");
            let good = self.append(&beside, self.version(), &[], "[2]");
            let applied = self.store.apply(&[bad, good]).await.unwrap_or_else(|e| panic!("{path:?}: {e:?}"));
            assert!(matches!(applied[..], [NotAnArray, Appended { .. }]), "{path:?}: {applied:?}");
        }
        self.assert_value(&key, put, document).await;
        let next = self.version();
        let append = self.append(&key, next, &["messages"], r#"[{"role": "user"}]"#);
        assert_eq!(self.apply_write(append).await, Appended { version: next, over: put, length: 2 });
        let document = document.replace(r#""a""#, r#""a", {"role": "user"}"#);
        self.assert_value(&key, next, &document).await;
    }

    pub(super) async fn append_keeps_the_limit_of_bytes(&self) {
        let key = self.key("large");
        let item = format!("[\"{}\"]", "x".repeat(MAX_BYTES / 2));
        let (first, second, third) = (self.version(), self.version(), self.version());
        let append = |version| self.append(&key, version, &[], &item);
        assert!(matches!(self.apply_write(append(first)).await, Appended { .. }));
        assert_eq!(self.apply_write(append(second)).await, TooLarge);
        self.assert_value(&key, first, &item).await;
        let small = self.apply_write(self.append(&key, third, &[], "[1]")).await;
        assert_eq!(small, Appended { version: third, over: first, length: 2 });
    }

    pub(super) async fn append_keeps_user_and_metadata_and_shortens_no_life(&self) {
        let key = self.key("life");
        let (put, first, second) = (self.version(), self.version(), self.version());
        let kept = Record { user: Some("u1".into()), ..self.record(&key, put, "[0]") };
        assert_eq!(self.apply(kept.clone()).await, Stored);
        let expire = |version, expires_at| {
            let write = self.append(&key, version, &[], "[1]");
            let record = Record { expires_at, user: Some("u2".into()), ..Record::clone(&write.record) };
            Write { record: record.into(), ..write }
        };
        let (sooner, later) = (kept.expires_at.minus(HOUR / 2), kept.expires_at.plus(HOUR));
        for (version, asked, expected) in [(first, sooner, kept.expires_at), (second, later, later)] {
            assert!(matches!(self.apply_write(expire(version, asked)).await, Appended { .. }));
            let Loaded::Found(found) = self.load(&key).await else { panic!("{key} is absent") };
            assert_eq!((found.expires_at, found.user.as_deref()), (expected, Some("u1")));
        }
    }

    pub(super) async fn append_after_the_expiry_begins_a_new_conversation(&self) {
        let key = self.key("expired before");
        let (put, append) = (self.version(), self.version());
        let past = self.store.clock().now().minus(HOUR);
        assert_eq!(self.apply(Record { expires_at: past, ..self.record(&key, put, "[0]") }).await, Stored);
        assert_eq!(self.apply_write(self.append_if_present(&key, append)).await, Absent);
        let applied = self.apply_write(self.append(&key, append, &[], "[1]")).await;
        assert_eq!(applied, Appended { version: append, over: put, length: 1 });
        self.assert_value(&key, append, "[1]").await;
    }

    pub(super) async fn append_only_if_present_creates_nothing(&self) {
        let key = self.key("if present");
        let [first, put, second, removal, third] = self.versions();
        assert_eq!(self.apply_write(self.append_if_present(&key, first)).await, Absent);
        assert_eq!(self.apply(self.record(&key, put, "[0]")).await, Stored);
        let applied = self.apply_write(self.append_if_present(&key, second)).await;
        assert_eq!(applied, Appended { version: second, over: put, length: 2 });
        assert_eq!(self.apply(self.tombstone(&key, removal)).await, Stored);
        assert_eq!(self.apply_write(self.append_if_present(&key, third)).await, Absent);
        assert_eq!(self.load(&key).await, Loaded::Absent(removal));
    }

    pub(super) async fn update_holds_over_own_appends(&self) {
        let key = self.key("own appends");
        let [put, append, update, last] = self.versions();
        let ours = WriterId::random();
        assert_eq!(self.apply(self.record(&key, put, "[0]")).await, Stored);
        let own = self.append(&key, append, &[], "[1]").with_writer(ours);
        assert!(matches!(self.apply_write(own.clone()).await, Appended { .. }));
        let over =
            |version| Write::new(self.record(&key, version, "[9]")).with_if_version(put).with_writer(ours);
        assert_eq!(self.apply_write(over(update)).await, Stored);
        assert_eq!(self.apply_write(own).await, AppendedBefore(update));
        let other = self.append(&key, last, &[], "[2]");
        assert_eq!(self.apply_write(other).await, Appended { version: last, over: update, length: 2 });
        assert_eq!(self.apply_write(over(self.version())).await, Conflict(last));
        self.assert_value(&key, last, "[9, 2]").await;
    }
}
