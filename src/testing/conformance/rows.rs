//! The rows: each tries one [`Behaviour`].

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::trial::{Binding, Sample, Stop, Trial, failed, must};
use super::{Behaviour, Fault, Step};
use crate::cluster::{Cluster, ClusterOptions};
use crate::error::{ErrorKind, KmsClass};
use crate::ids::{ClusterId, DatabaseId, Generation, MasterKeyId};
use crate::keys::wrapper::WrappedKey;
use crate::keys::wrappers::Wrappers;
use crate::kms::scripted::ScriptedWrapper;

/// No sound call takes as long as this, and no row that waits for a deadline waits much longer.
const SHORT: Duration = Duration::from_millis(700);
/// What a call may take beyond its deadline on a busy machine.
const SLACK: Duration = Duration::from_secs(3);

pub(super) fn attempt(behaviour: Behaviour, trial: &Trial<'_>) -> Result<(), Stop> {
    match behaviour {
        Behaviour::RoundTrip => round_trip(trial),
        Behaviour::ContextBound => context_bound(trial),
        Behaviour::Tampered => tampered(trial),
        Behaviour::OtherKey => other_key(trial),
        Behaviour::Disabled => told_until(trial, Step::Disable, KmsClass::Disabled, Step::Enable),
        Behaviour::Deleted => told(trial, Step::Delete, KmsClass::Deleted).map(drop),
        Behaviour::Restored => restored(trial),
        Behaviour::Denied => told_until(trial, Step::Deny, KmsClass::Denied, Step::Allow),
        Behaviour::CredentialsFixedInPlace => {
            told_until(trial, Step::SpoilCredentials, KmsClass::Denied, Step::FixCredentials)
        }
        Behaviour::Unreachable => {
            says_nothing(trial, Fault::Refuse)?;
            says_nothing(trial, Fault::Reset)
        }
        Behaviour::ServerError => {
            says_nothing(trial, Fault::ServerError)?;
            says_nothing(trial, Fault::ProxyError)
        }
        Behaviour::BlackHole => black_hole(trial),
        Behaviour::Throttled => throttled(trial),
        Behaviour::RotationAtTheService => rotation(trial),
        Behaviour::Rewrap => rewrap(trial),
        Behaviour::StoredProbe => stored_probe(trial),
        Behaviour::Concurrent => concurrent(trial),
        Behaviour::InMultiThreadRuntime => in_runtime(trial, true),
        Behaviour::InCurrentThreadRuntime => in_runtime(trial, false),
        Behaviour::WithoutRuntime => thread::scope(|scope| {
            let call = scope.spawn(|| trial.round_trip(&Binding::DATA));
            call.join().unwrap_or_else(|_| Err(failed("the call panicked")))
        }),
        Behaviour::HangingIsAbandoned => hanging_is_abandoned(trial),
        Behaviour::ClusterLife => cluster_life(trial),
    }
}

fn round_trip(trial: &Trial<'_>) -> Result<(), Stop> {
    let id = trial.wrapper.id();
    must(id == trial.wrapper.id() && !id.key.is_empty() && !id.provider.is_empty(), || format!("the id {id:?}"))?;
    for binding in [Binding::DATA, Binding::CLUSTER, Binding::PROBE] {
        let (sample, wrapped) = trial.wrapped(&binding)?;
        must(wrapped.master_key == id, || format!("wrapped by {}, not {id}", wrapped.master_key))?;
        must((1..=4096).contains(&wrapped.blob.len()), || format!("a blob of {} bytes", wrapped.blob.len()))?;
        must(wrapped.key_version.len() <= 255, || format!("a version of {} bytes", wrapped.key_version.len()))?;
        must(!sample.shows_in(&wrapped.blob), || "the blob shows the key".into())?;
        trial.opens(&sample, &wrapped, &binding)?;
        trial.opens(&sample, &wrapped, &binding)?;
    }
    Ok(())
}

