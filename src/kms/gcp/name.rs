//! [`KeyName`]: the resource name of a key, taken apart once.

/// `projects/P/locations/L/keyRings/R/cryptoKeys/K`. Google's limits for each piece:
/// <https://cloud.google.com/kms/docs/resource-hierarchy>.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct KeyName {
    text: String,
    project: String,
    /// The rest, from `locations` on.
    path: String,
}

const SHAPE: &str = "projects/PROJECT/locations/LOCATION/keyRings/KEY_RING/cryptoKeys/KEY";

impl KeyName {
    /// # Errors
    /// Which piece is wrong, and how the name should look.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let wrong = |what: String| format!("{what}; the name of a key looks like {SHAPE}");
        let pieces: Vec<&str> = text.split('/').collect();
        let collections = ["projects", "locations", "keyRings", "cryptoKeys"];
        if let [.., "cryptoKeyVersions", _] = pieces[..] {
            let what = "it names one version of a key: leave /cryptoKeyVersions/N away, the service picks the version";
            return Err(wrong(what.into()));
        }
        for (at, collection) in collections.into_iter().enumerate() {
            let (found, value) = (pieces.get(2 * at), pieces.get(2 * at + 1));
            if found != Some(&collection) {
                return Err(wrong(format!("piece {} must be {collection:?}", 2 * at + 1)));
            }
            let (what, good) = match collection {
                // Ids may be scoped by a domain, `example.com:project`.
                "projects" => ("project", is_made_of(value, 100, ".:-")),
                "locations" => ("location", is_made_of(value, 63, "-")),
                "keyRings" => ("key ring", is_made_of(value, 63, "_-")),
                _ => ("key", is_made_of(value, 63, "_-")),
            };
            if !good {
                return Err(wrong(format!(
                    "the {what} (piece {}) is missing or has characters that none has",
                    2 * at + 2
                )));
            }
        }
        if pieces.len() > 8 {
            return Err(wrong("there is more after the key".into()));
        }
        Ok(Self { text: text.to_owned(), project: pieces[1].to_owned(), path: pieces[2..].join("/") })
    }

    pub(super) fn as_str(&self) -> &str {
        &self.text
    }

    /// The number in the name of a version, if it is a version of this key. A project may be called by its id or by its
    /// number, and which of the two the service answers with is not documented: a number stands for any id.
    pub(super) fn version_in<'a>(&self, name: &'a str) -> Option<&'a str> {
        let (project, rest) = name.strip_prefix("projects/")?.split_once('/')?;
        let (path, version) = rest.rsplit_once("/cryptoKeyVersions/")?;
        let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let same_project = project == self.project || number(project) != number(&self.project);
        (same_project && path == self.path && number(version) && version.len() <= 20).then_some(version)
    }
}

fn is_made_of(value: Option<&&str>, longest: usize, marks: &str) -> bool {
    let good = |value: &&&str| {
        let characters = |c: char| c.is_ascii_alphanumeric() || marks.contains(c);
        // A name of dots only would be a step in the URL's path.
        value.chars().all(characters) && value.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-')
    };
    value.filter(|value| (1..=longest).contains(&value.len())).filter(good).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "projects/my-project/locations/europe-west3/keyRings/ring_1/cryptoKeys/Key-1";

    #[test]
    fn a_good_name_is_kept_as_it_is() {
        for project in ["my-project", "1234567890", "example.com:my-project"] {
            let text = KEY.replace("my-project", project);
            assert_eq!(KeyName::parse(&text).unwrap().as_str(), text);
        }
    }

    #[test]
    fn an_error_says_which_piece_is_wrong() {
        let cases = [
            ("", "piece 1 must be \"projects\""),
            ("my-key", "piece 1 must be \"projects\""),
            ("projects", "the project (piece 2)"),
            ("projects//locations/l/keyRings/r/cryptoKeys/k", "the project (piece 2)"),
            ("projects/../locations/l/keyRings/r/cryptoKeys/k", "the project (piece 2)"),
            ("projects/p/location/l/keyRings/r/cryptoKeys/k", "piece 3 must be \"locations\""),
            ("projects/p/locations/l l/keyRings/r/cryptoKeys/k", "the location (piece 4)"),
            ("projects/p/locations/l/keyrings/r/cryptoKeys/k", "piece 5 must be \"keyRings\""),
            ("projects/p/locations/l/keyRings/r.s/cryptoKeys/k", "the key ring (piece 6)"),
            ("projects/p/locations/l/keyRings/r", "piece 7 must be \"cryptoKeys\""),
            ("projects/p/locations/l/keyRings/r/cryptoKeys", "the key (piece 8)"),
            ("projects/p/locations/l/keyRings/r/cryptoKeys/k?x", "the key (piece 8)"),
            ("projects/p/locations/l/keyRings/r/cryptoKeys/k/", "more after the key"),
            ("projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/3", "leave /cryptoKeyVersions/N away"),
            ("//cloudkms.googleapis.com/projects/p/locations/l/keyRings/r/cryptoKeys/k", "piece 1 must be"),
        ];
        for (name, expected) in cases {
            let text = KeyName::parse(name).unwrap_err();
            assert!(text.contains(expected) && text.contains("projects/PROJECT/"), "{name}: {text}");
        }
        let long = KEY.replace("ring_1", &"r".repeat(64));
        assert!(KeyName::parse(&long).unwrap_err().contains("key ring"));
    }

    #[test]
    fn only_a_version_of_the_same_key_has_a_number() {
        let key = KeyName::parse(KEY).unwrap();
        let version = |name: &str| key.version_in(name).map(str::to_owned);
        assert_eq!(version(&format!("{KEY}/cryptoKeyVersions/12")).as_deref(), Some("12"));
        let by_number = KEY.replace("my-project", "1234567890");
        assert_eq!(version(&format!("{by_number}/cryptoKeyVersions/3")).as_deref(), Some("3"));
        let others = [
            KEY.into(),
            format!("{KEY}/cryptoKeyVersions/"),
            format!("{KEY}/cryptoKeyVersions/1x"),
            format!("{KEY}/cryptoKeyVersions/{}", "1".repeat(21)),
            format!("{KEY}2/cryptoKeyVersions/1"),
            format!("{}/cryptoKeyVersions/1", KEY.replace("my-project", "other-project")),
            format!("{}/cryptoKeyVersions/1", KEY.replace("europe-west3", "global")),
            format!("x{KEY}/cryptoKeyVersions/1"),
        ];
        for other in others {
            assert_eq!(version(&other), None, "{other}");
        }
        let numbered = KeyName::parse(&by_number).unwrap();
        assert_eq!(numbered.version_in(&format!("{}/cryptoKeyVersions/1", KEY.replace("my-project", "42"))), None);
        assert_eq!(numbered.version_in(&format!("{KEY}/cryptoKeyVersions/1")), Some("1"));
    }
}
