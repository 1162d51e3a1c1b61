//! The one message of `PostgreSQL` that has to be told from others: the request to cancel what a session
//! of the same client does. It comes on a connection of its own, and says by a key that its server has
//! given out which session is meant. Only that server knows the key.

/// What stands in place of a version of the protocol.
const CANCEL: u32 = 80_877_102;
/// Likewise, to ask whether the server encrypts: `SSLRequest` and `GSSENCRequest`.
const NEGOTIATIONS: [u32; 2] = [80_877_103, 80_877_104];
/// Length, code and process id.
const HEAD: usize = 12;
/// The secret's length: 4 before version 3.2 of the protocol.
const SECRET_MAX: usize = 256;

/// The longest such request.
pub const CANCEL_REQUEST_MAX: usize = HEAD + SECRET_MAX;

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(u32::from_be_bytes(word))
}

/// Whether the first bytes of a client ask for encryption. If the server has none, the client begins
/// again: a cancel request may follow.
pub fn is_negotiation(bytes: &[u8]) -> bool {
    let code = word(bytes, 4).filter(|code| NEGOTIATIONS.contains(code));
    bytes.len() == 8 && word(bytes, 0) == Some(8) && code.is_some()
}

/// Whether the first bytes of a client are a request to cancel, and nothing else. Clients send one in
/// one piece; in several it is not recognized.
pub fn is_cancel_request(bytes: &[u8]) -> bool {
    (HEAD + 4..=CANCEL_REQUEST_MAX).contains(&bytes.len())
        && word(bytes, 0) == Some(bytes.len() as u32)
        && word(bytes, 4) == Some(CANCEL)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(code: u32, rest: &[u8]) -> Vec<u8> {
        let length = 8 + rest.len() as u32;
        [&length.to_be_bytes()[..], &code.to_be_bytes(), rest].concat()
    }

    #[test]
    fn a_cancel_request_is_told_from_what_else_a_client_may_begin_with() {
        assert!(is_cancel_request(&message(CANCEL, &[0; 8])));
        assert!(is_cancel_request(&message(CANCEL, &[7; 4 + SECRET_MAX])), "version 3.2");
        let others = [
            (80_877_103, vec![], "SSLRequest"),
            (196_608, b"user\0aegis\0\0".to_vec(), "the start of a session"),
            (CANCEL, vec![0; 4], "no secret"),
            (CANCEL, vec![0; 5 + SECRET_MAX], "too long"),
        ];
        for (code, rest, what) in others {
            assert!(!is_cancel_request(&message(code, &rest)), "{what}");
        }
        for code in NEGOTIATIONS {
            let asks = message(code, &[]);
            assert!(is_negotiation(&asks) && !is_negotiation(&asks[..7]));
            assert!(!is_negotiation(&[&asks[..], &asks].concat()), "something follows");
        }
        assert!(!is_negotiation(&message(CANCEL, &[])));
        let whole = message(CANCEL, &[0; 8]);
        for len in 0..whole.len() {
            assert!(!is_cancel_request(&whole[..len]), "{len} bytes");
        }
        assert!(!is_cancel_request(&[&whole[..], &whole].concat()), "something follows");
    }
}