fn context_bound(trial: &Trial<'_>) -> Result<(), Stop> {
    let (sample, wrapped) = trial.wrapped(&Binding::DATA)?;
    let later = Generation::new(2).ok_or_else(|| failed("there is a generation 2"))?;
    let others = [
        ("another cluster", Binding { cluster: ClusterId::from_bytes([9; 16]), ..Binding::DATA }),
        ("another database", Binding { database: Some(DatabaseId::from_bytes([9; 16])), ..Binding::DATA }),
        ("another generation", Binding { generation: later, ..Binding::DATA }),
        ("another purpose", Binding::CLUSTER),
    ];
    for (what, other) in others {
        trial.refuses(what, KmsClass::BadCiphertext, &sample, trial.unwrap(&wrapped, &other))?;
    }
    trial.opens(&sample, &wrapped, &Binding::DATA)
}

fn tampered(trial: &Trial<'_>) -> Result<(), Stop> {
    let (sample, wrapped) = trial.wrapped(&Binding::DATA)?;
    let len = wrapped.blob.len();
    let refuse = |what: &str, blob: Vec<u8>| {
        let changed = WrappedKey { blob, ..wrapped.clone() };
        trial.refuses(what, KmsClass::BadCiphertext, &sample, trial.unwrap(&changed, &Binding::DATA)).map(drop)
    };
    // Begin, end, and places between: header, nonce, ciphertext and tag of any layout.
    for at in (0..16).map(|step| step * (len - 1) / 15) {
        let mut blob = wrapped.blob.clone();
        blob[at] ^= 0x04;
        refuse(&format!("byte {at} of {len} changed"), blob)?;
    }
    refuse("cut", wrapped.blob[..len - 1].to_vec())?;
    refuse("halved", wrapped.blob[..len / 2].to_vec())?;
    refuse("longer", [&wrapped.blob[..], &[0]].concat())?;
    refuse("empty", Vec::new())?;
    // Whatever a service says of a version that it never made, it must not open under it.
    let version = WrappedKey { key_version: format!("{}x", wrapped.key_version), ..wrapped.clone() };
    if let Ok(payload) = trial.unwrap(&version, &Binding::DATA) {
        must(sample.is(&payload), || "another payload came back for a changed version".into())?;
    }
    trial.opens(&sample, &wrapped, &Binding::DATA)
}

fn other_key(trial: &Trial<'_>) -> Result<(), Stop> {
    let other = trial.other_key()?;
    must(other.id() != trial.wrapper.id(), || "the two keys have one id".into())?;
    let (sample, own) = trial.wrapped(&Binding::DATA)?;
    let foreign = Trial::of(trial, other).wrap(&sample, &Binding::DATA)?;
    let passed_off = WrappedKey { master_key: trial.wrapper.id(), ..foreign.clone() };
    let what = "another key's record under this key's name";
    trial.refuses(what, KmsClass::BadCiphertext, &sample, trial.unwrap(&passed_off, &Binding::DATA))?;
    let blob_only = WrappedKey { blob: foreign.blob, ..own };
    // A service may call this a missing right; what counts is that nothing is opened.
    if trial.unwrap(&blob_only, &Binding::DATA).is_ok() {
        return Err(failed("another key's blob in this key's record was unwrapped"));
    }
    Ok(())
}

/// What `step` does is told as `class`; returns what was wrapped before.
fn told(trial: &Trial<'_>, step: Step, class: KmsClass) -> Result<(Sample, WrappedKey), Stop> {
    let (sample, wrapped) = trial.wrapped(&Binding::DATA)?;
    trial.perform(step)?;
    trial.refuses(&format!("{step:?}"), class, &sample, trial.unwrap(&wrapped, &Binding::DATA))?;
    // To wrap may work (Azure wraps with a disabled key), or fail with another verdict (whoever may not make keys is denied
    // by Vault when the key is gone), but not fail as if nobody was there.
    if let Err(error) = trial.wrapper.wrap_key(&sample.payload, &Binding::DATA.context(trial.patience())) {
        must(error.class.is_revocation(), || format!("{step:?}, wrapping: {:?}: {error}", error.class))?;
    }
    Ok((sample, wrapped))
}

