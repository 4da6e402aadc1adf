//! A cluster whose master key is in Azure Key Vault: made, used, closed and opened again.
//!
//! ```text
//! export PAGESEAL_AZURE_VAULT_URL=https://contoso.vault.azure.net PAGESEAL_AZURE_KEY=pageseal
//! az login   # or AZURE_TENANT_ID, AZURE_CLIENT_ID, AZURE_CLIENT_SECRET; or a managed identity
//! cargo run --release --features azure --example kms_azure
//! ```
//!
//! `AzureKeyVault::from_env` has the table of all variables.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pageseal::{AzureKeyVault, Cluster, ClusterOptions, Error, FileId, KeyWrapper, PageContext, Wrappers};

fn main() -> ExitCode {
    let place = TemporaryDirectory(std::env::temp_dir().join(format!("pageseal-kms-azure-{}", std::process::id())));
    match run(&place.0) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(place: &Path) -> Result<(), Error> {
    let key = AzureKeyVault::from_env()?;
    println!("master key   {}", key.id());
    let wrappers = || Wrappers::one(key.clone());
    let cluster = Cluster::create(place, ClusterOptions::new(), wrappers())?;
    let id = cluster.id();
    let database = cluster.create_database("orders")?;
    println!("made         cluster {id}, with the database \"orders\"");

    let context = PageContext::page(FileId::new(1), 42);
    let mut page = vec![7; 4096]; // The last 48 bytes are the trailer's.
    database.cipher()?.seal_in_place(&context, &mut page)?;
    println!("sealed       page 42: {:02x?}…", &page[..8]);
    drop((database, cluster));

    // With an RSA key anybody can wrap, so the expected id must be given.
    let cluster = Cluster::open(place, ClusterOptions::new().expected_id(id), wrappers())?;
    cluster.check_master_key()?;
    cluster.database("orders")?.cipher()?.open_in_place(&context, &mut page)?;
    println!("opened again, and page 42: {:02x?}…", &page[..8]);
    Ok(())
}

struct TemporaryDirectory(PathBuf);

impl Drop for TemporaryDirectory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
