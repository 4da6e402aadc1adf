//! [`copies_left`]: how many copies of a key a wrapper leaves in this process's memory.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::KeyService;
use super::trial::{Binding, Sample};
use crate::format::wrapped::PAYLOAD_KEY_AT;
use crate::secret::KeyPayload;

/// What [`copies_left`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Copies {
    /// Places that hold the first 16 bytes of the key.
    pub raw: usize,
    /// Places that hold the base64 digits of the same part of the payload.
    pub base64: usize,
}

/// Wraps a random key `times` times and unwraps it again, drops the payloads, and then searches the writable memory of this
/// process for what is left of it. No other search may run at the same time.
///
/// pageseal wipes its own copies; those in the buffers of an SDK it cannot. They are overwritten as the memory is used again.
///
/// # Errors
/// The wrapper's, or the system's if /proc cannot be read.
pub fn copies_left(service: &dyn KeyService, times: usize) -> Result<Copies, Box<dyn std::error::Error + Send + Sync>> {
    let wrapper = service.wrapper();
    let (payload, needles) = Needles::draw();
    for _ in 0..times {
        let context = || Binding::DATA.context(service.patience());
        let wrapped = wrapper.wrap_key(&payload, &context())?;
        drop(wrapper.unwrap_key(&wrapped, &context())?);
    }
    drop(payload);
    Ok(needles.count()?)
}

/// What is searched for, under a mask: else the search would find itself.
struct Needles {
    raw: [u8; 16],
    base64: [u8; 16],
}

const MASK: u8 = 0xa5;

impl Needles {
    fn draw() -> (KeyPayload, Self) {
        let sample = Sample::new(&Binding::DATA);
        let masked = |bytes: &[u8; KeyPayload::LEN]| {
            let raw = std::array::from_fn(|at| bytes[PAYLOAD_KEY_AT + at] ^ MASK);
            let base64 = std::array::from_fn(|at| base64_digit(bytes, at) ^ MASK);
            Self { raw, base64 }
        };
        let payload = sample.into_payload();
        let needles = payload.with_bytes(masked).expect("this process is not forked");
        (payload, needles)
    }

    fn count(&self) -> io::Result<Copies> {
        const CHUNK: usize = 1 << 20;
        const OVERLAP: usize = 15;
        let memory = File::open("/proc/self/mem")?;
        let mut buffer = vec![0; CHUNK + OVERLAP];
        let own = buffer.as_ptr() as usize..buffer.as_ptr() as usize + buffer.len();
        let mut copies = Copies { raw: 0, base64: 0 };
        // The buffer shows what was read before, and is no place of its own.
        let around =
            |region: Range<usize>| [region.start..region.end.min(own.start), region.start.max(own.end)..region.end];
        for region in writable_regions()?.into_iter().flat_map(around) {
            for begin in region.clone().step_by(CHUNK) {
                let end = region.end.min(begin + CHUNK + OVERLAP);
                // Regions come and go, and some (vvar) cannot be read.
                let Ok(read) = memory.read_at(&mut buffer[..end - begin], begin as u64) else { continue };
                copies.raw += buffer[..read].windows(16).filter(|window| is(window, &self.raw)).count();
                copies.base64 += buffer[..read].windows(16).filter(|window| is(window, &self.base64)).count();
            }
        }
        Ok(copies)
    }
}

fn is(window: &[u8], masked: &[u8; 16]) -> bool {
    window.iter().zip(masked).all(|(byte, masked)| byte ^ MASK == *masked)
}

/// The digit `at` after the first group of three bytes that lies in the key.
fn base64_digit(payload: &[u8; KeyPayload::LEN], at: usize) -> u8 {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = PAYLOAD_KEY_AT.next_multiple_of(3) + at / 4 * 3;
    let bits = u32::from(payload[group]) << 16 | u32::from(payload[group + 1]) << 8 | u32::from(payload[group + 2]);
    ALPHABET[(bits >> (18 - 6 * (at % 4)) & 63) as usize]
}

fn writable_regions() -> io::Result<Vec<Range<usize>>> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let regions = maps.lines().filter_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let address = |digits| usize::from_str_radix(digits, 16).ok();
        rest.starts_with("rw").then_some(address(start)?..address(end)?)
    });
    Ok(regions.collect())
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::super::{Cannot, Fault, Step};
    use super::*;
    use crate::error::KmsError;
    use crate::ids::MasterKeyId;
    use crate::keys::wrapper::{KeyWrapper, WrapContext, WrappedKey};
    use crate::kms::scripted::ScriptedWrapper;

    /// Keeps what it is given, as it is or in base64, or does not.
    #[derive(Clone)]
    struct Keeper(ScriptedWrapper, Keeps, Arc<Mutex<Vec<Vec<u8>>>>);

    #[derive(Clone, Copy)]
    enum Keeps {
        Nothing,
        Raw,
        Base64,
    }

    impl KeyWrapper for Keeper {
        fn id(&self) -> MasterKeyId {
            self.0.id()
        }

        fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
            let kept = key.with_bytes(|bytes| match self.1 {
                Keeps::Nothing => Vec::new(),
                Keeps::Raw => bytes.to_vec(),
                Keeps::Base64 => (0..80).map(|at| base64_digit(bytes, at)).collect(),
            })?;
            self.2.lock().unwrap().push(kept);
            self.0.wrap_key(key, cx)
        }

        fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
            self.0.unwrap_key(key, cx)
        }
    }

    impl KeyService for Keeper {
        fn wrapper(&self) -> Arc<dyn KeyWrapper> {
            Arc::new(self.clone())
        }

        fn perform(&self, _: Step) -> Result<(), Cannot> {
            Err(Cannot::new("not here"))
        }

        fn inflict(&self, _: Fault) -> Result<(), Cannot> {
            Err(Cannot::new("not here"))
        }
    }

    #[test]
    fn what_a_wrapper_keeps_is_found_and_what_it_wipes_is_not() {
        let left = |keeps| {
            let keeper = Keeper(ScriptedWrapper::new("keeper"), keeps, Arc::default());
            copies_left(&keeper, 3).unwrap()
        };
        assert_eq!(left(Keeps::Nothing), Copies { raw: 0, base64: 0 });
        assert_eq!(left(Keeps::Raw), Copies { raw: 3, base64: 0 });
        assert_eq!(left(Keeps::Base64), Copies { raw: 0, base64: 3 });
    }
}
