//! Random schedules of several processes, checked against a model.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageseal::Hierarchy;

use crate::child::Process;
use crate::common::Dice;
use crate::model::{Model, Op, Page, Seen, Step};
use crate::worker::{Home, Worker};

const NAMES: [&str; 4] = ["a", "b", "c", "d"];
const ROUNDS: usize = 20;

/// What was done in all schedules.
#[derive(Default, Debug)]
pub struct Tally {
    pub schedules: u64,
    pub operations: u64,
    pub kills: u64,
    pub pages: u64,
    pub violations: u64,
    /// The first violation, with its schedule.
    pub first: Option<String>,
}

/// What is different in a schedule.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    /// Processes are handles of their own, in this process.
    Handles,
    /// Two of them are real.
    Children,
    /// As `Handles`, but the locks keep nobody out: half-way the lock file is removed, and one process begins anew.
    WithoutLocks,
}

enum Actor {
    Handle(Box<Worker>),
    Child(Process),
}

impl Actor {
    fn start(home: &Home, real: bool) -> Self {
        if real { Self::Child(Process::start(home, true)) } else { Self::Handle(Box::new(Worker::new(home, false))) }
    }

    fn call(&mut self, line: &str) -> String {
        match self {
            Self::Handle(worker) => worker.answer(line),
            Self::Child(process) => process.ask(line),
        }
    }

    /// Killed a little later; the answer, if it came before.
    fn call_and_kill(&mut self, line: &str, after: Duration) -> Option<String> {
        let Self::Child(process) = self else { return Some(self.call(line)) };
        process.tell(line);
        std::thread::sleep(after);
        process.kill();
        process.next_if_any()
    }
}

pub fn run(seed: u64, kind: Kind, directory: &Path, tally: &mut Tally) {
    let mut schedule = Schedule::new(seed, kind, directory);
    let outcome = (0..ROUNDS).try_for_each(|round| schedule.round(round, tally)).and_then(|()| schedule.end(tally));
    tally.schedules += 1;
    if let Err(violation) = outcome {
        tally.violations += 1;
        let told = format!("seed {seed}: {violation}\n{}", schedule.log.join("\n"));
        tally.first.get_or_insert(told);
    }
    let home = schedule.home.0.clone();
    drop(schedule);
    let _ = fs::remove_dir_all(home);
}

struct Schedule {
    home: Home,
    kind: Kind,
    dice: Dice,
    actors: Vec<Actor>,
    /// Sees the end of each round, and keeps nothing open.
    auditor: Worker,
    /// All states that explain what was seen so far.
    possible: Vec<Model>,
    log: Vec<String>,
    number: u64,
}

impl Schedule {
    fn new(seed: u64, kind: Kind, directory: &Path) -> Self {
        let mut dice = Dice::new(seed);
        let hierarchy = if dice.below(2) == 0 { Hierarchy::Direct } else { Hierarchy::ClusterKey };
        let home = Home::make(&directory.join(format!("schedule-{seed}")), hierarchy);
        let count = 2 + dice.below(2);
        let actors: Vec<_> = (0..count).map(|at| Actor::start(&home, is_real(kind, at))).collect();
        let auditor = Worker::new(&home, false);
        let log = vec![format!("{hierarchy:?}, {count} processes")];
        Self { home, kind, dice, actors, auditor, possible: vec![Model::new(count)], log, number: 0 }
    }

