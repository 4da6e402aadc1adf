//! [`LocalKeyFile`]: a master key in a file, for development and tests.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind as IoKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::env::Env;
use crate::error::{Error, ErrorKind, KmsClass, KmsError, Result};
use crate::ids::MasterKeyId;
use crate::keys::wrapper::{KeyWrapper, WrapContext, WrappedKey};
use crate::kms::envelope::{WrappingKey, fingerprint, open_payload, seal_payload};
use crate::secret::{KeyPayload, LockedMemoryError, SecretKey};

const KEY_LEN: u64 = 32;
/// The owner may read and write, nobody may do anything else.
const ALLOWED_MODE: u32 = 0o600;

/// A master key in a file of 32 random bytes. **For development and tests only**: a key beside the data it protects protects
/// nothing, whoever copies the file keeps the key for ever, and nobody can take it back.
///
/// The file is read anew at each call, so that removing it, or [`LocalKeyFile::disable`], acts like the same step at a key
/// service. Between calls this process holds no copy of the key; the system's page cache does.
///
/// The id is `local:` and the file's name, without its directory: the file can be moved, but not renamed. The key version
/// is a fingerprint of the key, so that another key under the same name is told from a damaged record.
///
/// | the file | answers |
/// |---|---|
/// | is missing | [`KmsClass::Deleted`] |
/// | has a marker beside it, named as the file and `.disabled` | [`KmsClass::Disabled`] |
/// | may not be read by this process | [`KmsClass::Denied`] |
/// | is open to group or others, not a regular file, or not 32 bytes long | [`KmsClass::Misconfigured`] |
/// | cannot be read for another reason | [`KmsClass::Unreachable`] |
///
/// ```
/// # use pageseal::{KeyWrapper, LocalKeyFile};
/// # let dir = std::env::temp_dir().join(format!("pageseal-doc-local-{}", std::process::id()));
/// # std::fs::create_dir_all(&dir)?;
/// let key = LocalKeyFile::create(dir.join("master.key"))?;
/// assert_eq!(key.id().to_string(), "local:master.key");
/// # std::fs::remove_dir_all(&dir)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct LocalKeyFile {
    path: PathBuf,
    env: Env,
}

