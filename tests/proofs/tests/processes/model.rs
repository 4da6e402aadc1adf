//! What a cluster must answer, and what must be true afterwards: every answer of a round must be explained by the
//! operations happening one after the other, in some order.

use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, PartialEq, Debug)]
pub enum Op {
    Create(String),
    Rename(String, String),
    Drop(String),
    Rotate(String),
    Destroy(String, u32),
    /// Says that nothing needs older generations than this.
    Release(String, u32),
    Seal {
        name: String,
        number: u64,
        held: bool,
    },
    Unseal {
        name: String,
        page: Page,
    },
    Close(String),
    Replace,
    Hierarchy(&'static str),
    Maintain,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Page {
    pub database: String,
    pub number: u64,
    pub generation: u32,
    pub bytes: String,
}

impl Op {
    pub fn line(&self) -> String {
        match self {
            Self::Create(name) => format!("create {name}"),
            Self::Rename(from, to) => format!("rename {from} {to}"),
            Self::Drop(name) => format!("drop {name}"),
            Self::Rotate(name) => format!("rotate {name}"),
            Self::Destroy(name, generation) => format!("destroy {name} {generation}"),
            Self::Release(name, below) => format!("release {name} {below}"),
            Self::Seal { name, number, held: false } => format!("seal {name} {number}"),
            Self::Seal { name, number, held: true } => format!("seal-held {name} {number}"),
            Self::Unseal { name, page: Page { database, number, bytes, .. } } => {
                format!("unseal {name} {database} {number} {bytes}")
            }
            Self::Close(name) => format!("close {name}"),
            Self::Replace => "replace".to_owned(),
            Self::Hierarchy(to) => format!("hierarchy {to}"),
            Self::Maintain => "maintain".to_owned(),
        }
    }

    fn opens(&self) -> bool {
        use Op::*;
        matches!(self, Create(_) | Rotate(_) | Destroy(..) | Release(..) | Seal { .. } | Unseal { .. } | Maintain)
    }

    /// Whether it takes generations for a moment, which others find locked meanwhile.
    fn takes(&self) -> bool {
        matches!(self, Self::Drop(_) | Self::Destroy(..) | Self::Release(..))
    }

    fn moves(&self) -> bool {
        matches!(self, Self::Replace | Self::Hierarchy(_) | Self::Maintain)
    }
}

/// One operation of a round: who, what, and the answer; none if the process was killed before it gave one.
pub struct Step {
    pub peer: usize,
    pub op: Op,
    pub answer: Option<String>,
    pub killed: bool,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Database {
    pub id: String,
    pub newest: u32,
    /// Ciphers were given out from this generation on.
    pub noted: Option<u32>,
    pub destroyed: BTreeSet<u32>,
    pub pages: Vec<Page>,
}

/// What a process has open, by the name under which it opened it: the id, and the generation that it seals under.
type Open = BTreeMap<String, (String, u32)>;

#[derive(Clone, PartialEq, Debug)]
pub struct Model {
    pub databases: BTreeMap<String, Database>,
    open: Vec<Open>,
}

/// Names, with id and newest generation.
pub type Seen = BTreeMap<String, (String, u32)>;

impl Model {
    pub fn new(peers: usize) -> Self {
        Self { databases: BTreeMap::new(), open: vec![Open::new(); peers] }
    }

    pub fn restart(&mut self, peer: usize) {
        self.open[peer].clear();
    }

    /// All states that explain the answers and what was seen after the round.
    pub fn after(&self, round: &[Step], seen: &Seen) -> Vec<Self> {
        let mut possible = Vec::new();
        self.explain(round, &mut vec![false; round.len()], seen, &mut possible);
        possible
    }

    fn explain(&self, round: &[Step], done: &mut Vec<bool>, seen: &Seen, possible: &mut Vec<Self>) {
        if done.iter().all(|done| *done) {
            let mut end = self.clone();
            round.iter().filter(|step| step.killed).for_each(|step| end.restart(step.peer));
            if end.shows() == *seen && !possible.contains(&end) {
                possible.push(end);
            }
            return;
        }
        for at in 0..round.len() {
            if done[at] {
                continue;
            }
            done[at] = true;
            let others: Vec<_> = round.iter().filter(|other| other.peer != round[at].peer).collect();
            for next in self.step(&round[at], &others, seen) {
                next.explain(round, done, seen, possible);
            }
            done[at] = false;
        }
    }

    /// The state if the process came as far as to note that a cipher was given out.
    fn with_note(&self, op: &Op) -> Option<Self> {
        let (Op::Seal { name, .. } | Op::Unseal { name, .. }) = op else { return None };
        let mut next = self.clone();
        let database = next.databases.get_mut(name)?;
        database.noted = database.noted.or(Some(database.newest));
        Some(next)
    }

    fn shows(&self) -> Seen {
        self.databases.iter().map(|(name, database)| (name.clone(), (database.id.clone(), database.newest))).collect()
    }

    fn step(&self, step: &Step, others: &[&Step], seen: &Seen) -> Vec<Self> {
        let Some(answer) = &step.answer else {
            // Done or not, or half-way, nobody knows.
            let done = self.apply(step.peer, &step.op, &self.success(&step.op, seen), others);
            return [Some(self.clone()), done, self.with_note(&step.op)].into_iter().flatten().collect();
        };
        self.apply(step.peer, &step.op, answer, others).into_iter().collect()
    }

    /// The answer that a killed process would have given if it had come to the end.
    fn success(&self, op: &Op, seen: &Seen) -> String {
        match op {
            Op::Create(name) => format!("ok {}", seen.get(name).map_or("", |(id, _)| id)),
            Op::Drop(name) => format!("ok {}", self.databases.get(name).map_or("", |database| &database.id)),
            Op::Rotate(name) => format!("ok {}", self.databases.get(name).map_or(0, |database| database.newest) + 1),
            // What it sealed is lost with it.
            Op::Seal { .. } => "lost".to_owned(),
            _ => "ok".to_owned(),
        }
    }

    /// The state after the operation, if this may be its answer.
    fn apply(&self, peer: usize, op: &Op, answer: &str, others: &[&Step]) -> Option<Self> {
        let mut next = self.clone();
        let words: Vec<_> = answer.split(' ').collect();
        let told = if words[0] == "ok" { "ok" } else { words.get(1).copied().unwrap_or_default() };
        next.judge(peer, op, told, &words, others).then_some(next)
    }

    fn judge(&mut self, peer: usize, op: &Op, told: &str, words: &[&str], others: &[&Step]) -> bool {
        let refused = told == "InUse" && others.iter().any(|other| other.op.takes());
        if let (true, Op::Rotate(name) | Op::Seal { name, held: false, .. } | Op::Unseal { name, .. }) = (refused, op) {
            // For a moment, because another process takes a generation: nothing happened.
            self.open[peer].remove(name);
            return true;
        }
        match op {
            Op::Create(name) => match self.databases.contains_key(name) {
                true => told == "AlreadyExists",
                false => told == "ok" && words.len() > 1 && self.create(peer, name, words[1]),
            },
            Op::Rename(from, to) => match (self.databases.contains_key(from), self.databases.contains_key(to)) {
                (false, _) => told == "NotFound",
                (true, true) => told == "AlreadyExists",
                (true, false) => {
                    let moved = self.databases.remove(from);
                    self.databases.extend(moved.map(|database| (to.clone(), database)));
                    told == "ok"
                }
            },
            Op::Drop(name) => self.judge_drop(peer, name, told, words, others),
            Op::Rotate(name) => {
                let Some(open) = self.opened(peer, name) else { return told == "NotFound" };
                open.newest += 1;
                let newest = open.newest;
                self.follow(peer);
                told == "ok" && words[1] == newest.to_string()
            }
            Op::Destroy(name, generation) => self.judge_destroy(peer, name, *generation, told, others),
            Op::Release(name, below) => self.judge_release(peer, name, *below, told, others),
            Op::Seal { name, held: false, .. } => {
                let Some(open) = self.opened(peer, name) else { return told == "NotFound" };
                let newest = open.newest;
                told == "ok" && self.seal(op, name, newest..=newest, words)
            }
            Op::Seal { name, held: true, .. } => self.judge_held(peer, op, name, told, words),
            Op::Unseal { name, page } => {
                let Some(open) = self.opened(peer, name) else { return told == "NotFound" };
                if open.id != page.database {
                    return told == "Another";
                }
                open.noted = open.noted.or(Some(open.newest));
                let expected = if open.destroyed.contains(&page.generation) { "UnknownGeneration" } else { "ok" };
                told == expected
            }
            Op::Close(name) => {
                self.open[peer].remove(name);
                told == "ok"
            }
            Op::Replace | Op::Hierarchy(_) | Op::Maintain => {
                if matches!(op, Op::Maintain) {
                    self.follow(peer);
                }
                told == "ok" || (told == "InUse" && others.iter().any(|other| other.op.moves()))
            }
        }
    }

    fn create(&mut self, peer: usize, name: &str, id: &str) -> bool {
        let fresh = self.databases.values().all(|other| other.id != id);
        let database =
            Database { id: id.to_owned(), newest: 1, noted: None, destroyed: BTreeSet::new(), pages: Vec::new() };
        self.databases.insert(name.to_owned(), database);
        self.open[peer].insert(name.to_owned(), (id.to_owned(), 1));
        fresh && !id.is_empty()
    }

    /// The process looks: all that it has open follows.
    fn follow(&mut self, peer: usize) {
        for (id, generation) in self.open[peer].values_mut() {
            if let Some(database) = self.databases.values().find(|database| database.id == *id) {
                *generation = database.newest;
            }
        }
    }

    /// The process opens the database, and follows the others; or finds that it is not there, and that is all.
    fn opened(&mut self, peer: usize, name: &str) -> Option<&mut Database> {
        if self.databases.contains_key(name) {
            self.follow(peer);
        }
        match self.databases.get_mut(name) {
            Some(database) => {
                self.open[peer].insert(name.to_owned(), (database.id.clone(), database.newest));
                Some(database)
            }
            None => {
                self.open[peer].remove(name);
                None
            }
        }
    }

    /// The generations that other processes hold of a database: for sure, and perhaps. One that is killed in this round
    /// holds nothing from some moment on; one that does something with its databases first follows the others, and so may
    /// have let go of an older one before anything else of what it does has happened.
    fn held(&self, peer: usize, id: &str, others: &[&Step]) -> (Vec<u32>, Vec<u32>) {
        let moves = |other: &&Step| other.killed || other.op.opens();
        let unsure = |peer| others.iter().any(|other| other.peer == peer && moves(other));
        let open = self.open.iter().enumerate().filter(|(other, _)| *other != peer);
        let held = open.flat_map(|(other, open)| open.values().map(move |open| (other, open)));
        let held: Vec<_> = held.filter(|(_, open)| open.0 == id).map(|(other, open)| (unsure(other), open.1)).collect();
        let sure = held.iter().filter(|(unsure, _)| !unsure).map(|(_, generation)| *generation).collect();
        (sure, held.iter().map(|(_, generation)| *generation).collect())
    }

    fn judge_drop(&mut self, peer: usize, name: &str, told: &str, words: &[&str], others: &[&Step]) -> bool {
        let Some(id) = self.databases.get(name).map(|database| database.id.clone()) else { return told == "NotFound" };
        let (sure, perhaps) = self.held(peer, &id, others);
        if told == "InUse" {
            return !perhaps.is_empty()
                || others.iter().any(|other| other.op.opens() || other.op.takes() || matches!(other.op, Op::Close(_)));
        }
        self.databases.remove(name);
        told == "ok" && words[1] == id && sure.is_empty()
    }

    fn judge_destroy(&mut self, peer: usize, name: &str, generation: u32, told: &str, others: &[&Step]) -> bool {
        let raced = told == "InUse" && !others.is_empty();
        let Some(open) = self.opened(peer, name) else { return told == "NotFound" || raced };
        let (id, known) = (open.id.clone(), generation <= open.newest);
        let needed = open.newest == generation || open.noted.is_some_and(|noted| noted <= generation);
        let gone = open.destroyed.contains(&generation);
        let (sure, perhaps) = self.held(peer, &id, others);
        match told {
            "ok" => {
                self.databases.get_mut(name).is_some_and(|open| open.destroyed.insert(generation))
                    && known
                    && !needed
                    && !gone
                    && !sure.contains(&generation)
            }
            "InUse" => needed || perhaps.contains(&generation) || raced,
            "Invalid" => gone,
            "NotFound" => !known,
            _ => false,
        }
    }

    fn judge_release(&mut self, peer: usize, name: &str, below: u32, told: &str, others: &[&Step]) -> bool {
        let raced = told == "InUse" && !others.is_empty();
        let Some(open) = self.opened(peer, name) else { return told == "NotFound" || raced };
        let (id, noted, known) = (open.id.clone(), open.noted, below <= open.newest);
        // Who needs keys from `below` on needs the later ones, too.
        let gone = open.destroyed.iter().any(|destroyed| *destroyed >= below);
        let destroyed = open.destroyed.clone();
        let older = |held: &u32| *held < below && !destroyed.contains(held);
        let (sure, perhaps) = self.held(peer, &id, others);
        match told {
            "ok" => {
                // The engine has sealed them anew, so to say.
                let open = self.databases.get_mut(name).expect("it was opened");
                open.noted = Some(below);
                open.pages.retain(|page| page.generation >= below);
                known && !gone && !sure.iter().any(older) && noted.is_some_and(|noted| noted <= below)
            }
            "InUse" => perhaps.iter().any(older) || raced,
            "Invalid" => gone || noted.is_some_and(|noted| noted > below),
            "NotFound" => !known || noted.is_none(),
            _ => false,
        }
    }

    /// By a handle that the process had, without a look.
    fn judge_held(&mut self, peer: usize, op: &Op, name: &str, told: &str, words: &[&str]) -> bool {
        let Some((id, generation)) = self.open[peer].get(name).cloned() else { return told == "NotHeld" };
        let current = self.databases.iter().find(|(_, database)| database.id == id);
        let Some((current, newest)) = current.map(|(name, database)| (name.clone(), database.newest)) else {
            return told == "Dropped" || told == "NotFound";
        };
        told == "ok"
            && self.seal(op, &current, generation..=newest, words)
            && self.open[peer].insert(name.to_owned(), (id, words[2].parse().unwrap_or(0))).is_some()
    }

    fn seal(&mut self, op: &Op, name: &str, allowed: std::ops::RangeInclusive<u32>, words: &[&str]) -> bool {
        let (Op::Seal { number, .. }, Some(database)) = (op, self.databases.get_mut(name)) else { return false };
        let [_, id, generation, bytes] = *words else { return false };
        let generation = generation.parse().unwrap_or(0);
        let noted = *database.noted.get_or_insert(generation);
        let page = Page { database: id.to_owned(), number: *number, generation, bytes: bytes.to_owned() };
        database.pages.push(page);
        id == database.id
            && allowed.contains(&generation)
            && noted <= generation
            && !database.destroyed.contains(&generation)
    }
}
