import type { RecordBatch, Table } from 'apache-arrow'

/** The Arrow library of the client, whose batches `put` takes. */
export * as arrow from 'apache-arrow'

export interface CallOptions {
    /** Cancels the call. */
    signal?: AbortSignal
}

export interface ConnectOptions extends CallOptions {
    /** Bearer token, sent with every call. */
    token?: string
    /** PEM certificates, for addresses that begin with grpc+tls://. The default takes Node's authorities. */
    tls?: { ca?: Buffer; key?: Buffer; cert?: Buffer }
    /** How often a call is tried again in a row without progress. The default is 6. */
    maxRetries?: number
}

export interface EmbedOptions extends CallOptions {
    /** One of the server's models: NAME or NAME@HASH. */
    model?: string
    /** A text before each text. A single word is the name of one of the model's prompts. */
    prompt?: string
    /** Keeps the first dimensions only, for models that allow it. */
    dims?: number
    /** Further fields of the command (docs/wire.md). */
    command?: Record<string, unknown>
}

export interface PutOptions extends CallOptions {
    /** Name of the upload, so that a later call with the same rows continues it. */
    uploadId?: string
    /** Further fields of the command (docs/wire.md), such as `mode` or `durability`. */
    command?: Record<string, unknown>
    /** Called for each acknowledgement. */
    onAck?: (ack: Ack) => void
}

export interface Ack {
    batch_id: number | null
    row_first: number
    row_last: number
    rows_stored: number
    rows_failed: number
    /** Number of rows, from row 0 on without a gap, that survive any crash. */
    rows_durable: number
}

export interface RowError {
    row: number
    id: string | number | null
    code: string
    message: string
}

export interface Summary {
    upload_id: string
    /** Whether every row is settled. */
    complete: boolean
    rows_received: number
    rows_stored: number
    rows_failed: number
    rows_durable: number
    rows_deduplicated: number
    model: string
    errors: RowError[]
    errors_truncated: boolean
}

export interface Model {
    name: string
    hash: string
    dim: number
    max_length: number
    is_default: boolean
    prompts: Record<string, string>
}

/** Error of a call. The codes are listed in docs/wire.md. */
export class FletcherError extends Error {
    /** Kind of the error, such as `unknown_model`. */
    readonly code: string
    /** The field, column or row that is wrong. */
    readonly field?: string
    readonly allowed?: string[]
    /** Time after which another attempt may succeed. */
    readonly retryAfterMs?: number
    /** Number of the text without a vector, counted from 0. */
    readonly row?: number
    /** Status of gRPC. */
    readonly status?: number
    /** Whether another attempt may succeed. */
    get retryable(): boolean
}

/** Connects to a server, such as grpc://HOST:PORT or grpc+tls://HOST:PORT. */
export function connect(address: string, options?: ConnectOptions): Promise<Client>

export class Client {
    private constructor()
    /** The vector of each text, with the model's default prompt, usually none. */
    embed(texts: string[], options?: EmbedOptions): Promise<Float32Array[]>
    /** Embeds queries with the model's prompt for queries, if it has one. */
    embedQueries(texts: string[], options?: EmbedOptions): Promise<Float32Array[]>
    /** Embeds documents with the model's prompt for documents, if it has one. */
    embedDocuments(texts: string[], options?: EmbedOptions): Promise<Float32Array[]>
    /** Embeds rows and stores them in a dataset. They have a column `text` and, if wanted, `id`. */
    put(
        dataset: string,
        batches: Iterable<RecordBatch | Table> | AsyncIterable<RecordBatch | Table>,
        options?: PutOptions,
    ): Promise<Summary>
    models(options?: CallOptions): Promise<Model[]>
    /** Calls an action with a JSON body, and returns its JSON answer. */
    action(name: string, body?: unknown, options?: CallOptions): Promise<any>
    close(): void
}
