package longbowfletcher;

/** Error of a text without a vector. */
public final class RowException extends FletcherException {
  private static final long serialVersionUID = 1L;
  private final long row;

  RowException(RowError error) {
    super(error.code(), error.message());
    this.row = error.row();
  }

  /** The row's number, counted from the first one that was sent. */
  public long row() {
    return row;
  }
}
