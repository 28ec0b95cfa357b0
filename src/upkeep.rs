//! What is done now and then in the background: accesses are reported, what is long expired is forgotten.

use std::future::Future;
use std::sync::Weak;
use std::time::Duration;

use tokio::task::AbortHandle;

/// Whatever has chores to do.
pub(crate) trait Upkeep: Send + Sync + 'static {
    fn upkeep(&self) -> impl Future<Output = ()> + Send;
}

/// The background task; it ends with its owner.
#[derive(Debug)]
pub(crate) struct Task(AbortHandle);

impl Task {
    /// Does the owner's chores every `period`, drawn anew each time between three quarters and all of it, so that many
    /// daemons do not keep step.
    pub(crate) fn start<T: Upkeep>(owner: Weak<T>, period: Duration) -> Self {
        let chores = async move {
            loop {
                tokio::time::sleep(period.mul_f64(0.75 + fastrand::f64() / 4.0)).await;
                let Some(owner) = owner.upgrade() else { return };
                owner.upkeep().await;
            }
        };
        Self(tokio::spawn(chores).abort_handle())
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}
