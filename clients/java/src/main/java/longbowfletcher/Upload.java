package longbowfletcher;

import com.fasterxml.jackson.databind.JsonNode;
import java.io.IOException;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Deque;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.function.Consumer;
import org.apache.arrow.flight.FlightClient;
import org.apache.arrow.flight.FlightDescriptor;
import org.apache.arrow.memory.ArrowBuf;
import org.apache.arrow.memory.BufferAllocator;
import org.apache.arrow.vector.FieldVector;
import org.apache.arrow.vector.VectorLoader;
import org.apache.arrow.vector.VectorSchemaRoot;
import org.apache.arrow.vector.VectorUnloader;
import org.apache.arrow.vector.ipc.ArrowReader;
import org.apache.arrow.vector.ipc.message.ArrowRecordBatch;

/** Upload over all its connections. Keeps rows until they are acknowledged. */
final class Upload implements AutoCloseable {
  // Most bytes that are sent and not acknowledged.
  private static final long WINDOW_BYTES = 32 << 20;

  /** Rows with their number. */
  private record Message(ArrowRecordBatch batch, long rowFirst, long numBytes) {
    long rowLast() {
      return rowFirst + batch.getLength() - 1;
    }
  }

  private final FletcherClient client;
  private final Map<String, Object> command;
  private final ArrowReader batches;
  private final Consumer<Ack> onAck;
  private final Deque<Message> unacked = new ArrayDeque<>(); // in the order of rows
  private List<long[]> stored = List.of(); // first and last row of each range
  private long nextRow;
  private long numInFlight; // bytes that were sent in this call and not acknowledged
  private long acked; // rows before this one are acknowledged

  Upload(FletcherClient client, Map<String, Object> command, ArrowReader batches, Consumer<Ack> onAck) {
    this.client = client;
    this.command = command;
    this.batches = batches;
    this.onAck = onAck;
  }

  @Override
  public void close() {
    unacked.forEach(one -> one.batch().close());
    unacked.clear();
  }

  Summary run(boolean ask) {
    boolean mustAsk = ask;
    for (int failures = 1; ; failures++) {
      long before = acked;
      try {
        if (mustAsk) {
          askStored();
        }
        return send();
      } catch (RuntimeException error) {
        failures = acked > before ? 1 : failures;
        client.waitAfter(failures, error);
      }
      mustAsk = true;
    }
  }

  /** Asks which rows the server has, and drops messages with these rows. */
  private void askStored() {
    Map<String, Object> body = new HashMap<>(command);
    body.keySet().retainAll(List.of("upload_id", "dataset", "store"));
    List<long[]> ranges = new ArrayList<>();
    try {
      JsonNode status = client.action("upload_status", body);
      status.path("ranges").forEach(one -> ranges.add(new long[] {one.get(0).asLong(), one.get(1).asLong()}));
    } catch (FletcherException error) {
      if (!error.code().equals("unknown_dataset")) {
        throw error;
      }
    }
    stored = ranges;
    if (acked > 0 && !has(0, acked - 1)) {
      throw new FletcherException("upload_conflict", "acknowledged rows of the upload are gone from the dataset; send the whole upload again", "upload_id", List.of(), 0, null);
    }
    unacked.removeIf(one -> {
      boolean isStored = has(one.rowFirst(), one.rowLast());
      if (isStored) {
        one.batch().close();
      }
      return isStored;
    });
  }

  private boolean has(long first, long last) {
    return stored.stream().anyMatch(one -> one[0] <= first && last <= one[1]);
  }

  /** The next messages to send, which the server does not have; none at the end. */
  private List<Message> read(VectorSchemaRoot root) {
    List<Message> messages = new ArrayList<>();
    while (messages.isEmpty() && loadBatch()) {
      int rows = root.getRowCount();
      long size = root.getFieldVectors().stream().mapToLong(FieldVector::getBufferSize).sum();
      int step = (int) Math.max(1, Math.min(rows, (long) rows * Exchange.MESSAGE_BYTES / Math.max(1, size)));
      for (int row = 0; row < rows; ) {
        int end = Math.min(rows, row + step);
        long first = nextRow + row;
        boolean isStored = false;
        for (long[] range : stored) {
          if (range[0] <= first && first <= range[1]) {
            isStored = true;
            end = (int) Math.min(rows, range[1] + 1 - nextRow);
            break;
          }
          if (first < range[0]) {
            end = (int) Math.min(end, range[0] - nextRow);
          }
        }
        if (!isStored) {
          messages.add(new Message(slice(root, row, end - row), first, size * (end - row) / rows));
        }
        row = end;
      }
      nextRow += rows;
    }
    unacked.addAll(messages);
    return messages;
  }

