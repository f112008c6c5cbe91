use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use arrow_array::{Array, RecordBatch};
use arrow_flight::error::FlightError;
use arrow_flight::{FlightData, SchemaAsIpc};
use arrow_ipc::writer::{CompressionContext, DictionaryTracker, IpcDataGenerator, IpcWriteOptions};
use arrow_schema::{FieldRef, SchemaRef};
use futures::{Stream, StreamExt, TryFutureExt, stream};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use crate::client::{Client, descriptor};
use crate::embed::MESSAGE_BYTES;
use crate::error::{Error, Result, RowError, limited};

/// Most bytes that are sent and not acknowledged. They are kept in memory, to be sent again after
/// a broken connection.
const WINDOW_BYTES: usize = 32 << 20;
/// Messages that wait for the connection.
const QUEUED_MESSAGES: usize = 2;

/// Summary of an upload. Counts include earlier connections.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[non_exhaustive]
#[allow(missing_docs)] // as in docs/wire.md
pub struct Summary {
    pub upload_id: String,
    /// Whether every row is settled.
    pub complete: bool,
    pub rows_received: u64,
    pub rows_stored: u64,
    pub rows_failed: u64,
    pub rows_durable: u64,
    #[serde(default)]
    pub rows_deduplicated: u64,
    /// NAME@HASH of the model.
    pub model: Option<String>,
    /// Errors of rows that failed.
    #[serde(default)]
    pub errors: Vec<RowError>,
    #[serde(default)]
    pub errors_truncated: bool,
}

/// Progress of an upload.
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
#[allow(missing_docs)] // as in docs/wire.md
pub struct Ack {
    pub batch_id: Option<u64>,
    pub row_first: i64,
    /// Before `row_first` for a batch without rows.
    pub row_last: i64,
    pub rows_stored: u64,
    pub rows_failed: u64,
    /// Number of rows, from row 0 on without a gap, that survive any crash.
    pub rows_durable: u64,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Answer {
    Ack(Ack),
    Summary(Summary),
}

type Batches<'a> = Pin<Box<dyn Stream<Item = Result<RecordBatch>> + Send + 'a>>;
type OnAck<'a> = Box<dyn FnMut(&Ack) + Send + 'a>;

/// Request to store rows.
#[must_use = "a request does nothing until `send`"]
pub struct Put<'a> {
    client: &'a Client,
    schema: SchemaRef,
    batches: Batches<'a>,
    command: Map<String, Value>,
    on_ack: OnAck<'a>,
    timeout: Option<Duration>,
}

impl fmt::Debug for Put<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Put").field("command", &self.command).finish_non_exhaustive()
    }
}

impl Client {
    /// Embed rows and store them in a dataset. The batches have a column `text` and, if wanted, an
    /// `id`. Batches should have 1 to 4 MiB. If the connection breaks, or the server or its store
    /// is unavailable, the call connects again, and sends what the server does not have.
    pub fn put<'a, E: fmt::Display>(
        &'a self,
        dataset: &str,
        schema: SchemaRef,
        batches: impl Stream<Item = std::result::Result<RecordBatch, E>> + Send + 'a,
    ) -> Put<'a> {
        let batches = batches.map(|batch| {
            batch.map_err(|error| Error::invalid("batches", format!("the batches cannot be read: {error}")))
        });
        let command = Map::from_iter([("dataset".to_owned(), dataset.into())]);
        let (batches, on_ack) = (Box::pin(batches), Box::new(|_: &Ack| ()));
        Put { client: self, schema, batches, command, on_ack, timeout: None }
    }
}

impl<'a> Put<'a> {
    /// Name the upload, so that a later call with the same rows continues it.
    pub fn upload_id(self, id: &str) -> Self {
        self.field("upload_id", id)
    }

    /// Set a field of the command (Fletcher's `docs/wire.md`), such as `mode` or `durability`.
    pub fn field(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.command.insert(name.to_owned(), value.into());
        self
    }

    /// Call a function for each acknowledgement.
    pub fn on_ack(mut self, call: impl FnMut(&Ack) + Send + 'a) -> Self {
        self.on_ack = Box::new(call);
        self
    }

    /// End the call after some time with the error `deadline_exceeded`.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Send the rows. The server has all of them if the summary is `complete`.
    pub async fn send(mut self) -> Result<Summary> {
        let named = self.command.contains_key("upload_id");
        if !named {
            let id = format!("{:032x}", fastrand::u128(..));
            self.command.insert("upload_id".into(), id.into());
        }
        let timeout = self.timeout;
        let mut upload = Upload {
            put: self,
            next_row: 0,
            unacked: VecDeque::new(),
            in_flight: 0,
            acked: 0,
            stored: Vec::new(),
            ended: false,
        };
        limited(timeout, upload.run(named)).await
    }
}

/// Rows of one message, with the number of the first one.
#[derive(Clone)]
struct Rows {
    batch: RecordBatch,
    first: u64,
    num_bytes: usize,
}

