import { randomUUID } from 'node:crypto'
import { DataType, makeData, RecordBatch, Schema, Struct, Vector, vectorFromArray } from 'apache-arrow'

import { descriptor, MESSAGE_BYTES, textBatch } from './embed.js'
import { FletcherError, invalid, parsed } from './errors.js'
import { encode } from './ipc.js'

/**
 * Most bytes that are sent and not acknowledged. They are kept in memory, to be sent again after a
 * broken connection.
 */
const WINDOW_BYTES = 32 << 20

/** Embeds rows and stores them, with as many calls as needed. */
export async function put(server, command, batches) {
    const named = command.upload_id !== undefined
    const upload = new Upload(server, { ...command, upload_id: command.upload_id ?? randomUUID() }, batches)
    try {
        return await upload.run(named)
    } finally {
        upload.close()
    }
}

class Upload {
    #server
    #command
    #batches
    /** The promise of the next batch. A call that fails leaves it to the next one. */
    #pending
    #schema
    #nextRow = 0
    /** Encoded rows, in their order. */
    #unacked = []
    /** Bytes that were sent in this call and are not acknowledged. */
    #inFlight = 0
    /** Rows before this one are acknowledged. */
    #acked = 0
    /** First and last row of what the server has. */
    #stored = []
    /** All batches were read. */
    #ended = false
    #wake = () => {}

    constructor(server, command, batches) {
        this.#server = server
        this.#command = command
        this.#batches = recordBatches(batches)
    }

    close() {
        this.#batches.return().catch(() => {})
    }

    async run(ask) {
        for (let failures = 1; ; failures++) {
            const before = this.#acked
            try {
                if (ask) await this.#askStored()
                return await this.#send()
            } catch (error) {
                if (this.#acked > before) failures = 1
                await this.#server.retry.wait(failures, error, this.#server.signal)
                ask = true
            }
        }
    }

    /** Asks which rows the server has, and drops these rows. */
    async #askStored() {
        const { upload_id, dataset, store } = this.#command
        try {
            this.#stored = (await this.#server.ask({ upload_id, dataset, store })).ranges
        } catch (error) {
            if (error.code !== 'unknown_dataset') throw error
            this.#stored = []
        }
        if (this.#acked > 0 && !this.#has(0, this.#acked)) {
            const text =
                'acknowledged rows of the upload are gone from the dataset; send the whole upload again'
            throw new FletcherError('upload_conflict', text, { field: 'upload_id' })
        }
        this.#unacked = this.#unacked.filter(({ first, end }) => !this.#has(first, end))
    }

