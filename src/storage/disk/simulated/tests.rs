use super::*;

const SECTOR: usize = 512;

fn path(name: &str) -> PathBuf {
    Path::new("/dir").join(name)
}

fn dir() -> &'static Path {
    Path::new("/dir")
}

fn stat(disk: &SimulatedDisk, path: &Path) -> Stat {
    disk.stat(path).unwrap().unwrap()
}

/// Writes to a file that is there.
fn write(disk: &SimulatedDisk, path: &Path, at: usize, bytes: &[u8], sync: bool) -> io::Result<()> {
    disk.write_at(path, stat(disk, path), at as u64, bytes, sync)
}

/// What lies at `path` on all disks that a power cut may leave.
fn after_all(disk: &SimulatedDisk, path: &Path) -> BTreeSet<Option<Vec<u8>>> {
    disk.power_cuts_all(10_000).iter().map(|disk| disk.seen(path)).collect()
}

fn images<const N: usize>(images: [&[u8]; N]) -> BTreeSet<Option<Vec<u8>>> {
    images.into_iter().map(|image| Some(image.to_vec())).collect()
}

fn sectors(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().flat_map(|&byte| [byte; SECTOR]).collect()
}

#[test]
fn programs_see_what_they_wrote_in_any_number_of_files() {
    let disk = SimulatedDisk::new(Broken::No);
    let other = Path::new("/other/file");
    disk.write_new(&path("a"), b"one").unwrap();
    disk.write_new(other, b"two").unwrap();
    write(&disk, &path("a"), 2, b"xyz", false).unwrap();
    assert_eq!(disk.read(&path("a"), 5).unwrap(), b"onxyz");
    assert_eq!(disk.read_from(&path("a"), 3, 2).unwrap(), b"yz");
    assert_eq!(disk.read_from(&path("a"), 9, 2).unwrap(), b"");
    assert_eq!(disk.read_from(&path("a"), 3, 1).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    assert_eq!(disk.read(&path("none"), 1).unwrap_err().kind(), io::ErrorKind::NotFound);
    assert_eq!(disk.list(dir()).unwrap(), [path("a")]);
    disk.rename(&path("a"), &path("b")).unwrap();
    assert_eq!(disk.paths(), [path("b"), other.to_owned()]);
    assert!(disk.rename(other, &path("c")).is_err());
    disk.remove(other).unwrap();
    disk.remove(other).unwrap();
    assert_eq!((disk.exists(other).unwrap(), disk.exists(&path("b")).unwrap()), (false, true));
}

#[test]
fn a_write_is_refused_if_the_file_was_replaced_or_lengthened() {
    let disk = SimulatedDisk::with_file(&path("a"), b"old", Broken::No);
    let old = stat(&disk, &path("a"));
    assert!(disk.write_at(&path("a"), Stat { len: 2, ..old }, 0, b"x", true).is_err());
    disk.replace(&path("a"), b"new").unwrap();
    assert!(disk.write_at(&path("a"), old, 0, b"x", true).is_err());
    assert_eq!(disk.seen(&path("a")).unwrap(), b"new");
}

#[test]
fn a_synced_file_with_a_synced_name_survives_everything() {
    let disk = SimulatedDisk::new(Broken::No);
    disk.replace(&path("a"), &sectors(b"123")).unwrap();
    write(&disk, &path("a"), 700, b"patch", true).unwrap();
    let seen = disk.seen(&path("a")).unwrap();
    assert_eq!(after_all(&disk, &path("a")), images([&seen]));
    assert_eq!(disk.power_cuts_all(10).len(), 1);
    assert_eq!(disk.kill().seen(&path("a")).unwrap(), seen);
}

#[test]
fn each_unsynced_sector_is_old_or_new_after_a_power_cut() {
    let disk = SimulatedDisk::with_file(&path("a"), &sectors(b"abc"), Broken::No);
    write(&disk, &path("a"), 0, &sectors(b"A"), false).unwrap();
    write(&disk, &path("a"), 2 * SECTOR, &sectors(b"C"), false).unwrap();
    let [all, old, first, last, new] = [b"abc", b"abc", b"Abc", b"abC", b"AbC"].map(|bytes| sectors(bytes));
    assert_eq!(after_all(&disk, &path("a")), images([&old, &first, &last, &new]));
    assert_eq!(disk.power_cuts_all(4).len(), 4);
    write(&disk, &path("a"), SECTOR, &all[SECTOR..2 * SECTOR], true).unwrap();
    assert_eq!(after_all(&disk, &path("a")), images([&new]), "a sync covers earlier writes");
}

#[test]
fn a_sector_written_twice_may_be_left_as_it_was_between() {
    let disk = SimulatedDisk::with_file(&path("a"), &sectors(b"0"), Broken::No);
    write(&disk, &path("a"), 0, &sectors(b"1"), false).unwrap();
    write(&disk, &path("a"), 0, &sectors(b"2"), false).unwrap();
    let [zero, one, two] = [b"0", b"1", b"2"].map(|byte| sectors(byte));
    assert_eq!(after_all(&disk, &path("a")), images([&zero, &one, &two]));
    assert_eq!(disk.after_crash(&path("a")), images([&zero, &one, &two]));
    write(&disk, &path("a"), 0, &sectors(b"3"), true).unwrap();
    assert_eq!(after_all(&disk, &path("a")), images([&sectors(b"3")]));
}

#[test]
fn an_unsynced_append_may_end_at_both_lengths_and_at_each_sector_between() {
    let disk = SimulatedDisk::with_file(&path("a"), &[1; 600], Broken::No);
    write(&disk, &path("a"), 600, &[2; 1000], false).unwrap();
    let lengths: BTreeSet<_> = after_all(&disk, &path("a")).into_iter().map(|image| image.unwrap().len()).collect();
    assert_eq!(lengths, BTreeSet::from([600, 1024, 1536, 1600]));
    let image = [vec![1; 600], vec![0; 424], vec![2; 512], vec![0; 64]].concat();
    assert!(after_all(&disk, &path("a")).contains(&Some(image)), "the length and the middle reached the disk");
}

#[test]
fn a_failed_sync_leaves_pages_clean_that_the_disk_does_not_have() {
    let disk = SimulatedDisk::with_file(&path("a"), &sectors(b"ab"), Broken::No);
    let (old, new) = (sectors(b"ab"), sectors(b"Ab"));
    let expected = stat(&disk, &path("a"));
    disk.arm(1, Fault::Once);
    assert!(disk.write_at(&path("a"), expected, 0, &sectors(b"A"), true).is_err());
    assert_eq!((disk.seen(&path("a")), disk.kill().seen(&path("a"))), (Some(new.clone()), Some(new.clone())));
    assert_eq!(after_all(&disk, &path("a")), images([&old, &new]));
    let next = disk.kill();
    write(&next, &path("a"), SECTOR, &sectors(b"B"), true).unwrap();
    assert_eq!(after_all(&next, &path("a")), images([&sectors(b"aB"), &sectors(b"AB")]), "a later sync does not help");
    write(&next, &path("a"), 0, &sectors(b"A"), true).unwrap();
    assert_eq!(after_all(&next, &path("a")), images([&sectors(b"AB")]), "writing it again does");
}

#[test]
fn an_unsynced_write_may_be_lost_without_anybody_being_told() {
    let disk = SimulatedDisk::with_file(&path("a"), &sectors(b"ab"), Broken::No);
    write(&disk, &path("a"), 0, &sectors(b"A"), false).unwrap();
    disk.fail_write_back(&path("a"));
    write(&disk, &path("a"), SECTOR, &sectors(b"B"), true).unwrap();
    assert_eq!(after_all(&disk, &path("a")), images([&sectors(b"aB"), &sectors(b"AB")]));
}

#[test]
fn of_unsynced_names_the_first_so_many_survive_and_a_rename_is_one_step() {
    let disk = SimulatedDisk::with_file(&path("a"), b"old", Broken::No);
    disk.write_new(&path("a.tmp"), b"new").unwrap();
    disk.rename(&path("a.tmp"), &path("a")).unwrap();
    disk.remove(&path("a")).unwrap();
    let states: Vec<_> =
        disk.power_cuts_all(10).iter().map(|disk| (disk.seen(&path("a")), disk.seen(&path("a.tmp")))).collect();
    let (old, new) = (Some(b"old".to_vec()), Some(b"new".to_vec()));
    assert_eq!(states, [(old.clone(), None), (old, new.clone()), (new, None), (None, None)]);
    disk.sync_dir(dir()).unwrap();
    assert_eq!(after_all(&disk, &path("a")), BTreeSet::from([None]));
}

#[test]
fn a_seed_may_bring_back_any_made_or_removed_name_but_never_tears_a_rename() {
    let disk = SimulatedDisk::with_file(&path("a"), b"old", Broken::No);
    disk.set(&path("b"), b"other");
    disk.write_new(&path("a.tmp"), b"new").unwrap();
    disk.rename(&path("a.tmp"), &path("a")).unwrap();
    disk.remove(&path("b")).unwrap();
    let cuts: Vec<_> = (0..400).map(|seed| disk.power_cut(seed)).collect();
    let found =
        |a: &[u8], b| cuts.iter().any(|cut| cut.seen(&path("a")).unwrap() == a && cut.exists(&path("b")).unwrap() == b);
    assert!(found(b"old", true) && found(b"new", true) && found(b"new", false), "the orderly ones");
    assert!(found(b"old", false), "the removal overtook the rename");
    assert!(
        !disk
            .power_cuts_all(10)
            .iter()
            .any(|cut| { cut.seen(&path("a")).unwrap() == b"old" && cut.seen(&path("b")).is_none() })
    );
}

#[test]
fn a_directory_sync_is_about_that_directory_only() {
    let disk = SimulatedDisk::new(Broken::No);
    let other = Path::new("/other/file");
    disk.write_new(&path("a"), b"a").unwrap();
    disk.write_new(other, b"b").unwrap();
    disk.sync_dir(Path::new("/other")).unwrap();
    assert_eq!(after_all(&disk, &path("a")), BTreeSet::from([None, Some(b"a".to_vec())]));
    assert_eq!(after_all(&disk, other), images([b"b"]));
}

#[test]
fn files_are_torn_independently_of_each_other() {
    let disk = SimulatedDisk::with_file(&path("a"), b"0", Broken::No);
    disk.set(&path("b"), b"0");
    write(&disk, &path("a"), 0, b"1", false).unwrap();
    write(&disk, &path("b"), 0, b"1", false).unwrap();
    let states = |cuts: Vec<SimulatedDisk>| -> BTreeSet<_> {
        cuts.iter().map(|cut| ["a", "b"].map(|name| cut.seen(&path(name)).unwrap()[0])).collect()
    };
    let all = BTreeSet::from([*b"00", *b"01", *b"10", *b"11"]);
    assert_eq!(states(disk.power_cuts_all(4)), all);
    assert_eq!(states((0..64).map(|seed| disk.power_cut(seed)).collect()), all);
}

#[test]
fn too_many_states_are_sampled_with_the_oldest_and_the_newest_among_them() {
    let disk = SimulatedDisk::with_file(&path("a"), &sectors(&[0; 40]), Broken::No);
    write(&disk, &path("a"), 0, &sectors(&[1; 40]), false).unwrap();
    let cuts = disk.power_cuts_all(20);
    assert_eq!(cuts.len(), 20);
    assert_eq!(cuts[0].seen(&path("a")).unwrap(), sectors(&[0; 40]));
    assert_eq!(cuts[1].seen(&path("a")).unwrap(), sectors(&[1; 40]));
    let torn: BTreeSet<_> = cuts[2..].iter().map(|cut| cut.seen(&path("a"))).collect();
    assert!(torn.len() > 15, "seeds differ");
    assert_eq!(disk.power_cut(7).seen(&path("a")), disk.power_cut(7).seen(&path("a")), "a seed is a seed");
}

#[test]
fn what_a_crash_left_is_a_disk_of_its_own_without_faults() {
    let disk = SimulatedDisk::with_file(&path("a"), b"old", Broken::No);
    let number = stat(&disk, &path("a")).file;
    disk.arm(0, Fault::Crash);
    for left in [disk.kill(), disk.power_cut(0)] {
        assert_eq!(left.steps(), 0);
        assert_eq!(stat(&left, &path("a")).file, number);
        write(&left, &path("a"), 0, b"new", true).unwrap();
        assert_eq!(after_all(&left, &path("a")), images([b"new"]));
    }
    assert_eq!(disk.clone().seen(&path("a")).unwrap(), b"old");
}

#[test]
fn a_fault_comes_once_or_stays_and_a_short_write_is_half() {
    for (fault, errno, after, then) in [
        (Fault::Once, Errno::Io, "abXX", true),
        (Fault::Forever, Errno::Io, "ab", false),
        (Fault::Once, Errno::NoSpace, "abXX", true),
        (Fault::Forever, Errno::NoSpace, "abXX", false),
        (Fault::Crash, Errno::Io, "abXXXX", false),
    ] {
        let disk = SimulatedDisk::with_file(&path("a"), b"ab", Broken::No);
        let expected = stat(&disk, &path("a"));
        disk.arm_with(0, fault, errno);
        let error = disk.write_at(&path("a"), expected, 2, b"XXXX", true).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(if errno == Errno::NoSpace { libc::ENOSPC } else { libc::EIO }));
        assert_eq!(disk.seen(&path("a")).unwrap(), after.as_bytes(), "{fault:?} {errno:?}");
        assert_eq!(disk.write_new(&path("b"), b"b").is_ok(), then, "{fault:?} {errno:?}");
        assert_eq!(disk.read(&path("a"), 9).is_ok(), then || errno == Errno::NoSpace, "a full disk can be read");
        disk.heal();
        disk.write_new(&path("b"), b"b").unwrap();
    }
}

