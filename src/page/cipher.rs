//! [`PageCipher`]: seals and opens one page.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use arc_swap::{ArcSwapOption, Guard};

use crate::aead::{AeadKey, AesBackend};
use crate::env::{Entropy, Env};
#[cfg(any(doc, test))]
use crate::error::ErrorKind;
use crate::error::{PageError, Result};
use crate::format::derive::Label;
use crate::format::page::{AAD_LEN, MAX_PAYLOAD, NONCE_LEN, OVERHEAD, PageContext, SALT_LEN, SubkeyName, Trailer};
use crate::ids::{DatabaseId, Generation};
use crate::keys::keyring::{Closed, Current, DataKey, Hold, Keyring, LiveKey, OpenKeys};
use crate::page::session::{Counter, Leased, MAX_SEALS, MAX_UNITS, Session, units};
use crate::page::subkeys::{Subkey, SubkeyCache};
use crate::secret::{Forked, Locked};

/// Seals and opens the pages of one database.
///
/// A handle: cloning it is cheap, and clones share their session. All methods take `&self` and may be called from any
/// number of threads. A sealed page is its payload's length plus [`OVERHEAD`], whatever the suite.
///
/// While the cluster is disabled every call fails with [`PageError::Disabled`]; calls that were running ended whole. The
/// same handle works again once the cluster does.
///
/// ```
/// # use pageseal::{Cluster, ClusterOptions, LocalKeyFile, Wrappers, FileId, PageContext, OVERHEAD};
/// # let dir = std::env::temp_dir().join(format!("pageseal-doc-cipher-{}", std::process::id()));
/// # std::fs::create_dir_all(&dir)?;
/// # let key = LocalKeyFile::create(dir.join("master.key"))?;
/// # let cluster = Cluster::create(&dir.join("cluster"), ClusterOptions::new(), Wrappers::one(key))?;
/// let cipher = cluster.create_database("orders")?.cipher()?;
/// let context = PageContext::page(FileId::new(1), 7);
///
/// let mut page = vec![0u8; 4096];
/// page[..5].copy_from_slice(b"hello");
/// cipher.seal_in_place(&context, &mut page)?;
/// cipher.open_in_place(&context, &mut page)?;
/// assert_eq!(&page[..5], b"hello");
///
/// cipher.seal_in_place(&context, &mut page)?;
/// let elsewhere = PageContext::page(FileId::new(1), 8);
/// assert!(cipher.open_in_place(&elsewhere, &mut page).is_err());
/// # std::fs::remove_dir_all(&dir)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct PageCipher(pub(crate) Arc<CipherInner>, #[allow(dead_code)] Option<KeepAlive>); // kept for its drop

/// The cluster of a cipher that was handed out: as long as anybody can seal, somebody must be there to close the gate.
type KeepAlive = Arc<dyn Send + Sync>;

/// What the cipher shares with its clones and with the batches.
pub(crate) struct CipherInner {
    keyring: Keyring,
    backend: AesBackend,
    session: ArcSwapOption<Session>,
    /// Held by the one thread that opens the next session.
    opening: Mutex<()>,
    subkeys: Arc<SubkeyCache>,
    /// How often the cluster was told that its machine was resumed.
    resumes: Arc<AtomicU64>,
    env: Env,
    source: Option<Weak<dyn GenerationSource>>,
}

/// Who may know generations that the keyring does not know yet, because another process made them.
pub(crate) trait GenerationSource: Send + Sync {
    /// Looks for them; true if the keyring may know this one now. Called for any page that names one, also a forged page:
    /// the implementor limits how often it really looks. It must not wait for keys to be gone: the caller may be in a batch
    /// that has them.
    fn look_for(&self, database: DatabaseId, generation: Generation) -> bool;
}

impl PageCipher {
    pub(crate) fn new(
        keyring: Keyring,
        backend: AesBackend,
        subkeys: Arc<SubkeyCache>,
        resumes: Arc<AtomicU64>,
        env: Env,
        source: Option<Weak<dyn GenerationSource>>,
    ) -> Self {
        let session = ArcSwapOption::empty();
        let opening = Mutex::new(());
        Self(Arc::new(CipherInner { keyring, backend, session, opening, subkeys, resumes, env, source }), None)
    }

    pub(crate) fn from_inner(inner: Arc<CipherInner>) -> Self {
        Self(inner, None)
    }

