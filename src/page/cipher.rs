//! [`PageCipher`]: seals and opens one page.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::{ArcSwapOption, Guard};

use crate::aead::{AeadKey, AesBackend};
use crate::env::{Entropy, Env};
use crate::error::PageError;
use crate::format::derive::Label;
use crate::format::page::{AAD_LEN, MAX_PAYLOAD, NONCE_LEN, OVERHEAD, PageContext, SALT_LEN, SubkeyName, Trailer};
use crate::ids::{DatabaseId, Generation};
use crate::keys::keyring::{DataKey, Keyring};
use crate::page::session::{Counter, Leased, MAX_SEALS, MAX_UNITS, Session, units};
use crate::page::subkeys::{Subkey, SubkeyCache};
use crate::secret::{Forked, Locked};

/// Seals and opens the pages of one database.
///
/// A handle: cloning it is cheap, and clones share their session. All methods take `&self` and may be called from any
/// number of threads. A sealed page is its payload's length plus [`OVERHEAD`], whatever the suite.
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
pub struct PageCipher(pub(crate) Arc<CipherInner>);

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
    /// Keeps the cluster locked as long as anybody can seal with its keys.
    _lock: Option<Arc<File>>,
}

impl PageCipher {
    pub(crate) fn new(
        keyring: Keyring,
        backend: AesBackend,
        subkeys: Arc<SubkeyCache>,
        resumes: Arc<AtomicU64>,
        env: Env,
        lock: Option<Arc<File>>,
    ) -> Self {
        let session = ArcSwapOption::empty();
        let opening = Mutex::new(());
        Self(Arc::new(CipherInner { keyring, backend, session, opening, subkeys, resumes, env, _lock: lock }))
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
        self.0.keyring.current().generation
    }

    /// The database whose pages this seals.
    pub fn database(&self) -> DatabaseId {
        self.0.keyring.database
    }

    pub(crate) fn current_key(&self) -> Arc<DataKey> {
        self.0.keyring.current()
    }

    pub(crate) fn find_key(&self, generation: Generation) -> Option<Arc<DataKey>> {
        self.0.keyring.find(generation)
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
            let current = self.session.load();
            if let Some(session) = &*current
                && session.resumes == self.resumes.load(Ordering::Relaxed)
                && let Some(leased) = session.counter.lease(pages, units)
            {
                return Ok((current, leased));
            }
            self.open_session(current.as_ref())?;
        }
    }

    /// Replaces `seen` by a new session, unless another thread did so already.
    #[cold]
    fn open_session(&self, seen: Option<&Arc<Session>>) -> Result<(), PageError> {
        // Before the lock: in a forked child it may be held by a thread that does not exist there.
        let data_key = self.keyring.current();
        data_key.key.check()?;
        let _opening = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.session.load();
        if now.as_ref().map(Arc::as_ptr) != seen.map(Arc::as_ptr) {
            return Ok(());
        }
        // Read before the salt is drawn: a resume in between makes this session stale at once.
        let resumes = self.resumes.load(Ordering::Relaxed);
        let salt = self.env.random().map_err(|_| PageError::Randomness)?;
        let name = SubkeyName::new(&salt, data_key.generation, data_key.suite);
        let subkey = self.make_subkey(&data_key, name)?;
        self.subkeys.insert(Arc::clone(&subkey));
        self.session.store(Some(Arc::new(Session { subkey, counter: Counter::new(), resumes })));
        Ok(())
    }

    /// Derives a subkey. Where locked memory is short, cached subkeys make room.
    fn make_subkey(&self, data_key: &DataKey, name: SubkeyName) -> Result<Arc<Subkey>, PageError> {
        let salt: [u8; SALT_LEN] = name.salt();
        loop {
            if Locked::<AeadKey>::would_use_reserve() && self.subkeys.shrink() {
                continue;
            }
            match data_key.derive(Label::Page, &salt, self.backend) {
                Ok(key) => return Ok(Arc::new(Subkey { owner: self.keyring.owner, name, salt, key })),
                Err(PageError::LockedMemory) if self.subkeys.shrink() => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Opens one page in place. After an error the payload holds anything: the callers zero it.
    #[inline]
    pub(crate) fn open(&self, context: &PageContext, payload: &mut [u8], trailer: &Trailer) -> Result<(), PageError> {
        check_payload(payload.len())?;
        let name = trailer.subkey_name();
        let aad = context.associated_data();
        if let Some(found) = self.subkeys.find(self.keyring.owner, &name)
            && let Some(subkey) = &*found
        {
            return open_page(subkey, &aad, payload, trailer);
        }
        self.open_uncached(&name, &aad, payload, trailer)
    }

    #[cold]
    fn open_uncached(
        &self,
        name: &SubkeyName,
        aad: &[u8; AAD_LEN],
        payload: &mut [u8],
        trailer: &Trailer,
    ) -> Result<(), PageError> {
        let generation = name.generation().ok_or(PageError::Authentication)?;
        let data_key = self.keyring.find(generation).ok_or(PageError::UnknownGeneration(generation))?;
        if name.suite() != Some(data_key.suite) {
            return Err(PageError::Authentication);
        }
        // Before the cache's lock: see `open_session`.
        data_key.key.check()?;
        let make = || match &*self.session.load() {
            // The cache let go of the running session's subkey; there must not be a second one.
            Some(session) if session.subkey.name == *name => Ok(Arc::clone(&session.subkey)),
            _ => self.make_subkey(&data_key, *name),
        };
        self.subkeys.find_or_make(self.keyring.owner, name, make, |subkey| open_page(subkey, aad, payload, trailer))
    }

    pub(crate) fn entropy(&self) -> &dyn Entropy {
        &*self.env.entropy
    }

    /// Fails in a forked child. The batches ask before they hand work to a pool whose threads do not exist there.
    pub(crate) fn check_fork(&self) -> Result<(), PageError> {
        Ok(self.keyring.current().key.check()?)
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
