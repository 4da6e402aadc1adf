//! What one process of a cluster does, told in lines: `create NAME` gives `ok ID`, a refusal gives `err KIND MESSAGE`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pageseal::{
    Cluster, ClusterOptions, Database, Error, FileId, Generation, Hierarchy, Inline, LocalKeyFile, PageCipher,
    PageContext, PageError, PageFile, PageFileOptions, Read, Wrappers,
};

/// The bytes of a page's payload, and of a page.
pub const PAYLOAD: usize = 64;
const PAGE: usize = PAYLOAD + pageseal::OVERHEAD;

/// Where a cluster and its master keys lie.
#[derive(Clone)]
pub struct Home(pub PathBuf);

impl Home {
    pub fn cluster(&self) -> PathBuf {
        self.0.join("cluster")
    }

    pub fn key(&self, name: &str) -> LocalKeyFile {
        LocalKeyFile::new(self.0.join(name))
    }

    /// Makes the master key `one` and a cluster under it.
    pub fn make(path: &Path, hierarchy: Hierarchy) -> Self {
        let home = Self(path.to_owned());
        std::fs::create_dir_all(path).unwrap();
        LocalKeyFile::create(path.join("one")).unwrap();
        let options = ClusterOptions::new().hierarchy(hierarchy).watched(false);
        drop(Cluster::create(&home.cluster(), options, Wrappers::one(home.key("one"))).unwrap());
        home
    }

    /// All master keys that there are.
    pub fn wrappers(&self) -> Wrappers {
        let there = ["one", "two"].into_iter().filter(|name| self.0.join(name).exists());
        Wrappers::any_of(there.map(|name| Arc::new(self.key(name)) as _)).unwrap()
    }

    pub fn open(&self, watched: bool) -> Cluster {
        Cluster::open(&self.cluster(), ClusterOptions::new().watched(watched), self.wrappers()).unwrap()
    }
}

/// A process of the cluster, or a thread that is one to the locks: it has a handle of its own.
pub struct Worker {
    pub home: Home,
    pub cluster: Cluster,
    /// Open databases, by the names under which they were opened.
    open: HashMap<String, Database>,
    ciphers: HashMap<String, PageCipher>,
    files: HashMap<String, PageFile>,
}

enum Refusal {
    Cluster(Error),
    Page(PageError),
    Other(&'static str),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Cluster(error)
    }
}

impl From<PageError> for Refusal {
    fn from(error: PageError) -> Self {
        Self::Page(error)
    }
}

type Answer = Result<String, Refusal>;

impl Worker {
    pub fn new(home: &Home, watched: bool) -> Self {
        let cluster = home.open(watched);
        Self { home: home.clone(), cluster, open: HashMap::new(), ciphers: HashMap::new(), files: HashMap::new() }
    }

    pub fn answer(&mut self, line: &str) -> String {
        let words: Vec<_> = line.split(' ').collect();
        match self.obey(&words) {
            Ok(text) => format!("ok {text}").trim_end().to_owned(),
            Err(Refusal::Cluster(error)) => format!("err {:?} {error}", error.kind()),
            Err(Refusal::Page(PageError::UnknownGeneration(_))) => "err UnknownGeneration".to_owned(),
            Err(Refusal::Page(error)) => format!("err {error:?}"),
            Err(Refusal::Other(what)) => format!("err {what}"),
        }
    }

