//! [`VaultTransitBuilder`], and what it takes from the environment.

use std::fmt;
use std::path::{Path, PathBuf};

use super::auth::VaultAuth;
use super::http::{Http, misconfigured};
use super::{Parts, VaultTransit};
use crate::error::Result;

/// Settings of a [`VaultTransit`]; see [`VaultTransit::builder`].
#[derive(Clone)]
pub struct VaultTransitBuilder {
    address: String,
    key: String,
    auth: VaultAuth,
    mount: String,
    namespace: Option<String>,
    ca_file: Option<PathBuf>,
    plain_allowed: bool,
}

impl VaultTransitBuilder {
    pub(super) fn new(address: String, key: String, auth: VaultAuth) -> Self {
        let mount = "transit".into();
        Self { address, key, auth, mount, namespace: None, ca_file: None, plain_allowed: false }
    }

    /// Where the transit engine is mounted; `transit` if not set.
    pub fn mount(mut self, mount: impl Into<String>) -> Self {
        self.mount = mount.into();
        self
    }

    /// The namespace that the engine, and the auth method, are in; none if not set. `a/b` is a namespace in a namespace.
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = Some(namespace.into());
        self
    }

    /// A file in PEM form, of at most 4 MiB, with the certificate authorities to trust, and no others. Without it, those of
    /// the system are trusted. It is read when the wrapper is made, and not again: before the server gets a certificate of
    /// another authority, put both authorities into the file and make the wrapper anew (restart).
    pub fn ca_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.ca_file = Some(path.into());
        self
    }

    /// Takes an address without TLS that is not of this machine. **Whoever can read the network then learns the token and the
    /// keys.** For networks that encrypt by other means only.
    pub fn dangerous_allow_plain_http(mut self) -> Self {
        self.plain_allowed = true;
        self
    }

    /// Checks the settings and reads the certificates. Nothing is sent before the first call.
    ///
    /// # Errors
    /// [`ErrorKind::Misconfigured`](crate::ErrorKind::Misconfigured), naming the setting and its environment variable.
    pub fn build(self) -> Result<VaultTransit> {
        let mount = checked_path("mount of the transit engine (PAGESEAL_VAULT_MOUNT)", &self.mount)?;
        let key = checked_key(&self.key)?;
        let namespace = match self.namespace.as_deref().map(|name| name.trim_matches('/')) {
            None | Some("" | "root") => None,
            Some(name) => Some(checked_path("namespace (VAULT_NAMESPACE)", name)?),
        };
        let auth = self.auth.checked()?;
        let http = Http::new(&self.address, namespace.as_deref(), self.ca_file, self.plain_allowed)?;
        Ok(VaultTransit::assemble(Parts { http, auth, mount, key, namespace }))
    }

    /// Reads the settings by `variable`.
    pub(super) fn from_variables(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        // As OpenBao's own clients do: its own name first.
        let either = |name: &str| set(&format!("BAO_{name}")).or_else(|| set(&format!("VAULT_{name}")));
        let refused: [(&str, &[&str], &str); 9] = [
            (
                "SKIP_VERIFY",
                &["", "0", "f", "false"],
                "a server that anybody can play would be given the keys; use VAULT_CACERT",
            ),
            ("CAPATH", &[""], "give one file in VAULT_CACERT"),
            ("CACERT_BYTES", &[""], "give a file in VAULT_CACERT"),
            ("CLIENT_CERT", &[""], "client certificates are not sent"),
            ("CLIENT_KEY", &[""], "client certificates are not sent"),
            ("AGENT_ADDR", &[""], "give the address to ask in VAULT_ADDR"),
            ("PROXY_ADDR", &[""], "give a proxy in HTTPS_PROXY"),
            ("HTTP_PROXY", &[""], "give a proxy in HTTPS_PROXY"),
            ("TLS_SERVER_NAME", &[""], "the certificate must name the host in VAULT_ADDR"),
        ];
        for (name, harmless, why) in refused {
            let value = either(name).unwrap_or_default().to_lowercase();
            if !harmless.contains(&value.trim()) {
                return Err(misconfigured(format!("VAULT_{name} is set, and not supported: {why}; unset it")));
            }
        }
        let address = either("ADDR").ok_or_else(|| {
            misconfigured("VAULT_ADDR is not set: the address of the server, such as https://vault.example.com:8200")
        })?;
        let key = set("PAGESEAL_VAULT_KEY").ok_or_else(|| {
            misconfigured("PAGESEAL_VAULT_KEY is not set: the name of the key in the transit engine, such as pageseal")
        })?;
        let mut builder = Self::new(address, key, auth_from(&set, &either)?);
        if let Some(mount) = set("PAGESEAL_VAULT_MOUNT") {
            builder = builder.mount(mount);
        }
        builder.namespace = either("NAMESPACE");
        builder.ca_file = either("CACERT").map(PathBuf::from);
        Ok(builder)
    }
}

