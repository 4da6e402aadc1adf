//! The programs that a new user runs first, as they are: `examples/kms_*.rs` and the quickstart with `--kms`, with nothing but
//! environment variables, on each key service. `tests/run kms` builds them.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::{env, fs};

use pageseal_kms_tests as services;
use pageseal_proofs::{score, skipped};

/// The variables that a user would set.
type Environment = Vec<(&'static str, String)>;

/// Whatever runs the service; it ends when this is dropped.
type Running = Box<dyn Send>;

#[cfg(feature = "aws")]
fn aws() -> Result<(Running, Environment), String> {
    let emulator = services::aws::Emulator::ministack()?;
    let (id, secret) = emulator.access_key();
    let environment = vec![
        ("PAGESEAL_AWS_KEY", emulator.key().to_owned()),
        ("AWS_REGION", services::aws::REGION.to_owned()),
        ("AWS_ENDPOINT_URL", emulator.url()),
        ("AWS_ACCESS_KEY_ID", id.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", secret.to_owned()),
    ];
    Ok((Box::new(emulator), environment))
}

#[cfg(feature = "azure")]
fn azure() -> Result<(Running, Environment), String> {
    use services::azure::fake::{CLIENT, KEY, Kind, SECRET, TENANT};
    let service = services::azure::FakeService::start(Kind::Rsa);
    let url = format!("https://{}", service.front.address());
    let environment = vec![
        ("PAGESEAL_AZURE_VAULT_URL", url.clone()),
        ("PAGESEAL_AZURE_KEY", KEY.to_owned()),
        ("PAGESEAL_AZURE_CA_FILE", service.fake.certificate().display().to_string()),
        ("PAGESEAL_AZURE_ANY_CHALLENGE", "1".to_owned()),
        ("AZURE_AUTHORITY_HOST", url),
        ("AZURE_TENANT_ID", TENANT.to_owned()),
        ("AZURE_CLIENT_ID", CLIENT.to_owned()),
        ("AZURE_CLIENT_SECRET", SECRET.to_owned()),
    ];
    Ok((Box::new(service), environment))
}

#[cfg(feature = "gcp")]
fn gcp() -> Result<(Running, Environment), String> {
    let fake = services::gcp::Fake::start();
    let environment = vec![
        ("PAGESEAL_GCP_KEY", services::gcp_fake::KEY.to_owned()),
        ("PAGESEAL_GCP_ENDPOINT", fake.cloud.url()),
        ("GCE_METADATA_HOST", fake.cloud.address().to_string()),
    ];
    Ok((Box::new(fake), environment))
}

#[cfg(feature = "vault")]
fn vault() -> Result<(Running, Environment), String> {
    services::vault::environment()
}

/// An example that was built in the profile of this test, with `arguments` and nothing in its environment but `environment`.
fn example(name: &str, arguments: &[&str], environment: &Environment) -> Option<Output> {
    let here = env::current_exe().expect("the system says where this program is");
    let built = here.parent().and_then(|deps| deps.parent()).map(|profile| profile.join("examples").join(name));
    let program: PathBuf = built.filter(|program| program.exists())?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(environment.iter().map(|(name, value)| (name, value)));
    Some(command.output().expect("the example can be started"))
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

/// Runs both programs, and the service's own once more with a setting taken away.
fn walk(provider: &str, start: fn() -> Result<(Running, Environment), String>) {
    let not_run = |why: &str| skipped(&format!("kms-examples {provider}"), why);
    let (_running, environment) = match start() {
        Ok(started) => started,
        Err(why) => return not_run(&why),
    };
    let own = format!("kms_{provider}");
    let Some(output) = example(&own, &[], &environment) else {
        return not_run("the examples are not built in this profile (tests/run kms builds them)");
    };
    assert!(output.status.success(), "{own}: {}", text(&output));

    let input = env::temp_dir().join(format!("pageseal-kms-examples-{provider}-{}", std::process::id()));
    fs::write(&input, vec![7; 3_000_000]).expect("the temporary directory can be written");
    let output = example("quickstart", &["--kms", provider, &input.to_string_lossy()], &environment);
    let _ = fs::remove_file(&input);
    let output = output.expect("the quickstart is built where the others are");
    let said = text(&output);
    assert!(output.status.success(), "quickstart: {said}");
    let figures = format!("SCORE quickstart kms={provider} bytes=3000000 ");
    assert!(said.contains(&figures) && said.contains("refusals=3 restored=1"), "{said}");

    // The first variable is the master key's name or the service's place: without it nothing is begun.
    let output = example(&own, &[], &environment[1..].to_vec()).expect("it ran a moment ago");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(environment[0].0) && said.lines().count() == 1, "{said}");
    score(&format!("kms-examples provider={provider} programs=2 passed=2 settings_told=1"));
}

#[cfg(feature = "aws")]
#[test]
fn the_programs_for_aws_run_as_documented() {
    walk("aws", aws);
}

#[cfg(feature = "azure")]
#[test]
fn the_programs_for_azure_run_as_documented() {
    walk("azure", azure);
}

#[cfg(feature = "gcp")]
#[test]
fn the_programs_for_gcp_run_as_documented() {
    walk("gcp", gcp);
}

#[cfg(feature = "vault")]
#[test]
fn the_programs_for_vault_run_as_documented() {
    walk("vault", vault);
}