impl LocalKeyFile {
    /// The master key in the file at `path`, which is not looked at before the first call.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), env: Env::system() }
    }

    /// Makes a new random key in a new file, readable by its owner alone, and returns when it is durable.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] if there is a file at `path`: a key is never overwritten. [`ErrorKind::Io`];
    /// [`ErrorKind::Resources`] without random bytes or locked memory.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self> {
        let created = Self::new(path);
        let key = SecretKey::fill_with(|out| created.env.entropy.fill(out).map_err(Error::from))?;
        let path = &created.path;
        let what = || format!("creating the key file {}", path.display());
        let opened = OpenOptions::new().write(true).create_new(true).mode(ALLOWED_MODE).open(path);
        let mut file = opened.map_err(|error| match error.kind() {
            IoKind::AlreadyExists => Error::with_source(
                ErrorKind::AlreadyExists,
                format!("{}: there is one already, and a key is never overwritten", what()),
                error,
            ),
            _ => Error::io(what(), error),
        })?;
        let written = key.with(|key| file.write_all(key))?;
        let written = written.and_then(|()| file.sync_all()).and_then(|()| sync_directory(path));
        if let Err(error) = written {
            // Half a key is of no use and would stand in the way of the next attempt. It is ours: `create_new` made it.
            let _ = fs::remove_file(path);
            return Err(Error::io(what(), error));
        }
        Ok(created)
    }

    /// Marks the key as disabled, durably: from now on every call fails with [`KmsClass::Disabled`]. Disabling it twice is
    /// the same as once.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the marker cannot be made.
    pub fn disable(&self) -> Result<()> {
        let marker = self.marker();
        let made = OpenOptions::new().write(true).create(true).truncate(false).mode(ALLOWED_MODE).open(&marker);
        made.and_then(|file| file.sync_all())
            .and_then(|()| sync_directory(&marker))
            .map_err(|error| Error::io(format!("making the marker {}", marker.display()), error))
    }

    /// Takes the mark of [`LocalKeyFile::disable`] away, durably, if there is one.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the marker cannot be removed.
    pub fn enable(&self) -> Result<()> {
        let marker = self.marker();
        let removed = match fs::remove_file(&marker) {
            Err(error) if error.kind() == IoKind::NotFound => Ok(()),
            Ok(()) => sync_directory(&marker),
            Err(error) => Err(error),
        };
        removed.map_err(|error| Error::io(format!("removing the marker {}", marker.display()), error))
    }

    fn marker(&self) -> PathBuf {
        let mut name = OsString::from(&self.path);
        name.push(".disabled");
        name.into()
    }

    /// Reads the key from the file straight into locked memory.
    fn key(&self) -> Result<SecretKey, KmsError> {
        // First, so that a disabled key is told as such, whatever else is wrong with its file.
        match fs::symlink_metadata(self.marker()) {
            Err(error) if error.kind() == IoKind::NotFound => {}
            Err(error) => return Err(self.failed(error)),
            Ok(_) => {
                let text = format!("the marker {} is there", self.marker().display());
                return Err(KmsError::with_source(KmsClass::Disabled, text));
            }
        }
        let mut file = self.open().map_err(|error| self.failed(error))?;
        let metadata = file.metadata().map_err(|error| self.failed(error))?;
        if !metadata.is_file() {
            return Err(self.misconfigured("is not a regular file"));
        }
        let mode = metadata.mode() & 0o7777;
        if mode & !ALLOWED_MODE != 0 {
            return Err(self.misconfigured(&format!("has mode {mode:04o}; make it 0600")));
        }
        if metadata.len() != KEY_LEN {
            return Err(self.misconfigured(&format!("has {} bytes, not {KEY_LEN}", metadata.len())));
        }
        SecretKey::fill_with(|out| file.read_exact(out).map_err(ReadFailure::Io)).map_err(|failure| match failure {
            ReadFailure::Io(error) => self.failed(error),
            ReadFailure::Memory(error) => Error::from(error).into(),
        })
    }

    /// Without waiting: to open a pipe would take until somebody writes to it.
    fn open(&self) -> io::Result<File> {
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(&self.path)
    }

    fn misconfigured(&self, what: &str) -> KmsError {
        KmsError::with_source(KmsClass::Misconfigured, format!("the key file {} {what}", self.path.display()))
    }

    fn failed(&self, error: io::Error) -> KmsError {
        let class = match error.kind() {
            IoKind::NotFound => KmsClass::Deleted,
            IoKind::PermissionDenied => KmsClass::Denied,
            IoKind::UnexpectedEof => KmsClass::Misconfigured,
            // Opening a socket.
            _ if error.raw_os_error() == Some(libc::ENXIO) => KmsClass::Misconfigured,
            _ => KmsClass::Unreachable,
        };
        KmsError::with_source(class, Error::io(format!("reading the key file {}", self.path.display()), error))
    }
}

impl KeyWrapper for LocalKeyFile {
    fn id(&self) -> MasterKeyId {
        let name = self.path.file_name().unwrap_or_default();
        MasterKeyId::new("local", name.to_string_lossy())
    }

    fn wrap_key(&self, payload: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        let key = self.key()?;
        let blob = seal_payload(WrappingKey::Local(&key), &self.env, payload, cx)?;
        Ok(WrappedKey { master_key: self.id(), key_version: fingerprint(&key)?, blob })
    }

    fn unwrap_key(&self, wrapped: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        let key = self.key()?;
        let version = fingerprint(&key)?;
        if wrapped.key_version != version {
            let text = format!("wrapped under version {:?}, the key file holds {version:?}", wrapped.key_version);
            return Err(KmsError::with_source(KmsClass::BadCiphertext, text));
        }
        open_payload(WrappingKey::Local(&key), &wrapped.blob, cx)
    }
}