impl fmt::Debug for VaultTransitBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, mount, namespace, auth, .. } = self;
        let mut shown = f.debug_struct("VaultTransitBuilder");
        shown.field("key", key).field("mount", mount).field("namespace", namespace).field("auth", auth);
        shown.finish_non_exhaustive()
    }
}

type Variable<'a> = &'a dyn Fn(&str) -> Option<String>;

/// A login method, if one is named; or else a token.
fn auth_from(set: Variable<'_>, either: Variable<'_>) -> Result<VaultAuth> {
    let methods = (set("PAGESEAL_VAULT_ROLE_ID"), set("PAGESEAL_VAULT_KUBERNETES_ROLE"));
    whole(set, methods.0.is_some(), methods.1.is_some())?;
    let auth = match methods {
        (Some(_), Some(_)) => {
            return Err(misconfigured(
                "both PAGESEAL_VAULT_ROLE_ID (AppRole) and PAGESEAL_VAULT_KUBERNETES_ROLE are set: unset one",
            ));
        }
        (Some(role_id), None) => match (set("PAGESEAL_VAULT_SECRET_ID"), set("PAGESEAL_VAULT_SECRET_ID_FILE")) {
            (Some(secret), None) => VaultAuth::app_role(role_id, secret),
            (None, Some(file)) => VaultAuth::app_role_with_secret_file(role_id, file),
            _ => {
                return Err(misconfigured(
                    "PAGESEAL_VAULT_ROLE_ID needs one of PAGESEAL_VAULT_SECRET_ID and PAGESEAL_VAULT_SECRET_ID_FILE, such \
                     as /run/secrets/vault-secret-id",
                ));
            }
        },
        (None, Some(role)) => {
            let auth = VaultAuth::kubernetes(role);
            match set("PAGESEAL_VAULT_KUBERNETES_JWT_FILE") {
                Some(file) => auth.jwt_file(file),
                None => auth,
            }
        }
        (None, None) => return token_from(set, either),
    };
    Ok(match set("PAGESEAL_VAULT_AUTH_MOUNT") {
        Some(mount) => auth.mount(mount),
        None => auth,
    })
}

/// No part of a method without the method: else a misspelt name would lead to other credentials than those that are meant,
/// such as whoever's `~/.vault-token`.
fn whole(set: Variable<'_>, app_role: bool, kubernetes: bool) -> Result<()> {
    let (role_id, role) = ("PAGESEAL_VAULT_ROLE_ID", "PAGESEAL_VAULT_KUBERNETES_ROLE");
    let either = format!("{role_id} nor {role}");
    for (name, used, missing) in [
        ("PAGESEAL_VAULT_SECRET_ID", app_role, role_id),
        ("PAGESEAL_VAULT_SECRET_ID_FILE", app_role, role_id),
        ("PAGESEAL_VAULT_KUBERNETES_JWT_FILE", kubernetes, role),
        ("PAGESEAL_VAULT_AUTH_MOUNT", app_role || kubernetes, either.as_str()),
    ] {
        if !used && set(name).is_some() {
            let not = if missing == either { "neither" } else { "not" };
            return Err(misconfigured(format!(
                "{name} is set, but {not} {missing}, which it belongs to: set it, or unset {name}"
            )));
        }
    }
    if (app_role || kubernetes) && set("PAGESEAL_VAULT_TOKEN_FILE").is_some() {
        return Err(misconfigured("PAGESEAL_VAULT_TOKEN_FILE is set, and a login method too: unset one"));
    }
    Ok(())
}

fn token_from(set: Variable<'_>, either: Variable<'_>) -> Result<VaultAuth> {
    if let Some(file) = set("PAGESEAL_VAULT_TOKEN_FILE") {
        return Ok(VaultAuth::token_file(file));
    }
    if let Some(token) = either("TOKEN") {
        return Ok(VaultAuth::token(token));
    }
    let home = set("HOME").map(|home| Path::new(&home).join(".vault-token"));
    match home.filter(|file| file.is_file()) {
        Some(file) => Ok(VaultAuth::token_file(file)),
        None => Err(misconfigured(
            "no credentials for Vault: set PAGESEAL_VAULT_ROLE_ID with PAGESEAL_VAULT_SECRET_ID_FILE, or \
             PAGESEAL_VAULT_KUBERNETES_ROLE, or PAGESEAL_VAULT_TOKEN_FILE, or VAULT_TOKEN (there is no ~/.vault-token)",
        )),
    }
}

