use std::fmt;
use std::time::Duration;

use arrow_flight::error::FlightError;
use serde::{Deserialize, Serialize};
use tonic::{Code, Status};

/// Result of a call.
pub type Result<T> = std::result::Result<T, Error>;

/// Error of a call. The codes are listed in Fletcher's `docs/wire.md`.
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
pub struct Error {
    /// Kind of the error, such as `unknown_model`.
    pub code: String,
    /// What came, and what is allowed.
    #[serde(default)]
    pub message: String,
    /// The field, column or row that is wrong, if there is one.
    pub field: Option<String>,
    /// What is allowed, if the server knows.
    pub allowed: Option<Vec<String>>,
    /// Time after which another attempt may succeed, if the server knows.
    pub retry_after_ms: Option<f64>,
    /// Number of the text without a vector, counted from 0, if the error is that of one text.
    pub row: Option<u64>,
    /// Status of gRPC, if the call ended with one.
    #[serde(skip)]
    pub status: Option<Code>,
}

/// Error of one row.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[non_exhaustive]
pub struct RowError {
    /// Number of the row, counted from the first one that was sent.
    pub row: u64,
    /// The row's id: a string, a number or null.
    #[serde(default)]
    pub id: serde_json::Value,
    /// Kind of the error, such as `row_too_large`.
    pub code: String,
    /// What came, and what is allowed.
    #[serde(default)]
    pub message: String,
}

impl Error {
    pub(crate) fn new(code: &str, message: impl Into<String>) -> Self {
        let (code, message) = (code.to_owned(), message.into());
        Self { code, message, field: None, allowed: None, retry_after_ms: None, row: None, status: None }
    }

    pub(crate) fn invalid(field: &str, message: impl Into<String>) -> Self {
        Self { field: Some(field.to_owned()), ..Self::new("invalid_command", message) }
    }

    /// The error that a server wrote, unless the JSON has another form.
    pub(crate) fn from_json(raw: &[u8]) -> Option<Self> {
        serde_json::from_slice(raw).ok()
    }

    /// Whether another attempt may succeed.
    pub fn is_retryable(&self) -> bool {
        let codes = ["overloaded", "draining", "store_unavailable", "journal_full", "unavailable"];
        codes.contains(&self.code.as_str())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

impl std::error::Error for Error {}

impl From<RowError> for Error {
    fn from(error: RowError) -> Self {
        Self { row: Some(error.row), ..Self::new(&error.code, error.message) }
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        if let Some(told) = Self::from_json(status.details()) {
            return Self { status: Some(status.code()), ..told };
        }
        let code = match status.code() {
            Code::Unavailable => "unavailable",
            Code::DeadlineExceeded => "deadline_exceeded",
            Code::Cancelled => "cancelled",
            Code::Unauthenticated => "unauthenticated",
            Code::PermissionDenied => "unauthorized",
            Code::InvalidArgument | Code::NotFound | Code::Unimplemented | Code::ResourceExhausted => {
                "invalid_command"
            }
            // The connection broke, or the server ended it.
            _ if is_transport(&status) => "unavailable",
            _ => "internal",
        };
        // Arrow puts `. Detail: X` behind each text.
        let message = match status.message().rsplit_once(". Detail: ") {
            Some((message, _)) => message,
            None => status.message(),
        };
        Self { status: Some(status.code()), ..Self::new(code, message) }
    }
}

/// Whether a status is tonic's own, for a broken connection.
fn is_transport(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<tonic::transport::Error>() || error.is::<std::io::Error>() {
            return true;
        }
        cause = error.source();
    }
    status.message().starts_with("h2 protocol error")
}

impl From<FlightError> for Error {
    fn from(error: FlightError) -> Self {
        match error {
            FlightError::Tonic(status) => (*status).into(),
            other => Self::new("internal", other.to_string()),
        }
    }
}

/// How often and when a call is tried again.
#[derive(Clone, Debug)]
pub(crate) struct RetryPolicy {
    pub(crate) most: u32,
    pub(crate) first: Duration,
    pub(crate) longest: Duration,
}

impl RetryPolicy {
    /// Wait before the next attempt, after a number of failures in a row without progress. The
    /// result is the error if no attempt is left.
    pub(crate) async fn wait(&self, failures: u32, failed: Error) -> Result<()> {
        if !failed.is_retryable() || failures > self.most {
            return Err(failed);
        }
        let pause = (self.first * 2_u32.saturating_pow(failures - 1).min(1 << 16)).min(self.longest);
        let pause = pause.mul_f64(0.5 + fastrand::f64() / 2.0);
        let asked = Duration::from_secs_f64(failed.retry_after_ms.unwrap_or(0.0).clamp(0.0, 1e9) / 1000.0);
        tokio::time::sleep(pause.max(asked)).await;
        Ok(())
    }
}

/// Run a call for at most some time.
pub(crate) async fn limited<T>(
    timeout: Option<Duration>,
    call: impl Future<Output = Result<T>>,
) -> Result<T> {
    let Some(timeout) = timeout else { return call.await };
    tokio::time::timeout(timeout, call).await.unwrap_or_else(|_| {
        let text = format!("the call did not end within {} ms", timeout.as_millis());
        Err(Error { status: Some(Code::DeadlineExceeded), ..Error::new("deadline_exceeded", text) })
    })
}