impl fmt::Debug for LocalKeyFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalKeyFile").field("path", &self.path).finish_non_exhaustive()
    }
}

enum ReadFailure {
    Io(io::Error),
    Memory(LockedMemoryError),
}

impl From<LockedMemoryError> for ReadFailure {
    fn from(error: LockedMemoryError) -> Self {
        Self::Memory(error)
    }
}

/// Makes the entry of `path` in its directory durable.
fn sync_directory(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::keys::calls::fixtures::{payload, request};
    use crate::keys::wrappers::Wrappers;

    /// A directory of this test's own, removed at its end.
    struct Directory(PathBuf);

    impl Directory {
        fn new() -> Self {
            static COUNT: AtomicU32 = AtomicU32::new(0);
            let name = format!("pageseal-local-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
            let path = std::env::temp_dir().join(name);
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn file(&self, name: &str) -> PathBuf {
            self.0.join(name)
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// How wrapping and unwrapping fail; they must agree.
    fn class(key: &LocalKeyFile, wrapped: &WrappedKey) -> Option<KmsClass> {
        let request = request();
        let cx = WrapContext {
            cluster: request.cluster,
            database: request.database,
            generation: request.generation,
            purpose: request.purpose,
            deadline: request.deadline(),
            label: "",
        };
        let unwrap = key.unwrap_key(wrapped, &cx).err().map(|error| error.class);
        let wrap = key.wrap_key(&payload(1), &cx).err().map(|error| error.class);
        assert_eq!(wrap, unwrap);
        unwrap
    }

    fn wrap(key: &LocalKeyFile) -> WrappedKey {
        Wrappers::one(key.clone()).wrap(&payload(1), &request()).unwrap().keys.remove(0)
    }

    #[test]
    fn a_created_key_wraps_and_is_its_owners_alone() {
        let directory = Directory::new();
        let path = directory.file("k");
        let key = LocalKeyFile::create(&path).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), metadata.mode() & 0o7777), (32, 0o600));
        let wrapped = wrap(&key);
        assert_eq!((wrapped.blob.len(), wrapped.key_version.len()), (176, 32));
        assert_eq!(class(&LocalKeyFile::new(&path), &wrapped), None);
    }

    #[test]
    fn a_key_is_never_overwritten() {
        let directory = Directory::new();
        let path = directory.file("k");
        LocalKeyFile::create(&path).unwrap();
        let before = fs::read(&path).unwrap();
        let error = LocalKeyFile::create(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), before);
        assert_eq!(LocalKeyFile::create(directory.file("none/k")).unwrap_err().kind(), ErrorKind::Io);
    }

    #[test]
    fn a_file_can_be_moved_but_another_key_under_its_name_is_told_apart_from_damage() {
        let directory = Directory::new();
        let first = LocalKeyFile::create(directory.file("k")).unwrap();
        let wrapped = wrap(&first);
        fs::create_dir(directory.file("sub")).unwrap();
        fs::rename(directory.file("k"), directory.file("sub/k")).unwrap();
        let moved = LocalKeyFile::new(directory.file("sub/k"));
        assert_eq!(moved.id(), first.id());
        assert_eq!(class(&moved, &wrapped), None);

        let other = LocalKeyFile::create(directory.file("k")).unwrap();
        let error = Wrappers::one(other.clone()).unwrap(std::slice::from_ref(&wrapped), &request()).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::BadCiphertext);
        let (text, held) = (error.to_string(), wrap(&other).key_version);
        let expected = format!("wrapped under version {:?}, the key file holds {held:?}", wrapped.key_version);
        assert!(text.contains(&expected), "{text}");
    }

    #[test]
    fn a_file_open_to_others_is_misconfigured_and_a_stricter_one_is_not() {
        let directory = Directory::new();
        let path = directory.file("k");
        let key = LocalKeyFile::create(&path).unwrap();
        let wrapped = wrap(&key);
        for mode in [0o640, 0o620, 0o610, 0o604, 0o602, 0o601, 0o700, 0o4600, 0o666] {
            set_mode(&path, mode);
            assert_eq!(class(&key, &wrapped), Some(KmsClass::Misconfigured), "{mode:o}");
        }
        for mode in [0o600, 0o400] {
            set_mode(&path, mode);
            assert_eq!(class(&key, &wrapped), None, "{mode:o}");
        }
    }

    #[test]
    fn what_is_not_a_regular_file_of_32_bytes_is_misconfigured() {
        let directory = Directory::new();
        let path = directory.file("k");
        let key = LocalKeyFile::create(&path).unwrap();
        let wrapped = wrap(&key);
        for len in [0, 1, 31, 33, 64] {
            fs::write(&path, vec![7; len]).unwrap();
            assert_eq!(class(&key, &wrapped), Some(KmsClass::Misconfigured), "{len} bytes");
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert_eq!(class(&key, &wrapped), Some(KmsClass::Misconfigured));
        fs::remove_dir(&path).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_eq!(class(&key, &wrapped), Some(KmsClass::Misconfigured));
        fs::remove_file(&path).unwrap();
        // A pipe, which nobody writes to: opening it must not wait.
        assert!(std::process::Command::new("mkfifo").args(["-m", "600"]).arg(&path).status().unwrap().success());
        assert_eq!(class(&key, &wrapped), Some(KmsClass::Misconfigured));
    }

    #[test]
    fn a_missing_file_is_deleted_until_it_is_put_back() {
        let directory = Directory::new();
        let key = LocalKeyFile::create(directory.file("k")).unwrap();
        let wrapped = wrap(&key);
        fs::rename(directory.file("k"), directory.file("kept")).unwrap();
        assert_eq!(class(&key, &wrapped), Some(KmsClass::Deleted));
        fs::rename(directory.file("kept"), directory.file("k")).unwrap();
        assert_eq!(class(&key, &wrapped), None);
    }

    #[test]
    fn a_disabled_key_is_disabled_until_it_is_enabled() {
        let directory = Directory::new();
        let key = LocalKeyFile::create(directory.file("k")).unwrap();
        let wrapped = wrap(&key);
        key.enable().unwrap();
        for _ in 0..2 {
            key.disable().unwrap();
            assert!(directory.file("k.disabled").exists());
            assert_eq!(class(&key, &wrapped), Some(KmsClass::Disabled));
        }
        set_mode(&directory.file("k"), 0o644);
        assert_eq!(class(&key, &wrapped), Some(KmsClass::Disabled), "a wrong mode hid the verdict");
        set_mode(&directory.file("k"), 0o600);
        for _ in 0..2 {
            key.enable().unwrap();
            assert_eq!(class(&key, &wrapped), None);
        }
    }

    /// By the system's error, because the tests may run as root, whom no file mode stops.
    #[test]
    fn an_unreadable_file_is_denied_and_a_failing_disk_says_nothing_about_the_key() {
        let key = LocalKeyFile::new("k");
        let class = |number| key.failed(io::Error::from_raw_os_error(number)).class;
        assert_eq!((class(libc::EACCES), class(libc::EPERM)), (KmsClass::Denied, KmsClass::Denied));
        assert_eq!((class(libc::EIO), class(libc::EMFILE)), (KmsClass::Unreachable, KmsClass::Unreachable));
        assert_eq!(class(libc::ENOENT), KmsClass::Deleted);
    }

    #[test]
    fn no_error_or_debug_output_holds_the_key() {
        let directory = Directory::new();
        let key = LocalKeyFile::create(directory.file("k")).unwrap();
        let hex: String = fs::read(directory.file("k")).unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
        let mut wrapped = wrap(&key);
        wrapped.blob[0] ^= 1;
        let error = Wrappers::one(key.clone()).unwrap(std::slice::from_ref(&wrapped), &request()).err().unwrap();
        for text in [format!("{key:?}"), error.to_string(), format!("{error:?} {wrapped:?}")] {
            assert!(!text.contains(&hex[..16]), "{text}");
        }
    }
}