impl Rows {
    /// Number of the row after the last one.
    fn end(&self) -> u64 {
        self.first + self.batch.num_rows() as u64
    }

    fn slice(&self, first: u64, end: u64) -> Self {
        let num_rows = (end - first) as usize;
        let batch = self.batch.slice((first - self.first) as usize, num_rows);
        Self { batch, first, num_bytes: self.num_bytes * num_rows / self.batch.num_rows() }
    }
}

struct Upload<'a> {
    put: Put<'a>,
    next_row: u64,
    /// In the order of rows.
    unacked: VecDeque<Rows>,
    /// Bytes that were sent in this call and are not acknowledged.
    in_flight: usize,
    /// Rows before this one are acknowledged.
    acked: u64,
    /// First and last row of what the server has.
    stored: Vec<(u64, u64)>,
    /// All batches were read.
    ended: bool,
}

/// What a call does next, beside reading answers.
#[derive(PartialEq)]
enum Step {
    Read,
    Send,
    Wait,
}

impl Upload<'_> {
    async fn run(&mut self, mut ask: bool) -> Result<Summary> {
        let mut failures = 0;
        loop {
            let before = self.acked;
            let failed = match self.attempt(ask).await {
                Ok(summary) => return Ok(summary),
                Err(error) => error,
            };
            failures = if self.acked > before { 1 } else { failures + 1 };
            self.put.client.retry.wait(failures, failed).await?;
            ask = true;
        }
    }

    async fn attempt(&mut self, ask: bool) -> Result<Summary> {
        if ask {
            self.ask_stored().await?;
        }
        self.send().await
    }

    /// Ask which rows the server has, and drop these rows.
    async fn ask_stored(&mut self) -> Result<()> {
        #[derive(Deserialize)]
        struct Status {
            ranges: Vec<(u64, u64)>,
        }
        let names = ["upload_id", "dataset", "store"];
        let given = names.iter().filter_map(|name| self.put.command.get_key_value(*name));
        let body: Map<_, _> = given.map(|(name, value)| (name.clone(), value.clone())).collect();
        self.stored = match self.put.client.action::<Status>("upload_status", &body.into()).await {
            Ok(status) => status.ranges,
            Err(error) if error.code == "unknown_dataset" => Vec::new(),
            Err(error) => return Err(error),
        };
        if self.acked > 0 && !self.has(0, self.acked) {
            let text =
                "acknowledged rows of the upload are gone from the dataset; send the whole upload again";
            return Err(Error { code: "upload_conflict".into(), ..Error::invalid("upload_id", text) });
        }
        let unacked = std::mem::take(&mut self.unacked);
        self.unacked = unacked.into_iter().filter(|rows| !self.has(rows.first, rows.end())).collect();
        Ok(())
    }

    fn has(&self, first: u64, end: u64) -> bool {
        self.stored.iter().any(|(from, to)| *from <= first && end <= to + 1)
    }

    /// The rows of these that the server does not have.
    fn missing(&self, rows: &Rows) -> Vec<Rows> {
        let mut parts = Vec::new();
        let mut row = rows.first;
        while row < rows.end() {
            if let Some((_, last)) = self.stored.iter().find(|(from, to)| *from <= row && row <= *to) {
                row = last + 1;
                continue;
            }
            let later = self.stored.iter().map(|(from, _)| *from).filter(|from| *from > row);
            let end = later.min().unwrap_or(rows.end()).min(rows.end());
            parts.push(rows.slice(row, end));
            row = end;
        }
        parts
    }

    /// Number the rows of a batch, and cut it into messages.
    fn take(&mut self, batch: RecordBatch) -> Result<Vec<Rows>> {
        let (found, wanted) = (batch.schema_ref().fields(), self.put.schema.fields());
        let is_same = |(found, wanted): (&FieldRef, &FieldRef)| {
            found.name() == wanted.name() && found.data_type() == wanted.data_type()
        };
        if found.len() != wanted.len() || !found.iter().zip(wanted).all(is_same) {
            return Err(Error::invalid("batches", "a batch has other columns than the schema"));
        }
        let (num_rows, num_bytes) = (batch.num_rows() as u64, batch_bytes(&batch));
        if num_rows == 0 {
            return Ok(Vec::new());
        }
        let whole = Rows { batch, first: self.next_row, num_bytes };
        let step = (num_rows * MESSAGE_BYTES as u64 / num_bytes.max(1) as u64).max(1);
        self.next_row += num_rows;
        let mut parts = Vec::new();
        for first in (whole.first..whole.end()).step_by(step as usize) {
            let slice = whole.slice(first, whole.end().min(first + step));
            parts.extend(self.missing(&slice));
        }
        self.unacked.extend(parts.iter().cloned());
        Ok(parts)
    }

    /// Send all that is left by one DoPut.
    async fn send(&mut self) -> Result<Summary> {
        let (messages, received) = mpsc::channel::<Vec<FlightData>>(QUEUED_MESSAGES);
        let mut messages = Some(messages);
        let request = stream::unfold(received, |mut received: mpsc::Receiver<Vec<FlightData>>| async {
            let sent = received.recv().await?;
            Some((stream::iter(sent.into_iter().map(Ok::<_, FlightError>)), received))
        })
        .flatten();
        // The server's first answer may come only after many messages, so the call is polled as a
        // stream beside the sending.
        let mut flight = self.put.client.flight();
        let mut answers =
            Box::pin(async move { flight.do_put(Box::pin(request)).await }.try_flatten_stream());
        let mut encoder = Encoder::new(&self.put);
        let mut queue = self.unacked.clone();
        let mut summary = None;
        self.in_flight = 0;
        loop {
            let step = match queue.front() {
                _ if messages.is_none() => Step::Wait,
                Some(rows) if self.in_flight == 0 || self.in_flight + rows.num_bytes <= WINDOW_BYTES => {
                    Step::Send
                }
                Some(_) => Step::Wait,
                None if self.ended => Step::Send,
                None => Step::Read,
            };
            tokio::select! {
                answer = answers.next() => match answer {
                    Some(answer) => match serde_json::from_slice(&answer?.app_metadata) {
                        Ok(Answer::Ack(ack)) => self.note(&ack),
                        Ok(Answer::Summary(told)) => summary = Some(told),
                        Err(_) => {} // of a later version of the server
                    },
                    None if encoder.ended => {
                        let text = "the server ended the upload without a summary";
                        return summary.ok_or_else(|| Error::new("unavailable", text));
                    }
                    None => return Err(Error::new("unavailable", "the server ended the upload early")),
                },
                batch = self.put.batches.next(), if step == Step::Read => match batch {
                    Some(batch) => queue.extend(self.take(batch?)?),
                    None => self.ended = true,
                },
                open = has_room(messages.as_ref()), if step == Step::Send => {
                    if open {
                        match queue.pop_front() {
                            Some(rows) => {
                                self.in_flight += rows.num_bytes;
                                encoder.encode(&rows)?;
                            }
                            None => encoder.end(self.next_row),
                        }
                    }
                    let sent = messages.as_ref().map(|to| to.try_send(std::mem::take(&mut encoder.messages)));
                    if !matches!(sent, Some(Ok(()))) || encoder.ended {
                        messages = None; // if the call is over, its answers say why
                    }
                }
            }
        }
    }

    /// Drop acknowledged rows.
    fn note(&mut self, ack: &Ack) {
        let is_acked = |rows: &Rows| rows.end() as i64 <= ack.row_last + 1;
        while self.unacked.front().is_some_and(is_acked) {
            let Some(rows) = self.unacked.pop_front() else { break };
            self.acked = rows.end();
            self.in_flight = self.in_flight.saturating_sub(rows.num_bytes);
        }
        (self.put.on_ack)(ack);
    }
}

