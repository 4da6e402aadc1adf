//! Ten thousand databases: what they cost the key service, the disk and the memory. In a test binary of its own, because it
//! counts in the allocator; its tests take turns, because they count for the whole process.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::HashSet;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use common::TempDir;
use pageseal::testing::{Broken, SimulatedDisk};
use pageseal::{
    Cluster, ClusterId, ClusterOptions, Database, Error, ErrorKind, FileId, Hierarchy, KeyPayload, KeyWrapper,
    KmsError, MasterKeyId, PageContext, PageError, ScriptedWrapper, WrapContext, WrappedKey, Wrappers,
};
use pageseal_proofs::score;

const DATABASES: usize = 10_000;
/// What one open database may take of memory, besides its locked key.
const MOST_BYTES: usize = 2048;
const MOST_FSYNCS: usize = 2;
const AT: PageContext = PageContext::page(FileId::new(1), 7);

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything to the system's allocator; counting allocates nothing. What is not overwritten here goes by way
// of these two.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn take_turn() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A cluster whose keystore is on a disk that counts, and its master key, which counts too.
struct Place {
    directory: TempDir,
    disk: SimulatedDisk,
    key: ScriptedWrapper,
    id: ClusterId,
}

/// What creating cost, at most, for one database.
struct Created {
    fsyncs: usize,
}

impl Place {
    fn with(hierarchy: Hierarchy, databases: usize) -> (Self, Created) {
        let (directory, disk, key) = (TempDir::new(), SimulatedDisk::new(Broken::No), ScriptedWrapper::new("scale"));
        let options = ClusterOptions::new().hierarchy(hierarchy).keystore_disk(&disk).watched(false);
        let cluster = Cluster::create(&directory.join("c"), options, Wrappers::one(key.clone())).unwrap();
        let place = Self { directory, disk, key, id: cluster.id() };
        let create = |number| place.fsyncs(|| drop(cluster.create_database(&name(number)).unwrap()));
        let fsyncs = (0..databases).map(create).max().unwrap_or(0);
        (place, Created { fsyncs })
    }

    fn options(&self) -> ClusterOptions {
        ClusterOptions::new().expected_id(self.id).keystore_disk(&self.disk).watched(false)
    }

    fn open(&self) -> Result<Cluster, Error> {
        self.open_with(self.key.clone())
    }

    fn open_with(&self, key: impl KeyWrapper + 'static) -> Result<Cluster, Error> {
        Cluster::open(&self.directory.join("c"), self.options(), Wrappers::one(key))
    }

    fn fsyncs(&self, f: impl FnOnce()) -> usize {
        let before = self.disk.syncs() + self.disk.dir_syncs();
        f();
        self.disk.syncs() + self.disk.dir_syncs() - before
    }

    /// How many calls to the key service `f` made.
    fn calls<R>(&self, f: impl FnOnce() -> R) -> (u64, R) {
        let before = self.key.calls();
        let done = f();
        (self.key.calls() - before, done)
    }
}

fn name(number: usize) -> String {
    format!("tenant-{number:05}")
}

fn promised_calls(hierarchy: Hierarchy) -> u64 {
    match hierarchy {
        Hierarchy::Direct => DATABASES as u64 + 1,
        Hierarchy::ClusterKey => 1,
    }
}

/// Those that are really open: each seals a page and opens it again.
fn usable(databases: &[Database]) -> usize {
    let ids: HashSet<_> = databases.iter().map(Database::id).collect();
    assert_eq!(ids.len(), databases.len(), "a database was opened twice");
    let works = |database: &&Database| {
        let (mut page, cipher) = ([7; 512], database.cipher().unwrap());
        cipher.seal_in_place(&AT, &mut page).is_ok() && cipher.open_in_place(&AT, &mut page).is_ok() && page[0] == 7
    };
    databases.iter().filter(works).count()
}

#[test]
fn ten_thousand_databases_of_a_cluster_key_open_with_one_call_and_within_the_memory_promised() {
    let _alone = take_turn();
    in_a_process_of_its_own(
        "ten_thousand_databases_of_a_cluster_key_open_with_one_call_and_within_the_memory_promised",
        || ten_thousand("cluster-key", Hierarchy::ClusterKey),
    );
}

#[test]
fn ten_thousand_databases_of_a_master_key_open_with_one_call_each_and_within_the_memory_promised() {
    let _alone = take_turn();
    in_a_process_of_its_own(
        "ten_thousand_databases_of_a_master_key_open_with_one_call_each_and_within_the_memory_promised",
        || ten_thousand("direct", Hierarchy::Direct),
    );
}

