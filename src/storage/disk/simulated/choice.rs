//! Who decides what a power cut leaves: a seed, or everything one after the other.

/// Decides between `options` outcomes; 0 is the oldest, the last is the newest.
pub(super) trait Choose {
    fn choose(&mut self, options: usize) -> usize;

    /// Begins the decisions about another file or directory, which have nothing to do with those before.
    fn next_subject(&mut self) {}

    /// Whether names that are made and removed may become durable out of order.
    fn reorders(&mut self) -> bool {
        false
    }
}

/// Nothing that is not surely durable is there.
pub(super) struct AllOld;

impl Choose for AllOld {
    fn choose(&mut self, _: usize) -> usize {
        0
    }
}

/// Everything was written back early.
pub(super) struct AllNew;

impl Choose for AllNew {
    fn choose(&mut self, options: usize) -> usize {
        options - 1
    }
}

/// Decides by SplitMix64. Leans to the old or the new for whole files at a time, because fair coins alone would nearly
/// never leave one file old and another new.
pub(super) struct Seeded {
    state: u64,
    lean: u64,
}

impl Seeded {
    pub(super) fn new(seed: u64) -> Self {
        Self { state: seed, lean: 0 }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        // The remainder is below `bound`, and the bias does not matter to a test.
        (self.next() % bound as u64) as usize
    }
}

impl Choose for Seeded {
    fn choose(&mut self, options: usize) -> usize {
        let leans = self.below(8) != 0;
        match self.lean {
            1 if leans => 0,
            2 if leans => options - 1,
            _ => self.below(options),
        }
    }

    fn next_subject(&mut self) {
        self.lean = self.next() % 3;
    }

    fn reorders(&mut self) -> bool {
        self.below(4) == 0
    }
}

/// Walks through all decisions, the last one first.
#[derive(Default)]
struct Every {
    /// Which option was taken, and of how many.
    taken: Vec<(usize, usize)>,
    at: usize,
}

impl Every {
    /// False if there are no more.
    fn advance(&mut self) -> bool {
        self.at = 0;
        while let Some((option, options)) = self.taken.pop() {
            if option + 1 < options {
                self.taken.push((option + 1, options));
                return true;
            }
        }
        false
    }
}

impl Choose for Every {
    fn choose(&mut self, options: usize) -> usize {
        if options == 1 {
            return 0;
        }
        if self.at == self.taken.len() {
            self.taken.push((0, options));
        }
        self.at += 1;
        self.taken[self.at - 1].0
    }
}

/// What `make` makes under all possible decisions; `None` if there are more than `limit`.
pub(super) fn every<T>(limit: usize, mut make: impl FnMut(&mut dyn Choose) -> T) -> Option<Vec<T>> {
    let mut choices = Every::default();
    let mut made = Vec::new();
    loop {
        if made.len() == limit {
            return None;
        }
        made.push(make(&mut choices));
        if !choices.advance() {
            return Some(made);
        }
    }
}
