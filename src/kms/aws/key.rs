//! [`KeyName`]: the ways to name a KMS key, and which key a Decrypt must name for what was wrapped before.

use std::fmt;

/// How the master key was named in the configuration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct KeyName {
    text: String,
    form: Form,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Form {
    /// `1234abcd-...` or `mrk-...`
    Id,
    /// `arn:aws:kms:REGION:ACCOUNT:key/ID`
    Arn(KeyArn),
    /// `alias/NAME`
    Alias,
    /// `arn:aws:kms:REGION:ACCOUNT:alias/NAME`
    AliasArn(Place),
}

/// Where a key or an alias is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Place {
    partition: String,
    region: String,
    account: String,
}

/// The ARN of a key, as KMS reports it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct KeyArn {
    place: Place,
    id: String,
}

impl KeyName {
    /// # Errors
    /// What is wrong with it, as a phrase that follows the text.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let form = if text.is_empty() {
            return Err("is empty".into());
        } else if text.starts_with("arn:") {
            let (place, resource) = Place::parse(text)?;
            match resource.split_once('/') {
                Some(("key", id)) => Form::Arn(KeyArn { place, id: key_id(id)? }),
                Some(("alias", name)) => {
                    alias_name(name)?;
                    Form::AliasArn(place)
                }
                _ => return Err("is an ARN of neither a key (key/ID) nor an alias (alias/NAME)".into()),
            }
        } else if let Some(name) = text.strip_prefix("alias/") {
            alias_name(name)?;
            Form::Alias
        } else {
            key_id(text)?;
            Form::Id
        };
        Ok(Self { text: text.into(), form })
    }

    /// As it was named, and as calls name it.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// The name that is stored beside each wrapped key. A key id and the key's ARN are the same key, and so are the replicas
    /// of a multi-region key, whose ids are equal; an alias is whatever it points to.
    pub(super) fn stored(&self) -> &str {
        match &self.form {
            Form::Arn(arn) => &arn.id,
            Form::Id | Form::Alias | Form::AliasArn(_) => &self.text,
        }
    }

    /// Whether only AWS knows the account that it is in, and it may point to any key there.
    pub(super) fn lacks_account(&self) -> bool {
        self.form == Form::Alias
    }

    pub(super) fn is_alias(&self) -> bool {
        matches!(self.form, Form::Alias | Form::AliasArn(_))
    }

    /// The region that the name gives away.
    pub(super) fn region(&self) -> Option<&str> {
        match &self.form {
            Form::Arn(arn) => Some(&arn.place.region),
            Form::AliasArn(place) => Some(&place.region),
            Form::Id | Form::Alias => None,
        }
    }

    /// Whether `arn` is this key; for an alias, whether it may point there, seen from `region`.
    pub(super) fn may_be(&self, arn: &KeyArn, region: &str) -> bool {
        match &self.form {
            Form::Id => arn.id == self.text,
            Form::Arn(own) => own.id == arn.id && own.place.reaches(&arn.place, arn.is_multi_region()),
            Form::AliasArn(place) => place.reaches(&arn.place, arn.is_multi_region()),
            Form::Alias => arn.place.region == region || arn.is_multi_region(),
        }
    }

    /// Whether what was wrapped by `arn` was wrapped by this very key, as far as its name tells: never for an alias.
    pub(super) fn is(&self, arn: &KeyArn) -> bool {
        !self.is_alias() && self.may_be(arn, "")
    }

    /// The key that unwraps what `recorded` wrapped: this one. Of an alias, the recorded one, because the alias may have been
    /// pointed elsewhere since; a multi-region key is named in the region of the call.
    ///
    /// # Errors
    /// If this key cannot have wrapped it.
    pub(super) fn that_unwraps(&self, recorded: &KeyArn, region: &str) -> Result<String, String> {
        if !self.may_be(recorded, region) {
            let place = if region.is_empty() { String::new() } else { format!(" in {region}") };
            return Err(format!("it was wrapped by {recorded}, and this is {}{place}", self.text));
        }
        Ok(match self.is_alias() {
            true => recorded.in_region(region).to_string(),
            false => self.text.clone(),
        })
    }
}