fn ten_thousand(label: &str, hierarchy: Hierarchy) {
    let (place, created) = Place::with(hierarchy, DATABASES);
    let opened = Opened::measure(&place);
    let control = opened.again_is_noticed(&place, hierarchy) && dropping_is_noticed(&place) && hoarding_is_noticed();
    score(&format!(
        "keystore databases={} hierarchy={label} kms_calls_at_open={} fsyncs_per_create={} bytes_per_database={} \
         locked_bytes_per_database={} control={}",
        opened.databases.len(),
        opened.calls,
        created.fsyncs,
        opened.bytes,
        opened.locked,
        u8::from(control)
    ));
    assert!(control);
    assert_eq!(opened.databases.len(), DATABASES);
    assert_eq!(opened.calls, promised_calls(hierarchy));
    assert_eq!(opened.calls_for_root, 1);
    assert!((1..=MOST_FSYNCS).contains(&created.fsyncs), "{} fsyncs to create one database", created.fsyncs);
    assert!((1..MOST_BYTES).contains(&opened.bytes), "{} bytes", opened.bytes);
    assert!((40..128).contains(&opened.locked), "{} locked bytes", opened.locked);
    assert!((1..=16).contains(&place.key.most_in_flight()), "{}", place.key.most_in_flight());
    assert_eq!(usable(&opened.databases[..64]), 64);
}

/// A cluster with all its databases open, and what that cost.
struct Opened {
    databases: Vec<Database>,
    cluster: Cluster,
    calls_for_root: u64,
    calls: u64,
    bytes: usize,
    locked: usize,
}

impl Opened {
    fn measure(place: &Place) -> Self {
        let (calls_for_root, cluster) = place.calls(|| place.open().unwrap());
        let (live, locked) = (LIVE.load(Ordering::Relaxed), locked_bytes());
        let start = Instant::now();
        let (calls, databases) = place.calls(|| cluster.open_databases().unwrap());
        println!("{} databases opened in {:?}", databases.len(), start.elapsed());
        let each = |now: usize, before: usize| now.saturating_sub(before).div_ceil(databases.len());
        let (bytes, locked) = (each(LIVE.load(Ordering::Relaxed), live), each(locked_bytes(), locked));
        Self { calls: calls_for_root + calls, databases, cluster, calls_for_root, bytes, locked }
    }

    /// The broken variant: all of it twice.
    fn again_is_noticed(&self, place: &Place, hierarchy: Hierarchy) -> bool {
        let (again, _) = place.calls(|| place.open().unwrap().open_databases().unwrap());
        // Whoever has them open shares them.
        let (shared, databases) = place.calls(|| self.cluster.open_databases().unwrap());
        assert_eq!((shared, databases.len()), (0, self.databases.len()));
        self.calls + again != promised_calls(hierarchy)
    }
}

/// The broken variant that writes the keystore anew for each database.
fn dropping_is_noticed(place: &Place) -> bool {
    let cluster = place.open().unwrap();
    place.fsyncs(|| {
        cluster.create_database("another").unwrap();
        drop(cluster.drop_database("another").unwrap());
    }) > MOST_FSYNCS
}

/// The broken variant that keeps as much as it may, and something.
fn hoarding_is_noticed() -> bool {
    let before = LIVE.load(Ordering::Relaxed);
    let kept: Vec<_> = (0..100).map(|_| std::hint::black_box(vec![1u8; MOST_BYTES])).collect();
    (LIVE.load(Ordering::Relaxed) - before) / kept.len() >= MOST_BYTES
}

#[test]
fn nothing_is_unwrapped_for_a_keystore_whose_header_does_not_verify_but_its_root() {
    let _alone = take_turn();
    let (place, _) = Place::with(Hierarchy::Direct, 100);
    for copy in ["keystore", "keystore.copy"] {
        let path = place.directory.join("c").join(copy);
        let bytes = place.disk.seen(&path).unwrap();
        // The header ends with its MAC; behind it the first group begins.
        let end = bytes.windows(4).position(|window| window == b"PSGR").unwrap();
        place.disk.flip(&path, end - 1, 1);
    }
    let (calls, refused) = place.calls(|| place.open());
    assert_eq!((calls, refused.unwrap_err().kind()), (1, ErrorKind::Authentication));
    for copy in ["keystore", "keystore.copy"] {
        let path = place.directory.join("c").join(copy);
        let end = place.disk.seen(&path).unwrap().windows(4).position(|window| window == b"PSGR").unwrap();
        place.disk.flip(&path, end - 1, 1);
    }
    assert_eq!(place.open().unwrap().open_databases().unwrap().len(), 100);
}

#[test]
fn who_opens_the_same_database_at_once_shares_one_unwrapping() {
    let _alone = take_turn();
    let (place, _) = Place::with(Hierarchy::Direct, 3);
    let cluster = place.open_with(Service::slow(&place.key)).unwrap();
    let (calls, databases) = place.calls(|| {
        let ready = Barrier::new(12);
        let open = &|number: usize| {
            ready.wait();
            cluster.database(&name(number % 3)).unwrap()
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..12).map(|number| scope.spawn(move || open(number))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        })
    });
    assert_eq!(calls, 3);
    assert_eq!(usable(&databases[..3]), 3);
    drop(databases);
    assert_eq!(place.calls(|| cluster.database(&name(0)).unwrap()).0, 1, "keys outlive the last handle");
}

