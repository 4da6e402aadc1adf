use super::*;
use crate::aead::sha256;
use crate::format::record::tests::{cluster_record, data_record};
use crate::format::wrapped::Purpose;
use crate::storage::disk::faulty::{Broken, Fault, FaultyDisk};

const SEQUENCE: u64 = 40;

fn mac_key(byte: u8) -> SecretKey {
    SecretKey::fill_with(|out| {
        out.fill(byte);
        Ok::<(), Error>(())
    })
    .unwrap()
}

fn header() -> Header {
    Header {
        hierarchy: Hierarchy::Direct,
        cluster: ClusterId::from_bytes([0xc1; 16]),
        sequence: SEQUENCE,
        record: cluster_record(Purpose::Cluster),
    }
}

fn id(database: u8) -> DatabaseId {
    DatabaseId::from_bytes([database; 16])
}

fn name(byte: u8) -> SealedName {
    SealedName { lookup: [byte; 32], sealed: vec![byte; 20] }
}

/// A database and its first data key.
fn new_database(byte: u8) -> Vec<Operation> {
    vec![Operation::Database { database: id(byte), name: name(byte) }, Operation::Generation(data_record(byte, 1))]
}

fn key_use(database: u8, owner: u8, oldest: u32) -> KeyUse {
    KeyUse {
        kind: OwnerKind::PageFile,
        owner: OwnerId([owner; 16]),
        database: id(database),
        oldest: Generation::new(oldest).unwrap(),
        name: Some(name(owner)),
    }
}

/// A small history of four groups, of one sector and of several.
fn history() -> Vec<Vec<Operation>> {
    let long = SealedName { lookup: [0x51; 32], sealed: vec![0x52; 500] };
    let external = KeyUse { kind: OwnerKind::External, owner: OwnerId([0; 16]), name: None, ..key_use(1, 0, 2) };
    vec![
        vec![Operation::Probe(cluster_record(Purpose::Probe))],
        new_database(1),
        vec![
            Operation::KeyUseAdd(KeyUse { name: Some(long), ..key_use(1, 9, 1) }),
            Operation::Generation(data_record(1, 2)),
        ],
        vec![Operation::KeyUseAdd(external)],
    ]
}

/// The same, with a group of six sectors, to be torn in more ways.
fn wide_history() -> Vec<Vec<Operation>> {
    let mut wide = data_record(1, 2);
    wide.wrappings[0].blob = vec![0xbb; 2000];
    let mut history = history();
    history[2][1] = Operation::Generation(wide);
    history
}

fn dir() -> &'static Path {
    Path::new("/cluster")
}

fn path() -> PathBuf {
    dir().join(FILE_NAME)
}

fn open_bytes(bytes: &[u8]) -> Result<Keystore> {
    open_on(Arc::new(FaultyDisk::with_file(&path(), bytes, Broken::No)))
}

fn open_on(disk: Arc<FaultyDisk>) -> Result<Keystore> {
    UnverifiedKeystore::read_on(disk, dir())?.verify(mac_key(7))
}

fn create_on(disk: Arc<FaultyDisk>, first: Vec<Operation>) -> Result<Keystore> {
    Keystore::create_on(disk, dir(), header(), first, mac_key(7))
}

fn error_of<T>(result: Result<T>) -> Error {
    result.err().expect("this must be refused")
}

/// A keystore file with these groups, the offsets where its groups begin and it ends, and the catalogue after each.
struct File {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    catalogues: Vec<Catalogue>,
}

impl File {
    fn new(groups: Vec<Vec<Operation>>) -> Self {
        let disk = Arc::new(FaultyDisk::new(Broken::No));
        let mut keystore = create_on(disk.clone(), Vec::new()).unwrap();
        let mut file =
            Self { bytes: Vec::new(), ends: vec![keystore.tip.end], catalogues: vec![copy(&keystore.catalogue)] };
        for operations in groups {
            keystore.append(operations).unwrap();
            file.ends.push(keystore.tip.end);
            file.catalogues.push(copy(&keystore.catalogue));
        }
        file.bytes = disk.seen(&path()).unwrap();
        file
    }

