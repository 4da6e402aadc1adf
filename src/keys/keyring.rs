//! The keyring: the unwrapped data keys of one database, and the gate of all its handles.
//!
//! Whoever needs a data key asks here, and is refused while the keyring is closed. Who was let in keeps what it was given
//! ([`OpenKeys`], [`Current`]) until it has ended, and so keeps those keys alive.

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;

use crate::aead::{AeadKey, AesBackend};
use crate::error::{Error, ErrorKind, PageError};
use crate::format::derive::{Info, Label};
use crate::format::page::{SALT_LEN, Suite};
use crate::ids::{DatabaseId, Generation, SealId};
use crate::keys::in_memory::{KeysInMemory, Live};
use crate::page::subkeys::Owner;
use crate::secret::{Forked, Locked, SecretKey, ThisProcess};

/// One generation of a database's data key.
pub(crate) struct DataKey {
    pub(crate) generation: Generation,
    pub(crate) suite: Suite,
    pub(crate) seal: SealId,
    pub(crate) key: SecretKey,
}

impl DataKey {
    /// Derives the key for one use of this data key, named by label and salt, ready for its suite.
    pub(crate) fn derive(
        &self,
        label: Label,
        salt: &[u8; SALT_LEN],
        backend: AesBackend,
    ) -> Result<Locked<AeadKey>, PageError> {
        let info = Info::data(label, self.seal, salt, self.generation, self.suite);
        AeadKey::derive(&self.key, &info, self.suite, backend)
    }
}

/// A data key in the keyring. Subkeys hold the one that they were derived from, so it outlives whatever uses it: once it
/// is gone, so is everything made from it.
pub(crate) type LiveKey = Live<DataKey>;

/// What must not be given up while anybody may seal under the newest generation: its lock among processes. It is dropped by
/// whoever ends last, on any thread: its drop must neither block nor call into the database.
pub(crate) type Hold = Arc<dyn Send + Sync>;

/// The keys of an open database, as they were at one moment. An operation that has them ends whole, whatever is closed
/// meanwhile.
pub(crate) struct OpenKeys {
    // Declared before the keys, so that it is gone when they are.
    hold: Option<Hold>,
    /// At least one; each generation once, in ascending order.
    keys: Vec<Arc<LiveKey>>,
}

/// The key that new seals use, and what is held for it.
pub(crate) struct Current {
    // Declared before the key, so that it is gone when the key is.
    pub(crate) hold: Option<Hold>,
    pub(crate) key: Arc<LiveKey>,
}

impl OpenKeys {
    /// `keys` in ascending order; those that `before` has, by their generation, are kept: no key is alive twice.
    fn new(keys: Vec<DataKey>, hold: Option<Hold>, before: Option<&Self>, in_memory: &KeysInMemory) -> Self {
        let kept = |key: DataKey| {
            let known = before.and_then(|before| before.find(key.generation));
            known.unwrap_or_else(|| LiveKey::new(key, in_memory.mark()))
        };
        Self { hold, keys: keys.into_iter().map(kept).collect() }
    }

    fn newest(&self) -> &Arc<LiveKey> {
        self.keys.last().expect("a keyring is opened with at least one key and never loses its last")
    }

    fn current(&self) -> Current {
        Current { hold: self.hold.clone(), key: Arc::clone(self.newest()) }
    }

    pub(crate) fn current_generation(&self) -> Generation {
        self.newest().generation
    }

    pub(crate) fn generations(&self) -> Vec<Generation> {
        self.keys.iter().map(|key| key.generation).collect()
    }

    #[cfg(feature = "test-util")]
    pub(crate) fn live_keys(&self) -> Vec<std::sync::Weak<LiveKey>> {
        self.keys.iter().map(Arc::downgrade).collect()
    }

    pub(crate) fn find(&self, generation: Generation) -> Option<Arc<LiveKey>> {
        let at = self.keys.binary_search_by_key(&generation, |key| key.generation).ok()?;
        Some(Arc::clone(&self.keys[at]))
    }
}

/// Why a keyring is closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Closed {
    /// The cluster is; it may come back.
    Disabled,
    /// The database is gone, for good.
    Dropped,
}

impl From<Closed> for PageError {
    fn from(why: Closed) -> Self {
        match why {
            Closed::Disabled => Self::Disabled,
            Closed::Dropped => Self::Dropped,
        }
    }
}

enum State {
    Open(Arc<OpenKeys>),
    Closed { why: Closed, newest: Generation },
}