    /// The same, which also keeps the cluster.
    pub(crate) fn keeping(&self, cluster: KeepAlive) -> Self {
        Self(Arc::clone(&self.0), Some(cluster))
    }

    /// Seals `src` into `dst`, which must be [`OVERHEAD`] bytes longer.
    ///
    /// # Errors
    /// A [`PageError`]; `dst` then holds zeros.
    pub fn seal_into(&self, context: &PageContext, src: &[u8], dst: &mut [u8]) -> Result<(), PageError> {
        or_zeros(dst, |dst| {
            if dst.len().checked_sub(OVERHEAD) != Some(src.len()) {
                return Err(PageError::Length);
            }
            let (payload, trailer) = split_sealed(dst)?;
            // Copied before the nonce is drawn: the bits must not outlive a read of input, which may wait for a disk.
            payload.copy_from_slice(src);
            trailer.copy_from_slice(&self.seal_detached(context, payload)?.0);
            Ok(())
        })
    }

    /// Opens the sealed page `src` into `dst`, which must be [`OVERHEAD`] bytes shorter.
    ///
    /// # Errors
    /// A [`PageError`]; `dst` then holds zeros.
    pub fn open_into(&self, context: &PageContext, src: &[u8], dst: &mut [u8]) -> Result<(), PageError> {
        or_zeros(dst, |dst| {
            if src.len().checked_sub(OVERHEAD) != Some(dst.len()) {
                return Err(PageError::Length);
            }
            let (payload, trailer) = src.split_last_chunk().ok_or(PageError::Length)?;
            dst.copy_from_slice(payload);
            self.0.open(context, dst, &Trailer(*trailer))
        })
    }

    /// Seals all but the last [`OVERHEAD`] bytes of `page`, which receive the trailer.
    ///
    /// # Errors
    /// A [`PageError`]; `page` is then unchanged, except after [`PageError::Forked`], where it may hold zeros.
    pub fn seal_in_place(&self, context: &PageContext, page: &mut [u8]) -> Result<(), PageError> {
        let (payload, trailer) = split_sealed(page)?;
        trailer.copy_from_slice(&self.seal_detached(context, payload)?.0);
        Ok(())
    }

    /// Opens the sealed page in `page`: all but its last [`OVERHEAD`] bytes are the payload then. The trailer stays.
    ///
    /// # Errors
    /// A [`PageError`]; the whole of `page` then holds zeros.
    pub fn open_in_place(&self, context: &PageContext, page: &mut [u8]) -> Result<(), PageError> {
        or_zeros(page, |page| {
            let (payload, trailer) = split_sealed(page)?;
            self.0.open(context, payload, &Trailer(*trailer))
        })
    }

    /// Seals `payload` in place and returns the trailer, for engines that keep it elsewhere.
    ///
    /// # Errors
    /// A [`PageError`]; `payload` is then unchanged, except after [`PageError::Forked`], where it may hold zeros.
    #[inline]
    pub fn seal_detached(&self, context: &PageContext, payload: &mut [u8]) -> Result<Trailer, PageError> {
        check_payload(payload.len())?;
        let (session, leased) = self.0.lease(1, units(payload.len()))?;
        let subkey = &session_of(&session)?.subkey;
        let nonces = leased.draw(&*self.0.env.entropy).map_err(|_| PageError::Randomness)?;
        seal_page(subkey, nonces.nonce(0), &context.associated_data(), payload)
    }

    /// Opens `payload` in place, with the trailer that [`PageCipher::seal_detached`] returned.
    ///
    /// # Errors
    /// A [`PageError`]; `payload` then holds zeros.
    #[inline]
    pub fn open_detached(&self, context: &PageContext, payload: &mut [u8], trailer: &Trailer) -> Result<(), PageError> {
        or_zeros(payload, |payload| self.0.open(context, payload, trailer))
    }

    /// The generation that new seals use.
    pub fn generation(&self) -> Generation {
        self.0.keyring.newest()
    }

    /// The database whose pages this seals.
    pub fn database(&self) -> DatabaseId {
        self.0.keyring.database
    }

    /// # Errors
    /// [`PageError::Forked`]; [`PageError::Disabled`] or [`PageError::Dropped`] while the gate is closed.
    pub(crate) fn current_key(&self) -> Result<Current, PageError> {
        self.0.check_fork()?;
        self.0.keyring.current()
    }

