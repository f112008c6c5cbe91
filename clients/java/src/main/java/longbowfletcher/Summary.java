package longbowfletcher;

import java.util.List;

/** Summary of an upload. Counts include earlier connections. */
public record Summary(
    String uploadId,
    boolean complete,
    long rowsReceived,
    long rowsStored,
    long rowsFailed,
    long rowsDurable,
    long rowsDeduplicated,
    String model,
    List<RowError> errors,
    boolean errorsTruncated) {}