impl State {
    fn newest(&self) -> Generation {
        match self {
            Self::Open(open) => open.newest().generation,
            Self::Closed { newest, .. } => *newest,
        }
    }

    fn open(&self) -> Result<&Arc<OpenKeys>, PageError> {
        match self {
            Self::Open(open) => Ok(open),
            Self::Closed { why, .. } => Err((*why).into()),
        }
    }
}

/// All data keys of one database, and whether they may be used. Changing it is [`CipherInner`]'s alone, which also ends
/// what was derived from the keys.
///
/// [`CipherInner`]: crate::page::cipher::CipherInner
pub(crate) struct Keyring {
    pub(crate) database: DatabaseId,
    pub(crate) owner: Owner,
    process: ThisProcess,
    in_memory: KeysInMemory,
    state: ArcSwap<State>,
    /// Held while the next state is made from the last.
    changing: Mutex<()>,
}

impl Keyring {
    /// An open keyring. `keys` must hold each generation once, in ascending order; `hold` is kept as long as anybody may
    /// seal under the last. As long as a key is in memory, `in_memory` says so.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if there is none; [`ErrorKind::Resources`].
    pub(crate) fn new(
        database: DatabaseId,
        keys: Vec<DataKey>,
        hold: Option<Hold>,
        in_memory: &KeysInMemory,
    ) -> Result<Self, Error> {
        check_keys(database, &keys)?;
        let state = State::Open(Arc::new(OpenKeys::new(keys, hold, None, in_memory)));
        Ok(Self {
            database,
            owner: Owner::next(),
            process: ThisProcess::mark()?,
            in_memory: in_memory.clone(),
            state: ArcSwap::from_pointee(state),
            changing: Mutex::default(),
        })
    }

    /// Fails in a forked child, open or closed.
    #[inline]
    pub(crate) fn check_fork(&self) -> Result<(), Forked> {
        self.process.check()
    }

    /// Lets an operation in.
    ///
    /// # Errors
    /// [`PageError::Disabled`] or [`PageError::Dropped`] while closed.
    pub(crate) fn enter(&self) -> Result<Arc<OpenKeys>, PageError> {
        self.state.load().open().map(Arc::clone)
    }

    /// The key that new seals use: the newest.
    ///
    /// # Errors
    /// As [`Keyring::enter`].
    pub(crate) fn current(&self) -> Result<Current, PageError> {
        self.state.load().open().map(|open| open.current())
    }

    /// # Errors
    /// As [`Keyring::enter`].
    pub(crate) fn find(&self, generation: Generation) -> Result<Option<Arc<LiveKey>>, PageError> {
        self.state.load().open().map(|open| open.find(generation))
    }

    /// Whether this very key may still be used.
    pub(crate) fn holds(&self, key: &Arc<LiveKey>) -> bool {
        matches!(self.find(key.generation), Ok(Some(found)) if Arc::ptr_eq(&found, key))
    }

    /// The newest generation, open or closed.
    pub(crate) fn newest(&self) -> Generation {
        self.state.load().newest()
    }

    /// Lets nobody in any more. What is dropped stays dropped. Who is in keeps the keys alive until they have ended.
    pub(crate) fn close(&self, why: Closed) {
        self.change(|state| match state {
            State::Closed { why: Closed::Dropped, .. } => None,
            _ => Some(State::Closed { why, newest: state.newest() }),
        });
    }

    /// Opens it with `keys`, as for [`Keyring::new`]; if it is open, they take the place of those it has.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the database was dropped; [`ErrorKind::Damaged`] without a key.
    pub(crate) fn open_with(&self, keys: Vec<DataKey>, hold: Option<Hold>) -> Result<(), Error> {
        self.put(keys, hold, |state| match state {
            State::Open(open) => Ok(Some(open)),
            State::Closed { why: Closed::Disabled, .. } => Ok(None),
            State::Closed { why: Closed::Dropped, .. } => Err(PageError::Dropped),
        })
    }

