//! What happens when the disk is full. A test binary of its own, because the limit that stands for a full disk holds for a
//! whole process.

use std::fs;

use pageseal::{
    Cluster, ClusterOptions, Error, ErrorKind, Inline, PageFile, PageFileOptions, Read, ScriptedWrapper, Wrappers,
};

const PAGE: usize = 512;

#[test]
fn after_a_failed_write_the_file_takes_no_more_until_it_is_opened_again() {
    let directory = std::env::temp_dir().join(format!("pageseal-full-{}", std::process::id()));
    let key = ScriptedWrapper::new("k");
    let cluster = Cluster::create(&directory, ClusterOptions::new(), Wrappers::one(key)).unwrap();
    let database = cluster.create_database("d").unwrap();
    let file = database.create_page_file("f", PageFileOptions::new().page_size(PAGE as u32)).unwrap();
    append(&file, 2).unwrap();

    limit_files_to(8192 + 10 * PAGE as u64);
    let payloads = vec![7; 64 * file.payload_len()];
    let mut appender = file.append().unwrap();
    assert_eq!(kind(appender.write(&Inline, &payloads)), ErrorKind::Io);
    limit_files_to(libc::RLIM_INFINITY);
    assert_eq!(kind(appender.write(&Inline, &payloads)), ErrorKind::Io, "a failed write was tried again");
    assert_eq!(kind(appender.finish()), ErrorKind::Io);
    assert_eq!(kind(file.append()), ErrorKind::Io);
    assert_eq!(file.pages(), 2);

    drop(file);
    let file = database.page_file("f").unwrap();
    assert_eq!(file.pages(), 2);
    append(&file, 3).unwrap();
    let mut buf = vec![0; file.payload_len()];
    assert_eq!(file.read(4, &mut buf).unwrap(), Read::Page);
    fs::remove_dir_all(&directory).unwrap();
}

fn append(file: &PageFile, pages: usize) -> Result<u64, Error> {
    let mut appender = file.append()?;
    appender.write(&Inline, &vec![1; pages * file.payload_len()])?;
    appender.finish()
}

fn kind<T>(outcome: Result<T, Error>) -> ErrorKind {
    outcome.err().expect("it should have failed").kind()
}

/// Lets no file of this process grow past `bytes`.
fn limit_files_to(bytes: u64) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is written to and read from a struct of ours. Ignoring SIGXFSZ turns the signal into an error.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit);
        limit.rlim_cur = bytes;
        libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit);
    }
}