fn told_until(trial: &Trial<'_>, step: Step, class: KmsClass, opposite: Step) -> Result<(), Stop> {
    let (sample, wrapped) = told(trial, step, class)?;
    trial.perform(opposite)?;
    trial.opens(&sample, &wrapped, &Binding::DATA)?;
    trial.round_trip(&Binding::DATA)
}

fn restored(trial: &Trial<'_>) -> Result<(), Stop> {
    let (sample, wrapped) = trial.wrapped(&Binding::DATA)?;
    trial.perform(Step::Delete)?;
    trial.perform(Step::Restore)?;
    trial.opens(&sample, &wrapped, &Binding::DATA)?;
    trial.round_trip(&Binding::DATA)
}

/// That a fault is told as unreachable, and soon, for wrapping as for unwrapping.
fn says_nothing(trial: &Trial<'_>, fault: Fault) -> Result<(), Stop> {
    let (sample, wrapped) = trial.wrapped(&Binding::DATA)?;
    trial.inflict(fault)?;
    let start = Instant::now();
    let what = format!("{fault:?}");
    trial.refuses(&what, KmsClass::Unreachable, &sample, trial.unwrap(&wrapped, &Binding::DATA))?;
    let outcome = trial.wrapper.wrap_key(&sample.payload, &Binding::DATA.context(trial.patience()));
    let class = outcome.err().map(|error| error.class);
    must(class == Some(KmsClass::Unreachable), || format!("{what}, wrapping: {class:?}"))?;
    must(start.elapsed() < SLACK, || format!("{what}: two calls took {:?}", start.elapsed()))?;
    trial.inflict(Fault::None)?;
    trial.opens(&sample, &wrapped, &Binding::DATA)
}

fn black_hole(trial: &Trial<'_>) -> Result<(), Stop> {
    let (sample, wrapped) = trial.wrapped(&Binding::DATA)?;
    trial.inflict(Fault::Hang)?;
    let start = Instant::now();
    let outcome = trial.unwrap_within(&wrapped, &Binding::DATA, SHORT);
    let took = start.elapsed();
    trial.refuses("hanging", KmsClass::Unreachable, &sample, outcome)?;
    must(took < SHORT + SLACK, || format!("a call with a deadline after {SHORT:?} took {took:?}"))?;
    trial.inflict(Fault::None)?;
    trial.opens(&sample, &wrapped, &Binding::DATA)
}

fn throttled(trial: &Trial<'_>) -> Result<(), Stop> {
    let (sample, wrapped) = trial.wrapped(&Binding::DATA)?;
    let after = Duration::from_secs(7);
    trial.inflict(Fault::Throttle(after))?;
    let start = Instant::now();
    let outcome = trial.unwrap(&wrapped, &Binding::DATA);
    let error = trial.refuses("throttled", KmsClass::Throttled, &sample, outcome)?;
    // pageseal itself comes back later; a wrapper that waited too would wait twice.
    must(start.elapsed() < SLACK, || format!("the wrapper waited {:?} by itself", start.elapsed()))?;
    must(error.retry_after == Some(after), || format!("asked to come back after {:?}", error.retry_after))?;
    trial.inflict(Fault::None)?;
    trial.opens(&sample, &wrapped, &Binding::DATA)
}

fn rotation(trial: &Trial<'_>) -> Result<(), Stop> {
    let (old_sample, old) = trial.wrapped(&Binding::DATA)?;
    trial.perform(Step::Rotate)?;
    let (new_sample, new) = trial.wrapped(&Binding::DATA)?;
    trial.opens(&old_sample, &old, &Binding::DATA)?;
    trial.opens(&new_sample, &new, &Binding::DATA)
}