/// A path of one or more segments, without slashes around it. What else stood in it could lead a request elsewhere.
pub(super) fn checked_path(what: &str, path: &str) -> Result<String> {
    let path = path.trim_matches('/');
    let segment = |segment: &str| {
        let plain = segment.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte));
        plain && !segment.is_empty() && segment.bytes().any(|byte| byte != b'.')
    };
    if path.len() <= 512 && path.split('/').all(segment) {
        return Ok(path.to_owned());
    }
    Err(misconfigured(format!(
        "the {what} is {:?}, which is no path of letters, digits, '-', '_', '.' and '~'",
        super::answer::quoted(path)
    )))
}

/// What the server takes for a name: letters, digits, '_' and '-' and '.', the last two neither first nor last.
fn checked_key(key: &str) -> Result<String> {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let bytes = key.as_bytes();
    let ends = bytes.first().zip(bytes.last()).is_some_and(|(&first, &last)| word(first) && word(last));
    if ends && key.len() <= 255 && bytes.iter().all(|&byte| word(byte) || b"-.".contains(&byte)) {
        return Ok(key.to_owned());
    }
    Err(misconfigured(format!(
        "the name of the key (PAGESEAL_VAULT_KEY) is {:?}, and must be of letters, digits, '_', '-' and '.', such as pageseal; \
         the mount goes into PAGESEAL_VAULT_MOUNT",
        super::answer::quoted(key)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::keys::wrapper::KeyWrapper;

    const ADDR: (&str, &str) = ("VAULT_ADDR", "http://127.0.0.1:8200");
    const KEY: (&str, &str) = ("PAGESEAL_VAULT_KEY", "pageseal");
    const TOKEN: (&str, &str) = ("VAULT_TOKEN", "s.secret-token");
    const ROLE: (&str, &str) = ("PAGESEAL_VAULT_ROLE_ID", "role");

    fn from(variables: &[(&str, &str)]) -> Result<VaultTransit> {
        let variable = |name: &str| {
            let found = variables.iter().rev().find(|variable| variable.0 == name);
            found.map(|variable| variable.1.to_owned())
        };
        VaultTransitBuilder::from_variables(&variable)?.build()
    }

    #[test]
    fn the_well_known_variables_make_a_wrapper() {
        let id = |more: &[(&str, &str)]| from(&[&[ADDR, KEY, TOKEN], more].concat()).unwrap().id().to_string();
        assert_eq!(id(&[]), "vault-transit:transit/keys/pageseal");
        assert_eq!(id(&[("PAGESEAL_VAULT_MOUNT", "/kms/transit/")]), "vault-transit:kms/transit/keys/pageseal");
        assert_eq!(id(&[("VAULT_NAMESPACE", "team/a/")]), "vault-transit:team/a/transit/keys/pageseal");
        assert_eq!(id(&[("VAULT_NAMESPACE", "a"), ("BAO_NAMESPACE", "b")]), "vault-transit:b/transit/keys/pageseal");
        assert_eq!(id(&[("VAULT_NAMESPACE", "root")]), "vault-transit:transit/keys/pageseal");
        assert_eq!(id(&[("VAULT_SKIP_VERIFY", "false"), ("VAULT_CAPATH", "")]), "vault-transit:transit/keys/pageseal");
        assert!(from(&[ADDR, KEY, ROLE, ("PAGESEAL_VAULT_SECRET_ID_FILE", "/f")]).is_ok());
        assert!(from(&[ADDR, KEY, ("PAGESEAL_VAULT_KUBERNETES_ROLE", "r")]).is_ok());
        let bao = from(&[("BAO_ADDR", "http://[::1]:1"), ("VAULT_ADDR", "nonsense"), KEY, TOKEN]).unwrap();
        assert!(format!("{bao:?}").contains("[::1]"), "{bao:?}");
    }

    #[test]
    fn a_wrong_or_missing_variable_is_named_with_what_to_do() {
        let all = [ADDR, KEY, TOKEN];
        let with = |more: (&'static str, &'static str)| [&all[..], &[more]].concat();
        const SECRET: (&str, &str) = ("PAGESEAL_VAULT_SECRET_ID", "secret-token");
        const FILE: (&str, &str) = ("PAGESEAL_VAULT_SECRET_ID_FILE", "/f");
        const JWT: (&str, &str) = ("PAGESEAL_VAULT_KUBERNETES_JWT_FILE", "/f");
        const KUBERNETES: (&str, &str) = ("PAGESEAL_VAULT_KUBERNETES_ROLE", "r");
        for (variables, parts) in [
            (with(SECRET), ["PAGESEAL_VAULT_SECRET_ID is set", "PAGESEAL_VAULT_ROLE_ID"]),
            (with(FILE), ["PAGESEAL_VAULT_SECRET_ID_FILE is set", "PAGESEAL_VAULT_ROLE_ID"]),
            (with(JWT), ["PAGESEAL_VAULT_KUBERNETES_JWT_FILE is set", "PAGESEAL_VAULT_KUBERNETES_ROLE"]),
            (with(("PAGESEAL_VAULT_AUTH_MOUNT", "m")), ["PAGESEAL_VAULT_AUTH_MOUNT is set", "PAGESEAL_VAULT_ROLE_ID"]),
            ([&all[..], &[KUBERNETES, SECRET]].concat(), ["PAGESEAL_VAULT_SECRET_ID is set", "PAGESEAL_VAULT_ROLE_ID"]),
            ([&all[..], &[ROLE, SECRET, JWT]].concat(), ["_JWT_FILE is set", "PAGESEAL_VAULT_KUBERNETES_ROLE"]),
            ([&all[..], &[ROLE, SECRET, ("PAGESEAL_VAULT_TOKEN_FILE", "/f")]].concat(), ["TOKEN_FILE", "unset one"]),
            (with(("VAULT_CLIENT_KEY", "/k")), ["VAULT_CLIENT_KEY", "unset it"]),
            (with(("VAULT_AGENT_ADDR", "http://127.0.0.1:1")), ["VAULT_AGENT_ADDR", "VAULT_ADDR"]),
            (with(("VAULT_PROXY_ADDR", "http://p")), ["VAULT_PROXY_ADDR", "HTTPS_PROXY"]),
            (with(("VAULT_HTTP_PROXY", "http://p")), ["VAULT_HTTP_PROXY", "HTTPS_PROXY"]),
            (vec![KEY, TOKEN], ["VAULT_ADDR is not set", "https://vault.example.com:8200"]),
            (vec![ADDR, TOKEN], ["PAGESEAL_VAULT_KEY is not set", "such as pageseal"]),
            (vec![ADDR, KEY], ["no credentials", "PAGESEAL_VAULT_ROLE_ID"]),
            (with(("VAULT_ADDR", "vault:8200")), ["VAULT_ADDR", "https://vault.example.com"]),
            (with(("VAULT_ADDR", "http://vault:8200")), ["without TLS", "https://"]),
            (with(("PAGESEAL_VAULT_KEY", "transit/keys/k")), ["PAGESEAL_VAULT_KEY", "PAGESEAL_VAULT_MOUNT"]),
            (with(("PAGESEAL_VAULT_KEY", "k/../../sys")), ["PAGESEAL_VAULT_KEY", "such as pageseal"]),
            (with(("PAGESEAL_VAULT_MOUNT", "../sys")), ["PAGESEAL_VAULT_MOUNT", "no path"]),
            (with(("PAGESEAL_VAULT_MOUNT", "a?b")), ["PAGESEAL_VAULT_MOUNT", "no path"]),
            (with(("VAULT_NAMESPACE", "a b")), ["VAULT_NAMESPACE", "no path"]),
            (with(("VAULT_TOKEN", "a\nb")), ["VAULT_TOKEN", "no token has"]),
            (with(("VAULT_SKIP_VERIFY", "1")), ["VAULT_SKIP_VERIFY", "unset it"]),
            (with(("BAO_SKIP_VERIFY", "true")), ["SKIP_VERIFY", "VAULT_CACERT"]),
            (with(("VAULT_CAPATH", "/etc/ca")), ["VAULT_CAPATH", "VAULT_CACERT"]),
            (with(("VAULT_CLIENT_CERT", "/c")), ["VAULT_CLIENT_CERT", "unset it"]),
            (with(("VAULT_CACERT", "/nonexistent/ca.pem")), ["/nonexistent/ca.pem", "VAULT_CACERT"]),
            (with(ROLE), ["PAGESEAL_VAULT_SECRET_ID", "PAGESEAL_VAULT_SECRET_ID_FILE"]),
            (
                [&with(ROLE)[..], &[("PAGESEAL_VAULT_KUBERNETES_ROLE", "r")]].concat(),
                ["PAGESEAL_VAULT_ROLE_ID", "unset one"],
            ),
        ] {
            let error = from(&variables).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Misconfigured, "{variables:?}");
            let text = error.to_string();
            assert!(parts.iter().all(|part| text.contains(part)), "{variables:?}: {text}");
            assert!(!text.contains("secret-token"), "{text}");
        }
    }

    #[test]
    fn the_token_file_of_the_command_line_client_is_the_last_resort() {
        let home = std::env::temp_dir().join(format!("pageseal-home-{}", std::process::id()));
        std::fs::create_dir_all(&home).unwrap();
        let home_variable = ("HOME", home.to_str().unwrap());
        assert!(from(&[ADDR, KEY, home_variable]).is_err());
        std::fs::write(home.join(".vault-token"), "s.t").unwrap();
        let wrapper = from(&[ADDR, KEY, home_variable]).unwrap();
        assert!(format!("{wrapper:?}").contains("127.0.0.1"));
        std::fs::remove_dir_all(&home).unwrap();
    }
}