  private boolean loadBatch() {
    try {
      return batches.loadNextBatch();
    } catch (IOException | RuntimeException error) {
      throw new FletcherException("invalid_command", "the batches cannot be read: " + error.getMessage(), "batches", List.of(), 0, error);
    }
  }

  private static ArrowRecordBatch slice(VectorSchemaRoot root, int first, int rows) {
    if (rows == root.getRowCount()) {
      return new VectorUnloader(root).getRecordBatch();
    }
    try (VectorSchemaRoot part = root.slice(first, rows)) {
      return new VectorUnloader(part).getRecordBatch();
    }
  }

  /** Sends all that is left by one DoPut. */
  private Summary send() {
    VectorSchemaRoot source = source();
    // Buffers can be shared only between allocators of one root.
    BufferAllocator allocator =
        source.getFieldVectors().isEmpty() ? client.allocator : source.getVector(0).getAllocator();
    PutAnswers answers = new PutAnswers();
    try (VectorSchemaRoot root = VectorSchemaRoot.create(source.getSchema(), allocator)) {
      FlightDescriptor descriptor = FlightDescriptor.command(Json.write(command));
      FlightClient.ClientStreamListener writer =
          client.flight.startPut(descriptor, root, answers, client.headers());
      try {
        return sendRows(writer, root, source, answers);
      } catch (RuntimeException error) {
        if (!answers.isEnded()) {
          writer.error(error);
        }
        throw answers.reason(error);
      }
    }
  }

  private VectorSchemaRoot source() {
    try {
      if (!batches.getDictionaryVectors().isEmpty()) {
        throw FletcherException.invalid("batches", "a column is dictionary-encoded; decode it with DictionaryEncoder");
      }
      return batches.getVectorSchemaRoot();
    } catch (IOException error) {
      throw FletcherException.invalid("batches", "the batches cannot be read: " + error.getMessage());
    }
  }

  private Summary sendRows(
      FlightClient.ClientStreamListener writer, VectorSchemaRoot root, VectorSchemaRoot source, PutAnswers answers) {
    numInFlight = 0;
    VectorLoader loader = new VectorLoader(root);
    List<Message> sent = new ArrayList<>(unacked);
    long batchId = 0;
    do {
      for (Message one : sent) {
        // Rows may be acknowledged that were sent by an earlier call.
        if (one.rowLast() < acked) {
          continue;
        }
        answers.waitFor(writer::isReady, () -> hasRoom(one), this::note);
        numInFlight += one.numBytes();
        loader.load(one.batch());
        writer.putNext(metadata(Map.of("batch_id", batchId++, "row_offset", one.rowFirst())));
        root.clear();
      }
      sent = read(source);
    } while (!sent.isEmpty());
    answers.waitFor(writer::isReady, () -> true, this::note);
    writer.putMetadata(metadata(Map.of("end", true, "rows", nextRow)));
    writer.completed();
    return answers.waitForSummary(this::note);
  }

  private boolean hasRoom(Message one) {
    return numInFlight == 0 || numInFlight + one.numBytes() <= WINDOW_BYTES;
  }

  private ArrowBuf metadata(Map<String, ?> fields) {
    byte[] raw = Json.write(fields);
    ArrowBuf buffer = client.allocator.buffer(raw.length);
    buffer.writeBytes(raw);
    return buffer;
  }

  /** Drops acknowledged messages. */
  private void note(Ack ack) {
    while (!unacked.isEmpty() && unacked.peek().rowLast() <= ack.rowLast()) {
      Message one = unacked.remove();
      acked = one.rowLast() + 1;
      numInFlight = Math.max(0, numInFlight - one.numBytes());
      one.batch().close();
    }
    onAck.accept(ack);
  }
}
