import {
    Field,
    FixedSizeList,
    makeData,
    RecordBatch,
    Schema,
    Struct,
    Utf8,
    vectorFromArray,
} from 'apache-arrow'

import { FletcherError, fromJson, invalid, parsed } from './errors.js'
import { Decoder, encode } from './ipc.js'

/** Most rows and bytes of one message of an exchange. A message should have 1 to 4 MiB. */
const MESSAGE_ROWS = 1024
export const MESSAGE_BYTES = 2 << 20

const TEXT_SCHEMA = new Schema([new Field('text', new Utf8(), true)])

/** A batch of texts. */
export function textBatch(texts) {
    const column = vectorFromArray(texts, new Utf8()).data[0] ?? makeData({ type: new Utf8() })
    const type = new Struct(TEXT_SCHEMA.fields)
    return new RecordBatch(
        TEXT_SCHEMA,
        makeData({ type, length: texts.length, nullCount: 0, children: [column] }),
    )
}

/** What the first message of a call says. */
export function descriptor(command) {
    return { type: 'CMD', cmd: Buffer.from(JSON.stringify(command)) }
}

/** Embeds texts by one DoExchange. */
export async function embed(start, texts, command) {
    const call = start()
    try {
        const sent = sendTexts(call, texts, command)
        sent.catch(() => call.close())
        const vectors = await readVectors(call, texts.length)
        await sent
        return vectors
    } finally {
        call.close()
    }
}

async function sendTexts(call, texts, command) {
    let first = true
    for (const part of cutTexts(texts)) {
        const [schema, ...rows] = encode(textBatch(part))
        if (first) await call.send({ ...schema, flight_descriptor: descriptor(command) })
        first = false
        for (const message of rows) if (!(await call.send(message))) return
    }
    call.end()
}

/** Cuts texts into parts of a message each. There is at least one part. */
function* cutTexts(texts) {
    let first = 0
    let size = 0
    for (const [place, text] of texts.entries()) {
        const length = Buffer.byteLength(text) + 4
        if (place > first && (size + length > MESSAGE_BYTES || place - first === MESSAGE_ROWS)) {
            yield texts.slice(first, place)
            first = place
            size = 0
        }
        size += length
    }
    yield texts.slice(first)
}

async function readVectors(call, numTexts) {
    const vectors = []
    const decoder = new Decoder()
    for await (const answer of call.answers()) {
        const batch = decoder.decode(answer)
        if (batch === undefined) continue
        const told = fromJson(answer.app_metadata)
        if (told) throw told
        const [error] = parsed(answer.app_metadata)?.errors ?? []
        if (error) throw new FletcherError(error.code, error.message, { row: error.row })
        appendVectors(vectors, batch)
    }
    if (vectors.length !== numTexts) {
        const text = `the server ended the exchange after ${vectors.length} of ${numTexts} texts`
        throw new FletcherError('unavailable', text)
    }
    return vectors
}

/** Adds a batch's vectors as Float32Array. */
function appendVectors(vectors, batch) {
    const column = batch.getChild('vector')
    if (!column) throw new FletcherError('internal', 'the server sent a batch without vectors')
    if (!(column.type instanceof FixedSizeList)) throw invalid('output', 'the model has no dense vectors')
    if (column.nullCount) {
        throw new FletcherError('internal', 'the server sent a row without a vector and without an error')
    }
    if (!column.length) return
    const width = column.type.listSize
    const values = toFloats(column.data[0].children[0])
    const scales = batch.getChild('scale')
    const ranges = parsed(batch.schema.metadata.get('fletcher.ranges'))
    for (let row = 0; row < column.length; row++) {
        const vector = values.slice(row * width, (row + 1) * width)
        if (scales) {
            const scale = scales.get(row)
            for (let place = 0; place < width; place++) vector[place] *= scale
        } else if (ranges) {
            for (let place = 0; place < width; place++) {
                vector[place] = ranges.start[place] + (vector[place] + 128.5) * ranges.step[place]
            }
        }
        vectors.push(vector)
    }
}

function toFloats({ type, values }) {
    switch (`${type}`) {
        case 'Float32':
            return values
        case 'Float16':
            return Float32Array.from(values, (bits) => HALF[bits])
        case 'Int8':
            return Float32Array.from(values)
    }
    throw invalid('dtype', `vectors are ${type}, which this client does not read`)
}

/** The number of each pattern of bits of a float16. */
const HALF = Float32Array.from({ length: 1 << 16 }, (_, bits) => {
    const sign = bits & 0x8000 ? -1 : 1
    const exponent = (bits >> 10) & 0x1f
    const fraction = bits & 0x3ff
    if (exponent === 0x1f) return fraction ? NaN : sign * Infinity
    if (exponent === 0) return sign * fraction * 2 ** -24
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15)
})