    fn round(&mut self, round: usize, tally: &mut Tally) -> Result<(), String> {
        if self.kind == Kind::WithoutLocks && round == ROUNDS / 3 {
            fs::remove_file(self.home.cluster().join("lock")).unwrap();
            self.restart(0);
        } else if self.dice.below(8) == 0 {
            let peer = self.dice.below(self.actors.len());
            self.restart(peer);
        }
        // One alone, or all at once.
        let alone = (self.dice.below(2) == 0).then(|| self.dice.below(self.actors.len()));
        let peers: Vec<_> = (0..self.actors.len()).filter(|peer| alone.is_none_or(|alone| alone == *peer)).collect();
        let planned: Vec<_> = peers.into_iter().map(|peer| (peer, self.plan(), self.plan_kill(peer))).collect();
        let steps = self.perform(planned);
        tally.operations += steps.len() as u64;
        tally.kills += steps.iter().filter(|step| step.killed).count() as u64;
        for step in &steps {
            let killed = if step.killed { ", killed" } else { "" };
            self.log.push(format!("{round} process {}: {}{killed} -> {:?}", step.peer, step.op.line(), step.answer));
        }
        for step in steps.iter().filter(|step| step.killed) {
            self.actors[step.peer] = Actor::start(&self.home, is_real(self.kind, step.peer));
        }
        let seen = self.audit()?;
        self.log.push(format!("{round} now: {seen:?}"));
        let mut possible: Vec<Model> = Vec::new();
        for next in self.possible.iter().flat_map(|model| model.after(&steps, &seen)) {
            if !possible.contains(&next) {
                possible.push(next);
            }
        }
        if possible.is_empty() {
            return Err(format!("round {round} cannot be explained; before, {:?}", self.possible[0]));
        }
        self.possible = possible;
        Ok(())
    }

    fn restart(&mut self, peer: usize) {
        self.log.push(format!("process {peer} begins anew"));
        self.actors[peer] = Actor::start(&self.home, is_real(self.kind, peer));
        self.possible.iter_mut().for_each(|model| model.restart(peer));
    }