    #has(first, end) {
        return this.#stored.some(([from, to]) => from <= first && end <= to + 1)
    }

    /** First and end of the rows that the server does not have. */
    *#missing(first, end) {
        for (let row = first; row < end;) {
            const stored = this.#stored.find(([from, to]) => from <= row && row <= to)
            if (stored) {
                row = stored[1] + 1
                continue
            }
            const later = this.#stored.map(([from]) => from).filter((from) => from > row)
            const partEnd = Math.min(end, ...later)
            yield [row, partEnd]
            row = partEnd
        }
    }

    /** Reads the next rows to send. Undefined at the end, or if the call is over. */
    async #read(call) {
        while (!this.#ended) {
            this.#pending ??= this.#batches.next()
            const read = await call.until(this.#pending)
            if (call.isOver) return undefined
            this.#pending = undefined
            if (read.done) {
                this.#ended = true
                return undefined
            }
            const parts = this.#take(read.value)
            if (parts.length) return parts
        }
        return undefined
    }

    /** Numbers the rows of a batch, and cuts it into messages. */
    #take(batch) {
        this.#schema ??= batch.schema
        if (columns(batch.schema) !== columns(this.#schema)) {
            throw invalid('batches', `a batch has ${columns(batch.schema)}, others ${columns(this.#schema)}`)
        }
        const start = this.#nextRow
        this.#nextRow += batch.numRows
        const parts = []
        const [, whole] = encode(batch)
        const step = Math.max(
            1,
            Math.floor((batch.numRows * MESSAGE_BYTES) / Math.max(1, whole.data_body.length)),
        )
        for (let first = start; first < this.#nextRow; first += step) {
            for (const [from, end] of this.#missing(first, Math.min(this.#nextRow, first + step))) {
                const isWhole = end - from === batch.numRows
                const message = isWhole ? whole : encode(batch.slice(from - start, end - start))[1]
                parts.push({ first: from, end, message, numBytes: message.data_body.length })
            }
        }
        this.#unacked.push(...parts)
        return parts
    }

    /** Sends all that is left by one DoPut. */
    async #send() {
        const call = this.#server.start()
        this.#inFlight = 0
        try {
            const written = this.#write(call)
            written.catch(() => call.close())
            const [summary, error] = await this.#answers(call).then(
                (summary) => [summary],
                (error) => [undefined, error],
            )
            const isWhole = await written
            if (error) throw error
            if (isWhole && summary) return summary
            throw new FletcherError(
                'unavailable',
                `the server ended the upload ${isWhole ? 'without a summary' : 'early'}`,
            )
        } finally {
            call.close()
        }
    }

    /** Writes a call's messages. False if the call was over before. */
    async #write(call) {
        let queue = [...this.#unacked]
        if (!queue.length) queue = (await this.#read(call)) ?? []
        const [schema] = encode(this.#schema ? new RecordBatch(this.#schema, undefined) : textBatch([]))
        await call.send({ ...schema, flight_descriptor: descriptor(this.#command) })
        for (let batchId = 0; queue.length; queue = (await this.#read(call)) ?? []) {
            for (const rows of queue) {
                while (this.#inFlight > 0 && this.#inFlight + rows.numBytes > WINDOW_BYTES && !call.isOver) {
                    await call.until(new Promise((resolve) => (this.#wake = resolve)))
                }
                this.#inFlight += rows.numBytes
                const metadata = json({ batch_id: batchId++, row_offset: rows.first })
                if (!(await call.send({ ...rows.message, app_metadata: metadata }))) return false
            }
        }
        if (!(await call.send({ app_metadata: json({ end: true, rows: this.#nextRow }) }))) return false
        call.end()
        return true
    }

    /** Reads a call's answers up to its end, and returns the summary. */
    async #answers(call) {
        let summary
        for await (const answer of call.answers()) {
            const told = parsed(answer.app_metadata)
            if (told?.type === 'ack') this.#note(told)
            if (told?.type === 'summary') summary = told
        }
        return summary
    }

    /** Drops acknowledged rows. */
    #note(ack) {
        while (this.#unacked.length && this.#unacked[0].end <= ack.row_last + 1) {
            const rows = this.#unacked.shift()
            this.#acked = rows.end
            this.#inFlight = Math.max(0, this.#inFlight - rows.numBytes)
        }
        this.#wake()
        this.#server.onAck?.(ack)
    }
}

/** The batches of an iterable of batches and tables. */
async function* recordBatches(batches) {
    try {
        for await (const item of batches) {
            for (const batch of item.batches ?? [item]) if (batch.numRows) yield plain(batch)
        }
    } catch (error) {
        throw new FletcherError('invalid_command', `the batches cannot be read: ${error.message}`, {
            field: 'batches',
            cause: error,
        })
    }
}

/** A batch without dictionaries, which differ between tables. Arrow makes them of texts. */
function plain(batch) {
    if (!batch.schema.fields.some(({ type }) => DataType.isDictionary(type))) return batch
    const valueType = (type) => (DataType.isDictionary(type) ? type.dictionary : type)
    const fields = batch.schema.fields.map((field) => field.clone({ type: valueType(field.type) }))
    const children = batch.data.children.map((data) => {
        if (!DataType.isDictionary(data.type)) return data
        return vectorFromArray([...new Vector([data])], data.type.dictionary).data[0]
    })
    const data = makeData({ type: new Struct(fields), length: batch.numRows, nullCount: 0, children })
    return new RecordBatch(new Schema(fields, batch.schema.metadata), data)
}

function columns({ fields }) {
    return fields.map(({ name, type }) => `${name}: ${type}`).join(', ')
}

function json(value) {
    return Buffer.from(JSON.stringify(value))
}
