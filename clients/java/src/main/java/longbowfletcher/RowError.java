package longbowfletcher;

/** Error of a row. The id is a string, a number or null. */
public record RowError(long row, Object id, String code, String message) {}
