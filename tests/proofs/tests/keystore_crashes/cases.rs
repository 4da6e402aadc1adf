//! The changes that are interrupted: each script begins on a cluster that was prepared for it.

use pageseal::testing::{Broken, SimulatedDisk};
use pageseal::{Cluster, Hierarchy};

use crate::world::{Act, COPIES, Handles, State, World};

/// What lies on the disk before a script begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Base {
    Nothing,
    /// Database `one` of three generations, of which an engine needs the last two; `two` of one; `bare` that no engine uses.
    Some,
    /// As `Some`; the second master key was out of reach.
    LacksWrappings,
    /// As `Some`, and then this happened to the copies of the keystore.
    Damaged(Damage, Damage),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Damage {
    None,
    Missing,
    Flipped,
    Short,
    Empty,
}

pub struct Script {
    pub base: Base,
    pub hierarchy: Hierarchy,
    pub acts: &'static [Act],
}

const fn direct(base: Base, acts: &'static [Act]) -> Script {
    Script { base, hierarchy: Hierarchy::Direct, acts }
}

const fn by_cluster_key(base: Base, acts: &'static [Act]) -> Script {
    Script { base, hierarchy: Hierarchy::ClusterKey, acts }
}

pub const SCRIPTS: &[Script] = &[
    // The first three are those that broken disks must fail.
    direct(Base::Some, &[Act::Create("new"), Act::Cipher("new")]),
    direct(Base::Some, &[Act::Rotate("one"), Act::Rotate("two"), Act::Rotate("one")]),
    direct(Base::Some, &[Act::Drop("one"), Act::Create("one"), Act::Cipher("one")]),
    direct(Base::Nothing, &[Act::CreateCluster, Act::Create("new"), Act::Cipher("new")]),
    by_cluster_key(Base::Nothing, &[Act::CreateCluster, Act::Create("new")]),
    direct(Base::Some, &[Act::Rename("two", "deux"), Act::Rename("deux", "due"), Act::Create("two")]),
    direct(Base::Some, &[Act::Rename("two", "deux"), Act::Drop("deux"), Act::Rename("one", "two")]),
    direct(Base::Some, &[Act::Cipher("bare"), Act::Rotate("bare")]),
    direct(Base::Some, &[Act::Destroy("one", 1), Act::Rotate("one")]),
    direct(Base::Some, &[Act::Rotate("two"), Act::Release("two", 2), Act::Destroy("two", 1)]),
    direct(Base::Some, &[Act::Rewrap, Act::Create("new")]),
    direct(Base::Some, &[Act::SetHierarchy(Hierarchy::ClusterKey), Act::Create("new")]),
    direct(Base::Some, &[Act::ReplaceClusterKey, Act::Rename("one", "eins")]),
    direct(Base::LacksWrappings, &[Act::Maintain]),
    by_cluster_key(Base::Some, &[Act::Create("new"), Act::Cipher("new"), Act::Rotate("new")]),
    by_cluster_key(Base::Some, &[Act::Rotate("one"), Act::Rename("one", "eins"), Act::Rotate("two")]),
    by_cluster_key(Base::Some, &[Act::Destroy("one", 1), Act::Drop("two")]),
    by_cluster_key(Base::Some, &[Act::Rewrap, Act::Create("new")]),
    by_cluster_key(Base::Some, &[Act::SetHierarchy(Hierarchy::Direct), Act::Rotate("one")]),
    by_cluster_key(Base::Some, &[Act::ReplaceClusterKey, Act::ReplaceClusterKey, Act::Create("new")]),
    by_cluster_key(Base::LacksWrappings, &[Act::Maintain]),
    direct(Base::Damaged(Damage::Flipped, Damage::None), &[Act::Open, Act::Drop("two")]),
    direct(Base::Damaged(Damage::None, Damage::Flipped), &[Act::Open, Act::Rotate("one")]),
    direct(Base::Damaged(Damage::None, Damage::Short), &[Act::Open, Act::Create("new")]),
    direct(Base::Damaged(Damage::Short, Damage::None), &[Act::Open]),
    direct(Base::Damaged(Damage::Missing, Damage::None), &[Act::Open]),
    direct(Base::Damaged(Damage::None, Damage::Missing), &[Act::Open]),
    direct(Base::Damaged(Damage::Empty, Damage::None), &[Act::Open]),
    direct(Base::Damaged(Damage::Missing, Damage::Missing), &[Act::Import, Act::Rotate("one")]),
    direct(Base::Damaged(Damage::Empty, Damage::Missing), &[Act::Import, Act::Create("new")]),
    by_cluster_key(Base::Damaged(Damage::Missing, Damage::Missing), &[Act::Import]),
];

/// A script, and what must be seen before it and after each of its acts.
pub struct Case {
    pub world: World,
    pub disk: SimulatedDisk,
    pub acts: &'static [Act],
    /// `None` where there is no keystore that opens.
    pub states: Vec<Option<State>>,
    /// Which of the old wrappings must have left the disk after each act.
    pub gone: Vec<Vec<Vec<u8>>>,
}

impl Case {
    pub fn new(script: &Script, broken: Broken) -> Self {
        let mut world = World::new(script.hierarchy);
        let disk = SimulatedDisk::new(broken);
        if script.base != Base::Nothing {
            prepare(&mut world, script.base, &disk);
        }
        let mut case = Self { world, disk, acts: script.acts, states: Vec::new(), gone: Vec::new() };
        case.rehearse();
        case
    }

