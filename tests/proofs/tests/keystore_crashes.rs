//! No crash and no failing disk loses a key. The keystore lies on a simulated disk; the machine stops at every step of every
//! change, and again at every step of the recovery; every call to the disk fails, once and for ever; every byte and every
//! length of the files is damaged. Afterwards the change is there or it is not, what was acknowledged is, and the cluster
//! goes on working.

#[path = "keystore_crashes/cases.rs"]
mod cases;
mod common;
#[path = "keystore_crashes/damage.rs"]
mod damage;
#[path = "keystore_crashes/trials.rs"]
mod trials;
#[path = "keystore_crashes/world.rs"]
mod world;

use std::sync::atomic::{AtomicUsize, Ordering};

use pageseal::Hierarchy;
use pageseal::testing::{Broken, SimulatedDisk};
use pageseal_proofs::score;

use cases::{Base, Case, SCRIPTS, Script};
use common::Dice;
use damage::{Counts, Whole, both_copies, both_short, one_copy};
use trials::{Tally, crash_everywhere, fail_everywhere, seal_after_failures};
use world::{Act, COPIES, Handles, World};

const SEED: u64 = 0x5ea1;

/// Runs `trial` for each of the scripts, on two threads.
fn for_each_script(broken: Broken, scripts: &[Script], trial: impl Fn(&Case, &mut Dice, &mut Tally) + Sync) -> Tally {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut tally = Tally::default();
        while let Some(script) = scripts.get(next.fetch_add(1, Ordering::Relaxed)) {
            let case = Case::new(script, broken);
            trial(&case, &mut Dice::new(SEED), &mut tally);
        }
        tally
    };
    std::thread::scope(|scope| {
        let threads = [scope.spawn(work), scope.spawn(work)];
        threads.into_iter().map(|thread| thread.join().unwrap()).fold(Tally::default(), Tally::and)
    })
}

#[test]
fn no_crash_loses_an_acknowledged_key_or_leaves_half_a_change() {
    let tally = for_each_script(Broken::No, SCRIPTS, crash_everywhere);
    let control = [Broken::AppendsAreNotSynced, Broken::NewFilesAreNotSynced, Broken::RenamesAreLost]
        .map(|broken| for_each_script(broken, &SCRIPTS[..3], crash_everywhere).lost);
    println!("lost with broken disks: {control:?}");
    let control = u8::from(control.iter().all(|lost| *lost > 0));
    let Tally { tried, lost, panics, .. } = tally;
    score(&format!("keystore-crash-points tried={tried} keys_lost={lost} panics={panics} control={control}"));
    tally.expect_nothing_lost();
    assert!(tried >= 20_000 && control == 1, "{tried} tried");
}

#[test]
fn a_failing_disk_loses_nothing_and_the_handle_goes_on_when_it_works_again() {
    let tally = for_each_script(Broken::No, SCRIPTS, fail_everywhere);
    let broken = for_each_script(Broken::AppendsAreNotSynced, &SCRIPTS[..3], fail_everywhere);
    let control = u8::from(broken.lost > 0);
    let Tally { tried, lost, panics, .. } = tally;
    score(&format!("keystore-io-faults tried={tried} keys_lost={lost} panics={panics} control={control}"));
    tally.expect_nothing_lost();
    assert!(tried > 1_000 && control == 1, "{tried} tried");
}

#[test]
fn nothing_is_sealed_under_a_key_that_is_not_durable() {
    let rotations = || SCRIPTS.iter().filter(|script| matches!(script.acts[0], Act::Rotate(_)));
    let mut tally = Tally::default();
    for script in rotations() {
        seal_after_failures(&Case::new(script, Broken::No), &mut Dice::new(SEED), &mut tally);
    }
    tally.expect_nothing_lost();
    assert!(tally.tried > 100);
}

const OPENED: Script = Script { base: Base::Some, hierarchy: Hierarchy::ClusterKey, acts: &[Act::Open] };

/// Damages every `threads`th byte, and ends the files there.
fn damage_every(from: usize, threads: usize) -> Counts {
    let case = Case::new(&OPENED, Broken::No);
    let whole = Whole::of(&case);
    let mut counts = Counts::default();
    let copies = COPIES.map(|name| case.world.path(name));
    for (copy, path) in copies.iter().enumerate() {
        let what = format!("copy {copy} cannot be read");
        one_copy(&case, &whole, &what, &mut counts, |disk| disk.fail_reads(path));
    }
    for at in (from..whole.bytes.len()).step_by(threads) {
        for (copy, xor) in [(0, 1), (0, 0xff), (1, 0x10)] {
            let what = format!("byte {at} of copy {copy} by {xor:#x}");
            one_copy(&case, &whole, &what, &mut counts, |disk| disk.flip(&copies[copy], at, xor));
        }
        both_copies(&case, &whole, at, 1, &mut counts);
        for (copy, path) in copies.iter().enumerate() {
            let what = format!("copy {copy} ends at {at}");
            one_copy(&case, &whole, &what, &mut counts, |disk| disk.set(path, &whole.bytes[..at]));
        }
        both_short(&case, &whole, at, &mut counts);
    }
    counts
}

#[test]
fn no_damage_is_believed_and_what_one_copy_still_has_is_not_lost() {
    let counts = std::thread::scope(|scope| {
        let threads = [0, 1].map(|from| scope.spawn(move || damage_every(from, 2)));
        threads.into_iter().map(|thread| thread.join().unwrap()).fold(Counts::default(), Counts::and)
    });
    let control = u8::from(a_damage_of_both_copies_is_noticed());
    let Counts { tally, refused, repaired } = counts;
    let (tried, panics) = (tally.tried, tally.panics);
    let figures = format!("tried={tried} refused={refused} repaired={repaired} panics={panics} control={control}");
    score(&format!("keystore-flips {figures}"));
    tally.expect_nothing_lost();
    assert!(control == 1 && refused > 0 && repaired > 0);
}

/// The control: what holds for one copy does not for both.
fn a_damage_of_both_copies_is_noticed() -> bool {
    let case = Case::new(&OPENED, Broken::No);
    let whole = Whole::of(&case);
    let mut counts = Counts::default();
    for at in 0..64 {
        let damage = |disk: &SimulatedDisk| COPIES.iter().for_each(|name| disk.flip(&case.world.path(name), at, 1));
        one_copy(&case, &whole, "both", &mut counts, damage);
    }
    counts.tally.lost == 64
}

#[test]
fn a_new_database_costs_two_syncs_and_a_new_name_one() {
    for hierarchy in [Hierarchy::Direct, Hierarchy::ClusterKey] {
        let (world, disk) = (World::new(hierarchy), SimulatedDisk::new(Broken::No));
        let mut handles = Handles::default();
        world.act(Act::CreateCluster, &disk, &mut handles).unwrap();
        let mut syncs_of = |act| {
            let before = (disk.syncs(), disk.dir_syncs());
            world.act(act, &disk, &mut handles).unwrap();
            (disk.syncs() - before.0, disk.dir_syncs() - before.1)
        };
        assert_eq!(syncs_of(Act::Create("one")), (2, 0));
        assert_eq!(syncs_of(Act::Rename("one", "two")), (1, 0));
        assert_eq!(syncs_of(Act::Rotate("two")), (2, 0));
        assert_eq!(syncs_of(Act::Cipher("two")), (2, 0));
        assert_eq!(syncs_of(Act::Create("one")), (2, 0));
    }
}