#[test]
fn a_crash_in_any_step_may_have_done_it_or_not() {
    let created = |at| {
        let disk = SimulatedDisk::with_file(&path("a"), b"old", Broken::No);
        disk.arm(at, Fault::Crash);
        let done = disk.replace(&path("a"), b"new").is_ok();
        (done, after_all(&disk, &path("a")).len(), disk.steps())
    };
    // Made, written, synced: only then renamed.
    assert_eq!([0, 1, 2].map(|at| created(at).1), [1, 1, 1]);
    assert_eq!([3, 4].map(created), [(false, 2, 4), (false, 2, 5)]);
    assert_eq!(created(5), (true, 1, 5));
}

#[test]
fn steps_bytes_and_syncs_are_counted() {
    let disk = SimulatedDisk::new(Broken::No);
    disk.replace(&path("a"), b"four").unwrap();
    assert_eq!((disk.steps(), disk.bytes_written(), disk.syncs(), disk.dir_syncs()), (5, 4, 1, 1));
    let expected = stat(&disk, &path("a"));
    disk.arm(99, Fault::Once);
    disk.write_at(&path("a"), expected, 0, b"xy", false).unwrap();
    disk.write_at(&path("a"), expected, 0, b"xy", true).unwrap();
    disk.list(dir()).unwrap();
    disk.read(&path("a"), 4).unwrap();
    disk.remove(&path("a")).unwrap();
    assert_eq!((disk.steps(), disk.bytes_written(), disk.syncs(), disk.dir_syncs()), (6, 8, 2, 1));
}

