package longbowfletcher;

/** Progress of an upload. Counts are cumulative. */
public record Ack(long batchId, long rowFirst, long rowLast, long rowsStored, long rowsFailed, long rowsDurable) {}
