//! A VFS between SQLite and the real disk. It fails by plan, counts calls, blocks writes, and records writes and syncs.
//! With the record, a test can cut the power at any moment.
//!
//! This VFS is the default of SQLite in this process. It forwards each call outside the watched directories.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::size_of;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, OnceLock, PoisonError};

use rusqlite::ffi;

use crate::power_cut::Change;

/// The calls of SQLite to a disk that can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Call {
    Open,
    Read,
    Write,
    Truncate,
    Sync,
    Size,
    Delete,
    Map,
}

/// A planned fault. Of the named calls, `times` calls fail from the call with the number `from` on. The first call has number 0.
#[derive(Debug, Clone)]
pub struct Fault {
    pub calls: &'static [Call],
    pub from: usize,
    pub times: usize,
    pub code: c_int,
}

#[derive(Default)]
struct State {
    changes: Vec<Change>,
    fault: Option<Fault>,
    matching_calls: usize,
    failed_calls: usize,
    syncs: usize,
    /// The file whose writes are blocked.
    blocked: Option<String>,
    blocked_writes: usize,
}

/// The calls in one directory, with their faults.
#[derive(Default)]
pub struct Disk {
    state: Mutex<State>,
    unblocked: Condvar,
}

impl Disk {
    /// Watches a directory from now on. Files that are already open are not watched.
    pub fn watch(directory: &Path) -> Arc<Self> {
        install();
        let disk = Arc::new(Self::default());
        lock(disks()).insert(directory.canonicalize().unwrap(), Arc::clone(&disk));
        disk
    }

    pub fn fail(&self, fault: Fault) {
        let mut state = lock(&self.state);
        (state.fault, state.matching_calls, state.failed_calls) = (Some(fault), 0, 0);
    }

    /// Ends the fault, and returns the number of failed calls.
    pub fn end_fault(&self) -> usize {
        let mut state = lock(&self.state);
        state.fault = None;
        state.failed_calls
    }

    /// Returns the number of changes.
    pub fn len(&self) -> usize {
        lock(&self.state).changes.len()
    }

    pub fn changes(&self) -> Vec<Change> {
        lock(&self.state).changes.clone()
    }

    pub fn syncs(&self) -> usize {
        lock(&self.state).syncs
    }

    /// Returns the number of syncs of this file.
    pub fn syncs_of(&self, name: &str) -> usize {
        let is_sync = |change: &&Change| matches!(change, Change::Sync { file } if file == name);
        lock(&self.state).changes.iter().filter(is_sync).count()
    }

    /// Blocks writes to this file until the caller drops the returned guard.
    pub fn block_writes(&self, file: &str) -> BlockGuard<'_> {
        lock(&self.state).blocked = Some(file.to_owned());
        BlockGuard(self)
    }

    /// Returns true if a write is blocked.
    pub fn is_blocking(&self) -> bool {
        lock(&self.state).blocked_writes > 0
    }

    fn begin_call(&self, call: Call, file: &str) -> c_int {
        let mut state = lock(&self.state);
        if call == Call::Sync {
            state.syncs += 1;
        }
        if call == Call::Write {
            while state.blocked.as_deref() == Some(file) {
                state.blocked_writes += 1;
                state = self.unblocked.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.blocked_writes -= 1;
            }
        }
        let State { fault: Some(fault), matching_calls, failed_calls, .. } = &mut *state else {
            return ffi::SQLITE_OK;
        };
        if !fault.calls.contains(&call) {
            return ffi::SQLITE_OK;
        }
        *matching_calls += 1;
        if *matching_calls <= fault.from || *matching_calls - fault.from > fault.times {
            return ffi::SQLITE_OK;
        }
        *failed_calls += 1;
        fault.code
    }

    /// Performs a change and records it, unless it fails by plan.
    fn change(&self, call: Call, change: Change, real: impl FnOnce() -> c_int) -> c_int {
        let file = match &change {
            Change::Write { file, .. }
            | Change::Truncate { file, .. }
            | Change::Sync { file }
            | Change::SyncFailed { file }
            | Change::Delete { file } => file.clone(),
        };
        let planned = self.begin_call(call, &file);
        let mut state = lock(&self.state);
        if planned != ffi::SQLITE_OK {
            if call == Call::Sync {
                state.changes.push(Change::SyncFailed { file });
            }
            return planned;
        }
        let code = real();
        if code == ffi::SQLITE_OK {
            state.changes.push(change);
        }
        code
    }
}

pub struct BlockGuard<'a>(&'a Disk);

impl Drop for BlockGuard<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).blocked = None;
        self.0.unblocked.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn disks() -> &'static Mutex<HashMap<PathBuf, Arc<Disk>>> {
    static DISKS: OnceLock<Mutex<HashMap<PathBuf, Arc<Disk>>>> = OnceLock::new();
    DISKS.get_or_init(Mutex::default)
}

