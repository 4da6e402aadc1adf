//! What happens to a script: crashes, twice, and a disk that fails.

use std::panic::{AssertUnwindSafe, catch_unwind};

use pageseal::testing::{Errno, Fault, SimulatedDisk};
use pageseal::{Cluster, Error};

use crate::cases::Case;
use crate::common::Dice;
use crate::world::{Act, Handles, Sealed, State};

/// So many power cuts are tried after one crash, if there are no fewer.
const CUTS: usize = 9;
/// One in so many recoveries is interrupted itself, at each of its steps.
const TWICE: usize = 24;
/// After one in so many trials another change is made.
const LASTING: usize = 4;

#[derive(Default)]
pub struct Tally {
    pub tried: u64,
    pub lost: u64,
    pub panics: u64,
    /// The first failures, in words.
    told: Vec<String>,
}

impl Tally {
    pub fn and(mut self, other: Self) -> Self {
        self.told.extend(other.told);
        Self {
            tried: self.tried + other.tried,
            lost: self.lost + other.lost,
            panics: self.panics + other.panics,
            told: self.told,
        }
    }

    pub fn expect_nothing_lost(&self) {
        assert!(self.lost == 0 && self.panics == 0, "{} lost: {:#?}", self.lost, self.told);
    }

    /// Counts one trial: `Err` says what is wrong.
    pub fn count(&mut self, what: &str, trial: impl FnOnce() -> Result<(), String>) {
        self.tried += 1;
        let failure = match catch_unwind(AssertUnwindSafe(trial)) {
            Ok(Ok(())) => return,
            Ok(Err(failure)) => {
                self.lost += 1;
                failure
            }
            Err(_) => {
                self.panics += 1;
                "it panicked".to_owned()
            }
        };
        if self.told.len() < 8 {
            self.told.push(format!("{what}: {failure}"));
        }
    }
}

/// How far a script came before the machine stopped or the disk failed.
#[derive(Clone)]
struct Progress {
    acknowledged: usize,
    /// Sealed since the script began, under keys that were acknowledged.
    sealed: Vec<Sealed>,
}

/// Does the acts up to the first failure.
fn run(case: &Case, disk: &SimulatedDisk, handles: &mut Handles) -> (Progress, Option<Error>) {
    let mut progress = Progress { acknowledged: 0, sealed: Vec::new() };
    for &act in case.acts {
        if let Err(error) = case.world.act(act, disk, handles) {
            return (progress, Some(error));
        }
        progress.acknowledged += 1;
        if matches!(act, Act::Drop(_) | Act::Destroy(..)) {
            progress.sealed.clear();
        }
        progress.sealed.extend(handles.seal());
    }
    (progress, None)
}

/// Stops the machine at every step of the script.
pub fn crash_everywhere(case: &Case, dice: &mut Dice, tally: &mut Tally) {
    for step in 0.. {
        let disk = case.start();
        let mut handles = case.handles(&disk);
        disk.arm(step, Fault::Crash);
        let (progress, _) = run(case, &disk, &mut handles);
        let mark = case.world.mark();
        drop(handles);
        let what = format!("{:?}, stopped at step {step}", case.acts);
        if progress.acknowledged > 0 {
            tally.count(&what, || old_wrappings_are_gone(case, &disk, &progress));
        }
        for (cut, marks) in images(&disk, dice, mark) {
            for mark in marks {
                let lasting = dice.below(LASTING) == 0;
                tally.count(&what, || recovers(case, &cut.kill(), mark.as_deref(), &progress, lasting));
                if dice.below(TWICE) == 0 {
                    crash_again(case, &cut, mark.as_deref(), &progress, dice, tally);
                }
            }
        }
        if disk.steps() <= step {
            return;
        }
    }
}

/// What an acknowledged act takes away is in no file any more, nor in one that a power cut would bring back.
fn old_wrappings_are_gone(case: &Case, disk: &SimulatedDisk, progress: &Progress) -> Result<(), String> {
    let gone = case.gone.iter().take(progress.acknowledged).flatten();
    match gone.map(|blob| disk.scan(blob)).sum() {
        0 => Ok(()),
        left => Err(format!("{left} wrappings that were taken away are still on the disk")),
    }
}

type Mark = Option<Vec<u8>>;

/// What may be found after the crash: the disk, and the mark in the lock file, which may or may not survive a power cut.
fn images(disk: &SimulatedDisk, dice: &mut Dice, mark: Mark) -> Vec<(SimulatedDisk, Vec<Mark>)> {
    let cuts = disk.power_cuts_all(CUTS).into_iter().chain([disk.power_cut(dice.next())]);
    let marks = if mark.is_some() { vec![None, mark.clone()] } else { vec![None] };
    let mut images: Vec<_> = cuts.map(|cut| (cut, marks.clone())).collect();
    images.push((disk.kill(), vec![mark]));
    images
}

