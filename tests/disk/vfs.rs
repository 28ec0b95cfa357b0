//! A disk between SQLite and the real one: it fails by plan, counts, holds calls up, and remembers what was written and
//! synced, so that a test can cut the power at any moment.
//!
//! It is SQLite's default in this process, and passes on whatever lies in a directory that nobody watches.
#![allow(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::size_of;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, OnceLock, PoisonError};

use rusqlite::ffi;

/// What SQLite asks a disk to do, as far as it can fail.
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

/// Which calls fail: of those named, all from the one numbered `from` (the first is 0), `times` times.
#[derive(Debug, Clone)]
pub struct Fault {
    pub calls: &'static [Call],
    pub from: usize,
    pub times: usize,
    pub code: c_int,
}

/// What changed the disk. A file is named by its last component.
#[derive(Debug, Clone)]
pub enum Change {
    Write {
        file: String,
        at: usize,
        bytes: Vec<u8>,
    },
    Truncate {
        file: String,
        to: usize,
    },
    Sync {
        file: String,
    },
    /// What was not synced yet may never be from now on, also where a later sync succeeds.
    SyncFailed {
        file: String,
    },
    Delete {
        file: String,
    },
}

#[derive(Default)]
struct State {
    changes: Vec<Change>,
    fault: Option<Fault>,
    met: usize,
    hit: usize,
    syncs: usize,
    /// Writes to this file wait.
    held: Option<String>,
    waiting: usize,
}

/// What happens in one directory.
#[derive(Default)]
pub struct Disk {
    state: Mutex<State>,
    turned: Condvar,
}

impl Disk {
    /// Watches a directory from now on; files that are open already are not seen.
    pub fn watch(directory: &Path) -> Arc<Self> {
        install();
        let disk = Arc::new(Self::default());
        lock(disks()).insert(directory.canonicalize().unwrap(), Arc::clone(&disk));
        disk
    }

    pub fn fail(&self, fault: Fault) {
        let mut state = lock(&self.state);
        (state.fault, state.met, state.hit) = (Some(fault), 0, 0);
    }

    /// Fails no more; says how many calls failed.
    pub fn mend(&self) -> usize {
        let mut state = lock(&self.state);
        state.fault = None;
        state.hit
    }

    /// How many changes there were.
    pub fn len(&self) -> usize {
        lock(&self.state).changes.len()
    }

    pub fn changes(&self) -> Vec<Change> {
        lock(&self.state).changes.clone()
    }

    pub fn syncs(&self) -> usize {
        lock(&self.state).syncs
    }

    /// How often that file was synced.
    pub fn syncs_of(&self, name: &str) -> usize {
        let is_one = |change: &&Change| matches!(change, Change::Sync { file } if file == name);
        lock(&self.state).changes.iter().filter(is_one).count()
    }

    /// Lets writes to that file wait until what this returns is dropped.
    pub fn hold_writes(&self, file: &str) -> Hold<'_> {
        lock(&self.state).held = Some(file.to_owned());
        Hold(self)
    }

    /// Whether a write waits.
    pub fn is_holding(&self) -> bool {
        lock(&self.state).waiting > 0
    }

    fn meet(&self, call: Call, file: &str) -> c_int {
        let mut state = lock(&self.state);
        if call == Call::Sync {
            state.syncs += 1;
        }
        if call == Call::Write {
            while state.held.as_deref() == Some(file) {
                state.waiting += 1;
                state = self.turned.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.waiting -= 1;
            }
        }
        let State { fault: Some(fault), met, hit, .. } = &mut *state else { return ffi::SQLITE_OK };
        if !fault.calls.contains(&call) {
            return ffi::SQLITE_OK;
        }
        *met += 1;
        if *met <= fault.from || *met - fault.from > fault.times {
            return ffi::SQLITE_OK;
        }
        *hit += 1;
        fault.code
    }

    /// Carries out what changes the disk, and notes it, unless it fails by plan.
    fn change(&self, call: Call, change: Change, real: impl FnOnce() -> c_int) -> c_int {
        let file = match &change {
            Change::Write { file, .. }
            | Change::Truncate { file, .. }
            | Change::Sync { file }
            | Change::SyncFailed { file }
            | Change::Delete { file } => file.clone(),
        };
        let planned = self.meet(call, &file);
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

pub struct Hold<'a>(&'a Disk);

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).held = None;
        self.0.turned.notify_all();
    }
}

/// What a directory holds after the power was cut when so many of the changes had been made: all that was synced, and of the
/// rest whatever chance has brought to disk.
pub fn after_power_cut(changes: &[Change], rng: &mut fastrand::Rng) -> BTreeMap<String, Vec<u8>> {
    let mut disk = BTreeMap::<String, Vec<u8>>::new();
    let mut unsynced = HashMap::<&str, Vec<&Change>>::new();
    for change in changes {
        match change {
            Change::Write { file, .. } | Change::Truncate { file, .. } => {
                unsynced.entry(file).or_default().push(change);
            }
            Change::Sync { file } => {
                let settled = unsynced.remove(file.as_str()).unwrap_or_default();
                settled.into_iter().for_each(|change| make(&mut disk, change, usize::MAX));
            }
            Change::SyncFailed { file } => some(&mut disk, unsynced.remove(file.as_str()), rng),
            Change::Delete { file } => {
                unsynced.remove(file.as_str());
                disk.remove(file);
            }
        }
    }
    unsynced.into_values().for_each(|left| some(&mut disk, Some(left), rng));
    disk
}