    fn perform(&mut self, planned: Vec<(usize, Op, Option<Duration>)>) -> Vec<Step> {
        let mut actors: BTreeMap<_, _> = self.actors.iter_mut().enumerate().collect();
        let planned = planned.into_iter().map(|(peer, op, kill)| {
            (peer, op, kill, actors.remove(&peer).expect("each process does one thing at a time"))
        });
        let planned: Vec<_> = planned.collect();
        std::thread::scope(|scope| {
            let running = planned.into_iter().map(|(peer, op, kill, actor)| {
                scope.spawn(move || {
                    let answer = match kill {
                        None => Some(actor.call(&op.line())),
                        Some(after) => actor.call_and_kill(&op.line(), after),
                    };
                    Step { peer, op, answer, killed: kill.is_some() }
                })
            });
            let running: Vec<_> = running.collect();
            running.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    fn plan_kill(&mut self, peer: usize) -> Option<Duration> {
        let kills = is_real(self.kind, peer) && self.dice.below(6) == 0;
        kills.then(|| Duration::from_micros(self.dice.below(4_000) as u64))
    }

    fn plan(&mut self) -> Op {
        let dice = &mut self.dice;
        let there: Vec<_> = self.possible[0].databases.keys().cloned().collect();
        let other = NAMES[dice.below(NAMES.len())].to_owned();
        // Mostly one that is there.
        let one =
            if there.is_empty() || dice.below(6) == 0 { other.clone() } else { there[dice.below(there.len())].clone() };
        self.number += 1;
        let number = self.number;
        let database = self.possible[0].databases.get(&one).cloned();
        let newest = database.as_ref().map_or(1, |database| database.newest);
        match dice.below(20) {
            0..=3 => Op::Create(other),
            4 if one != other => Op::Rename(one, other),
            5 | 6 => Op::Drop(one),
            7 | 8 => Op::Rotate(one),
            9 => Op::Destroy(one, 1 + dice.below(newest as usize) as u32),
            10 => Op::Release(one, 1 + dice.below(newest as usize) as u32),
            11 | 12 => Op::Seal { name: one, number, held: false },
            13 => Op::Seal { name: one, number, held: true },
            14 | 15 => match database.filter(|database| !database.pages.is_empty()) {
                Some(database) => {
                    let page = database.pages[dice.below(database.pages.len())].clone();
                    Op::Unseal { name: one, page }
                }
                None => Op::Seal { name: one, number, held: false },
            },
            16 => Op::Close(one),
            17 => Op::Replace,
            18 => Op::Hierarchy(if dice.below(2) == 0 { "direct" } else { "cluster" }),
            _ => Op::Maintain,
        }
    }

    /// What there is, as a process sees it that has nothing open.
    fn audit(&mut self) -> Result<Seen, String> {
        seen_by(|line| self.auditor.answer(line))
    }

    /// Every process sees the same, opens every database and every page; and the keystore is whole.
    fn end(&mut self, tally: &mut Tally) -> Result<(), String> {
        let expected = self.audit()?;
        let databases: Vec<_> = self.possible[0].databases.clone().into_iter().collect();
        for (at, actor) in self.actors.iter_mut().enumerate() {
            let seen = seen_by(|line| actor.call(line))?;
            if seen != expected {
                return Err(format!("at the end process {at} sees {seen:?}, not {expected:?}"));
            }
            for (name, database) in &databases {
                for page in &database.pages {
                    tally.pages += 1;
                    let answer = actor.call(&Op::Unseal { name: name.clone(), page: page.clone() }.line());
                    // In another explanation of what happened, the engine may have given it up.
                    let kept = self.possible.iter().all(|model| keeps(model, name, page));
                    if answer != "ok" && kept {
                        return Err(format!("at the end process {at} cannot open {page:?}: {answer}"));
                    }
                }
            }
        }
        self.actors.clear();
        verify(&self.home)
    }
}

fn is_real(kind: Kind, peer: usize) -> bool {
    kind == Kind::Children && peer > 0
}

fn keeps(model: &Model, name: &str, page: &Page) -> bool {
    let database = model.databases.get(name);
    database.is_some_and(|database| database.pages.contains(page) && !database.destroyed.contains(&page.generation))
}

fn seen_by(mut call: impl FnMut(&str) -> String) -> Result<Seen, String> {
    let listed = call("list");
    let names = listed.strip_prefix("ok").ok_or_else(|| format!("listing: {listed}"))?.trim_start();
    let mut seen = Seen::new();
    for name in names.split(',').filter(|name| !name.is_empty()) {
        let looked = call(&format!("look {name}"));
        let words: Vec<_> = looked.split(' ').collect();
        match words[..] {
            ["ok", id, newest] => seen.insert(name.to_owned(), (id.to_owned(), newest.parse().unwrap())),
            _ => return Err(format!("{name} is listed and does not open: {looked}")),
        };
    }
    let mut ids: Vec<_> = seen.values().map(|(id, _)| id).collect();
    ids.sort_unstable();
    ids.dedup();
    if ids.len() == seen.len() { Ok(seen) } else { Err(format!("one database has two names: {seen:?}")) }
}

/// Both files verify, after whatever a killed process left was put right, and are the same.
pub fn verify(home: &Home) -> Result<(), String> {
    let mut last = Worker::new(home, false);
    for (line, expected) in [("maintain", "ok"), ("findings", "ok")] {
        let answer = last.answer(line);
        if answer != expected {
            return Err(format!("at the end, {line}: {answer}"));
        }
    }
    let copies = ["keystore", "keystore.copy"].map(|name| fs::read(home.cluster().join(name)).unwrap());
    if copies[0] != copies[1] {
        return Err("at the end the copies differ".to_owned());
    }
    let names: Vec<_> = fs::read_dir(home.cluster()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    match names.iter().find(|name| name.to_string_lossy().starts_with("keystore.damaged")) {
        Some(name) => Err(format!("something was taken for damage: {}", name.display())),
        None => Ok(()),
    }
}

/// A directory in memory, where a sync costs nothing; else a temporary one.
pub fn fast_directory() -> PathBuf {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    parent.join(format!("pageseal-processes-{}", std::process::id()))
}
