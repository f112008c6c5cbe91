use std::sync::Arc;
use std::time::Duration;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float16Type, Float32Type, Int8Type};
use arrow_array::{Array, FixedSizeListArray, RecordBatch, StringArray};
use arrow_flight::decode::DecodedPayload;
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::error::FlightError;
use arrow_schema::{DataType, Field, Schema};
use futures::{StreamExt, stream};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::client::{Client, descriptor};
use crate::error::{Error, Result, RowError, limited};

/// Most rows and bytes of one message of an exchange. A message should have 1 to 4 MiB.
const MESSAGE_ROWS: usize = 1024;
pub(crate) const MESSAGE_BYTES: usize = 2 << 20;

const QUERY_PROMPTS: &[&str] = &["query", "search_query"];
const DOCUMENT_PROMPTS: &[&str] = &["document", "passage", "corpus", "search_document"];

/// Request for the vectors of texts.
#[must_use = "a request does nothing until `send`"]
#[derive(Debug)]
pub struct Embed<'a> {
    client: &'a Client,
    batches: Vec<RecordBatch>,
    command: Map<String, Value>,
    prompts: &'static [&'static str],
    timeout: Option<Duration>,
}

impl Client {
    /// Embed texts, with the model's default prompt, usually none.
    pub fn embed<T: AsRef<str>>(&self, texts: &[T]) -> Embed<'_> {
        self.embed_with(texts, &[])
    }

    /// Embed queries, with the model's prompt for queries, if it has one.
    pub fn embed_queries<T: AsRef<str>>(&self, texts: &[T]) -> Embed<'_> {
        self.embed_with(texts, QUERY_PROMPTS)
    }

    /// Embed documents, with the model's prompt for documents, if it has one.
    pub fn embed_documents<T: AsRef<str>>(&self, texts: &[T]) -> Embed<'_> {
        self.embed_with(texts, DOCUMENT_PROMPTS)
    }

    fn embed_with<T: AsRef<str>>(&self, texts: &[T], prompts: &'static [&'static str]) -> Embed<'_> {
        let mut command = Map::new();
        command.insert("accept_compression".into(), json!(["lz4", "zstd"]));
        command.insert("dtype".into(), json!("float32"));
        Embed { client: self, batches: cut_texts(texts), command, prompts, timeout: None }
    }
}

impl Embed<'_> {
    /// Choose one of the server's models: NAME or NAME@HASH.
    pub fn model(self, name: &str) -> Self {
        self.field("model", name)
    }

    /// Put a text before each text. A single word is the name of one of the model's prompts.
    pub fn prompt(self, prompt: &str) -> Self {
        self.field("prompt", prompt)
    }

    /// Keep the first dimensions only, for models that allow it.
    pub fn dims(self, dims: usize) -> Self {
        self.field("dims", dims)
    }

    /// Set another field of the command (Fletcher's `docs/wire.md`).
    pub fn field(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.command.insert(name.to_owned(), value.into());
        self
    }

    /// End the call after some time with the error `deadline_exceeded`.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// The vector of each text, as float32, whatever type the server sends. The error of the first
    /// text without a vector has its number as `row`.
    pub async fn send(self) -> Result<Vec<Vec<f32>>> {
        limited(self.timeout, self.run()).await
    }

    async fn run(&self) -> Result<Vec<Vec<f32>>> {
        let mut command = self.command.clone();
        let mut failures = 0;
        loop {
            let failed = match self.attempt(&mut command).await {
                Ok(vectors) => return Ok(vectors),
                Err(error) if error.row.is_some() => return Err(error),
                Err(error) => error,
            };
            failures += 1;
            self.client.retry.wait(failures, failed).await?;
        }
    }

    async fn attempt(&self, command: &mut Map<String, Value>) -> Result<Vec<Vec<f32>>> {
        if !self.prompts.is_empty()
            && !command.contains_key("prompt")
            && let Some(prompt) = self.served_prompt().await?
        {
            command.insert("prompt".into(), prompt.into());
        }
        self.exchange(command).await
    }

    /// The name of the model's prompt, if it has one.
    async fn served_prompt(&self) -> Result<Option<&'static str>> {
        let wanted = self.command.get("model").and_then(Value::as_str);
        let models = self.client.models().await?;
        let model = models.iter().find(|model| match wanted {
            None => model.is_default,
            Some(wanted) => wanted == model.name || wanted == format!("{}@{}", model.name, model.hash),
        });
        let has = |prompt: &&&str| model.is_some_and(|model| model.prompts.contains_key(**prompt));
        Ok(self.prompts.iter().find(has).copied())
    }

    /// Embed the texts by one DoExchange.
    async fn exchange(&self, command: &Map<String, Value>) -> Result<Vec<Vec<f32>>> {
        #[derive(Deserialize)]
        struct Answer {
            #[serde(default)]
            errors: Vec<RowError>,
        }
        let batches: Vec<_> = self.batches.iter().cloned().map(Ok::<_, FlightError>).collect();
        let request = FlightDataEncoderBuilder::new()
            .with_flight_descriptor(Some(descriptor(command)))
            .with_schema(text_schema())
            .build(stream::iter(batches));
        let mut answers = self.client.flight().do_exchange(request).await?.into_inner();
        let num_texts = self.batches.iter().map(RecordBatch::num_rows).sum();
        let mut vectors = Vec::with_capacity(num_texts);
        while let Some(answer) = answers.next().await {
            let answer = answer?;
            let DecodedPayload::RecordBatch(batch) = &answer.payload else { continue };
            let metadata = answer.app_metadata();
            if let Some(told) = Error::from_json(&metadata) {
                return Err(told);
            }
            let told: Answer = serde_json::from_slice(&metadata).map_err(|error| {
                Error::new("internal", format!("the server sent a batch without JSON: {error}"))
            })?;
            if let Some(error) = told.errors.into_iter().next() {
                return Err(error.into());
            }
            append_vectors(&mut vectors, batch)?;
        }
        if vectors.len() != num_texts {
            let text = format!("the server ended the exchange after {} of {num_texts} texts", vectors.len());
            return Err(Error::new("unavailable", text));
        }
        Ok(vectors)
    }
}

