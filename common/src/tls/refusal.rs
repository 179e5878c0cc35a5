//! Why there is no TLS connection, as a sentence that stands alone behind an address.

use super::identity::{Identity, Role};
use rustls::{AlertDescription, CertificateError, Error, InvalidMessage};
use std::io;

/// The other side is *it*.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("TLS: it does not speak TLS, this process does")]
    Plain,
    #[error("TLS: it speaks TLS, this process is configured without")]
    WantsTls,
    #[error("TLS: it shows no certificate")]
    NoCertificate,
    #[error("TLS: its certificate is not from this cluster's CA")]
    Foreign,
    #[error("TLS: its certificate has expired")]
    Expired,
    #[error("TLS: its certificate is not valid yet; compare the clocks")]
    NotYetValid,
    #[error("TLS: its certificate names no role in a Gabion cluster")]
    NoIdentity,
    #[error("TLS: its certificate is of {got}, this cluster is {cluster}")]
    OtherCluster { got: Identity, cluster: String },
    #[error("TLS: its certificate is of {got}, wanted is one of role {want}")]
    WrongRole { got: Identity, want: Role },
    #[error("TLS: it refuses this process's certificate: {0}; its log says more")]
    RefusesOurs(&'static str),
    #[error("TLS: it hung up during the handshake; is TLS on there?")]
    HungUp,
    #[error("TLS: no handshake in time")]
    TimedOut,
    #[error("TLS: {0}")]
    Other(String),
}

impl Refusal {
    /// Every sentence begins so.
    pub const PREFIX: &str = "TLS: ";

    /// What a handshake, or the first read after it, failed by. `None`: the network, not TLS.
    pub fn of(error: &io::Error) -> Option<Refusal> {
        let inner = error.get_ref()?;
        if let Some(refusal) = inner.downcast_ref::<Refusal>() {
            return Some(refusal.clone());
        }
        inner.downcast_ref::<Error>().map(Refusal::of_tls)
    }

    /// The same for a handshake, which the other side may also leave.
    pub fn of_handshake(error: &io::Error) -> Option<Refusal> {
        let hung_up = [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset];
        Refusal::of(error).or_else(|| hung_up.contains(&error.kind()).then_some(Refusal::HungUp))
    }

    fn of_tls(error: &Error) -> Refusal {
        use CertificateError as Bad;
        match error {
            // Of bytes that are no TLS record.
            Error::InvalidMessage(
                InvalidMessage::InvalidContentType
                | InvalidMessage::UnknownProtocolVersion
                | InvalidMessage::MessageTooLarge
                | InvalidMessage::InvalidEmptyPayload,
            ) => Refusal::Plain,
            Error::NoCertificatesPresented => Refusal::NoCertificate,
            // A CA of the same name signs with another key.
            Error::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature) => Refusal::Foreign,
            Error::InvalidCertificate(Bad::Expired | Bad::ExpiredContext { .. }) => Refusal::Expired,
            Error::InvalidCertificate(Bad::NotValidYet | Bad::NotValidYetContext { .. }) => {
                Refusal::NotYetValid
            }
            Error::InvalidCertificate(Bad::Other(other)) => match other.0.downcast_ref::<Refusal>() {
                Some(refusal) => refusal.clone(),
                None => Refusal::Other(error.to_string()),
            },
            Error::AlertReceived(alert) => Refusal::of_alert(*alert),
            other => Refusal::Other(other.to_string()),
        }
    }

    fn of_alert(alert: AlertDescription) -> Refusal {
        use AlertDescription as Alert;
        Refusal::RefusesOurs(match alert {
            Alert::UnknownCA | Alert::DecryptError => "it is not from its CA",
            Alert::CertificateExpired => "it has expired, or is not valid yet",
            Alert::CertificateRequired => "there is none",
            Alert::CertificateUnknown | Alert::AccessDenied => "it is of another cluster or role",
            Alert::BadCertificate | Alert::UnsupportedCertificate => "it is not fit for this",
            other => return Refusal::Other(format!("it answers with the alert {other:?}")),
        })
    }

    /// For rustls, which sends the fitting alert.
    pub(super) fn into_tls(self) -> Error {
        Error::InvalidCertificate(CertificateError::Other(rustls::OtherError(std::sync::Arc::new(self))))
    }

    pub fn into_io(self) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, self)
    }
}
