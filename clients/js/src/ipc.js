import { Message, RecordBatchReader, RecordBatchStreamWriter } from 'apache-arrow'

/** A batch as messages of Flight: the schema, dictionaries and the rows. */
export function encode(batch) {
    const bytes = RecordBatchStreamWriter.writeAll([batch]).toUint8Array(true)
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
    const messages = []
    // Each message has a mark, the length of its header, the header and the body.
    for (let at = 0; at + 8 <= bytes.length;) {
        const length = view.getInt32(at + 4, true)
        if (length === 0) break // the end of the stream
        const header = bytes.subarray(at + 8, at + 8 + length)
        const bodyLength = Number(Message.decode(header).bodyLength)
        at += 8 + length + bodyLength
        messages.push({ data_header: header, data_body: bytes.subarray(at - bodyLength, at) })
    }
    return messages
}

/** Reads batches from the messages of one call. */
export class Decoder {
    #schema

    /** The batch of a message; undefined for a schema. */
    decode({ data_header: header, data_body: body }) {
        if (!header.length) return undefined
        const bytes = framed(header, body)
        if (this.#schema === undefined) {
            this.#schema = bytes
            return undefined
        }
        const [batch] = RecordBatchReader.from(Buffer.concat([this.#schema, bytes]))
        return batch
    }
}

function framed(header, body) {
    const length = Math.ceil(header.length / 8) * 8
    const bytes = Buffer.alloc(8 + length + body.length)
    bytes.writeInt32LE(-1, 0)
    bytes.writeInt32LE(length, 4)
    bytes.set(header, 8)
    bytes.set(body, 8 + length)
    return bytes
}