#[test]
fn bytes_are_found_wherever_a_crash_may_bring_them_back() {
    let disk = SimulatedDisk::with_file(&path("a"), b"a secret, the secret", Broken::No);
    assert_eq!(disk.scan(b"secret"), 2);
    write(&disk, &path("a"), 2, b"______", false).unwrap();
    assert_eq!(disk.scan(b"secret"), 1 + 2, "seen, and durable");
    disk.write_new(&path("a.tmp"), b"public").unwrap();
    disk.rename(&path("a.tmp"), &path("a")).unwrap();
    assert_eq!(disk.scan(b"secret"), 3, "the old name may come back");
    disk.sync_dir(dir()).unwrap();
    assert_eq!((disk.scan(b"secret"), disk.scan(b"public")), (0, 1));
}

#[test]
fn damage_is_on_the_disk_as_well_as_seen() {
    let disk = SimulatedDisk::with_file(&path("a"), b"abcdef", Broken::No);
    disk.flip(&path("a"), 1, 0x20);
    disk.misdirect(&path("a"), 3, b"XY");
    assert_eq!(disk.seen(&path("a")).unwrap(), b"aBcXYf");
    assert_eq!(after_all(&disk, &path("a")), images([b"aBcXYf"]));
    disk.lose(&path("a"));
    assert_eq!(after_all(&disk, &path("a")), BTreeSet::from([None]));
}