#[test]
fn at_most_sixteen_calls_are_in_flight_however_many_databases_are_opened() {
    let _alone = take_turn();
    let (place, _) = Place::with(Hierarchy::Direct, 200);
    let service = Service::slow(&place.key);
    let cluster = place.open_with(service.clone()).unwrap();
    assert_eq!(cluster.open_databases().unwrap().len(), 200);
    assert_eq!(service.most_in_flight(), 16);
}

#[test]
fn a_service_that_throttles_the_start_gets_every_call_again_later_and_none_is_lost() {
    let _alone = take_turn();
    const THROTTLED: u64 = 100;
    let (place, _) = Place::with(Hierarchy::Direct, 300);
    let service = Service::new(&place.key, Duration::ZERO);
    place.key.throttle_next(1, None);
    let (calls, cluster) = place.calls(|| place.open_with(service.clone()).unwrap());
    assert_eq!(calls, 2);
    place.key.throttle_next(THROTTLED, None);
    service.forget();
    let (calls, databases) = place.calls(|| cluster.open_databases().unwrap());
    assert_eq!((calls, usable(&databases)), (300 + THROTTLED, 300));
    assert!(service.most_in_flight() <= 16);
    // The first sixteen were throttled together. They do not come back together, and none at once.
    let times = service.times();
    let back: Vec<_> = times[16..32].iter().map(|time| *time - times[0]).collect();
    assert!(back.iter().all(|wait| *wait >= Duration::from_millis(45)), "{back:?}");
    let spread = *back.iter().max().unwrap() - *back.iter().min().unwrap();
    assert!(spread >= Duration::from_millis(20), "they came back together: {back:?}");
}

#[test]
fn ten_thousand_databases_that_all_seal_fit_into_the_locked_memory_that_systems_allow() {
    let _alone = take_turn();
    in_a_process_of_its_own(
        "ten_thousand_databases_that_all_seal_fit_into_the_locked_memory_that_systems_allow",
        || {
            let (place, _) = Place::with(Hierarchy::ClusterKey, DATABASES);
            give_up_the_right_to_lock_beyond_the_limit();
            limit_locked_memory_to(8 << 20);
            let cluster = place.open().unwrap();
            let databases = cluster.open_databases().unwrap();
            let keys = locked_bytes();
            let sealed = databases.iter().filter(|database| try_to_seal(database).is_ok()).count();
            println!("{keys} bytes are locked for {DATABASES} keys, {} with a session of each", locked_bytes());
            assert_eq!(sealed, DATABASES);
            assert!(keys < 1 << 20 && locked_bytes() <= 8 << 20);
        },
    );
}

fn try_to_seal(database: &Database) -> Result<(), PageError> {
    let mut page = [7; 512];
    database.cipher().unwrap().seal_in_place(&AT, &mut page)
}

#[test]
fn where_locked_memory_is_short_for_keys_of_a_master_key_the_error_says_so_and_nothing_is_lost() {
    let _alone = take_turn();
    in_a_process_of_its_own(
        "where_locked_memory_is_short_for_keys_of_a_master_key_the_error_says_so_and_nothing_is_lost",
        || short_of_locked_memory(Hierarchy::Direct),
    );
}

#[test]
fn where_locked_memory_is_short_for_keys_of_a_cluster_key_the_error_says_so_and_nothing_is_lost() {
    let _alone = take_turn();
    in_a_process_of_its_own(
        "where_locked_memory_is_short_for_keys_of_a_cluster_key_the_error_says_so_and_nothing_is_lost",
        || short_of_locked_memory(Hierarchy::ClusterKey),
    );
}

fn short_of_locked_memory(hierarchy: Hierarchy) {
    let (place, _) = Place::with(hierarchy, 2_000);
    let cluster = place.open().unwrap();
    give_up_the_right_to_lock_beyond_the_limit();
    limit_locked_memory_to(locked_bytes() as u64 + (32 << 10));
    assert_short(cluster.open_databases());
    // What fits goes on.
    let some: Vec<_> = (0..50).map(|number| cluster.database(&name(number)).unwrap()).collect();
    assert_short(cluster.open_databases());
    // Their keys may have taken all that there was: if none is left for a session, that is said, too.
    assert!(matches!(try_to_seal(&some[0]), Ok(()) | Err(PageError::LockedMemory)));
    limit_locked_memory_to(8 << 20);
    assert_eq!(usable(&some), 50);
    assert_eq!(usable(&cluster.open_databases().unwrap()), 2_000);
    drop((some, cluster));
    assert_eq!(usable(&place.open().unwrap().open_databases().unwrap()), 2_000);
}