    /// # Errors
    /// As [`PageCipher::current_key`]; [`PageError::UnknownGeneration`].
    pub(crate) fn find_key(&self, generation: Generation) -> Result<Arc<LiveKey>, PageError> {
        self.0.find_key(None, generation)
    }

    #[cfg(feature = "test-util")]
    pub(crate) fn set_counter(&self, seals: u32, units: u32) -> Result<(), PageError> {
        let (session, _) = self.0.lease(1, 1)?;
        session_of(&session)?.counter.set(seals, units);
        Ok(())
    }
}

impl std::fmt::Debug for PageCipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageCipher").field("database", &self.database()).finish_non_exhaustive()
    }
}

pub(crate) type SessionGuard = Guard<Option<Arc<Session>>>;

impl CipherInner {
    /// Takes a range of the current session, opening the next session when there is none or it is used up.
    #[inline]
    pub(crate) fn lease(&self, pages: u32, units: u64) -> Result<(SessionGuard, Leased), PageError> {
        // No session could ever hold more; opening one after the other would not end.
        if units > MAX_UNITS || u64::from(pages) > MAX_SEALS {
            return Err(PageError::Length);
        }
        loop {
            // No look at the gate: whoever closes it ends the session.
            let current = self.session.load();
            if let Some(session) = &*current
                && let Some(leased) = self.lease_of(session, pages, units)
            {
                return Ok((current, leased));
            }
            self.open_session(current.as_ref())?;
        }
    }

    /// A range of this session; `None` when it is used up, or older than the last resume.
    #[inline]
    pub(crate) fn lease_of(&self, session: &Session, pages: u32, units: u64) -> Option<Leased> {
        let resumed = session.resumes != self.resumes.load(Ordering::Relaxed);
        if resumed { None } else { session.counter.lease(pages, units) }
    }

    /// Replaces `seen` by a new session, unless another thread did so already.
    #[cold]
    fn open_session(&self, seen: Option<&Arc<Session>>) -> Result<(), PageError> {
        // Before the lock: in a forked child it may be held by a thread that does not exist there.
        self.check_fork()?;
        // What it replaces is dropped after the lock: with it may go the last of a hold.
        self.replace_session(seen).map(drop)
    }

    fn replace_session(&self, seen: Option<&Arc<Session>>) -> Result<Option<Arc<Session>>, PageError> {
        let _opening = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        if self.session.load().as_ref().map(Arc::as_ptr) != seen.map(Arc::as_ptr) {
            return Ok(None);
        }
        // Under the lock, which whoever changes the keyring has: no session of an older key appears then.
        let Current { hold, key } = self.keyring.current()?;
        // Read before the salt is drawn: a resume in between makes this session stale at once.
        let resumes = self.resumes.load(Ordering::Relaxed);
        let salt = self.env.random().map_err(|_| PageError::Randomness)?;
        let name = SubkeyName::new(&salt, key.generation, key.suite);
        let subkey = self.make_subkey(&key, name)?;
        self.subkeys.insert(Arc::clone(&subkey));
        let session = Session { hold, subkey, counter: Counter::new(), resumes };
        Ok(self.session.swap(Some(Arc::new(session))))
    }