/// Each change, part of it, or nothing of it; in one disk in three all of them up to some point.
fn some(disk: &mut BTreeMap<String, Vec<u8>>, changes: Option<Vec<&Change>>, rng: &mut fastrand::Rng) {
    let changes = changes.unwrap_or_default();
    let upto = (rng.u8(..3) == 0).then(|| rng.usize(..=changes.len()));
    for (at, change) in changes.into_iter().enumerate() {
        match upto {
            Some(upto) if at < upto => make(disk, change, usize::MAX),
            Some(upto) if at == upto => make(disk, change, rng.usize(..5_000)),
            Some(_) => {}
            None => match rng.u8(..3) {
                0 => {}
                1 => make(disk, change, usize::MAX),
                _ => make(disk, change, rng.usize(..5_000)),
            },
        }
    }
}

/// Makes a change, a write as far as its first `most` bytes.
fn make(disk: &mut BTreeMap<String, Vec<u8>>, change: &Change, most: usize) {
    match change {
        Change::Write { file, at, bytes } => {
            let bytes = &bytes[..bytes.len().min(most)];
            let file = disk.entry(file.clone()).or_default();
            if file.len() < at + bytes.len() {
                file.resize(at + bytes.len(), 0);
            }
            file[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        Change::Truncate { file, to } => {
            disk.entry(file.clone()).or_default().resize(*to, 0);
        }
        _ => {}
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn disks() -> &'static Mutex<HashMap<PathBuf, Arc<Disk>>> {
    static DISKS: OnceLock<Mutex<HashMap<PathBuf, Arc<Disk>>>> = OnceLock::new();
    DISKS.get_or_init(Mutex::default)
}

/// The disk under a path, and the name of the file.
fn find(path: *const c_char) -> Option<(Arc<Disk>, String)> {
    if path.is_null() {
        return None;
    }
    // SAFETY: SQLite hands over a path that ends in NUL.
    let path = Path::new(unsafe { CStr::from_ptr(path) }.to_str().ok()?);
    let disk = lock(disks()).get(path.parent()?).cloned()?;
    Some((disk, path.file_name()?.to_str()?.to_owned()))
}

/// An open file as SQLite sees it; the real one lies behind it in memory.
#[repr(C)]
struct File {
    base: ffi::sqlite3_file,
    /// Null where nobody watches.
    watched: *mut (Arc<Disk>, String),
}

/// The VFS that SQLite comes with.
#[derive(Clone, Copy)]
struct Real(*mut ffi::sqlite3_vfs);

// SAFETY: it is a static of SQLite's, which nobody changes.
unsafe impl Send for Real {}
// SAFETY: as above.
unsafe impl Sync for Real {}

static REAL: OnceLock<Real> = OnceLock::new();

fn real() -> *mut ffi::sqlite3_vfs {
    REAL.get().expect("it is installed").0
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the copy lives for ever, and differs from what SQLite comes with in what is set here.
        unsafe {
            let found = ffi::sqlite3_vfs_find(std::ptr::null());
            REAL.set(Real(found)).ok();
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

/// The real file behind ours.
unsafe fn behind(file: *mut ffi::sqlite3_file) -> *mut ffi::sqlite3_file {
    // SAFETY: SQLite gave as many bytes as `szOsFile` asks for.
    unsafe { file.cast::<u8>().add(size_of::<File>()).cast() }
}

/// Whoever watches the file.
unsafe fn watched<'a>(file: *mut ffi::sqlite3_file) -> Option<&'a (Arc<Disk>, String)> {
    // SAFETY: `open` has set it, and `close` takes it.
    unsafe { (*file.cast::<File>()).watched.as_ref() }
}

/// Calls a method of the real file.
macro_rules! pass_on {
    ($file:expr, $method:ident $(, $argument:expr)*) => {{
        let file = behind($file);
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
    // SAFETY: the real one gets what it is owed: its own VFS, and its part of the memory.
    unsafe {
        let ours = file.cast::<File>();
        (*ours).base.pMethods = std::ptr::null();
        (*ours).watched = std::ptr::null_mut();
        let found = find(name);
        if let Some((disk, file)) = &found {
            let code = disk.meet(Call::Open, file);
            if code != ffi::SQLITE_OK {
                return code;
            }
        }
        let code = ((*real()).xOpen.unwrap())(real(), name, behind(file), flags, out);
        if code == ffi::SQLITE_OK {
            (*ours).base.pMethods = &raw const METHODS;
            (*ours).watched = found.map_or(std::ptr::null_mut(), |found| Box::into_raw(Box::new(found)));
        }
        code
    }
}

unsafe extern "C" fn delete(_: *mut ffi::sqlite3_vfs, name: *const c_char, sync: c_int) -> c_int {
    // SAFETY: as in `open`.
    let real = || unsafe { ((*real()).xDelete.unwrap())(real(), name, sync) };
    match find(name) {
        Some((disk, file)) => disk.change(Call::Delete, Change::Delete { file }, real),
        None => real(),
    }
}

unsafe extern "C" fn close(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: SQLite closes a file once.
    unsafe {
        let watched = std::mem::replace(&mut (*file.cast::<File>()).watched, std::ptr::null_mut());
        if !watched.is_null() {
            drop(Box::from_raw(watched));
        }
        pass_on!(file, xClose)
    }
}

unsafe extern "C" fn read(file: *mut ffi::sqlite3_file, to: *mut c_void, len: c_int, at: i64) -> c_int {
    // SAFETY: passed on.
    unsafe {
        match watched(file).map_or(ffi::SQLITE_OK, |(disk, name)| disk.meet(Call::Read, name)) {
            ffi::SQLITE_OK => pass_on!(file, xRead, to, len, at),
            code => code,
        }
    }
}

unsafe extern "C" fn write(file: *mut ffi::sqlite3_file, from: *const c_void, len: c_int, at: i64) -> c_int {
    // SAFETY: SQLite hands over that many bytes.
    unsafe {
        let Some((disk, name)) = watched(file) else { return pass_on!(file, xWrite, from, len, at) };
        let bytes = std::slice::from_raw_parts(from.cast::<u8>(), usize::try_from(len).unwrap()).to_vec();
        let change = Change::Write { file: name.clone(), at: usize::try_from(at).unwrap(), bytes };
        disk.change(Call::Write, change, || pass_on!(file, xWrite, from, len, at))
    }
}

unsafe extern "C" fn truncate(file: *mut ffi::sqlite3_file, to: i64) -> c_int {
    // SAFETY: passed on.
    unsafe {
        let Some((disk, name)) = watched(file) else { return pass_on!(file, xTruncate, to) };
        let change = Change::Truncate { file: name.clone(), to: usize::try_from(to).unwrap() };
        disk.change(Call::Truncate, change, || pass_on!(file, xTruncate, to))
    }
}

unsafe extern "C" fn sync(file: *mut ffi::sqlite3_file, flags: c_int) -> c_int {
    // SAFETY: passed on.
    unsafe {
        let Some((disk, name)) = watched(file) else { return pass_on!(file, xSync, flags) };
        let change = Change::Sync { file: name.clone() };
        disk.change(Call::Sync, change, || pass_on!(file, xSync, flags))
    }
}

unsafe extern "C" fn file_size(file: *mut ffi::sqlite3_file, size: *mut i64) -> c_int {
    // SAFETY: passed on.
    unsafe {
        match watched(file).map_or(ffi::SQLITE_OK, |(disk, name)| disk.meet(Call::Size, name)) {
            ffi::SQLITE_OK => pass_on!(file, xFileSize, size),
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
    // SAFETY: passed on.
    unsafe {
        match watched(file).map_or(ffi::SQLITE_OK, |(disk, name)| disk.meet(Call::Map, name)) {
            ffi::SQLITE_OK => pass_on!(file, xShmMap, page, size, extend, to),
            code => code,
        }
    }
}

unsafe extern "C" fn lock_file(file: *mut ffi::sqlite3_file, level: c_int) -> c_int {
    // SAFETY: passed on.
    unsafe { pass_on!(file, xLock, level) }
}

unsafe extern "C" fn unlock_file(file: *mut ffi::sqlite3_file, level: c_int) -> c_int {
    // SAFETY: passed on.
    unsafe { pass_on!(file, xUnlock, level) }
}

unsafe extern "C" fn check_reserved_lock(file: *mut ffi::sqlite3_file, out: *mut c_int) -> c_int {
    // SAFETY: passed on.
    unsafe { pass_on!(file, xCheckReservedLock, out) }
}

unsafe extern "C" fn file_control(file: *mut ffi::sqlite3_file, what: c_int, with: *mut c_void) -> c_int {
    // SAFETY: passed on.
    unsafe { pass_on!(file, xFileControl, what, with) }
}

unsafe extern "C" fn sector_size(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: passed on.
    unsafe { pass_on!(file, xSectorSize) }
}

unsafe extern "C" fn device_characteristics(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: passed on.
    unsafe { pass_on!(file, xDeviceCharacteristics) }
}

unsafe extern "C" fn shm_lock(file: *mut ffi::sqlite3_file, at: c_int, count: c_int, flags: c_int) -> c_int {
    // SAFETY: passed on.
    unsafe { pass_on!(file, xShmLock, at, count, flags) }
}

unsafe extern "C" fn shm_barrier(file: *mut ffi::sqlite3_file) {
    // SAFETY: passed on.
    unsafe { pass_on!(file, xShmBarrier) }
}

unsafe extern "C" fn shm_unmap(file: *mut ffi::sqlite3_file, delete: c_int) -> c_int {
    // SAFETY: passed on.
    unsafe { pass_on!(file, xShmUnmap, delete) }
}
