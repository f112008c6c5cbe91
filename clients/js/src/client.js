import { fileURLToPath } from 'node:url'
import { credentials, loadPackageDefinition, Metadata } from '@grpc/grpc-js'
import { loadSync } from '@grpc/proto-loader'

import { Call } from './call.js'
import { embed } from './embed.js'
import { FletcherError, invalid, parsed, RetryPolicy, toFletcherError } from './errors.js'
import { put } from './put.js'

/** Version of Fletcher's calls that this client speaks. */
const WIRE_VERSION = 1
const CHECK_TIMEOUT_MS = 20_000
const OPTIONS = {
    // The server sends smaller messages unless it is asked for others.
    'grpc.max_receive_message_length': 64 << 20,
    'grpc.max_send_message_length': -1,
    // Bytes that the server may send ahead of what was read.
    'grpc-node.flow_control_window': 8 << 20,
    // gRPC's servers end connections on which clients ping more often than every five minutes.
    'grpc.keepalive_time_ms': 360_000,
    'grpc.keepalive_timeout_ms': 60_000,
    // The client itself waits between attempts.
    'grpc.initial_reconnect_backoff_ms': 100,
    'grpc.max_reconnect_backoff_ms': 1_000,
    'grpc.enable_retries': 0,
    'grpc.use_local_subchannel_pool': 1,
}

const definition = loadSync(fileURLToPath(new URL('flight.proto', import.meta.url)), {
    keepCase: true,
    defaults: true,
})
const { FlightService } = loadPackageDefinition(definition).arrow.flight.protocol

const QUERY_PROMPTS = ['query', 'search_query']
const DOCUMENT_PROMPTS = ['document', 'passage', 'corpus', 'search_document']

/** Connects to a server, such as grpc://HOST:PORT or grpc+tls://HOST:PORT. */
export async function connect(address, { token, tls, maxRetries = 6, signal } = {}) {
    const [, scheme, target] = /^(grpc|grpc\+tcp|grpc\+tls):\/\/([^/]+:\d+)\/?$/.exec(address) ?? []
    if (target === undefined) {
        const expected = 'expected grpc://HOST:PORT or grpc+tls://HOST:PORT'
        throw invalid('address', `\`address\` is ${JSON.stringify(address)}, ${expected}`)
    }
    const encrypted = scheme === 'grpc+tls'
    if (tls && !encrypted)
        throw invalid('tls', `TLS is given, but ${address} is not encrypted; use grpc+tls://`)
    const channel = encrypted
        ? credentials.createSsl(tls?.ca, tls?.key, tls?.cert)
        : credentials.createInsecure()
    const metadata = new Metadata()
    if (token) metadata.set('authorization', `Bearer ${token}`)
    const client = new Client(
        new FlightService(target, channel, OPTIONS),
        metadata,
        new RetryPolicy(maxRetries),
    )
    try {
        await client.check(address, signal)
    } catch (error) {
        client.close()
        throw error
    }
    return client
}

/** Client of one server. */
export class Client {
    #flight
    #metadata
    #retry

    constructor(flight, metadata, retry) {
        this.#flight = flight
        this.#metadata = metadata
        this.#retry = retry
    }

    async check(address, signal) {
        const limit = AbortSignal.timeout(CHECK_TIMEOUT_MS)
        const both = signal ? AbortSignal.any([signal, limit]) : limit
        const { status, wire } = await this.action('health', undefined, { signal: both })
        if (status === 'ok' && wire === WIRE_VERSION) return
        const versions = `version ${wire} of Fletcher's wire, this client version ${WIRE_VERSION}`
        throw invalid('address', `${address} speaks ${versions}; use the client of the server's release`)
    }

    /** Ends the connection. */
    close() {
        this.#flight.close()
    }

    /** Calls an action with a JSON body, and returns its JSON answer. */
    async action(name, body, { signal } = {}) {
        const message = { type: name, body: Buffer.from(body === undefined ? '' : JSON.stringify(body)) }
        let call
        try {
            call = new Call(() => this.#flight.DoAction(message, this.#metadata), signal)
            for await (const answer of call.answers()) {
                const value = parsed(answer.body)
                if (value !== undefined) return value
                break
            }
        } catch (error) {
            throw toFletcherError(error, signal)
        } finally {
            call?.close()
        }
        throw new FletcherError('internal', `the server did not answer \`${name}\` with JSON`)
    }

    /** The server's models. */
    async models(options) {
        return (await this.action('list_models', undefined, options)).models
    }

    /** The vector of each text, with the model's default prompt, usually none. */
    embed(texts, options = {}) {
        return this.#embed(texts, options, [])
    }

    /** Embeds queries with the model's prompt for queries, if it has one. */
    embedQueries(texts, options = {}) {
        return this.#embed(texts, options, QUERY_PROMPTS)
    }

    /** Embeds documents with the model's prompt for documents, if it has one. */
    embedDocuments(texts, options = {}) {
        return this.#embed(texts, options, DOCUMENT_PROMPTS)
    }

    async #embed(texts, { model, prompt, dims, command, signal }, prompts) {
        const asked = { dtype: 'float32', model, prompt, dims, ...command }
        for (let failures = 1; ; failures++) {
            try {
                if (asked.prompt === undefined && prompts.length)
                    asked.prompt = await this.#prompt(asked.model, prompts, signal)
                return await embed(() => this.#stream('DoExchange', signal), texts, asked)
            } catch (error) {
                if (error.row !== undefined) throw error
                await this.#retry.wait(failures, error, signal)
            }
        }
    }

    /** The name of the model's prompt, if it has one. */
    async #prompt(wanted, names, signal) {
        const isWanted = ({ name, hash, is_default: isDefault }) =>
            wanted === undefined ? isDefault : wanted === name || wanted === `${name}@${hash}`
        const model = (await this.models({ signal })).find(isWanted)
        return names.find((name) => Object.hasOwn(model?.prompts ?? {}, name))
    }

    /** Embeds rows and stores them in a dataset. */
    put(dataset, batches, { uploadId, command, onAck, signal } = {}) {
        const asked = { dataset, upload_id: uploadId, ...command }
        const ask = (body) => this.action('upload_status', body, { signal })
        const start = () => this.#stream('DoPut', signal)
        return put({ start, ask, retry: this.#retry, signal, onAck }, asked, batches)
    }

    #stream(method, signal) {
        return new Call(() => this.#flight[method](this.#metadata), signal)
    }
}
