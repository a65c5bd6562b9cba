//! Who may measure: whoever knows the token that the serving side printed, proven without sending it.

use std::fmt;
use std::str::FromStr;

use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

/// Bytes of a token of our own making: 80 bits, which nobody guesses from a recorded proof.
const TOKEN_BYTES: usize = 10;
/// Shortest and longest token that a person may choose.
const TOKEN_LENGTH: std::ops::RangeInclusive<usize> = 12..=128;

/// A number that is used once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Nonce(pub [u8; 16]);

/// That somebody knows the token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Proof(pub [u8; 32]);

/// What the traffic of one flow begins with: only who heard it on the control connection knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Ticket(pub [u8; Ticket::LEN]);

impl Ticket {
    /// Bytes of it.
    pub(super) const LEN: usize = 16;

    /// A new one.
    pub(super) fn draw() -> Result<Ticket, NoRandom> {
        draw().map(Ticket)
    }
}

impl Nonce {
    /// A new one.
    pub(super) fn draw() -> Result<Nonce, NoRandom> {
        draw().map(Nonce)
    }
}

/// The operating system gives no random numbers.
#[derive(Debug, thiserror::Error)]
#[error("the operating system gives no random numbers")]
pub(super) struct NoRandom;

/// Random bytes.
pub(super) fn draw<const N: usize>() -> Result<[u8; N], NoRandom> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| NoRandom)?;
    Ok(bytes)
}

/// What both sides must know.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(withheld)")
    }
}

impl FromStr for Token {
    type Err = String;

    fn from_str(text: &str) -> Result<Token, String> {
        let fine = TOKEN_LENGTH.contains(&text.len()) && text.chars().all(|c| c.is_ascii_graphic());
        match fine {
            true => Ok(Token(text.to_owned())),
            false => Err(format!(
                "a token has {} to {} visible ASCII characters",
                TOKEN_LENGTH.start(),
                TOKEN_LENGTH.end()
            )),
        }
    }
}

/// Which side proves it: so that neither can give the other its own proof back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Prover {
    /// Who wants to measure.
    Asker,
    /// Who serves.
    Server,
}

impl Token {
    /// A new one.
    pub(super) fn draw() -> Result<Token, NoRandom> {
        let bytes: [u8; TOKEN_BYTES] = draw()?;
        Ok(Token(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// For the person who starts the other side.
    pub(super) fn reveal(&self) -> &str {
        &self.0
    }

    /// That this side knows the token, for this one connection.
    pub(super) fn prove(&self, prover: Prover, asker: Nonce, server: Nonce) -> Proof {
        let mut proof = [0; 32];
        // HMAC-SHA256 has 32 bytes.
        let tag = hmac::sign(&self.key(), &statement(prover, asker, server));
        proof.iter_mut().zip(tag.as_ref()).for_each(|(to, from)| *to = *from);
        Proof(proof)
    }

    /// Whether the other side knows it; takes the same time for every wrong proof.
    pub(super) fn is_known_to(&self, prover: Prover, asker: Nonce, server: Nonce, proof: Proof) -> bool {
        hmac::verify(&self.key(), &statement(prover, asker, server), &proof.0).is_ok()
    }

    fn key(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, self.0.as_bytes())
    }
}

fn statement(prover: Prover, asker: Nonce, server: Nonce) -> Vec<u8> {
    let who: &[u8] = match prover {
        Prover::Asker => b"warren bench: asker",
        Prover::Server => b"warren bench: server",
    };
    [who, &asker.0, &server.0].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_token_proves_it_and_only_for_this_side_and_connection() {
        let token = Token::draw().expect("random");
        let (asker, server) = (Nonce::draw().expect("random"), Nonce::draw().expect("random"));
        let proof = token.prove(Prover::Asker, asker, server);
        assert!(token.is_known_to(Prover::Asker, asker, server, proof));
        assert!(!token.is_known_to(Prover::Server, asker, server, proof), "given back");
        assert!(!token.is_known_to(Prover::Asker, server, asker, proof), "other halves");
        assert!(!token.is_known_to(Prover::Asker, asker, Nonce([0; 16]), proof), "another connection's");
        let other = Token::draw().expect("random");
        assert_ne!(other, token);
        assert!(!other.is_known_to(Prover::Asker, asker, server, proof));
        let mut bent = proof;
        bent.0[31] ^= 1;
        assert!(!token.is_known_to(Prover::Asker, asker, server, bent));
    }

    #[test]
    fn a_token_that_is_drawn_may_be_given_and_is_never_shown_by_accident() {
        let token = Token::draw().expect("random");
        assert_eq!(token.reveal().parse::<Token>().as_ref(), Ok(&token));
        assert_eq!(token.reveal().len(), 2 * TOKEN_BYTES);
        assert!(!format!("{token:?}").contains(token.reveal()));
    }

    #[test]
    fn a_token_is_long_enough_and_visible() {
        for bad in ["", "short", "has a space in it", "line\nfeed in the token", &"x".repeat(129)] {
            assert!(bad.parse::<Token>().is_err(), "{bad:?}");
        }
        assert!("twelve-chars".parse::<Token>().is_ok());
    }
}