#[test]
#[should_panic(expected = "has no bytes 6 to 7")]
fn damage_that_hits_nothing_is_not_overlooked() {
    SimulatedDisk::with_file(&path("a"), b"abcdef", Broken::No).flip(&path("a"), 6, 1);
}

#[test]
fn every_deliberate_mistake_shows() {
    let replaced = |broken| {
        let disk = SimulatedDisk::with_file(&path("a"), b"old", broken);
        disk.replace(&path("a"), b"new").unwrap();
        after_all(&disk, &path("a")).len()
    };
    assert_eq!(replaced(Broken::No), 1);
    assert!(replaced(Broken::NewFilesAreNotSynced) > 1 && replaced(Broken::RenamesAreLost) > 1);
    let overwritten = |broken| {
        let disk = SimulatedDisk::with_file(&path("a"), b"old", broken);
        write(&disk, &path("a"), 0, b"new", true).unwrap();
        after_all(&disk, &path("a"))
    };
    assert_eq!(overwritten(Broken::No), images([b"new"]));
    assert_eq!(overwritten(Broken::IgnoresOverwrites), images([b"old"]));
    assert_eq!(overwritten(Broken::AppendsAreNotSynced), images([b"old", b"new"]));
    let careless = SimulatedDisk::with_file(&path("a"), b"old", Broken::WritesToAnyFile);
    careless.write_at(&path("a"), Stat { file: 99, len: 99 }, 0, b"new", true).unwrap();
}