    /// How many groups this catalogue is the sum of.
    fn position(&self, catalogue: &Catalogue) -> Option<usize> {
        self.catalogues.iter().position(|known| known == catalogue)
    }

    fn group(&self, index: usize) -> &[u8] {
        &self.bytes[self.ends[index]..self.ends[index + 1]]
    }

    fn header(&self) -> &[u8] {
        &self.bytes[..self.ends[0]]
    }
}

fn copy(catalogue: &Catalogue) -> Catalogue {
    Catalogue {
        databases: catalogue.databases.clone(),
        names: catalogue.names.clone(),
        generations: catalogue.generations.clone(),
        probe: catalogue.probe.clone(),
        key_uses: catalogue.key_uses.clone(),
        key_use_names: catalogue.key_use_names.clone(),
    }
}

/// A keystore whose second group has this body, under the right key.
fn with_body(body: &[u8]) -> Vec<u8> {
    let mut file = File::new(vec![new_database(1)]);
    let keystore = open_bytes(&file.bytes).unwrap();
    let length = u32::try_from(body.len()).unwrap();
    let (group, _) = keystore.mac.seal_group(keystore.tip.seq + 1, &keystore.tip.tag, length, body).unwrap();
    file.bytes.extend(group);
    file.bytes
}

#[test]
fn what_was_appended_is_there_after_reopening() {
    let file = File::new(history());
    let keystore = open_bytes(&file.bytes).unwrap();
    let catalogue = keystore.catalogue();
    assert!(!keystore.has_torn_tail());
    assert_eq!(keystore.sequence(), SEQUENCE + 4);
    assert_eq!(keystore.cluster_record(), &header().record);
    assert_eq!(catalogue.probe(), Some(&cluster_record(Purpose::Probe)));
    assert_eq!(catalogue.find_database(&[1; 32]), Some(id(1)));
    assert_eq!(catalogue.databases().collect::<Vec<_>>(), [(id(1), &name(1))]);
    let generations: Vec<_> = catalogue.generations(id(1)).cloned().collect();
    assert_eq!(generations, [data_record(1, 1), data_record(1, 2)]);
    let owners: Vec<_> = catalogue.key_uses(id(1)).map(|key_use| key_use.owner).collect();
    assert_eq!(owners, [OwnerId([9; 16]), OwnerId([0; 16])]);
    assert!(catalogue.find_key_use(id(1), OwnerKind::PageFile, &[0x51; 32]).is_some());
    assert!(catalogue.find_key_use(id(1), OwnerKind::Log, &[0x51; 32]).is_none());
}

