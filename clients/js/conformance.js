// Runs Fletcher's conformance cases with this client. Reads cases as JSON lines and writes their
// outcomes as JSON lines (tests/conformance/README.md).
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'

import { arrow, connect, FletcherError } from './src/index.js'

for await (const line of createInterface({ input: process.stdin })) {
    console.log(JSON.stringify(await outcome(JSON.parse(line))))
}

async function outcome(one) {
    try {
        return { answer: await run(one) }
    } catch (error) {
        if (!(error instanceof FletcherError)) throw error
        const { code, message, field = '', row } = error
        return row === undefined ? { error: { code, message, field } } : { row_error: { row, code, message } }
    }
}

async function run(one) {
    const client = await connect(one.address, { token: one.token, maxRetries: one.max_retries ?? 0 })
    const signal = one.deadline_ms ? AbortSignal.timeout(one.deadline_ms) : cancelled(one.cancel_ms)
    const options = { command: one.command, signal }
    try {
        switch (one.call) {
            case 'embed':
                return floats(await client.embed(one.texts, options))
            case 'embed_queries':
                return floats(await client.embedQueries(one.texts, options))
            case 'embed_documents':
                return floats(await client.embedDocuments(one.texts, options))
            case 'put':
                return await client.put(one.dataset, batches(one), options)
        }
    } finally {
        client.close()
    }
}

function floats(vectors) {
    return vectors.map((vector) => [...vector])
}

function cancelled(afterMs) {
    const controller = new AbortController()
    if (afterMs) setTimeout(() => controller.abort(), afterMs)
    return controller.signal
}

/** Rows whose ids are their numbers. */
async function* batches({ rows, batch_rows: batchRows, null_texts: nulls = [], pause_ms: pauseMs = 0 }) {
    for (let first = 0; first < rows; first += batchRows) {
        const numbers = Array.from({ length: Math.min(rows - first, batchRows) }, (_, place) => first + place)
        const texts = numbers.map((row) => (nulls.includes(row) ? null : `text ${row}`))
        if (pauseMs) await sleep(pauseMs)
        yield new arrow.Table({
            id: arrow.vectorFromArray(numbers.map(BigInt), new arrow.Int64()),
            text: arrow.vectorFromArray(texts, new arrow.Utf8()),
        })
    }
}
