//! A cluster under a master key in the transit engine of HashiCorp Vault or OpenBao: made, used, closed and opened again, in
//! a temporary directory.
//!
//! ```text
//! VAULT_ADDR=https://vault.example.com:8200 PAGESEAL_VAULT_KEY=pageseal \
//!     PAGESEAL_VAULT_ROLE_ID=... PAGESEAL_VAULT_SECRET_ID_FILE=/run/secrets/vault-secret-id \
//!     cargo run --features vault --example kms_vault
//! ```
//!
//! `VaultTransit::from_env` says which other variables there are, docs/kms/vault.md which policy the identity needs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pageseal::{Cluster, ClusterOptions, FileId, KeyWrapper, PageContext, Result, VaultTransit, Wrappers};

const TEXT: &[u8] = b"a page under a key in Vault's transit engine";

fn main() -> ExitCode {
    let place = std::env::temp_dir().join(format!("pageseal-kms-vault-{}", std::process::id()));
    let outcome = run(&place.join("cluster"), &place);
    let _ = fs::remove_dir_all(&place);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // It says what to do.
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(home: &Path, place: &PathBuf) -> Result<()> {
    let master = VaultTransit::from_env()?;
    println!("master key   {}", master.id());
    fs::create_dir_all(place).expect("the temporary directory can be written");

    let cluster = Cluster::create(home, ClusterOptions::new(), Wrappers::one(master.clone()))?;
    let id = cluster.id();
    println!("created      cluster {id}: its keys are wrapped, and were unwrapped once to be sure");
    let cipher = cluster.create_database("orders")?.cipher()?;
    println!("created      database \"orders\" with a data key of its own");

    let context = PageContext::page(FileId::new(1), 42);
    let mut page = [0; 4096];
    page[..TEXT.len()].copy_from_slice(TEXT);
    cipher.seal_in_place(&context, &mut page)?;
    println!("sealed       a page of {} bytes, without a call to the server", page.len());
    drop((cipher, cluster));

    let cluster = Cluster::open(home, ClusterOptions::new().expected_id(id), Wrappers::one(master))?;
    cluster.check_master_key()?;
    println!("reopened     the cluster, and checked the master key");
    cluster.database("orders")?.cipher()?.open_in_place(&context, &mut page)?;
    assert!(page.starts_with(TEXT));
    println!("opened       the page: {:?}", String::from_utf8_lossy(&page[..TEXT.len()]));
    Ok(())
}