    /// Derives a subkey. Where locked memory is short, cached subkeys make room.
    fn make_subkey(&self, data_key: &Arc<LiveKey>, name: SubkeyName) -> Result<Arc<Subkey>, PageError> {
        let salt: [u8; SALT_LEN] = name.salt();
        loop {
            if Locked::<AeadKey>::would_use_reserve() && self.subkeys.shrink() {
                continue;
            }
            match data_key.derive(Label::Page, &salt, self.backend) {
                Ok(key) => {
                    let parent = Arc::clone(data_key);
                    return Ok(Arc::new(Subkey { owner: self.keyring.owner, name, salt, key, parent }));
                }
                Err(PageError::LockedMemory) if self.subkeys.shrink() => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Opens one page in place. After an error the payload holds anything: the callers zero it.
    #[inline]
    pub(crate) fn open(&self, context: &PageContext, payload: &mut [u8], trailer: &Trailer) -> Result<(), PageError> {
        self.open_within(None, context, payload, trailer)
    }

    /// As [`CipherInner::open`], in a call that was let in with `keys`, and ends whole.
    #[inline]
    pub(crate) fn open_within(
        &self,
        keys: Option<&OpenKeys>,
        context: &PageContext,
        payload: &mut [u8],
        trailer: &Trailer,
    ) -> Result<(), PageError> {
        check_payload(payload.len())?;
        let name = trailer.subkey_name();
        let aad = context.associated_data();
        // No look at the gate: whoever closes it lets go of the subkeys.
        if let Some(found) = self.subkeys.find(self.keyring.owner, &name)
            && let Some(subkey) = &*found
        {
            return open_page(subkey, &aad, payload, trailer);
        }
        self.open_uncached(keys, &name, &aad, payload, trailer)
    }

    #[cold]
    fn open_uncached(
        &self,
        keys: Option<&OpenKeys>,
        name: &SubkeyName,
        aad: &[u8; AAD_LEN],
        payload: &mut [u8],
        trailer: &Trailer,
    ) -> Result<(), PageError> {
        if keys.is_none() {
            self.check_open()?;
        }
        let generation = name.generation().ok_or(PageError::Authentication)?;
        // Before the cache's lock: see `open_session`.
        let data_key = self.find_key(keys, generation)?;
        if name.suite() != Some(data_key.suite) {
            return Err(PageError::Authentication);
        }
        let make = || match &*self.session.load() {
            // The cache let go of the running session's subkey; there must not be a second one.
            Some(session) if session.subkey.name == *name => Ok(Arc::clone(&session.subkey)),
            _ => self.make_subkey(&data_key, *name),
        };
        let may_keep = |subkey: &Subkey| self.keyring.holds(&subkey.parent);
        let open = |subkey: &Subkey| open_page(subkey, aad, payload, trailer);
        self.subkeys.find_or_make(self.keyring.owner, name, make, may_keep, open)
    }

    /// The key of a generation: among `keys`, else in the keyring, else wherever the source finds it. Call it with no lock.
    fn find_key(&self, keys: Option<&OpenKeys>, generation: Generation) -> Result<Arc<LiveKey>, PageError> {
        // First, for the source too: it may take locks.
        self.check_fork()?;
        if let Some(key) = keys.and_then(|keys| keys.find(generation)) {
            return Ok(key);
        }
        if let Some(key) = self.keyring.find(generation)? {
            return Ok(key);
        }
        let source = self.source.as_ref().and_then(Weak::upgrade);
        if source.is_some_and(|source| source.look_for(self.keyring.database, generation))
            && let Some(key) = self.keyring.find(generation)?
        {
            return Ok(key);
        }
        Err(PageError::UnknownGeneration(generation))
    }

    pub(crate) fn entropy(&self) -> &dyn Entropy {
        &*self.env.entropy
    }

    /// Fails in a forked child. The batches ask before they hand work to a pool whose threads do not exist there.
    pub(crate) fn check_fork(&self) -> Result<(), PageError> {
        Ok(self.keyring.check_fork()?)
    }

    /// Lets a call of many pages in: with what this returns it ends whole, whatever is closed meanwhile.
    ///
    /// # Errors
    /// [`PageError::Forked`]; [`PageError::Disabled`] or [`PageError::Dropped`] while the gate is closed.
    pub(crate) fn enter(&self) -> Result<Arc<OpenKeys>, PageError> {
        self.check_fork()?;
        self.keyring.enter()
    }

    /// # Errors
    /// As [`CipherInner::enter`].
    pub(crate) fn check_open(&self) -> Result<(), PageError> {
        self.enter().map(drop)
    }
}

/// The gate of all handles, and the changes of what is behind it. The session ends before the keyring changes, and the next
/// one begins after it. Subkeys go after the keyring changed: who still makes one looks at the keyring under the lock that is
/// taken here to remove it.
impl CipherInner {
    /// Refuses every new operation of every handle, and lets go of all keys. When this returns, no operation that begins
    /// succeeds; those in flight end whole, and keep the keys in memory until they have.
    pub(crate) fn close(&self, why: Closed) {
        if self.check_fork().is_ok() {
            self.change_keys(|_| true, |keyring| keyring.close(why));
            self.forget_subkeys();
        }
    }

    /// Opens the gate for the same handles, with all data keys in ascending order of generation; `hold` is kept as long as
    /// anybody may seal under the last. Where it is open already, they take the place of those it has.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] after [`Closed::Dropped`]; [`ErrorKind::Damaged`] unless the keys are in order;
    /// [`ErrorKind::Forked`].
    pub(crate) fn open_with(&self, keys: Vec<DataKey>, hold: Option<Hold>) -> Result<()> {
        self.check_fork()?;
        let opened = self.change_keys(|_| true, |keyring| keyring.open_with(keys, hold));
        self.forget_subkeys();
        opened
    }

    /// Takes over the generations that there are now, as other processes made and destroyed them. Those that stay keep
    /// their keys; `new` are the others'.
    ///
    /// # Errors
    /// As [`CipherInner::open_with`]; [`ErrorKind::Closed`] while the gate is closed.
    pub(crate) fn follow(&self, current: &[Generation], new: Vec<DataKey>, hold: Option<Hold>) -> Result<()> {
        self.check_fork()?;
        let newer = |newest| current.last().is_some_and(|&last| last > newest);
        let followed = self.change_keys(newer, |keyring| keyring.follow(current, new, hold));
        self.forget_subkeys();
        followed
    }

    /// Rotates: seals that begin after this returned use `key`. What the older generation holds goes when the last seal
    /// under it has ended.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] unless it is newer than the newest; [`ErrorKind::Closed`], [`ErrorKind::NotFound`] while the
    /// gate is closed; [`ErrorKind::Forked`].
    pub(crate) fn add_generation(&self, key: DataKey, hold: Option<Hold>) -> Result<()> {
        self.check_fork()?;
        self.change_keys(|_| true, |keyring| keyring.add(key, hold))
    }

    /// Lets go of an older generation's key; pages that name it do not open any more.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for the newest; else as [`CipherInner::add_generation`].
    pub(crate) fn forget_generation(&self, generation: Generation) -> Result<()> {
        self.check_fork()?;
        self.change_keys(|_| false, |keyring| keyring.remove(generation))?;
        self.forget_subkeys();
        Ok(())
    }

    /// Changes the keyring; unless the newest key stays what it is, while there is no session. So whoever has seen the new
    /// newest generation, and noted it, seals under nothing older.
    fn change_keys<R>(&self, ends_session: impl FnOnce(Generation) -> bool, change: impl FnOnce(&Keyring) -> R) -> R {
        // Dropped after the lock: with it may go the last of a hold.
        let _ended;
        let _opening = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        _ended = if ends_session(self.keyring.newest()) { self.session.swap(None) } else { None };
        change(&self.keyring)
    }

    /// Lets go of the subkeys of keys that have left the keyring.
    fn forget_subkeys(&self) {
        self.subkeys.forget_if(self.keyring.owner, |subkey| !self.keyring.holds(&subkey.parent));
    }
}

impl Drop for CipherInner {
    fn drop(&mut self) {
        self.subkeys.forget(self.keyring.owner);
    }
}

/// The session behind the guard that [`CipherInner::lease`] returned.
#[inline]
pub(crate) fn session_of(guard: &SessionGuard) -> Result<&Session, PageError> {
    guard.as_deref().ok_or(PageError::Forked)
}

/// Seals one page under one nonce. Asks before and after whether the process was forked: in a child the key may vanish in
/// the middle of the cipher, and what was sealed under half a key must not leave.
#[inline]
pub(crate) fn seal_page(
    subkey: &Subkey,
    nonce: [u8; NONCE_LEN],
    aad: &[u8; AAD_LEN],
    payload: &mut [u8],
) -> Result<Trailer, PageError> {
    subkey.key.check()?;
    match subkey.key.with(|key| key.seal(nonce, &subkey.salt, aad, payload)) {
        Ok(tag) => Ok(Trailer::new(&tag, &nonce, &subkey.name)),
        Err(Forked) => {
            payload.fill(0);
            Err(PageError::Forked)
        }
    }
}

#[inline]
fn open_page(subkey: &Subkey, aad: &[u8; AAD_LEN], payload: &mut [u8], trailer: &Trailer) -> Result<(), PageError> {
    let opened = subkey.key.with(|key| key.open(trailer.nonce(), &subkey.salt, aad, payload, &trailer.tag()))?;
    opened.map_err(|_| PageError::Authentication)
}

#[inline]
pub(crate) fn check_payload(len: usize) -> Result<(), PageError> {
    if len > MAX_PAYLOAD { Err(PageError::Length) } else { Ok(()) }
}

/// Splits a sealed page into payload and trailer.
#[inline]
pub(crate) fn split_sealed(page: &mut [u8]) -> Result<(&mut [u8], &mut [u8; OVERHEAD]), PageError> {
    page.split_last_chunk_mut().ok_or(PageError::Length)
}

/// Runs `f` over the buffer, and fills the buffer with zeros if it fails: no plaintext, and no half of one, is left.
#[inline]
pub(crate) fn or_zeros(buffer: &mut [u8], f: impl FnOnce(&mut [u8]) -> Result<(), PageError>) -> Result<(), PageError> {
    let outcome = f(buffer);
    if outcome.is_err() {
        buffer.fill(0);
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::page::Suite;
    use crate::ids::{FileId, SealId};
    use crate::keys::in_memory::KeysInMemory;
    use crate::secret::SecretKey;
    use std::sync::OnceLock;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn generation(number: u32) -> Generation {
        Generation::new(number).unwrap()
    }

    fn data_key(number: u32) -> DataKey {
        let key = SecretKey::fill_with(|out| {
            out.fill(number as u8);
            Ok::<(), PageError>(())
        });
        let (suite, seal) = (Suite::Aes256Gcm, SealId::from_bytes([number as u8; 16]));
        DataKey { generation: generation(number), suite, seal, key: key.unwrap() }
    }

    fn data_keys(numbers: std::ops::RangeInclusive<u32>) -> Vec<DataKey> {
        numbers.map(data_key).collect()
    }

    fn generations(numbers: std::ops::RangeInclusive<u32>) -> Vec<Generation> {
        numbers.map(generation).collect()
    }

    fn cipher(hold: Option<Hold>, source: Option<Weak<dyn GenerationSource>>) -> PageCipher {
        counted_cipher(hold, source, &KeysInMemory::default())
    }

    fn counted_cipher(
        hold: Option<Hold>,
        source: Option<Weak<dyn GenerationSource>>,
        in_memory: &KeysInMemory,
    ) -> PageCipher {
        let keyring = Keyring::new(DatabaseId::from_bytes([0xdb; 16]), data_keys(1..=1), hold, in_memory).unwrap();
        let subkeys = Arc::new(SubkeyCache::new(64));
        PageCipher::new(keyring, AesBackend::Ring, subkeys, Arc::default(), Env::system(), source)
    }

    fn at(page: u64) -> PageContext {
        PageContext::page(FileId::new(1), page)
    }

    fn seal(cipher: &PageCipher) -> Result<Vec<u8>, PageError> {
        let mut page = vec![7; 64 + OVERHEAD];
        cipher.seal_in_place(&at(1), &mut page).map(|()| page)
    }

    fn open(cipher: &PageCipher, page: &[u8]) -> Result<(), PageError> {
        cipher.open_into(&at(1), page, &mut [0; 64])
    }

    fn generation_of(page: &[u8]) -> u32 {
        Trailer(*page.last_chunk().unwrap()).generation().unwrap().get()
    }

    #[test]
    fn a_cache_that_lost_the_running_subkey_gets_it_back_and_no_second_one() {
        let cipher = cipher(None, None);
        let page = seal(&cipher).unwrap();
        let session = cipher.0.session.load_full().unwrap();
        while cipher.0.subkeys.shrink() {}
        assert_eq!(cipher.0.subkeys.len(), 0);
        assert_eq!(open(&cipher, &page), Ok(()));
        let found = cipher.0.subkeys.find(cipher.0.keyring.owner, &session.subkey.name).unwrap();
        assert!(Arc::ptr_eq(found.as_ref().unwrap(), &session.subkey), "a second copy of the subkey lives");
    }

    #[test]
    fn closing_waits_for_a_seal_in_flight_which_ends_whole_under_what_was_held() {
        let held: Hold = Arc::new(());
        let holding = Arc::downgrade(&held);
        let keys = KeysInMemory::default();
        let cipher = counted_cipher(Some(held), None, &keys);
        let (session, leased) = cipher.0.lease(1, 1).unwrap();
        cipher.0.close(Closed::Disabled);
        assert!(!keys.wait(Duration::from_millis(5), || false), "keys are wiped under a seal in flight");
        assert!(holding.strong_count() > 0, "the lock went before the seal");
        let nonces = leased.draw(cipher.0.entropy()).unwrap();
        let mut page = vec![7; 64 + OVERHEAD];
        let (payload, trailer) = split_sealed(&mut page).unwrap();
        let subkey = &session_of(&session).unwrap().subkey;
        trailer.copy_from_slice(&seal_page(subkey, nonces.nonce(0), &at(1).associated_data(), payload).unwrap().0);
        drop(session);
        assert!(keys.wait(PATIENCE, || false));
        assert_eq!(holding.strong_count(), 0);
        assert_eq!(open(&cipher, &page), Err(PageError::Disabled));
        cipher.0.open_with(data_keys(1..=1), None).unwrap();
        assert_eq!(open(&cipher, &page), Ok(()));
    }

    #[test]
    fn a_call_that_was_let_in_opens_pages_after_the_closing_and_leaves_no_subkey() {
        let in_memory = KeysInMemory::default();
        let cipher = counted_cipher(None, None, &in_memory);
        let page = seal(&cipher).unwrap();
        let keys = cipher.0.enter().unwrap();
        cipher.0.close(Closed::Disabled);
        let (mut payload, trailer) = (page[..64].to_vec(), Trailer(*page.last_chunk().unwrap()));
        assert_eq!(cipher.0.open_within(Some(&keys), &at(1), &mut payload, &trailer), Ok(()));
        assert_eq!(payload, [7; 64]);
        assert_eq!(cipher.0.subkeys.len(), 0, "a subkey outlives the closing");
        assert!(!in_memory.is_empty());
        drop(keys);
        assert!(in_memory.wait(PATIENCE, || false));
    }

    #[test]
    fn a_page_that_is_opened_while_the_gate_closes_leaves_no_subkey() {
        let keys = KeysInMemory::default();
        let cipher = counted_cipher(None, None, &keys);
        let page = seal(&cipher).unwrap();
        let trailer = Trailer(*page.last_chunk().unwrap());
        let name = trailer.subkey_name();
        while cipher.0.subkeys.shrink() {}
        let data_key = cipher.0.find_key(None, generation(1)).unwrap();
        let subkey = cipher.0.make_subkey(&data_key, name).unwrap();
        std::thread::scope(|scope| {
            let (mut closer, inner) = (None, &cipher.0);
            // The gate closes on another thread after the filler was told that it may keep the subkey, and before it does.
            let may_keep = |subkey: &Subkey| {
                let held = inner.keyring.holds(&subkey.parent);
                closer = Some(scope.spawn(|| inner.close(Closed::Disabled)));
                while inner.check_open().is_ok() {
                    std::thread::yield_now();
                }
                std::thread::sleep(Duration::from_millis(20));
                held
            };
            let owner = inner.keyring.owner;
            let kept = inner.subkeys.find_or_make(owner, &name, || Ok(subkey), may_keep, |_| Ok(()));
            assert_eq!(kept, Ok(()));
            drop(data_key);
            closer.unwrap().join().unwrap();
            assert!(keys.wait(PATIENCE, || false), "a subkey was cached after the gate was closed");
        });
        assert_eq!(cipher.0.subkeys.len(), 0);
    }

    #[test]
    fn rotating_ends_the_session_and_gives_up_the_older_lock_with_the_last_seal_under_it() {
        let (first, second): (Hold, Hold) = (Arc::new(()), Arc::new(()));
        let holding = Arc::downgrade(&first);
        let cipher = cipher(Some(first), None);
        let (in_flight, _) = cipher.0.lease(1, 1).unwrap();
        cipher.0.add_generation(data_key(2), Some(second)).unwrap();
        assert_eq!(generation_of(&seal(&cipher).unwrap()), 2);
        assert_eq!(holding.strong_count(), 1);
        drop(in_flight);
        assert_eq!(holding.strong_count(), 0, "the older generation's lock is kept without need");
        assert!(cipher.0.add_generation(data_key(2), None).is_err());
        assert!(cipher.0.forget_generation(generation(2)).is_err());
    }

    #[test]
    fn once_a_newer_generation_is_seen_nothing_is_sealed_under_an_older_one() {
        type Change = fn(&CipherInner);
        let changes: [Change; 3] = [
            |inner| inner.add_generation(data_key(2), None).unwrap(),
            |inner| inner.follow(&generations(1..=2), data_keys(2..=2), None).unwrap(),
            |inner| inner.open_with(data_keys(1..=2), None).unwrap(),
        ];
        for (which, change) in changes.into_iter().enumerate() {
            let cipher = cipher(None, None);
            seal(&cipher).unwrap();
            std::thread::scope(|scope| {
                // As long as the lock is held, nobody ends the session.
                let opening = cipher.0.opening.lock().unwrap();
                let changing = scope.spawn(|| change(&cipher.0));
                for _ in 0..50 {
                    std::thread::sleep(Duration::from_millis(1));
                    let seen = cipher.generation().get();
                    assert!(
                        generation_of(&seal(&cipher).unwrap()) >= seen,
                        "change {which}: noted {seen}, sealed under less"
                    );
                }
                drop(opening);
                changing.join().unwrap();
            });
            assert_eq!(generation_of(&seal(&cipher).unwrap()), 2, "change {which}");
        }
    }

    #[test]
    fn catching_up_keeps_the_keys_and_the_session_that_stay() {
        let cipher = cipher(None, None);
        let first = seal(&cipher).unwrap();
        let (key, session) = (cipher.find_key(generation(1)).unwrap(), cipher.0.session.load_full().unwrap());
        cipher.0.follow(&generations(1..=1), Vec::new(), None).unwrap();
        assert!(Arc::ptr_eq(&key, &cipher.find_key(generation(1)).unwrap()), "a second copy of the key lives");
        assert!(Arc::ptr_eq(&session, &cipher.0.session.load_full().unwrap()), "the session ended without need");
        cipher.0.follow(&generations(1..=2), data_keys(2..=2), None).unwrap();
        assert!(Arc::ptr_eq(&key, &cipher.find_key(generation(1)).unwrap()));
        assert_eq!((generation_of(&seal(&cipher).unwrap()), cipher.generation()), (2, generation(2)));
        assert_eq!(open(&cipher, &first), Ok(()));
        cipher.0.follow(&generations(2..=2), Vec::new(), None).unwrap();
        assert_eq!(open(&cipher, &first), Err(PageError::UnknownGeneration(generation(1))));
        assert_eq!(Arc::strong_count(&key), 2, "more than this test and its session hold a key that is gone");
    }

    #[test]
    fn a_closed_gate_refuses_changes_and_a_dropped_database_stays_dropped() {
        let cipher = cipher(None, None);
        cipher.0.close(Closed::Disabled);
        let kind = |outcome: Result<(), crate::Error>| outcome.unwrap_err().kind();
        assert_eq!(kind(cipher.0.follow(&generations(1..=2), data_keys(2..=2), None)), ErrorKind::Closed);
        assert_eq!(kind(cipher.0.add_generation(data_key(2), None)), ErrorKind::Closed);
        assert_eq!(kind(cipher.0.forget_generation(generation(1))), ErrorKind::Closed);
        assert_eq!(cipher.generation(), generation(1));
        cipher.0.close(Closed::Dropped);
        cipher.0.close(Closed::Disabled);
        assert_eq!(seal(&cipher), Err(PageError::Dropped));
        assert_eq!(kind(cipher.0.open_with(data_keys(1..=1), None)), ErrorKind::NotFound);
        assert_eq!(seal(&cipher), Err(PageError::Dropped));
    }

    #[test]
    fn a_generation_that_another_process_made_is_looked_for_once_it_is_named() {
        struct OtherProcess(OnceLock<PageCipher>, AtomicBool);
        impl GenerationSource for OtherProcess {
            fn look_for(&self, _: DatabaseId, generation: Generation) -> bool {
                self.1.store(true, Ordering::Relaxed);
                let here = &self.0.get().unwrap().0;
                generation.get() == 2 && here.follow(&generations(1..=2), data_keys(2..=2), None).is_ok()
            }
        }
        let source = Arc::new(OtherProcess(OnceLock::new(), AtomicBool::new(false)));
        let weak: Weak<OtherProcess> = Arc::downgrade(&source);
        let here = cipher(None, Some(weak));
        source.0.set(here.clone()).unwrap();
        let there = cipher(None, None);
        let old = seal(&there).unwrap();
        there.0.add_generation(data_key(2), None).unwrap();
        let new = seal(&there).unwrap();
        there.0.add_generation(data_key(3), None).unwrap();
        let unknown = seal(&there).unwrap();
        assert_eq!(open(&here, &old), Ok(()));
        assert!(!source.1.load(Ordering::Relaxed), "a generation that is known was looked for");
        assert_eq!(open(&here, &new), Ok(()));
        assert_eq!(open(&here, &unknown), Err(PageError::UnknownGeneration(generation(3))));
    }
}