impl Place {
    /// Takes `arn:PARTITION:kms:REGION:ACCOUNT:RESOURCE` apart.
    fn parse(text: &str) -> Result<(Self, &str), String> {
        let parts: Vec<&str> = text.splitn(6, ':').collect();
        let &["arn", partition, service, region, account, resource] = &parts[..] else {
            return Err("is no ARN: it has the form arn:aws:kms:REGION:ACCOUNT:key/ID".into());
        };
        if service != "kms" {
            return Err(format!("is an ARN of the service {service:?}, not of kms"));
        }
        if !partition.starts_with("aws") || !is_region(partition) {
            return Err(format!("has the partition {partition:?}, which is none (aws, aws-cn, aws-us-gov, ...)"));
        }
        if !is_region(region) {
            return Err(format!("has the region {region:?}, which is none"));
        }
        if account.len() != 12 || !account.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(format!("has the account {account:?}, which has not 12 digits"));
        }
        Ok((Self { partition: partition.into(), region: region.into(), account: account.into() }, resource))
    }

    /// Whether a key at `other` can be used as one of this place: replicas are of one account and partition.
    fn reaches(&self, other: &Self, multi_region: bool) -> bool {
        self.partition == other.partition
            && self.account == other.account
            && (self.region == other.region || multi_region)
    }
}

impl KeyArn {
    /// `None` for anything but the ARN of a key.
    pub(super) fn parse(text: &str) -> Option<Self> {
        match KeyName::parse(text).ok()?.form {
            Form::Arn(arn) => Some(arn),
            _ => None,
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Whether it is the same key as `other`, or the same multi-region key in another region.
    pub(super) fn is_or_replicates(&self, other: &Self) -> bool {
        *self == other.in_region(&self.place.region)
    }

    pub(super) fn is_of_account_of(&self, other: &Self) -> bool {
        self.place.partition == other.place.partition && self.place.account == other.place.account
    }

    fn is_multi_region(&self) -> bool {
        self.id.starts_with("mrk-")
    }

    /// The replica in `region` of a multi-region key; of any other, the key itself.
    fn in_region(&self, region: &str) -> Self {
        let mut replica = self.clone();
        if self.is_multi_region() && !region.is_empty() {
            replica.place.region = region.into();
        }
        replica
    }
}

impl fmt::Display for KeyArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { partition, region, account } = &self.place;
        write!(f, "arn:{partition}:kms:{region}:{account}:key/{}", self.id)
    }
}

/// Whether it can be the name of a region: `eu-central-1`.
pub(super) fn is_region(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=32).contains(&text.len()) && text.bytes().all(allowed)
}

fn key_id(text: &str) -> Result<String, String> {
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    let is_uuid = |text: &str| {
        let groups: Vec<&str> = text.split('-').collect();
        groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12]) && groups.iter().all(|group| digits(group))
    };
    let sound = match text.strip_prefix("mrk-") {
        Some(rest) => (rest.len() == 32 && digits(rest)) || is_uuid(rest),
        None => is_uuid(text),
    };
    match sound {
        true => Ok(text.into()),
        false => Err(format!(
            "names the key {text:?}, which is no key id (1234abcd-12ab-34cd-56ef-1234567890ab, or mrk- and 32 hex digits); \
             an alias is written alias/NAME"
        )),
    }
}

