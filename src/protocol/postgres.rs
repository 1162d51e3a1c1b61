//! The one message of `PostgreSQL` that has to be told from others: the request to cancel what a session
//! of the same client does. It comes on a connection of its own, and says by a key that its server has
//! given out which session is meant. Only that server knows the key.

/// What stands in place of a version of the protocol.
const CANCEL: u32 = 80_877_102;
/// Length, code and process id.
const HEAD: usize = 12;
/// The secret's length: 4 before version 3.2 of the protocol.
const SECRET_MAX: usize = 256;

/// The longest such request.
pub const CANCEL_REQUEST_MAX: usize = HEAD + SECRET_MAX;

/// Whether the first bytes of a client are a request to cancel, and nothing else. Clients send one in
/// one piece; in several it is not recognized.
pub fn is_cancel_request(bytes: &[u8]) -> bool {
    let word = |at: usize| {
        let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
        word.map(u32::from_be_bytes)
    };
    (HEAD + 4..=CANCEL_REQUEST_MAX).contains(&bytes.len())
        && word(0) == Some(bytes.len() as u32)
        && word(4) == Some(CANCEL)
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
        let whole = message(CANCEL, &[0; 8]);
        for len in 0..whole.len() {
            assert!(!is_cancel_request(&whole[..len]), "{len} bytes");
        }
        assert!(!is_cancel_request(&[&whole[..], &whole].concat()), "something follows");
    }
}
