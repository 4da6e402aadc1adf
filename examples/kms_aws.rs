//! A cluster whose master key is in AWS KMS.
//!
//! `PAGESEAL_AWS_KEY=arn:aws:kms:... cargo run --features aws --example kms_aws`. Region and credentials come from where every
//! AWS program takes them; `AwsKms::from_env` lists the variables. Makes a cluster in a temporary directory and removes it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pageseal::{AwsKms, Cluster, ClusterOptions, Error, FileId, KeyWrapper, PageContext, Wrappers};

fn main() -> ExitCode {
    let directory = std::env::temp_dir().join(format!("pageseal-kms-aws-{}", std::process::id()));
    let outcome = std::fs::create_dir(&directory)
        .map_err(|error| format!("making {}: {error}", directory.display()))
        .and_then(|()| run(&directory).map_err(|error| error.to_string()));
    let _ = std::fs::remove_dir_all(&directory);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("{text}");
            ExitCode::FAILURE
        }
    }
}

fn run(directory: &Path) -> Result<(), Error> {
    let key = AwsKms::from_env()?;
    println!("master key   {}", key.id());
    let path: PathBuf = directory.join("cluster");

    let cluster = Cluster::create(&path, ClusterOptions::new(), Wrappers::one(key.clone()))?;
    let id = cluster.id();
    println!("created      cluster {id}, its key wrapped by AWS KMS");
    let database = cluster.create_database("orders")?;
    let cipher = database.cipher()?;
    let context = PageContext::page(FileId::new(1), 42);
    let mut page = vec![7; 4096]; // The last 48 bytes are the trailer's.
    cipher.seal_in_place(&context, &mut page)?;
    println!("sealed       a page of {} bytes in the database \"orders\"", page.len());
    drop((cipher, database, cluster));

    let cluster = Cluster::open(&path, ClusterOptions::new().expected_id(id), Wrappers::one(key))?;
    let database = cluster.database("orders")?;
    database.cipher()?.open_in_place(&context, &mut page)?;
    assert!(page[..4048].iter().all(|&byte| byte == 7), "the page came back changed");
    println!("opened       the same page, after the cluster was opened anew");
    cluster.check_master_key()?;
    println!("checked      the master key can be used");
    Ok(())
}