/// Returns the watched disk of a path and the name of the file.
fn find(path: *const c_char) -> Option<(Arc<Disk>, String)> {
    if path.is_null() {
        return None;
    }
    // SAFETY: SQLite passes a path that ends in NUL.
    let path = Path::new(unsafe { CStr::from_ptr(path) }.to_str().ok()?);
    let disk = lock(disks()).get(path.parent()?).cloned()?;
    Some((disk, path.file_name()?.to_str()?.to_owned()))
}

/// An open file of this VFS. The file of the real VFS follows it in memory.
#[repr(C)]
struct File {
    base: ffi::sqlite3_file,
    /// Null if the directory is not watched.
    watched: *mut (Arc<Disk>, String),
}

/// The original default VFS of SQLite.
#[derive(Clone, Copy)]
struct RealVfs(*mut ffi::sqlite3_vfs);

// SAFETY: the pointer names a static of SQLite that nothing changes.
unsafe impl Send for RealVfs {}
// SAFETY: the pointer names a static of SQLite that nothing changes.
unsafe impl Sync for RealVfs {}

static REAL_VFS: OnceLock<RealVfs> = OnceLock::new();

fn real() -> *mut ffi::sqlite3_vfs {
    REAL_VFS.get().expect("`install` sets the real VFS").0
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the copy is never freed. It differs from the original VFS only in the fields that are set here.
        unsafe {
            let found = ffi::sqlite3_vfs_find(std::ptr::null());
            REAL_VFS.set(RealVfs(found)).ok();
            let mut ours = *found;
            ours.szOsFile += c_int::try_from(size_of::<File>()).unwrap();
            ours.zName = c"watched".as_ptr();
            ours.pNext = std::ptr::null_mut();
            ours.xOpen = Some(open);
            ours.xDelete = Some(delete);
            let ours = Box::leak(Box::new(ours));
            assert_eq!(ffi::sqlite3_vfs_register(ours, 1), ffi::SQLITE_OK);
        }
    });
}

/// Returns the file of the real VFS.
unsafe fn real_file(file: *mut ffi::sqlite3_file) -> *mut ffi::sqlite3_file {
    // SAFETY: SQLite allocates `szOsFile` bytes for each file.
    unsafe { file.cast::<u8>().add(size_of::<File>()).cast() }
}

/// Returns the watched disk and the name of an open file.
unsafe fn watched<'a>(file: *mut ffi::sqlite3_file) -> Option<&'a (Arc<Disk>, String)> {
    // SAFETY: `open` sets the pointer and `close` takes it.
    unsafe { (*file.cast::<File>()).watched.as_ref() }
}

/// Forwards a call to the file of the real VFS.
macro_rules! forward {
    ($file:expr, $method:ident $(, $argument:expr)*) => {{
        let file = real_file($file);
        ((*(*file).pMethods).$method.unwrap())(file $(, $argument)*)
    }};
}

static METHODS: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    iVersion: 2,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(file_size),
    xLock: Some(lock_file),
    xUnlock: Some(unlock_file),
    xCheckReservedLock: Some(check_reserved_lock),
    xFileControl: Some(file_control),
    xSectorSize: Some(sector_size),
    xDeviceCharacteristics: Some(device_characteristics),
    xShmMap: Some(shm_map),
    xShmLock: Some(shm_lock),
    xShmBarrier: Some(shm_barrier),
    xShmUnmap: Some(shm_unmap),
    xFetch: None,
    xUnfetch: None,
};

unsafe extern "C" fn open(
    _: *mut ffi::sqlite3_vfs,
    name: ffi::sqlite3_filename,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out: *mut c_int,
) -> c_int {
    // SAFETY: the real VFS gets its own pointer and its own part of the memory.
    unsafe {
        let ours = file.cast::<File>();
        (*ours).base.pMethods = std::ptr::null();
        (*ours).watched = std::ptr::null_mut();
        let found = find(name);
        if let Some((disk, file)) = &found {
            let code = disk.begin_call(Call::Open, file);
            if code != ffi::SQLITE_OK {
                return code;
            }
        }
        let code = ((*real()).xOpen.unwrap())(real(), name, real_file(file), flags, out);
        if code == ffi::SQLITE_OK {
            (*ours).base.pMethods = &raw const METHODS;
            (*ours).watched = found.map_or(std::ptr::null_mut(), |found| Box::into_raw(Box::new(found)));
        }
        code
    }
}

unsafe extern "C" fn delete(_: *mut ffi::sqlite3_vfs, name: *const c_char, sync: c_int) -> c_int {
    // SAFETY: the real VFS gets its own pointer.
    let real = || unsafe { ((*real()).xDelete.unwrap())(real(), name, sync) };
    match find(name) {
        Some((disk, file)) => disk.change(Call::Delete, Change::Delete { file }, real),
        None => real(),
    }
}

unsafe extern "C" fn close(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: SQLite closes each file once.
    unsafe {
        let watched = std::mem::replace(&mut (*file.cast::<File>()).watched, std::ptr::null_mut());
        if !watched.is_null() {
            drop(Box::from_raw(watched));
        }
        forward!(file, xClose)
    }
}