    /// Does everything once, without any failure, to know what must be seen.
    fn rehearse(&mut self) {
        let disk = self.start();
        self.states.push(self.seen(&disk));
        let mut handles = self.handles(&disk);
        for &act in self.acts {
            let ids = handles.cluster.as_ref().map(|cluster| self.ids(cluster)).unwrap_or_default();
            self.world.act(act, &disk, &mut handles).unwrap();
            self.gone.push(self.gone_after(act, &ids));
            self.states.push(Some(self.seen(&disk).unwrap_or_else(|| panic!("{act:?} leaves nothing that opens"))));
        }
    }

    /// The disk as it is before the script, and no process has touched it since.
    pub fn start(&self) -> SimulatedDisk {
        self.world.set_mark(None);
        self.disk.kill()
    }

    /// What a process has open when it begins with the script.
    pub fn handles(&self, disk: &SimulatedDisk) -> Handles {
        let mut handles = Handles::default();
        if !self.acts[0].opens() {
            let cluster = self.world.open(disk).unwrap();
            for name in ["one", "two"] {
                handles.ciphers.push((name, cluster.database(name).unwrap().cipher().unwrap()));
            }
            handles.cluster = Some(cluster);
        }
        handles
    }

    fn seen(&self, disk: &SimulatedDisk) -> Option<State> {
        let disk = disk.kill();
        let mark = self.world.mark();
        let cluster = self.world.open(&disk).ok()?;
        let seen = State { opened_by: self.opened_by(&disk), ..self.world.look(&disk, &cluster).unwrap() };
        drop(cluster);
        self.world.set_mark(mark.as_deref());
        Some(seen)
    }

    /// Asked only where it changes.
    pub fn opened_by(&self, disk: &SimulatedDisk) -> [bool; 2] {
        let asked = self.acts.iter().any(|act| matches!(act, Act::Rewrap | Act::Maintain));
        if asked { self.world.opened_by(disk) } else { [true, false] }
    }

    fn ids(&self, cluster: &Cluster) -> Vec<(String, pageseal::DatabaseId)> {
        let names = cluster.databases().unwrap();
        names.into_iter().map(|name| (name.clone(), cluster.database(&name).unwrap().id())).collect()
    }

    /// The wrappings that were made while the cluster was prepared, as far as the act takes them away.
    fn gone_after(&self, act: Act, ids: &[(String, pageseal::DatabaseId)]) -> Vec<Vec<u8>> {
        use pageseal::Purpose::{Cluster as OfCluster, Data};
        let id = |name: &str| ids.iter().find(|(known, _)| known == name).map(|(_, id)| *id);
        let prepared = self.prepared();
        let taken = prepared.into_iter().filter(|old| match act {
            Act::Drop(name) => old.database == id(name),
            Act::Destroy(name, number) => old.database == id(name) && old.generation.get() == number,
            Act::Rewrap => true,
            Act::SetHierarchy(Hierarchy::ClusterKey) => old.purpose == Data,
            Act::ReplaceClusterKey => old.purpose == OfCluster,
            _ => false,
        });
        taken.map(|old| old.blob).collect()
    }

    /// What the first master key wrapped before the script begins, as far as it lies on the disk then.
    fn prepared(&self) -> Vec<crate::world::Wrapping> {
        let wrapped = self.world.masters[0].wrapped();
        wrapped.into_iter().filter(|wrapping| self.disk.scan(&wrapping.blob) > 0).collect()
    }
}

fn prepare(world: &mut World, base: Base, disk: &SimulatedDisk) {
    if base == Base::LacksWrappings {
        world.both = true;
        world.masters[1].key.unreachable();
    }
    let mut handles = Handles::default();
    let prepared = ["one", "zwei", "bare"].map(Act::Create);
    for act in [Act::CreateCluster].into_iter().chain(prepared).chain(["one", "zwei"].map(Act::Cipher)) {
        world.act(act, disk, &mut handles).unwrap();
    }
    world.sealed = handles.seal();
    for _ in 0..2 {
        world.act(Act::Rotate("one"), disk, &mut handles).unwrap();
        world.sealed.push(handles.seal().remove(0));
    }
    world.act(Act::Release("one", 2), disk, &mut handles).unwrap();
    // The last change is one that only the first copy has durably.
    world.act(Act::Rename("zwei", "two"), disk, &mut handles).unwrap();
    world.id = Some(handles.cluster().id());
    world.masters[1].key.restore();
    if let Base::Damaged(first, second) = base {
        handles.cluster().export(&world.path("export")).unwrap();
        for (copy, damage) in COPIES.into_iter().zip([first, second]) {
            damage.strike(disk, &world.path(copy));
        }
    }
}

impl Damage {
    fn strike(self, disk: &SimulatedDisk, path: &std::path::Path) {
        let bytes = disk.seen(path).unwrap();
        match self {
            // The last change is durable in the first copy only: damaging that one must not take it away.
            Self::None => disk.set(path, &bytes),
            Self::Missing => disk.lose(path),
            Self::Flipped => disk.flip(path, bytes.len() / 2, 1),
            Self::Short => disk.set(path, &bytes[..bytes.len() - 512]),
            Self::Empty => disk.set(path, b""),
        }
    }
}