    /// If it is open: the keys of these generations, in ascending order, are all that there are now. Those that it has stay
    /// what they are, the others are among `new`. Does nothing if it has a newer one: then `current` was read too early.
    ///
    /// # Errors
    /// As [`Keyring::enter`]; [`ErrorKind::Damaged`] if a key is in neither.
    pub(crate) fn follow(&self, current: &[Generation], new: Vec<DataKey>, hold: Option<Hold>) -> Result<(), Error> {
        let new: Vec<_> = new.into_iter().map(|key| LiveKey::new(key, self.in_memory.mark())).collect();
        let mut outcome = Ok(());
        self.change(|state| {
            let open = match state.open() {
                Ok(open) => open,
                Err(error) => {
                    outcome = Err(error.into());
                    return None;
                }
            };
            if current.last().is_some_and(|&last| last < open.newest().generation) {
                return None;
            }
            let found = |generation: Generation| {
                open.find(generation).or_else(|| new.iter().find(|key| key.generation == generation).cloned())
            };
            let keys: Vec<_> = current.iter().filter_map(|&generation| found(generation)).collect();
            if keys.is_empty() || keys.len() != current.len() {
                let message = format!("database {} lacks a data key", self.database);
                outcome = Err(Error::new(ErrorKind::Damaged, message));
                return None;
            }
            Some(State::Open(Arc::new(OpenKeys { hold: hold.clone(), keys })))
        });
        outcome
    }

    /// Adds the next generation, which seals use from now on.
    ///
    /// # Errors
    /// As [`Keyring::enter`]; [`ErrorKind::Invalid`] if it is not newer than the newest.
    pub(crate) fn add(&self, key: DataKey, hold: Option<Hold>) -> Result<(), Error> {
        let key = LiveKey::new(key, self.in_memory.mark());
        let mut outcome = Ok(());
        self.change(|state| {
            let checked = state.open().map_err(Error::from).and_then(|open| check_newer(open, &key));
            match checked {
                Ok(mut keys) => {
                    keys.push(Arc::clone(&key));
                    Some(State::Open(Arc::new(OpenKeys { hold: hold.clone(), keys })))
                }
                Err(error) => {
                    outcome = Err(error);
                    None
                }
            }
        });
        outcome
    }

    /// Takes a generation out, other than the newest.
    ///
    /// # Errors
    /// As [`Keyring::enter`]; [`ErrorKind::Invalid`] for the newest.
    pub(crate) fn remove(&self, generation: Generation) -> Result<(), Error> {
        let mut outcome = Ok(());
        self.change(|state| {
            let open = match state.open() {
                Ok(open) if open.newest().generation != generation => open,
                Ok(_) => {
                    let message = format!("generation {generation} is the newest: rotate before it is removed");
                    outcome = Err(Error::invalid(message));
                    return None;
                }
                Err(error) => {
                    outcome = Err(error.into());
                    return None;
                }
            };
            let keys = open.keys.iter().filter(|key| key.generation != generation).cloned().collect();
            Some(State::Open(Arc::new(OpenKeys { hold: open.hold.clone(), keys })))
        });
        outcome
    }

    fn put(
        &self,
        keys: Vec<DataKey>,
        hold: Option<Hold>,
        before: impl FnOnce(&State) -> Result<Option<&Arc<OpenKeys>>, PageError>,
    ) -> Result<(), Error> {
        check_keys(self.database, &keys)?;
        let mut outcome = Ok(());
        self.change(|state| match before(state) {
            Ok(before) => {
                let open = OpenKeys::new(keys, hold.clone(), before.map(|before| &**before), &self.in_memory);
                Some(State::Open(Arc::new(open)))
            }
            Err(error) => {
                outcome = Err(error.into());
                None
            }
        });
        outcome
    }

    /// The caller has checked that this is no forked child.
    fn change(&self, next: impl FnOnce(&State) -> Option<State>) {
        // Dropped after the lock: with it may go the last of a hold.
        let old;
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        old = self.state.load_full();
        if let Some(next) = next(&old) {
            self.state.store(Arc::new(next));
        }
    }
}

fn check_keys(database: DatabaseId, keys: &[DataKey]) -> Result<(), Error> {
    if keys.is_empty() {
        return Err(Error::new(ErrorKind::Damaged, format!("database {database} has no data key")));
    }
    if !keys.is_sorted_by(|a, b| a.generation < b.generation) {
        return Err(Error::new(ErrorKind::Damaged, format!("the data keys of database {database} are out of order")));
    }
    Ok(())
}

/// The keys of `open`, if `key` may come after them.
fn check_newer(open: &OpenKeys, key: &LiveKey) -> Result<Vec<Arc<LiveKey>>, Error> {
    let newest = open.newest().generation;
    if key.generation <= newest {
        let message = format!("generation {} does not come after {newest}", key.generation);
        return Err(Error::invalid(message));
    }
    Ok(open.keys.clone())
}