fn batch_bytes(batch: &RecordBatch) -> usize {
    let size = |column: &dyn Array| column.to_data().get_slice_memory_size().unwrap_or_default();
    batch.columns().iter().map(|column| size(column)).sum()
}

/// Wait for room for a message. False if the call is over.
async fn has_room(messages: Option<&mpsc::Sender<Vec<FlightData>>>) -> bool {
    match messages {
        Some(messages) => messages.reserve().await.is_ok(),
        None => false,
    }
}

/// Writer of the messages of one DoPut.
struct Encoder {
    messages: Vec<FlightData>,
    next_batch: u64,
    ended: bool,
    generator: IpcDataGenerator,
    dictionaries: DictionaryTracker,
    compression: CompressionContext,
    options: IpcWriteOptions,
}

impl Encoder {
    fn new(put: &Put<'_>) -> Self {
        let options = IpcWriteOptions::default();
        let schema = FlightData::from(SchemaAsIpc::new(&put.schema, &options));
        Self {
            messages: vec![schema.with_descriptor(descriptor(&put.command))],
            next_batch: 0,
            ended: false,
            generator: IpcDataGenerator::default(),
            dictionaries: DictionaryTracker::new(false),
            compression: CompressionContext::default(),
            options,
        }
    }

    fn encode(&mut self, rows: &Rows) -> Result<()> {
        let (dictionaries, batch) = self
            .generator
            .encode(&rows.batch, &mut self.dictionaries, &self.options, &mut self.compression)
            .map_err(|error| Error::invalid("batches", format!("a batch cannot be sent: {error}")))?;
        let metadata = json!({"batch_id": self.next_batch, "row_offset": rows.first});
        self.next_batch += 1;
        self.messages.extend(dictionaries.into_iter().map(FlightData::from));
        self.messages.push(FlightData::from(batch).with_app_metadata(metadata.to_string()));
        Ok(())
    }

    fn end(&mut self, rows: u64) {
        let metadata = json!({"end": true, "rows": rows});
        self.messages.push(FlightData::new().with_app_metadata(metadata.to_string()));
        self.ended = true;
    }
}