    fn obey(&mut self, words: &[&str]) -> Answer {
        match *words {
            ["list"] => Ok(self.cluster.databases()?.join(",")),
            ["create", name] => {
                let database = self.cluster.create_database(name)?;
                self.note(name, database)
            }
            ["open", name] => {
                let database = self.cluster.database(name)?;
                self.note(name, database)
            }
            // Looks, and keeps nothing open.
            ["look", name] => {
                let database = self.cluster.database(name)?;
                Ok(format!("{} {}", database.id(), database.generation()))
            }
            ["close", name] => {
                self.ciphers.remove(name);
                self.open.remove(name);
                Ok(String::new())
            }
            ["generation", name] => Ok(self.held(name)?.generation().to_string()),
            ["rename", from, to] => {
                self.cluster.rename_database(from, to)?;
                Ok(String::new())
            }
            ["drop", name] => Ok(self.cluster.drop_database(name)?.database.to_string()),
            ["rotate", name] => Ok(self.opened(name)?.rotate()?.to_string()),
            ["destroy", name, number] => {
                self.opened(name)?.destroy_generation(generation(number))?;
                Ok(String::new())
            }
            ["release", name, number] => {
                self.opened(name)?.release_external(generation(number))?;
                Ok(String::new())
            }
            ["seal", name, number] => {
                self.opened(name)?;
                self.seal(name, number)
            }
            ["seal-held", name, number] => self.seal(name, number),
            ["unseal", name, id, number, page] => {
                if self.opened(name)?.id().to_string() != id {
                    return Err(Refusal::Other("Another"));
                }
                self.unseal(name, number, page)
            }
            ["unseal-held", name, number, page] => self.unseal(name, number, page),
            ["replace"] => {
                self.cluster.replace_cluster_key()?;
                Ok(String::new())
            }
            ["hierarchy", to] => {
                let to = if to == "direct" { Hierarchy::Direct } else { Hierarchy::ClusterKey };
                self.cluster.set_hierarchy(to, &|_| {})?;
                Ok(String::new())
            }
            ["rewrap", to] => {
                self.cluster.rewrap(Wrappers::one(self.home.key(to)), &|_| {})?;
                Ok(String::new())
            }
            ["maintain"] => {
                self.cluster.maintain()?;
                Ok(String::new())
            }
            ["findings"] => Ok(self.cluster.keystore_findings().join(",")),
            ["disable"] => {
                self.cluster.disable()?;
                Ok(String::new())
            }
            ["disabled"] => Ok(self.cluster.is_disabled().to_string()),
            ["retry"] => {
                self.cluster.retry()?;
                Ok(String::new())
            }
            ["new-file", name, file] => {
                let options = PageFileOptions::new().page_size(512);
                let made = self.opened(name)?.create_page_file(file, options)?;
                self.files.insert(file.to_owned(), made);
                Ok(String::new())
            }
            ["open-file", name, file] => {
                let opened = self.opened(name)?.page_file(file)?;
                let pages = opened.pages().to_string();
                self.files.insert(file.to_owned(), opened);
                Ok(pages)
            }
            ["close-file", file] => {
                self.files.remove(file);
                Ok(String::new())
            }
            ["append", file] => self.append(file),
            ["read", file, page] => {
                let file = self.files.get(file).ok_or(Refusal::Other("NotHeld"))?;
                let mut payload = vec![0; file.payload_len()];
                let read = file.read(page.parse().unwrap(), &mut payload)?;
                Ok((read == Read::Page && payload.iter().all(|byte| *byte == 5)).to_string())
            }
            _ => Err(Refusal::Other("Misunderstood")),
        }
    }

    fn note(&mut self, name: &str, database: Database) -> Answer {
        let answer = database.id().to_string();
        if self.open.get(name).is_some_and(|open| open.id() != database.id()) {
            self.ciphers.remove(name);
        }
        self.open.insert(name.to_owned(), database);
        Ok(answer)
    }

    /// Opened anew: looks at what the others did.
    fn opened(&mut self, name: &str) -> Result<Database, Refusal> {
        let opened = self.cluster.database(name).inspect_err(|_| {
            self.open.remove(name);
            self.ciphers.remove(name);
        })?;
        self.note(name, opened.clone())?;
        Ok(opened)
    }

    /// As it was opened, without a look.
    fn held(&self, name: &str) -> Result<&Database, Refusal> {
        self.open.get(name).ok_or(Refusal::Other("NotHeld"))
    }

    fn cipher(&mut self, name: &str) -> Result<PageCipher, Refusal> {
        if let Some(cipher) = self.ciphers.get(name) {
            return Ok(cipher.clone());
        }
        let cipher = self.held(name)?.cipher()?;
        self.ciphers.insert(name.to_owned(), cipher.clone());
        Ok(cipher)
    }

    fn seal(&mut self, name: &str, number: &str) -> Answer {
        let cipher = self.cipher(name)?;
        let mut page = [0; PAGE];
        page[..PAYLOAD].copy_from_slice(&payload(number));
        cipher.seal_in_place(&context(number), &mut page)?;
        let id = self.held(name)?.id();
        // docs/FORMAT.md, "trailer": the generation is 3 bytes, 4 before the end.
        let sealed = u32::from_le_bytes([page[PAGE - 4], page[PAGE - 3], page[PAGE - 2], 0]);
        Ok(format!("{id} {sealed} {}", hex(&page)))
    }

    fn unseal(&mut self, name: &str, number: &str, page: &str) -> Answer {
        let cipher = self.cipher(name)?;
        let mut page = from_hex(page);
        cipher.open_in_place(&context(number), &mut page)?;
        if page[..PAYLOAD] == payload(number) { Ok(String::new()) } else { Err(Refusal::Other("OtherContent")) }
    }

    fn append(&mut self, file: &str) -> Answer {
        let file = self.files.get(file).ok_or(Refusal::Other("NotHeld"))?;
        let mut appender = file.append()?;
        appender.write(&Inline, &vec![5; file.payload_len()])?;
        Ok(appender.finish()?.to_string())
    }
}

fn generation(number: &str) -> Generation {
    Generation::new(number.parse().unwrap()).unwrap()
}

fn context(number: &str) -> PageContext {
    PageContext::page(FileId::new(1), number.parse().unwrap())
}

fn payload(number: &str) -> [u8; PAYLOAD] {
    [number.parse::<u64>().unwrap() as u8; PAYLOAD]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2);
    digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}
