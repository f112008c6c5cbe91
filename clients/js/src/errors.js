import { setTimeout as sleep } from 'node:timers/promises'
import { status } from '@grpc/grpc-js'

const RETRYABLE = new Set(['overloaded', 'draining', 'store_unavailable', 'journal_full', 'unavailable'])
const CODES = new Map([
    [status.UNAVAILABLE, 'unavailable'],
    [status.DEADLINE_EXCEEDED, 'deadline_exceeded'],
    [status.CANCELLED, 'cancelled'],
    [status.UNAUTHENTICATED, 'unauthenticated'],
    [status.PERMISSION_DENIED, 'unauthorized'],
    [status.INVALID_ARGUMENT, 'invalid_command'],
    [status.NOT_FOUND, 'invalid_command'],
    [status.UNIMPLEMENTED, 'invalid_command'],
    [status.RESOURCE_EXHAUSTED, 'invalid_command'],
])

/** Error of a call. The codes are listed in docs/wire.md. */
export class FletcherError extends Error {
    constructor(code, message, { field, allowed, retry_after_ms: retryAfterMs, row, status, cause } = {}) {
        super(message, cause && { cause })
        this.name = 'FletcherError'
        Object.assign(this, { code, field, allowed, retryAfterMs, row, status })
    }

    /** Whether another attempt may succeed. */
    get retryable() {
        return RETRYABLE.has(this.code)
    }
}

export function invalid(field, message) {
    return new FletcherError('invalid_command', message, { field })
}

/** The error that a server wrote; undefined if the JSON has another form. */
export function fromJson(raw, status) {
    const told = parsed(raw)
    if (typeof told?.code === 'string')
        return new FletcherError(told.code, told.message ?? '', { ...told, status })
}

/** The object of a JSON text; undefined if it is another thing. */
export function parsed(raw) {
    try {
        const value = JSON.parse(raw)
        return typeof value === 'object' && value !== null ? value : undefined
    } catch {
        return undefined
    }
}

/** The error of a call that ended with `error`. */
export function toFletcherError(error, signal) {
    if (signal?.aborted) {
        const { reason } = signal
        const code = reason?.name === 'TimeoutError' ? 'deadline_exceeded' : 'cancelled'
        return new FletcherError(code, reason?.message ?? String(reason), { cause: reason })
    }
    if (error instanceof FletcherError || error?.metadata === undefined) return error
    const [details] = error.metadata.get('grpc-status-details-bin')
    const told = details && fromJson(details, error.code)
    // Arrow puts `. Detail: X` behind each text.
    const message = error.details.replace(/\. Detail: [^.]*$/, '')
    return told ?? new FletcherError(CODES.get(error.code) ?? 'internal', message, { status: error.code })
}

/** How often and when a call is tried again. */
export class RetryPolicy {
    constructor(most) {
        this.most = most
    }

    /** Waits before the next attempt, or throws the error if no attempt is left. */
    async wait(failures, failed, signal) {
        const error = toFletcherError(failed, signal)
        if (!error.retryable || failures > this.most) throw error
        const pause = Math.min(200 * 2 ** (failures - 1), 10_000) * (0.5 + Math.random() / 2)
        try {
            await sleep(Math.max(pause, error.retryAfterMs ?? 0), undefined, { signal })
        } catch (error) {
            throw toFletcherError(error, signal)
        }
    }
}