fn rewrap(trial: &Trial<'_>) -> Result<(), Stop> {
    let (sample, wrapped) = trial.wrapped(&Binding::DATA)?;
    must(trial.wrapper.can_rewrap(&wrapped), || "it does not take what it wrapped itself".into())?;
    let foreign = MasterKeyId::new("a provider that does not exist", "key");
    let foreign = WrappedKey { master_key: foreign, ..wrapped.clone() };
    must(!trial.wrapper.can_rewrap(&foreign), || "it takes what no service of its kind wrapped".into())?;
    let rewrapped = trial.rewrap(&wrapped, &Binding::DATA)?;
    must(rewrapped.master_key == trial.wrapper.id(), || format!("rewrapped by {}", rewrapped.master_key))?;
    let current = trial.wrap(&sample, &Binding::DATA)?.key_version;
    must(rewrapped.key_version == current, || format!("version {}, not {current}", rewrapped.key_version))?;
    trial.opens(&sample, &rewrapped, &Binding::DATA)?;
    trial.opens(&sample, &wrapped, &Binding::DATA)
}

fn stored_probe(trial: &Trial<'_>) -> Result<(), Stop> {
    let (sample, probe) = trial.wrapped(&Binding::PROBE)?;
    trial.check(&probe).map_err(|error| failed(format!("the check of a good key failed: {error}")))?;
    // Where keys have no states, a missing right does as well.
    let (step, class) = match trial.perform(Step::Disable) {
        Ok(()) => (Step::Disable, KmsClass::Disabled),
        Err(_) => {
            trial.perform(Step::Deny)?;
            (Step::Deny, KmsClass::Denied)
        }
    };
    let Err(error) = trial.check(&probe) else {
        return Err(failed(format!("the check passes after {step:?}")));
    };
    trial.shows_nothing(&error, &sample)?;
    must(error.class == class, || format!("the check says {:?} after {step:?}", error.class))
}

fn concurrent(trial: &Trial<'_>) -> Result<(), Stop> {
    const CALLS: usize = 200;
    let (sample, wrapped) = trial.wrapped(&Binding::DATA)?;
    let done = AtomicU64::new(0);
    let failure = thread::scope(|scope| {
        let call = |index: usize| {
            let (done, sample, wrapped) = (&done, &sample, &wrapped);
            move || {
                // Half of them wrap, so that neither direction has the service to itself.
                match index % 2 {
                    0 => trial.opens(sample, wrapped, &Binding::DATA),
                    _ => trial.wrap(sample, &Binding::DATA).map(drop),
                }
                .inspect(|()| _ = done.fetch_add(1, Ordering::SeqCst))
            }
        };
        let calls: Vec<_> = (0..CALLS).map(|index| scope.spawn(call(index))).collect();
        let outcomes = calls.into_iter().map(|call| call.join().unwrap_or_else(|_| Err(failed("a call panicked"))));
        outcomes.filter_map(Result::err).next()
    });
    match failure {
        None => Ok(()),
        Some(Stop::Failed(why)) => Err(failed(format!("{} of {CALLS} succeeded; {why}", done.into_inner()))),
        Some(cannot) => Err(cannot),
    }
}

#[cfg(feature = "tokio")]
fn in_runtime(trial: &Trial<'_>, multi_thread: bool) -> Result<(), Stop> {
    let mut builder = match multi_thread {
        true => tokio::runtime::Builder::new_multi_thread(),
        false => tokio::runtime::Builder::new_current_thread(),
    };
    let runtime = builder.enable_all().build().map_err(|error| failed(format!("no runtime: {error}")))?;
    runtime.block_on(async {
        trial.round_trip(&Binding::DATA)?;
        trial.round_trip(&Binding::CLUSTER)?;
        // The crate's own path too: its threads are outside the runtime of the caller.
        let place = TemporaryDirectory::new()?;
        let options = ClusterOptions::new().kms_timeout(trial.patience());
        Cluster::create(&place.cluster(), options, one(trial)).map(drop).map_err(|error| failed(error.to_string()))
    })
}