fn alias_name(name: &str) -> Result<(), String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"/_-".contains(&byte);
    match (1..=250).contains(&name.len()) && name.bytes().all(allowed) {
        true => Ok(()),
        false => Err(format!("names the alias {name:?}: 1 to 250 letters, digits, '/', '_' and '-' are allowed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "1234abcd-12ab-34cd-56ef-1234567890ab";
    const MRK: &str = "mrk-1234abcd12ab34cd56ef1234567890ab";

    fn arn(region: &str, account: &str, id: &str) -> String {
        format!("arn:aws:kms:{region}:{account}:key/{id}")
    }

    fn key(region: &str, account: &str, id: &str) -> KeyArn {
        KeyArn::parse(&arn(region, account, id)).unwrap()
    }

    const HERE: &str = "eu-west-1";
    const THERE: &str = "us-east-1";
    const OURS: &str = "111122223333";
    const OTHERS: &str = "444455556666";

    #[test]
    fn every_form_is_taken_and_an_id_and_its_arn_are_stored_as_one_key() {
        let moto = "mrk-6ac6ce2c-5003-4beb-b613-32e94dcd1ece";
        for id in [ID, MRK, moto] {
            for text in [id.to_owned(), arn(HERE, OURS, id), arn(THERE, OURS, id)] {
                let name = KeyName::parse(&text).unwrap();
                assert_eq!((name.stored(), name.text(), name.is_alias()), (id, &text[..], false));
            }
        }
        for text in ["alias/pageseal", "alias/a/b_c-1", "arn:aws-cn:kms:cn-north-1:111122223333:alias/x"] {
            let name = KeyName::parse(text).unwrap();
            assert_eq!((name.stored(), name.text(), name.is_alias()), (text, text, true));
        }
        assert_eq!(KeyName::parse(&arn(HERE, OURS, ID)).unwrap().region(), Some(HERE));
        assert_eq!(KeyName::parse("alias/x").unwrap().region(), None);
    }

    #[test]
    fn what_names_no_key_is_refused_with_what_is_wrong() {
        let cases = [
            ("", "is empty"),
            ("pageseal", "an alias is written alias/NAME"),
            ("1234ABCD-12ab-34cd-56ef-1234567890ab", "no key id"),
            ("1234abcd-12ab-34cd-56ef-1234567890a", "no key id"),
            ("mrk-1234", "no key id"),
            (" alias/x", "no key id"),
            ("alias/", "the alias \"\""),
            ("alias/a b", "are allowed"),
            ("arn:aws:kms:eu-west-1:111122223333", "is no ARN"),
            ("arn:aws:s3:eu-west-1:111122223333:key/x", "the service \"s3\""),
            ("arn:gcp:kms:eu-west-1:111122223333:key/x", "the partition"),
            ("arn:aws:kms::111122223333:key/x", "the region \"\""),
            ("arn:aws:kms:EU:111122223333:key/x", "the region \"EU\""),
            ("arn:aws:kms:eu-west-1:1111:key/x", "12 digits"),
            ("arn:aws:kms:eu-west-1:111122223333:key/x", "no key id"),
            ("arn:aws:kms:eu-west-1:111122223333:grant/x", "neither a key"),
            ("arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab:x", "no key id"),
        ];
        for (text, expected) in cases {
            let error = KeyName::parse(text).unwrap_err();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
        for text in [ID, "alias/x", "", "arn:aws:kms:eu-west-1:111122223333:alias/x"] {
            assert_eq!(KeyArn::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_key_unwraps_what_it_wrapped_and_nothing_else() {
        let by_id = KeyName::parse(ID).unwrap();
        let by_arn = KeyName::parse(&arn(HERE, OURS, ID)).unwrap();
        for name in [&by_id, &by_arn] {
            assert_eq!(name.that_unwraps(&key(HERE, OURS, ID), HERE).unwrap(), name.text());
            let other = key(HERE, OURS, "00000000-12ab-34cd-56ef-1234567890ab");
            assert!(name.that_unwraps(&other, HERE).is_err() && !name.is(&other));
            assert!(name.is(&key(HERE, OURS, ID)));
        }
        assert!(by_arn.that_unwraps(&key(THERE, OURS, ID), HERE).is_err());
        assert!(by_arn.that_unwraps(&key(HERE, OTHERS, ID), HERE).is_err());
    }

    #[test]
    fn a_multi_region_key_is_one_key_in_its_own_account_only() {
        let by_id = KeyName::parse(MRK).unwrap();
        let by_arn = KeyName::parse(&arn(HERE, OURS, MRK)).unwrap();
        for name in [&by_id, &by_arn] {
            assert_eq!(name.that_unwraps(&key(THERE, OURS, MRK), HERE).unwrap(), name.text());
        }
        assert!(by_arn.that_unwraps(&key(THERE, OTHERS, MRK), HERE).is_err());
    }

    #[test]
    fn an_alias_unwraps_by_the_recorded_key_in_the_region_of_the_call() {
        let bare = KeyName::parse("alias/x").unwrap();
        let full = KeyName::parse("arn:aws:kms:eu-west-1:111122223333:alias/x").unwrap();
        for name in [&bare, &full] {
            assert_eq!(name.that_unwraps(&key(HERE, OURS, ID), HERE).unwrap(), arn(HERE, OURS, ID));
            assert_eq!(name.that_unwraps(&key(THERE, OURS, MRK), HERE).unwrap(), arn(HERE, OURS, MRK));
            assert!(name.that_unwraps(&key(THERE, OURS, ID), HERE).is_err());
            assert!(!name.is(&key(HERE, OURS, ID)));
        }
        assert!(full.that_unwraps(&key(HERE, OTHERS, ID), HERE).is_err());
    }
}