fn text_schema() -> Arc<Schema> {
    Arc::new(Schema::new(vec![Field::new("text", DataType::Utf8, true)]))
}

/// Texts as batches of a message each.
fn cut_texts<T: AsRef<str>>(texts: &[T]) -> Vec<RecordBatch> {
    let mut batches = Vec::new();
    let (mut first, mut size) = (0, 0);
    let mut cut = |first: usize, end: usize| {
        let column = StringArray::from_iter_values(&texts[first..end]);
        batches.push(RecordBatch::try_new(text_schema(), vec![Arc::new(column)]).expect("the schema's type"));
    };
    for (place, text) in texts.iter().enumerate() {
        let length = text.as_ref().len() + 4;
        if place > first && (size + length > MESSAGE_BYTES || place - first == MESSAGE_ROWS) {
            cut(first, place);
            (first, size) = (place, 0);
        }
        size += length;
    }
    if first < texts.len() {
        cut(first, texts.len());
    }
    batches
}

/// Add a batch's vectors as float32.
fn append_vectors(vectors: &mut Vec<Vec<f32>>, batch: &RecordBatch) -> Result<()> {
    let missing = |text: &str| Error::new("internal", text);
    let column =
        batch.column_by_name("vector").ok_or_else(|| missing("the server sent a batch without vectors"))?;
    let lists = column
        .as_fixed_size_list_opt()
        .ok_or_else(|| Error::invalid("output", "the model has no dense vectors"))?;
    if lists.null_count() > 0 {
        return Err(missing("the server sent a row without a vector and without an error"));
    }
    let scales = batch.column_by_name("scale").map(|scales| scales.as_primitive::<Float32Type>());
    let ranges = match batch.schema_ref().metadata().get("fletcher.ranges") {
        Some(raw) => {
            let width = lists.value_length() as usize;
            let read = serde_json::from_str(raw).ok();
            let read = read.filter(|read: &Ranges| read.start.len() == width && read.step.len() == width);
            Some(read.ok_or_else(|| missing("the server sent ranges that cannot be read"))?)
        }
        None => None,
    };
    for row in 0..lists.len() {
        let mut vector = floats(lists, row)?;
        if let Some(scales) = scales {
            vector.iter_mut().for_each(|value| *value *= scales.value(row));
        } else if let Some(ranges) = &ranges {
            for ((value, start), step) in vector.iter_mut().zip(&ranges.start).zip(&ranges.step) {
                *value = start + (*value + 128.5) * step;
            }
        }
        vectors.push(vector);
    }
    Ok(())
}

/// Least value and step of each dimension of int8 vectors.
#[derive(Deserialize)]
struct Ranges {
    start: Vec<f32>,
    step: Vec<f32>,
}

fn floats(lists: &FixedSizeListArray, row: usize) -> Result<Vec<f32>> {
    let values = lists.value(row);
    match values.data_type() {
        DataType::Float32 => Ok(values.as_primitive::<Float32Type>().values().to_vec()),
        DataType::Float16 => {
            Ok(values.as_primitive::<Float16Type>().values().iter().map(|value| value.to_f32()).collect())
        }
        DataType::Int8 => {
            Ok(values.as_primitive::<Int8Type>().values().iter().map(|value| f32::from(*value)).collect())
        }
        other => {
            Err(Error::invalid("dtype", format!("vectors are {other}, which this client does not read")))
        }
    }
}