#[cfg(not(feature = "tokio"))]
fn in_runtime(_: &Trial<'_>, _: bool) -> Result<(), Stop> {
    Err(super::Cannot::new("this build is without the feature `tokio`").into())
}

fn one(trial: &Trial<'_>) -> Wrappers {
    Wrappers::any_of([Arc::clone(&trial.wrapper)]).expect("one wrapper is a valid list")
}

fn hanging_is_abandoned(trial: &Trial<'_>) -> Result<(), Stop> {
    let text = |error: crate::Error| failed(error.to_string());
    let place = TemporaryDirectory::new()?;
    let second = ScriptedWrapper::new("second");
    let wrappers = || {
        let list: [Arc<dyn crate::KeyWrapper>; 2] = [Arc::clone(&trial.wrapper), Arc::new(second.clone())];
        Wrappers::any_of(list).expect("two wrappers are a valid list")
    };
    let options = || ClusterOptions::new().kms_timeout(trial.patience());
    let cluster = Cluster::create(&place.cluster(), options(), wrappers()).map_err(text)?;
    let id = cluster.id();
    cluster.create_database("before").map_err(text)?;
    drop(cluster);
    trial.inflict(Fault::Hang)?;
    let start = Instant::now();
    let options = || ClusterOptions::new().kms_timeout(SHORT).expected_id(id);
    let cluster = Cluster::open(&place.cluster(), options(), wrappers()).map_err(text)?;
    cluster.database("before").map_err(text)?;
    cluster.create_database("meanwhile").map_err(text)?;
    let took = start.elapsed();
    // Cluster key, probes, two databases: each waits once for the deadline.
    must(took < 8 * SHORT + SLACK, || format!("opening, with the other key answering, took {took:?}"))?;
    drop(cluster);
    trial.inflict(Fault::None)?;
    let options = ClusterOptions::new().kms_timeout(trial.patience()).expected_id(id);
    Cluster::open(&place.cluster(), options, wrappers()).map_err(text)?.database("meanwhile").map(drop).map_err(text)
}

fn cluster_life(trial: &Trial<'_>) -> Result<(), Stop> {
    let text = |error: crate::Error| failed(error.to_string());
    let place = TemporaryDirectory::new()?;
    let options = || ClusterOptions::new().kms_timeout(trial.patience());
    let cluster = Cluster::create(&place.cluster(), options(), one(trial)).map_err(text)?;
    let id = cluster.id();
    cluster.create_database("orders").map_err(text)?;
    cluster.check_master_key().map_err(text)?;
    drop(cluster);
    let open = || Cluster::open(&place.cluster(), options().expected_id(id), one(trial));
    open().and_then(|cluster| cluster.database("orders").map(drop)).map_err(text)?;
    if trial.wrapper.wrapping_is_public() {
        let unexpected = Cluster::open(&place.cluster(), options(), one(trial)).map(drop);
        let kind = unexpected.err().map(|error| error.kind());
        must(kind == Some(ErrorKind::Misconfigured), || format!("without the expected id: {kind:?}"))?;
    }
    let (step, opposite, expected) = match trial.perform(Step::Disable) {
        Ok(()) => (Step::Disable, Step::Enable, ErrorKind::Disabled),
        Err(_) => {
            trial.perform(Step::Deny)?;
            (Step::Deny, Step::Allow, ErrorKind::Denied)
        }
    };
    let kind = open().err().map(|error| error.kind());
    must(kind == Some(expected), || format!("opening after {step:?}: {kind:?}"))?;
    trial.perform(opposite)?;
    open().and_then(|cluster| cluster.database("orders").map(drop)).map_err(text)
}

/// A new directory, removed at the end.
struct TemporaryDirectory(PathBuf);

impl TemporaryDirectory {
    fn new() -> Result<Self, Stop> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("pageseal-conformance-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).map_err(|error| failed(format!("making {}: {error}", path.display())))?;
        Ok(Self(path))
    }

    fn cluster(&self) -> PathBuf {
        self.0.join("cluster")
    }
}

impl Drop for TemporaryDirectory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