/// Stops the machine at every step of the recovery, too.
fn crash_again(
    case: &Case,
    found: &SimulatedDisk,
    mark: Option<&[u8]>,
    before: &Progress,
    dice: &mut Dice,
    tally: &mut Tally,
) {
    for step in 0.. {
        let disk = found.kill();
        case.world.set_mark(mark);
        disk.arm(step, Fault::Crash);
        let recovered = catch_unwind(AssertUnwindSafe(|| drop(case.world.open(&disk))));
        let mark = case.world.mark();
        let what = format!("{:?}, and its recovery at step {step}", case.acts);
        let survives = dice.below(2) == 0;
        tally.count(&what, || {
            recovered.map_err(|_| "opening panicked".to_owned())?;
            recovers(case, &disk.power_cut(dice.next()), mark.as_deref().filter(|_| survives), before, true)
        });
        tally.count(&what, || recovers(case, &disk.kill(), mark.as_deref(), before, false));
        if disk.steps() <= step {
            return;
        }
    }
}

/// Opens what a crash left: the state is one of two, everything acknowledged is there, and, if `lasting` is to be tried,
/// another change works and lasts.
fn recovers(
    case: &Case,
    disk: &SimulatedDisk,
    mark: Option<&[u8]>,
    progress: &Progress,
    lasting: bool,
) -> Result<(), String> {
    case.world.set_mark(mark);
    let cluster = match case.world.open(disk) {
        Ok(cluster) => cluster,
        Err(error) if case.states[progress.acknowledged].is_none() => return starts_anew(case, disk, &error),
        Err(error) => return Err(format!("it does not open: {error}")),
    };
    let opened_by = case.opened_by(disk);
    let seen = case.world.look(disk, &cluster).map_err(|error| format!("it opens, but: {error}"))?;
    let seen = State { opened_by, ..seen };
    is_allowed(case, progress, &seen, &cluster)?;
    if lasting { goes_on(case, disk, &cluster, seen) } else { Ok(()) }
}

/// Where there was no cluster that opens, the script can be done again from its beginning.
fn starts_anew(case: &Case, disk: &SimulatedDisk, why: &Error) -> Result<(), String> {
    let mut handles = Handles::default();
    case.world.act(case.acts[0], disk, &mut handles).map_err(|error| format!("after {why}: {error}"))
}

/// It is as after the last act that was acknowledged, or as after the next one.
fn is_allowed(case: &Case, progress: &Progress, seen: &State, cluster: &Cluster) -> Result<(), String> {
    let acknowledged = progress.acknowledged;
    let (before, after) = (&case.states[acknowledged], case.states.get(acknowledged + 1));
    let is = |state: &Option<State>| state.as_ref() == Some(seen);
    if !is(before) && !after.is_some_and(is) {
        return Err(format!("after {acknowledged} acts it is {seen:?}, not {before:?} or {after:?}"));
    }
    let dropped = !is(before) && matches!(case.acts[acknowledged], Act::Drop(_));
    let missing = progress.sealed.iter().filter(|page| !opens_anywhere(page, cluster)).count();
    if missing > 0 && !dropped {
        return Err(format!("{missing} pages that were sealed before do not open"));
    }
    Ok(())
}

fn opens_anywhere(page: &Sealed, cluster: &Cluster) -> bool {
    let names = cluster.databases().unwrap_or_default();
    let mut ciphers = names.iter().filter_map(|name| cluster.database(name).ok()?.cipher().ok());
    ciphers.any(|cipher| page.opens(&cipher))
}

/// Another change works, and lasts.
pub fn goes_on(case: &Case, disk: &SimulatedDisk, cluster: &Cluster, seen: State) -> Result<(), String> {
    cluster.create_database("later").map_err(|error| format!("nothing can be changed any more: {error}"))?;
    let mut expected = seen;
    expected.databases.values_mut().for_each(|shown| shown.noted = true);
    expected.databases.insert("later".into(), crate::world::Shown { generation: 1, noted: false, opens: Vec::new() });
    let oldest = disk.power_cuts_all(2).swap_remove(0);
    case.world.set_mark(None);
    let cluster =
        case.world.open(&oldest).map_err(|error| format!("after another change it does not open: {error}"))?;
    let later = case.world.look(&oldest, &cluster).map_err(|error| format!("after another change: {error}"))?;
    let later = State { opened_by: expected.opened_by, ..later };
    if later == expected { Ok(()) } else { Err(format!("after another change it is {later:?}, not {expected:?}")) }
}