fn assert_short(opened: Result<Vec<Database>, Error>) {
    let error = opened.map(|databases| databases.len()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Resources, "{error}");
    assert!(error.to_string().contains("RLIMIT_MEMLOCK"), "{error}");
}

#[test]
fn ten_thousand_open_databases_are_closed_and_brought_back_in_a_moment() {
    let _alone = take_turn();
    let (place, _) = Place::with(Hierarchy::ClusterKey, DATABASES);
    let (cluster, other) = (place.open().unwrap(), place.open().unwrap());
    let databases = cluster.open_databases().unwrap();
    let start = Instant::now();
    other.create_database("of another process").unwrap();
    cluster.maintain().unwrap();
    let followed = start.elapsed();
    let start = Instant::now();
    cluster.disable().unwrap();
    let disabled = start.elapsed();
    assert!(databases[DATABASES - 1].cipher().is_err());
    let start = Instant::now();
    let (calls, ()) = place.calls(|| cluster.retry().unwrap());
    let back = start.elapsed();
    println!("{DATABASES} open databases: followed in {followed:?}, disabled in {disabled:?}, back in {back:?}");
    assert_eq!(calls, 1);
    assert_eq!(usable(&databases[DATABASES - 64..]), 64);
    assert!(followed.max(disabled).max(back) < Duration::from_secs(5));
}

/// The key service as a network shows it: slow, and every call noted.
#[derive(Clone)]
struct Service(Arc<ServiceInner>);

struct ServiceInner {
    key: ScriptedWrapper,
    delay: Duration,
    in_flight: AtomicUsize,
    most: AtomicUsize,
    times: Mutex<Vec<Instant>>,
}

impl Service {
    fn new(key: &ScriptedWrapper, delay: Duration) -> Self {
        Self(Arc::new(ServiceInner {
            key: key.clone(),
            delay,
            in_flight: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            times: Mutex::default(),
        }))
    }

    fn slow(key: &ScriptedWrapper) -> Self {
        Self::new(key, Duration::from_millis(20))
    }

    fn most_in_flight(&self) -> usize {
        self.0.most.load(Ordering::SeqCst)
    }

    /// When calls came, in order.
    fn times(&self) -> Vec<Instant> {
        let mut times = self.0.times.lock().unwrap().clone();
        times.sort();
        times
    }

    fn forget(&self) {
        self.0.times.lock().unwrap().clear();
    }

    fn serve<R>(&self, call: impl FnOnce(&ScriptedWrapper) -> R) -> R {
        self.0.times.lock().unwrap().push(Instant::now());
        let now = self.0.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.most.fetch_max(now, Ordering::SeqCst);
        thread::sleep(self.0.delay);
        let answer = call(&self.0.key);
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
        answer
    }
}

impl KeyWrapper for Service {
    fn id(&self) -> MasterKeyId {
        self.0.key.id()
    }

    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        self.serve(|service| service.wrap_key(key, cx))
    }

    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        self.serve(|service| service.unwrap_key(key, cx))
    }
}

/// Locked memory of this process.
fn locked_bytes() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmLck:")).expect("the kernel counts locked memory");
    line.split_whitespace().nth(1).and_then(|number| number.parse::<usize>().ok()).expect("a number of KiB") * 1024
}

/// Limits on memory hold for a whole process.
fn in_a_process_of_its_own(test: &str, f: impl FnOnce()) {
    const CHILD: &str = "PAGESEAL_SCALE_CHILD";
    if env::var_os(CHILD).is_some() {
        return f();
    }
    let mut command = Command::new(env::current_exe().unwrap());
    let status = command.args([test, "--exact", "--nocapture"]).env(CHILD, "1").status().unwrap();
    assert!(status.success(), "{test}: {status}");
}

/// Can be raised again.
fn limit_locked_memory_to(bytes: u64) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: passes valid structs; changes nothing but this process's own limit.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit), 0);
        limit.rlim_cur = bytes;
        assert_eq!(libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit), 0);
    }
}

/// Without CAP_IPC_LOCK, which root has, limits hold. For this thread, and those that it starts.
fn give_up_the_right_to_lock_beyond_the_limit() {
    #[repr(C)]
    struct Header {
        version: u32,
        thread: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    const CAP_IPC_LOCK: u32 = 14;
    let header = Header { version: VERSION_3, thread: 0 };
    let mut data = [Data::default(); 2];
    // SAFETY: the structs are laid out as capget(2) and capset(2) say for version 3, and outlive the calls.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_capget, &header, &mut data), 0);
        data[0].effective &= !(1 << CAP_IPC_LOCK);
        assert_eq!(libc::syscall(libc::SYS_capset, &header, &data), 0);
    }
}