/// The fingerprint was computed by another program, from the description of the bytes (Python's hmac and struct).
#[test]
fn golden_fingerprint_of_a_whole_keystore() {
    let file = File::new(history());
    assert_eq!(file.bytes.len(), 3072);
    let fingerprint: String = sha256(&file.bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(fingerprint, "9c60dbcd0866036983d8f57adce647aab64a10deb978a2836137157d67d4dd7c");
}

#[test]
fn a_keystore_lives_in_real_files_and_is_made_once() {
    let dir = std::env::temp_dir().join(format!("pageseal-keystore-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    assert_eq!(error_of(UnverifiedKeystore::read(&dir)).kind(), ErrorKind::NotFound);
    let mut keystore = Keystore::create(&dir, header(), new_database(1), mac_key(7)).unwrap();
    keystore.append(new_database(2)).unwrap();
    let again = Keystore::create(&dir, header(), new_database(3), mac_key(7));
    assert_eq!(error_of(again).kind(), ErrorKind::AlreadyExists);
    let unverified = UnverifiedKeystore::read(&dir).unwrap();
    assert_eq!(unverified.cluster_id(), header().cluster);
    assert_eq!(unverified.cluster_record(), &header().record);
    assert_eq!(unverified.hierarchy(), Hierarchy::Direct);
    let mut reopened = unverified.verify(mac_key(7)).unwrap();
    assert!(reopened.catalogue() == keystore.catalogue());
    reopened.append(new_database(3)).unwrap();
    // The first handle knows nothing of that, and must not write over it.
    assert_eq!(error_of(keystore.append(new_database(4))).kind(), ErrorKind::Io);
    assert_eq!(open_bytes(&std::fs::read(dir.join(FILE_NAME)).unwrap()).unwrap().catalogue().databases().count(), 3);
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn every_changed_byte_is_refused_or_drops_the_last_group() {
    let file = File::new(history());
    let groups = file.catalogues.len() - 1;
    let (mut tried, mut refused, mut dropped) = (0, 0, 0);
    for at in 0..file.bytes.len() {
        for change in [1, 0x80, 0xff, file.bytes[at]] {
            if change == 0 {
                continue;
            }
            let mut bytes = file.bytes.clone();
            bytes[at] ^= change;
            tried += 1;
            match open_bytes(&bytes) {
                Err(_) => refused += 1,
                Ok(keystore) => {
                    dropped += 1;
                    assert!(at >= file.ends[groups - 1], "byte {at} is acknowledged and its change went unnoticed");
                    assert_eq!(file.position(keystore.catalogue()), Some(groups - 1), "byte {at}");
                    assert!(keystore.has_torn_tail());
                }
            }
        }
    }
    println!("SCORE keystore-flips tried={tried} refused={refused} last-group-dropped={dropped} accepted=0");
}

#[test]
fn every_cut_leaves_a_beginning_of_the_history() {
    let file = File::new(history());
    for len in 0..=file.bytes.len() {
        let opened = open_bytes(&file.bytes[..len]);
        let Some(groups) = file.ends.iter().rposition(|&end| end <= len) else {
            assert!(opened.is_err(), "length {len}");
            continue;
        };
        let keystore = opened.unwrap_or_else(|error| panic!("length {len}: {error}"));
        assert_eq!(file.position(keystore.catalogue()), Some(groups), "length {len}");
        assert_eq!(keystore.has_torn_tail(), len != file.ends[groups], "length {len}");
    }
}

#[test]
fn moved_repeated_and_missing_groups_are_refused() {
    let file = File::new(history());
    let count = file.catalogues.len() - 1;
    let mut orders = Vec::new();
    for a in 0..count {
        for b in 0..count {
            for c in 0..count {
                orders.extend([
                    vec![a],
                    vec![a, b],
                    vec![a, b, c],
                    vec![a, b, c, 0],
                    vec![0, 1, 2, 3, a],
                    vec![a, b, c, 3],
                ]);
            }
        }
    }
    for order in orders {
        let mut bytes = file.header().to_vec();
        order.iter().for_each(|&index| bytes.extend(file.group(index)));
        let in_order = order.iter().enumerate().all(|(at, &index)| at == index);
        match open_bytes(&bytes) {
            Ok(keystore) => {
                assert!(in_order, "{order:?}");
                assert_eq!(file.position(keystore.catalogue()), Some(order.len()));
            }
            Err(error) => {
                assert!(!in_order, "{order:?}: {error}");
                assert_eq!(error.kind(), ErrorKind::Damaged);
            }
        }
    }
}

#[test]
fn damage_before_a_synced_group_names_its_byte_and_a_torn_tail_is_no_damage() {
    let file = File::new(history());
    for index in 0..3 {
        let mut bytes = file.bytes.clone();
        bytes[file.ends[index] + HEAD_LEN + 3] ^= 1;
        let error = error_of(open_bytes(&bytes));
        assert_eq!(error.kind(), ErrorKind::Damaged);
        let text = error.to_string();
        assert!(text.contains("/cluster/keystore") && text.contains(&format!("byte {}:", file.ends[index])), "{text}");
    }
    // Zeros or anything else where an append was about to go: no head there is ours.
    for tail in [vec![0; 512], vec![0; 5000], vec![0xaa; 777], group::MAGIC.repeat(300)] {
        let keystore = open_bytes(&[file.bytes.clone(), tail].concat()).unwrap();
        assert_eq!(file.position(keystore.catalogue()), Some(4));
        assert!(keystore.has_torn_tail());
    }
}

#[test]
fn a_torn_tail_leaves_the_file_with_the_next_append_and_not_before() {
    let file = File::new(history());
    let torn = [&file.bytes[..], &[0xaa; 700]].concat();
    let disk = Arc::new(FaultyDisk::with_file(&path(), &torn, Broken::No));
    let mut keystore = open_on(disk.clone()).unwrap();
    assert_eq!(disk.seen(&path()).unwrap(), torn);
    keystore.append(new_database(2)).unwrap();
    assert!(!keystore.has_torn_tail());
    let bytes = disk.seen(&path()).unwrap();
    assert_eq!(bytes[..file.bytes.len()], file.bytes);
    assert_eq!(bytes.len(), keystore.tip.end);
    assert!(open_bytes(&bytes).unwrap().catalogue() == keystore.catalogue());
}

#[test]
fn another_key_cluster_or_segment_is_refused() {
    let file = File::new(history());
    let disk = Arc::new(FaultyDisk::with_file(&path(), &file.bytes, Broken::No));
    let error = error_of(UnverifiedKeystore::read_on(disk, dir()).unwrap().verify(mac_key(8)));
    assert_eq!(error.kind(), ErrorKind::Authentication);
    // Of the same key, but another cluster, or rewritten at another sequence: its groups do not fit this header.
    for other in [
        Header { sequence: SEQUENCE + 1, ..header() },
        Header { cluster: ClusterId::from_bytes([0xc2; 16]), ..header() },
    ] {
        let disk = Arc::new(FaultyDisk::new(Broken::No));
        Keystore::create_on(disk.clone(), dir(), other, new_database(1), mac_key(7)).unwrap();
        let foreign = disk.seen(&path()).unwrap().split_off(512);
        let keystore = open_bytes(&[file.header(), &foreign].concat()).unwrap();
        assert_eq!(file.position(keystore.catalogue()), Some(0), "a foreign group was accepted");
        let mixed = [file.header(), file.group(0), &foreign, file.group(2), file.group(3)].concat();
        assert_eq!(error_of(open_bytes(&mixed)).kind(), ErrorKind::Damaged);
    }
}

#[test]
fn groups_of_a_fork_of_the_history_are_refused() {
    let mut fork = history();
    fork[1] = new_database(3);
    fork.truncate(2);
    let (file, fork) = (File::new(history()), File::new(fork));
    let spliced = [file.header(), file.group(0), fork.group(1), file.group(2), file.group(3)].concat();
    let error = error_of(open_bytes(&spliced));
    assert!(error.to_string().contains("another history"), "{error}");
}

#[test]
fn operations_of_a_newer_version_are_refused_and_not_skipped() {
    for kind in [0, 2, 3, 5, 6, 9, 10, 11, 12, 255] {
        let mut body = Vec::new();
        body.extend([kind, 0, 0, 0, 4, 0, 0, 0, 1, 2, 3, 4]);
        let error = error_of(open_bytes(&with_body(&body)));
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains(&format!("kind {kind}")) && error.to_string().contains("newer"), "{error}");
    }
}

#[test]
fn authentic_bodies_that_break_the_format_are_errors_at_their_byte() {
    let mut body = Vec::new();
    let at: Vec<_> = new_database(2)
        .iter()
        .map(|operation| {
            let at = body.len();
            operation.encode(&mut body).unwrap();
            at
        })
        .collect();
    let whole = open_bytes(&with_body(&body)).unwrap();
    let start = whole.tip.end - group::group_len(u32::try_from(body.len()).unwrap()) + HEAD_LEN;
    for len in 0..body.len() {
        let error = error_of(open_bytes(&with_body(&body[..len])));
        assert_eq!(error.kind(), ErrorKind::Damaged, "length {len}");
        let byte = start + at.iter().rev().find(|&&at| at < len).unwrap_or(&0);
        assert!(error.to_string().contains(&format!("byte {byte}:")), "length {len}: {error}");
    }
    for byte in 0..body.len() {
        let mut changed = body.clone();
        changed[byte] ^= 0xff;
        let _ = open_bytes(&with_body(&changed));
    }
}

#[test]
fn declared_lengths_are_bounded_before_they_are_used() {
    let file = File::new(vec![new_database(1)]);
    let keystore = open_bytes(&file.bytes).unwrap();
    for length in [MAX_BODY_LEN + 1, u32::MAX] {
        let (group, _) = keystore.mac.seal_group(SEQUENCE + 2, &keystore.tip.tag, length, b"").unwrap();
        let error = error_of(open_bytes(&[&file.bytes[..], &group].concat()));
        assert!(error.to_string().contains("longer than allowed"), "{error}");
    }
    // Allowed, and not there: a torn tail, found without allocating for it.
    let (group, _) = keystore.mac.seal_group(SEQUENCE + 2, &keystore.tip.tag, MAX_BODY_LEN, b"").unwrap();
    assert!(open_bytes(&[&file.bytes[..], &group].concat()).unwrap().has_torn_tail());
    let bomb = [1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
    assert_eq!(error_of(open_bytes(&with_body(&bomb))).kind(), ErrorKind::Damaged);
}

/// Groups of operations that contradict what is there, or each other.
fn contradictions() -> Vec<(ErrorKind, Vec<Operation>)> {
    let database = |byte, by_name| Operation::Database { database: id(byte), name: name(by_name) };
    let generation = |byte, number| Operation::Generation(data_record(byte, number));
    let used = |key_use| Operation::KeyUseAdd(key_use);
    let destroyed = Record { state: KeyState::Destroyed, wrappings: Vec::new(), ..data_record(1, 3) };
    vec![
        (ErrorKind::AlreadyExists, vec![database(1, 2), generation(1, 3)]),
        (ErrorKind::AlreadyExists, vec![database(2, 1), generation(2, 1)]),
        (ErrorKind::AlreadyExists, [new_database(2), new_database(2)].concat()),
        (ErrorKind::AlreadyExists, [new_database(2), vec![database(3, 2), generation(3, 1)]].concat()),
        (ErrorKind::NotFound, vec![generation(2, 1)]),
        (ErrorKind::NotFound, vec![generation(2, 1), database(2, 2)]),
        (ErrorKind::Invalid, vec![database(2, 2)]),
        (ErrorKind::Invalid, vec![database(2, 2), generation(2, 2)]),
        (ErrorKind::Invalid, vec![generation(1, 2)]),
        (ErrorKind::Invalid, vec![generation(1, 4)]),
        (ErrorKind::Invalid, vec![generation(1, 3), generation(1, 3)]),
        (ErrorKind::NotFound, vec![used(key_use(2, 1, 1))]),
        (ErrorKind::NotFound, vec![used(key_use(1, 1, 3))]),
        (ErrorKind::Invalid, vec![Operation::Generation(destroyed), used(key_use(1, 1, 3))]),
        (ErrorKind::AlreadyExists, vec![used(KeyUse { name: Some(name(8)), ..key_use(1, 9, 1) })]),
        (
            ErrorKind::AlreadyExists,
            vec![used(KeyUse { name: Some(SealedName { lookup: [0x51; 32], ..name(1) }), ..key_use(1, 8, 1) })],
        ),
        (ErrorKind::AlreadyExists, vec![used(key_use(1, 3, 1)), used(key_use(1, 3, 1))]),
    ]
}

#[test]
fn contradictory_operations_write_nothing_and_leave_the_handle_usable() {
    let file = File::new(history());
    let disk = Arc::new(FaultyDisk::with_file(&path(), &file.bytes, Broken::No));
    let mut keystore = open_on(disk.clone()).unwrap();
    for (kind, operations) in contradictions() {
        let text = format!("{operations:?}");
        assert_eq!(error_of(keystore.append(operations)).kind(), kind, "{text}");
        assert_eq!(file.position(keystore.catalogue()), Some(4), "{text}");
    }
    let too_long = Operation::Database { database: id(2), name: SealedName { sealed: vec![0; 513], ..name(2) } };
    assert_eq!(error_of(keystore.append(vec![too_long])).kind(), ErrorKind::Invalid);
    let too_many = vec![Operation::Probe(cluster_record(Purpose::Probe)); (MAX_BODY_LEN as usize) / 100];
    assert_eq!(error_of(keystore.append(too_many)).kind(), ErrorKind::Invalid);
    keystore.append(Vec::new()).unwrap();
    assert_eq!(disk.bytes_written(), 0);
    keystore.append(new_database(2)).unwrap();
    assert_eq!(keystore.sequence(), SEQUENCE + 5);
}

#[test]
fn contradictory_operations_on_disk_are_damage() {
    let file = File::new(history());
    let keystore = open_bytes(&file.bytes).unwrap();
    for (_, operations) in contradictions() {
        let mut body = Vec::new();
        operations.iter().for_each(|operation| operation.encode(&mut body).unwrap());
        let length = u32::try_from(body.len()).unwrap();
        let (group, _) = keystore.mac.seal_group(SEQUENCE + 5, &keystore.tip.tag, length, &body).unwrap();
        let error = error_of(open_bytes(&[&file.bytes[..], &group].concat()));
        assert_eq!(error.kind(), ErrorKind::Damaged, "{operations:?}");
    }
}

/// What is tried, and what went wrong, over all crashes or failures.
#[derive(Default, Debug)]
struct Tally {
    tried: usize,
    /// An acknowledged change is not there.
    lost: usize,
    /// The keystore does not open, or shows a state that never was.
    neither: usize,
}

impl Tally {
    /// Judges a file that may be found: at least `acknowledged` of the history must be there. Then appends to it, which
    /// must work and be durable whatever happens next.
    fn judge(&mut self, file: &File, image: &[u8], acknowledged: usize) {
        self.tried += 1;
        let disk = Arc::new(FaultyDisk::with_file(&path(), image, Broken::No));
        let Ok(mut keystore) = open_on(disk.clone()) else {
            self.neither += 1;
            return;
        };
        match file.position(keystore.catalogue()) {
            None => self.neither += 1,
            Some(found) if found < acknowledged => self.lost += 1,
            Some(_) => {
                keystore.append(new_database(0xee)).unwrap();
                self.expect_exactly(&disk, keystore.catalogue());
            }
        }
    }

    /// After an acknowledged append every possible file has this catalogue.
    fn expect_exactly(&mut self, disk: &FaultyDisk, catalogue: &Catalogue) {
        for image in disk.after_crash(&path()) {
            self.tried += 1;
            match image.as_deref().map(open_bytes) {
                Some(Ok(keystore)) if keystore.catalogue() == catalogue => {}
                Some(Ok(_)) => self.lost += 1,
                Some(Err(_)) | None => self.neither += 1,
            }
        }
    }
}

/// Stops the machine in each step of creating a keystore.
fn crash_while_creating(broken: Broken, tally: &mut Tally) {
    let file = File::new(vec![new_database(1)]);
    for at in 0.. {
        let disk = Arc::new(FaultyDisk::new(broken));
        disk.arm(at, Fault::Crash);
        let created = create_on(disk.clone(), new_database(1)).is_ok();
        for image in disk.after_crash(&path()) {
            match image {
                // It has its first group or does not exist.
                Some(image) => tally.judge(&file, &image, 1),
                None => {
                    tally.tried += 1;
                    tally.lost += usize::from(created);
                }
            }
        }
        if created {
            assert!(broken != Broken::No || at >= 6, "fewer steps than expected");
            return;
        }
    }
}

/// Stops the machine in each step of opening a keystore that ends in `tail`, and appending twice.
fn crash_while_appending(broken: Broken, history: &[Vec<Operation>], tail: &[u8], tally: &mut Tally) {
    let file = File::new(history.to_vec());
    let start = [&file.bytes[..file.ends[2]], tail].concat();
    for at in 0.. {
        let disk = Arc::new(FaultyDisk::with_file(&path(), &start, broken));
        disk.arm(at, Fault::Crash);
        let mut acknowledged = 2;
        if let Ok(mut keystore) = open_on(disk.clone()) {
            for operations in history[2..].iter().cloned() {
                acknowledged += usize::from(keystore.append(operations).is_ok());
            }
        }
        for image in disk.after_crash(&path()) {
            tally.judge(&file, &image.unwrap_or_default(), acknowledged);
        }
        if acknowledged == 4 {
            assert!(broken != Broken::No || at >= 8, "fewer steps than expected");
            return;
        }
    }
}

fn crash_everywhere(broken: Broken) -> Tally {
    let mut tally = Tally::default();
    crash_while_creating(broken, &mut tally);
    for history in [history(), wide_history()] {
        crash_while_appending(broken, &history, &[], &mut tally);
        crash_while_appending(broken, &history, &[0; 1024], &mut tally);
        crash_while_appending(broken, &history, &[0xaa; 300], &mut tally);
    }
    tally
}

#[test]
fn a_crash_in_any_step_with_any_torn_write_leaves_the_old_or_the_new_state() {
    let tally = crash_everywhere(Broken::No);
    let unsynced_file = crash_everywhere(Broken::NewFilesAreNotSynced);
    let unsynced_append = crash_everywhere(Broken::AppendsAreNotSynced);
    let control = unsynced_file.neither > 0 && unsynced_append.lost > 0;
    println!(
        "SCORE keystore-crash-points tried={} lost={} neither={} control={}",
        tally.tried,
        tally.lost,
        tally.neither,
        u8::from(control)
    );
    assert_eq!((tally.lost, tally.neither), (0, 0));
    assert!(control, "deliberate mistakes went unnoticed: {unsynced_file:?} {unsynced_append:?}");
}

/// Lets each call fail, once or for good, while a keystore is opened and appended to twice.
fn fail_everywhere(broken: Broken) -> Tally {
    let mut tally = Tally::default();
    let file = File::new(history());
    for (tail, fault) in [(0, Fault::Once), (0, Fault::Forever), (300, Fault::Once), (300, Fault::Forever)] {
        let start = [&file.bytes[..file.ends[2]], &vec![0xaa; tail]].concat();
        for at in 0.. {
            let disk = Arc::new(FaultyDisk::with_file(&path(), &start, broken));
            disk.arm(at, fault);
            let acknowledged = append_under_faults(&disk);
            if disk.steps() <= at {
                break;
            }
            disk.heal();
            for image in disk.after_crash(&path()) {
                tally.judge(&file, &image.unwrap_or_default(), acknowledged);
            }
            reopen_in_the_same_system(&file, disk, acknowledged, &mut tally);
        }
    }
    tally
}

/// Returns how many groups are acknowledged. After a failure, everything is refused without touching the disk.
fn append_under_faults(disk: &Arc<FaultyDisk>) -> usize {
    let Ok(mut keystore) = open_on(disk.clone()) else {
        return 2;
    };
    let mut acknowledged = 2;
    for operations in history().split_off(2) {
        match keystore.append(operations) {
            Ok(()) => acknowledged += 1,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Io);
                let steps = disk.steps();
                disk.heal();
                let refused = error_of(keystore.append(new_database(0xdd)));
                assert_eq!(refused.kind(), ErrorKind::Io);
                assert!(refused.to_string().contains("open the cluster again"), "{refused}");
                assert_eq!(disk.steps(), steps, "a poisoned handle touched the disk");
                break;
            }
        }
    }
    acknowledged
}

/// The cache still shows what a failed sync did not bring to the disk. What is seen and then appended to must be durable.
fn reopen_in_the_same_system(file: &File, disk: Arc<FaultyDisk>, acknowledged: usize, tally: &mut Tally) {
    tally.tried += 1;
    let Ok(mut keystore) = open_on(disk.clone()) else {
        tally.neither += 1;
        return;
    };
    match file.position(keystore.catalogue()) {
        None => tally.neither += 1,
        Some(found) if found < acknowledged => tally.lost += 1,
        Some(_) => {
            keystore.append(new_database(0xee)).unwrap();
            tally.expect_exactly(&disk, keystore.catalogue());
        }
    }
}

#[test]
fn a_failing_call_at_any_place_is_an_error_and_loses_nothing() {
    let tally = fail_everywhere(Broken::No);
    let broken = fail_everywhere(Broken::IgnoresOverwrites);
    let control = broken.lost + broken.neither > 0;
    println!(
        "SCORE keystore-io-failures tried={} lost={} neither={} control={}",
        tally.tried,
        tally.lost,
        tally.neither,
        u8::from(control)
    );
    assert_eq!((tally.lost, tally.neither), (0, 0));
    assert!(control, "writing the last group again after opening seems to be unnecessary: {broken:?}");
}

#[test]
fn a_failed_create_leaves_no_keystore_or_a_whole_one() {
    let file = File::new(vec![new_database(1)]);
    for fault in [Fault::Once, Fault::Forever] {
        for at in 0..5 {
            let disk = Arc::new(FaultyDisk::new(Broken::No));
            disk.arm(at, fault);
            assert_eq!(error_of(create_on(disk.clone(), new_database(1))).kind(), ErrorKind::Io);
            disk.heal();
            match open_on(disk.clone()) {
                Ok(keystore) => assert_eq!(file.position(keystore.catalogue()), Some(1)),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::NotFound);
                    create_on(disk, new_database(1)).expect("left-overs do not prevent another try");
                }
            }
        }
    }
}

