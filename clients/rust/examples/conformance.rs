//! Runs Fletcher's conformance cases with this client. Reads cases as JSON lines and writes their
//! outcomes as JSON lines (tests/conformance/README.md).

use std::sync::Arc;
use std::time::Duration;

use arrow_array::{Int64Array, RecordBatch, StringArray};
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef};
use fletcher::{Client, Embed, Error, Result};
use futures::{Stream, StreamExt, stream};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
struct Case {
    call: String,
    address: String,
    token: String,
    max_retries: u32,
    texts: Vec<String>,
    command: Map<String, Value>,
    dataset: String,
    rows: i64,
    batch_rows: i64,
    null_texts: Vec<i64>,
    pause_ms: u64,
    cancel_ms: u64,
    deadline_ms: u64,
}

#[tokio::main]
async fn main() {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await.expect("standard input") {
        let case: Case = serde_json::from_str(&line).expect("a case");
        println!("{}", outcome(case).await);
    }
}

async fn outcome(case: Case) -> Value {
    let cancel = Duration::from_millis(if case.cancel_ms > 0 { case.cancel_ms } else { 1 << 40 });
    // A call is cancelled when its future is dropped.
    let found = tokio::time::timeout(cancel, run(case)).await;
    match found {
        Err(_) => json!({"error": {"code": "cancelled", "message": "the call was dropped", "field": ""}}),
        Ok(Ok(answer)) => json!({"answer": answer}),
        Ok(Err(error)) => failure(error),
    }
}

fn failure(error: Error) -> Value {
    match error.row {
        Some(row) => json!({"row_error": {"row": row, "code": error.code, "message": error.message}}),
        None => {
            let field = error.field.unwrap_or_default();
            json!({"error": {"code": error.code, "message": error.message, "field": field}})
        }
    }
}

async fn run(case: Case) -> Result<Value> {
    let builder = Client::builder().token(&case.token).max_retries(case.max_retries);
    let client = builder.connect(&case.address).await?;
    let limit = Duration::from_millis(if case.deadline_ms > 0 { case.deadline_ms } else { 1 << 40 });
    match case.call.as_str() {
        "embed" => embed(client.embed(&case.texts), &case.command, limit).await,
        "embed_queries" => embed(client.embed_queries(&case.texts), &case.command, limit).await,
        "embed_documents" => embed(client.embed_documents(&case.texts), &case.command, limit).await,
        "put" => {
            let request = client.put(&case.dataset, schema(), batches(case.clone())).timeout(limit);
            let request = case
                .command
                .iter()
                .fold(request, |request, (name, value)| request.field(name, value.clone()));
            Ok(json!(request.send().await?))
        }
        other => Ok(json!({"skipped": other})),
    }
}

async fn embed(request: Embed<'_>, command: &Map<String, Value>, limit: Duration) -> Result<Value> {
    let request = command.iter().fold(request, |request, (name, value)| request.field(name, value.clone()));
    Ok(json!(request.timeout(limit).send().await?))
}

fn schema() -> SchemaRef {
    let fields = vec![Field::new("id", DataType::Int64, false), Field::new("text", DataType::Utf8, true)];
    Arc::new(Schema::new(fields))
}

/// Rows whose ids are their numbers.
fn batches(case: Case) -> impl Stream<Item = std::result::Result<RecordBatch, ArrowError>> {
    let step = case.batch_rows.max(1);
    stream::iter((0..case.rows).step_by(step as usize)).then(move |first| {
        let rows = first..case.rows.min(first + step);
        let ids = Int64Array::from_iter_values(rows.clone());
        let text = |row| (!case.null_texts.contains(&row)).then(|| format!("text {row}"));
        let texts: StringArray = rows.map(text).collect();
        let pause = Duration::from_millis(case.pause_ms);
        async move {
            tokio::time::sleep(pause).await;
            RecordBatch::try_new(schema(), vec![Arc::new(ids), Arc::new(texts)])
        }
    })
}
