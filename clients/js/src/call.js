/** One streaming call of gRPC, which a signal can cancel. */
export class Call {
    #call
    #signal
    #cancel = () => this.#call.cancel()
    #wake = () => {}
    /** Whether the call is over, for whatever reason. */
    isOver = false

    constructor(start, signal) {
        signal?.throwIfAborted()
        this.#call = start()
        this.#signal = signal
        this.#call.on('error', () => {}) // the reader tells it
        signal?.addEventListener('abort', this.#cancel, { once: true })
        const end = () => {
            this.isOver = true
            this.#wake()
        }
        for (const event of ['end', 'error', 'close']) this.#call.once(event, end)
    }

    /** Waits for a promise or for the end of the call. Only the writer may wait. */
    async until(promise) {
        const over = new Promise((resolve) => (this.#wake = resolve))
        return this.isOver ? undefined : Promise.race([promise, over])
    }

    /** The answers. Throws the error with which the call ended. */
    async *answers() {
        yield* this.#call
    }

    /** Sends a message when there is room. False if the call is over. */
    async send(message) {
        if (this.isOver) return false
        if (!this.#call.write(message)) {
            const drained = new Promise((resolve) => this.#call.once('drain', resolve))
            await this.until(drained)
        }
        return !this.isOver
    }

    /** Ends the client's writing. */
    end() {
        this.#call.end()
    }

    /** Cancels the call, unless it is over. */
    close() {
        this.#signal?.removeEventListener('abort', this.#cancel)
        this.#call.cancel()
    }
}
