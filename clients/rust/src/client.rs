use std::collections::HashMap;
use std::time::Duration;

use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::{Action, FlightClient, FlightDescriptor};
use futures::StreamExt;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};

use crate::error::{Error, Result, RetryPolicy, limited};

/// Version of Fletcher's calls that this client speaks.
const WIRE_VERSION: u64 = 1;
/// The server sends smaller messages unless it is asked for others.
const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// Bytes that the server may send ahead of what was read.
const WINDOW_BYTES: u32 = 8 << 20;
/// gRPC's servers end connections on which clients ping more often than every five minutes.
const PING_INTERVAL: Duration = Duration::from_secs(360);
const CHECK_TIMEOUT: Duration = Duration::from_secs(20);

/// Client of one server. Clones share the connection.
#[derive(Clone, Debug)]
pub struct Client {
    channel: Channel,
    authorization: Option<MetadataValue<Ascii>>,
    pub(crate) retry: RetryPolicy,
}

/// Settings of a connection.
#[derive(Debug)]
pub struct Builder {
    token: Option<String>,
    tls: Option<ClientTlsConfig>,
    retry: RetryPolicy,
}

impl Builder {
    /// Send a bearer token with every call.
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// Set certificates, for addresses that begin with `grpc+tls://`. The default takes the
    /// system's certificate authorities.
    pub fn tls(mut self, tls: ClientTlsConfig) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Set how often a call is tried again in a row without progress. The default is 6.
    pub fn max_retries(mut self, retries: u32) -> Self {
        self.retry.most = retries;
        self
    }

    /// Connect to a server, such as `grpc://HOST:PORT` or `grpc+tls://HOST:PORT`. Fails if the
    /// server does not answer, does not take the token, or speaks another version of the wire.
    pub async fn connect(self, address: &str) -> Result<Client> {
        let wrong = || {
            let text = format!("`address` is {address:?}, expected grpc://HOST:PORT or grpc+tls://HOST:PORT");
            Error::invalid("address", text)
        };
        let (scheme, host) = address.split_once("://").ok_or_else(wrong)?;
        let host = host.trim_end_matches('/');
        if host.rsplit_once(':').is_none_or(|(_, port)| port.parse::<u16>().is_err()) {
            return Err(wrong());
        }
        let tls = match scheme {
            "grpc" | "grpc+tcp" if self.tls.is_some() => {
                let text = format!("TLS is given, but {address} is not encrypted; use grpc+tls://");
                return Err(Error::invalid("tls", text));
            }
            "grpc" | "grpc+tcp" => None,
            "grpc+tls" => Some(self.tls.unwrap_or_else(|| ClientTlsConfig::new().with_enabled_roots())),
            _ => return Err(wrong()),
        };
        let url = format!("{}://{host}", if tls.is_some() { "https" } else { "http" });
        let mut endpoint = Endpoint::from_shared(url)
            .map_err(|_| wrong())?
            .connect_timeout(CHECK_TIMEOUT)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(Duration::from_secs(60));
        if let Some(tls) = tls {
            endpoint = endpoint.tls_config(tls).map_err(|error| Error::invalid("tls", error.to_string()))?;
        }
        let authorization = match self.token.filter(|token| !token.is_empty()) {
            None => None,
            Some(token) => Some(
                format!("Bearer {token}")
                    .parse()
                    .map_err(|_| Error::invalid("token", "`token` has characters that no header takes"))?,
            ),
        };
        let client = Client { channel: endpoint.connect_lazy(), authorization, retry: self.retry };
        client.check_server(address).await?;
        Ok(client)
    }
}

/// A model of the server.
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
pub struct Model {
    /// Name of the model.
    pub name: String,
    /// Hash of all that decides its vectors.
    pub hash: String,
    /// Width of its vectors.
    pub dim: usize,
    /// Most tokens that it reads.
    pub max_length: usize,
    /// Whether the server takes it for commands without a model.
    pub is_default: bool,
    /// Texts that can be put before texts, by name.
    #[serde(default)]
    pub prompts: HashMap<String, String>,
}

impl Client {
    /// Connect with the default settings ([`Builder::connect`]).
    pub async fn connect(address: &str) -> Result<Self> {
        Self::builder().connect(address).await
    }

    /// Settings of a connection.
    pub fn builder() -> Builder {
        let (first, longest) = (Duration::from_millis(200), Duration::from_secs(10));
        Builder { token: None, tls: None, retry: RetryPolicy { most: 6, first, longest } }
    }

    /// The server's models.
    pub async fn models(&self) -> Result<Vec<Model>> {
        #[derive(Deserialize)]
        struct Answer {
            models: Vec<Model>,
        }
        Ok(self.action::<Answer>("list_models", &Value::Null).await?.models)
    }

    /// Call an action with a JSON body (null: none), and decode its JSON answer.
    pub async fn action<T: DeserializeOwned>(&self, name: &str, body: &Value) -> Result<T> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let mut answers = self.flight().do_action(Action::new(name, body)).await?;
        let Some(answer) = answers.next().await else {
            return Err(Error::new("internal", format!("the server did not answer `{name}`")));
        };
        serde_json::from_slice(&answer?).map_err(|error| {
            Error::new("internal", format!("the server did not answer `{name}` with JSON: {error}"))
        })
    }

    async fn check_server(&self, address: &str) -> Result<()> {
        let health: Value = limited(Some(CHECK_TIMEOUT), self.action("health", &Value::Null)).await?;
        if health["status"] == "ok" && health["wire"] == WIRE_VERSION {
            return Ok(());
        }
        let text = format!(
            "{address} speaks version {} of Fletcher's wire, this client version {WIRE_VERSION}; \
             use the client of the server's release",
            health["wire"]
        );
        Err(Error::invalid("address", text))
    }

    /// Arrow's client for one call.
    pub(crate) fn flight(&self) -> FlightClient {
        let service =
            FlightServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let mut client = FlightClient::new_from_inner(service);
        if let Some(token) = &self.authorization {
            client.metadata_mut().insert("authorization", token.clone());
        }
        client
    }
}

pub(crate) fn descriptor(command: &Map<String, Value>) -> FlightDescriptor {
    FlightDescriptor::new_cmd(Value::Object(command.clone()).to_string())
}
