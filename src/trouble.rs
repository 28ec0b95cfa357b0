//! What an operator has to mend: a refused key, missing migrations, a file that cannot be used.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, ErrorKind, Result};

/// What a call to the origin does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Read,
    Write,
}

/// The trouble there is, if any, by the last call to the origin, whoever made it.
#[derive(Debug, Default)]
pub(crate) struct Trouble(Mutex<Option<Error>>);

impl Trouble {
    /// Takes note of what a call says about the origin. That a file can be read does not mean that it can be written, so
    /// only a write ends the trouble with a file.
    pub(crate) fn note<T>(&self, call: Call, result: &Result<T>) {
        match result {
            Ok(_) => {
                let mut trouble = self.lock();
                let is_over = |error: &Error| call == Call::Write || error.kind() != ErrorKind::Local;
                if trouble.as_ref().is_some_and(is_over) {
                    tracing::info!("the source of truth works again");
                    *trouble = None;
                }
            }
            Err(e) if matches!(e.kind(), ErrorKind::Denied | ErrorKind::Schema | ErrorKind::Local) => {
                let mut trouble = self.lock();
                if trouble.is_none() {
                    tracing::error!(error = %e, "the source of truth needs an operator");
                }
                *trouble = Some(e.clone());
            }
            Err(_) => {}
        }
    }

    /// What is to be mended.
    pub(crate) fn get(&self) -> Option<Error> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Error>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