/// Lets every call to the disk fail, once and for ever, with both errors.
pub fn fail_everywhere(case: &Case, dice: &mut Dice, tally: &mut Tally) {
    for (fault, errno) in [
        (Fault::Once, Errno::Io),
        (Fault::Once, Errno::NoSpace),
        (Fault::Forever, Errno::Io),
        (Fault::Forever, Errno::NoSpace),
    ] {
        for step in 0.. {
            let disk = case.start();
            let mut handles = case.handles(&disk);
            disk.arm_with(step, fault, errno);
            let lasting = dice.below(LASTING) == 0;
            let what = format!("{:?}, {errno:?} {fault:?} at step {step}", case.acts);
            tally.count(&what, || {
                let (progress, failed) = run(case, &disk, &mut handles);
                heals(case, &disk, handles, progress, failed, lasting)
            });
            if disk.steps() <= step {
                break;
            }
        }
    }
}

/// When the disk works again, the same handle does, and what it shows is what another process finds.
fn heals(
    case: &Case,
    disk: &SimulatedDisk,
    handles: Handles,
    progress: Progress,
    failed: Option<Error>,
    lasting: bool,
) -> Result<(), String> {
    disk.heal();
    let Some(cluster) = &handles.cluster else {
        return recovers(case, disk, case.world.mark().as_deref(), &progress, true);
    };
    let opened_by = case.opened_by(disk);
    let seen = case.world.look(disk, cluster);
    let seen = seen.map_err(|error| format!("after {failed:?} the handle does not work: {error}"))?;
    let seen = State { opened_by, ..seen };
    is_allowed(case, &progress, &seen, cluster)?;
    let again = handles.seal();
    if !again.iter().all(|page| opens_anywhere(page, cluster)) {
        return Err("what is sealed now does not open".to_owned());
    }
    if lasting { goes_on(case, disk, cluster, seen) } else { Ok(()) }
}

/// Nothing is sealed under a key that a power cut would take: not by the process whose change failed, not by another one
/// that saw it, and not by one that opens the cluster while nothing can be written.
pub fn seal_after_failures(case: &Case, dice: &mut Dice, tally: &mut Tally) {
    for step in 0.. {
        let disk = case.start();
        let mut handles = case.handles(&disk);
        let other = case.handles(&disk);
        let fault = if dice.below(2) == 0 { Fault::Crash } else { Fault::Once };
        disk.arm(step, fault);
        let (mut progress, _) = run(case, &disk, &mut handles);
        let stopped = disk.steps() > step;
        let what = format!("{:?}, {fault:?} at step {step}", case.acts);
        disk.heal();
        let mark = case.world.mark();
        let found = disk.kill();
        progress.sealed.extend(seal_once_more(&other));
        tally.count(&format!("{what}, and another process seals"), || all_last(case, &disk, &progress.sealed));
        progress.sealed.extend(seal_once_more(&handles));
        tally.count(&format!("{what}, and the same process seals"), || all_last(case, &disk, &progress.sealed));
        drop((handles, other));
        for failing in 0..4 {
            let disk = found.kill();
            case.world.set_mark(mark.as_deref());
            disk.arm_with(failing, Fault::Forever, Errno::NoSpace);
            let sealed = case.world.open(&disk).map(|cluster| seal_with(&cluster)).unwrap_or_default();
            tally.count(&format!("{what}, and a new process seals"), || all_last(case, &disk, &sealed));
        }
        if !stopped {
            return;
        }
    }
}

/// Pages that a process seals after it has looked what others did.
fn seal_once_more(handles: &Handles) -> Vec<Sealed> {
    handles.cluster.as_ref().map(seal_with).unwrap_or_default()
}

/// A page by each database whose use is noted, without a change of the keystore.
fn seal_with(cluster: &Cluster) -> Vec<Sealed> {
    let noted = ["one", "two"].into_iter().filter_map(|name| cluster.database(name).ok()?.cipher().ok());
    noted.filter_map(|cipher| Sealed::new(&cipher)).collect()
}

/// All these pages open after the power cut that leaves the least.
fn all_last(case: &Case, disk: &SimulatedDisk, sealed: &[Sealed]) -> Result<(), String> {
    let oldest = disk.power_cuts_all(2).swap_remove(0);
    let mark = case.world.mark();
    case.world.set_mark(None);
    let cluster = case.world.open(&oldest).map_err(|error| format!("it does not open: {error}"))?;
    let lost = sealed.iter().filter(|page| !opens_anywhere(page, &cluster)).count();
    drop(cluster);
    case.world.set_mark(mark.as_deref());
    if lost == 0 {
        Ok(())
    } else {
        Err(format!("{lost} of {} pages were sealed under a key that is lost", sealed.len()))
    }
}