unsafe extern "C" fn read(file: *mut ffi::sqlite3_file, to: *mut c_void, len: c_int, at: i64) -> c_int {
    // SAFETY: the arguments are forwarded unchanged.
    unsafe {
        match watched(file).map_or(ffi::SQLITE_OK, |(disk, name)| disk.begin_call(Call::Read, name)) {
            ffi::SQLITE_OK => forward!(file, xRead, to, len, at),
            code => code,
        }
    }
}

unsafe extern "C" fn write(file: *mut ffi::sqlite3_file, from: *const c_void, len: c_int, at: i64) -> c_int {
    // SAFETY: SQLite passes `len` valid bytes.
    unsafe {
        let Some((disk, name)) = watched(file) else { return forward!(file, xWrite, from, len, at) };
        let bytes = std::slice::from_raw_parts(from.cast::<u8>(), usize::try_from(len).unwrap()).to_vec();
        let change = Change::Write { file: name.clone(), at: usize::try_from(at).unwrap(), bytes };
        disk.change(Call::Write, change, || forward!(file, xWrite, from, len, at))
    }
}

unsafe extern "C" fn truncate(file: *mut ffi::sqlite3_file, to: i64) -> c_int {
    // SAFETY: the arguments are forwarded unchanged.
    unsafe {
        let Some((disk, name)) = watched(file) else { return forward!(file, xTruncate, to) };
        let change = Change::Truncate { file: name.clone(), to: usize::try_from(to).unwrap() };
        disk.change(Call::Truncate, change, || forward!(file, xTruncate, to))
    }
}

unsafe extern "C" fn sync(file: *mut ffi::sqlite3_file, flags: c_int) -> c_int {
    // SAFETY: the arguments are forwarded unchanged.
    unsafe {
        let Some((disk, name)) = watched(file) else { return forward!(file, xSync, flags) };
        let change = Change::Sync { file: name.clone() };
        disk.change(Call::Sync, change, || forward!(file, xSync, flags))
    }
}

unsafe extern "C" fn file_size(file: *mut ffi::sqlite3_file, size: *mut i64) -> c_int {
    // SAFETY: the arguments are forwarded unchanged.
    unsafe {
        match watched(file).map_or(ffi::SQLITE_OK, |(disk, name)| disk.begin_call(Call::Size, name)) {
            ffi::SQLITE_OK => forward!(file, xFileSize, size),
            code => code,
        }
    }
}

unsafe extern "C" fn shm_map(
    file: *mut ffi::sqlite3_file,
    page: c_int,
    size: c_int,
    extend: c_int,
    to: *mut *mut c_void,
) -> c_int {
    // SAFETY: the arguments are forwarded unchanged.
    unsafe {
        match watched(file).map_or(ffi::SQLITE_OK, |(disk, name)| disk.begin_call(Call::Map, name)) {
            ffi::SQLITE_OK => forward!(file, xShmMap, page, size, extend, to),
            code => code,
        }
    }
}

unsafe extern "C" fn lock_file(file: *mut ffi::sqlite3_file, level: c_int) -> c_int {
    // SAFETY: the arguments are forwarded unchanged.
    unsafe { forward!(file, xLock, level) }
}

unsafe extern "C" fn unlock_file(file: *mut ffi::sqlite3_file, level: c_int) -> c_int {
    // SAFETY: the arguments are forwarded unchanged.
    unsafe { forward!(file, xUnlock, level) }
}

unsafe extern "C" fn check_reserved_lock(file: *mut ffi::sqlite3_file, out: *mut c_int) -> c_int {
    // SAFETY: the arguments are forwarded unchanged.
    unsafe { forward!(file, xCheckReservedLock, out) }
}

unsafe extern "C" fn file_control(file: *mut ffi::sqlite3_file, what: c_int, with: *mut c_void) -> c_int {
    // SAFETY: the arguments are forwarded unchanged.
    unsafe { forward!(file, xFileControl, what, with) }
}

unsafe extern "C" fn sector_size(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: the arguments are forwarded unchanged.
    unsafe { forward!(file, xSectorSize) }
}

unsafe extern "C" fn device_characteristics(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: the arguments are forwarded unchanged.
    unsafe { forward!(file, xDeviceCharacteristics) }
}

unsafe extern "C" fn shm_lock(file: *mut ffi::sqlite3_file, at: c_int, count: c_int, flags: c_int) -> c_int {
    // SAFETY: the arguments are forwarded unchanged.
    unsafe { forward!(file, xShmLock, at, count, flags) }
}

unsafe extern "C" fn shm_barrier(file: *mut ffi::sqlite3_file) {
    // SAFETY: the arguments are forwarded unchanged.
    unsafe { forward!(file, xShmBarrier) }
}

unsafe extern "C" fn shm_unmap(file: *mut ffi::sqlite3_file, delete: c_int) -> c_int {
    // SAFETY: the arguments are forwarded unchanged.
    unsafe { forward!(file, xShmUnmap, delete) }
}
