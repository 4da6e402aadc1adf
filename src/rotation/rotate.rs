//! Rotating a database's data key: a new generation for new seals. Older ones still open what they sealed.

use crate::database::Database;
use crate::error::{Error, ErrorKind, Result};
use crate::format::keystore::Operation;
use crate::format::record::{KeyState, Record};
use crate::ids::Generation;

/// How often a rotation begins anew when other processes rotate the same database.
const TRIES: usize = 8;

impl Database {
    /// Makes a new data key, wrapped and durable before anything is sealed with it. Every seal that begins after this
    /// returned, by any handle of this process, uses it; pages that older generations sealed open as before. Other processes
    /// follow within about a second.
    ///
    /// # Errors
    /// What the key services answered; [`ErrorKind::Invalid`] after 2^24 - 1 generations; [`ErrorKind::Closed`] while the
    /// cluster is disabled; [`ErrorKind::NotFound`] if the database was dropped; what changing the keystore gives.
    pub fn rotate(&self) -> Result<Generation> {
        for _ in 0..TRIES {
            if let Some(generation) = self.try_rotate()? {
                return Ok(generation);
            }
        }
        let message = format!("other processes keep rotating database {}; try again", self.id());
        Err(Error::new(ErrorKind::InUse, message))
    }

    /// `None` if another process was faster.
    fn try_rotate(&self) -> Result<Option<Generation>> {
        let (cluster, id) = (self.cluster(), self.id());
        let _in_flight = cluster.enter()?;
        let last = cluster.look(|keystore, _| {
            let last = keystore.catalogue().generations(id).next_back().cloned();
            last.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("database {id} was dropped")))
        })?;
        let next = Generation::new(last.generation.get() + 1);
        let next = next.ok_or_else(|| Error::invalid(format!("database {id} has had all 2^24 - 1 generations")))?;
        let key = cluster.draw_data_key(next, cluster.options.suite)?;
        // No lock is held while the key service is called.
        let new = cluster.wrap_data_key(&key, id)?;
        let persisted = cluster.append(|keystore, root| {
            let unchanged = keystore.catalogue().generations(id).next_back() == Some(&last);
            if !unchanged || !new.fits(keystore, root) {
                return Ok((Vec::new(), None));
            }
            let (record, hold) = cluster.numbered(new.record, keystore)?;
            Ok((rotation(&last, record), Some(hold)))
        })?;
        let Some(hold) = persisted else { return Ok(None) };
        // It is durable: now it may be used. Another thread that looked for changes may have brought it already.
        let cipher = self.cipher_inner();
        let added = cipher.add_generation(key, Some(hold));
        match added {
            Err(error) if cipher.enter()?.current_generation() < next => Err(error),
            _ => Ok(Some(next)),
        }
    }
}

fn rotation(last: &Record, record: Record) -> Vec<Operation> {
    let mut operations = vec![Operation::Generation(record)];
    if last.state == KeyState::Active {
        let (database, generation) = (last.database, last.generation);
        operations.push(Operation::State { database, generation, state: KeyState::Retired });
    }
    operations
}