#[test]
fn ten_thousand_databases_cost_the_same_bytes_each() {
    let disk = Arc::new(FaultyDisk::new(Broken::No));
    let mut keystore = create_on(disk.clone(), vec![Operation::Probe(cluster_record(Purpose::Probe))]).unwrap();
    let mut costs = std::collections::BTreeSet::new();
    for number in 0..10_000u64 {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&(number + 1).to_le_bytes());
        let database = DatabaseId::from_bytes(bytes[..16].try_into().unwrap());
        let name = SealedName { lookup: bytes, sealed: vec![1; 20] };
        let record = Record { database, ..data_record(1, 1) };
        let before = disk.bytes_written();
        keystore.append(vec![Operation::Database { database, name }, Operation::Generation(record)]).unwrap();
        costs.insert(disk.bytes_written() - before);
    }
    assert_eq!(costs.len(), 1, "{costs:?}");
    let unverified = UnverifiedKeystore::read_on(disk, dir()).unwrap();
    let start = std::time::Instant::now();
    let verified = unverified.verify(mac_key(7)).unwrap();
    println!(
        "verified {} databases in {:?}, {costs:?} bytes each",
        verified.catalogue().databases().count(),
        start.elapsed()
    );
    assert!(verified.catalogue() == keystore.catalogue());
}
