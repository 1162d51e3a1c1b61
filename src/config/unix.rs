//! What is configured of Unix sockets: who may connect to those that this process listens on.

use std::fmt::{self, Display};
use std::str::FromStr;

/// The bits that say who may connect.
const MODE_MAX: u32 = 0o777;

/// Who may connect to a Unix socket that this process listens on: whoever may write to its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketMode(u32);

impl SocketMode {
    /// Anybody may connect.
    pub const ALL: Self = Self(0o666);

    /// The owner and the group may connect.
    pub const DEFAULT: Self = Self(0o660);

    /// As `chmod` takes it.
    pub fn bits(self) -> u32 {
        self.0
    }
}

impl FromStr for SocketMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_octal = text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        let mode = u32::from_str_radix(text, 8).ok().filter(|_| is_octal);
        let mode = mode.ok_or("not an octal number")?;
        if mode > MODE_MAX {
            return Err(format!("above {MODE_MAX:04o}"));
        }
        Ok(Self(mode))
    }
}

impl Display for SocketMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

/// Whose a Unix socket's file is to be, by number: the image has no list of names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketOwner {
    /// The user; as it comes if `None`.
    pub uid: Option<u32>,
    /// The group; as it comes if `None`.
    pub gid: Option<u32>,
}

impl FromStr for SocketOwner {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // The greatest number means "leave it" to `chown`.
        let id = |text: &str| match text.parse::<u32>() {
            Ok(id) if id < u32::MAX && !text.starts_with('+') => Ok(Some(id)),
            _ => Err(format!("{text:?} is not the number of a user or group")),
        };
        match text.split_once(':') {
            None => Ok(Self { uid: id(text)?, gid: None }),
            Some(("", gid)) => Ok(Self { uid: None, gid: id(gid)? }),
            Some((uid, gid)) => Ok(Self { uid: id(uid)?, gid: id(gid)? }),
        }
    }
}

impl Display for SocketOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(uid) = self.uid {
            uid.fmt(f)?;
        }
        if let Some(gid) = self.gid {
            write!(f, ":{gid}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_octal() {
        for (text, bits) in [("0660", 0o660), ("666", 0o666), ("0", 0), ("0777", 0o777)] {
            assert_eq!(text.parse::<SocketMode>().map(SocketMode::bits), Ok(bits));
        }
        assert_eq!("660".parse::<SocketMode>().unwrap().to_string(), "0660");
        for (text, why) in [
            ("", "not an octal number"),
            ("0o660", "not an octal number"),
            ("+660", "not an octal number"),
            ("0680", "not an octal number"),
            ("rw", "not an octal number"),
            ("1777", "above 0777"),
        ] {
            assert_eq!(text.parse::<SocketMode>().unwrap_err(), why, "{text:?}");
        }
    }

    #[test]
    fn an_owner_is_a_user_or_a_group_or_both() {
        for (text, uid, gid) in [
            ("0", Some(0), None),
            ("1000:2000", Some(1000), Some(2000)),
            (":2000", None, Some(2000)),
        ] {
            let owner: SocketOwner = text.parse().unwrap();
            assert_eq!(owner, SocketOwner { uid, gid });
            assert_eq!(owner.to_string(), text);
        }
        for text in ["", ":", "1000:", "root", "-1", "+1", "4294967295", "1:2:3"] {
            assert!(text.parse::<SocketOwner>().is_err(), "{text:?}");
        }
    }
}
