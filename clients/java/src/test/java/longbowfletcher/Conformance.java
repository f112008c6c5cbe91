package longbowfletcher;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.PropertyNamingStrategies;
import io.grpc.Context;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;
import org.apache.arrow.memory.BufferAllocator;
import org.apache.arrow.memory.RootAllocator;
import org.apache.arrow.vector.BigIntVector;
import org.apache.arrow.vector.VarCharVector;
import org.apache.arrow.vector.VectorSchemaRoot;
import org.apache.arrow.vector.ipc.ArrowReader;
import org.apache.arrow.vector.types.pojo.ArrowType;
import org.apache.arrow.vector.types.pojo.Field;
import org.apache.arrow.vector.types.pojo.Schema;

/** Runs Fletcher's conformance cases with this client (tests/conformance/README.md). */
public final class Conformance {
  private static final ObjectMapper JSON =
      new ObjectMapper().setPropertyNamingStrategy(PropertyNamingStrategies.SNAKE_CASE);
  private static final Schema SCHEMA =
      new Schema(List.of(Field.nullable("id", new ArrowType.Int(64, true)), Field.nullable("text", ArrowType.Utf8.INSTANCE)));

  private Conformance() {}

  public static void main(String[] arguments) {
    try {
      runCases();
    } catch (Exception error) {
      error.printStackTrace();
      System.exit(2); // threads of a client that failed would keep the program alive
    }
  }

  private static void runCases() throws Exception {
    ScheduledExecutorService timer = Executors.newScheduledThreadPool(1, task -> {
      Thread thread = new Thread(task);
      thread.setDaemon(true);
      return thread;
    });
    BufferedReader lines = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    for (String line = lines.readLine(); line != null; line = lines.readLine()) {
      System.out.println(new String(JSON.writeValueAsBytes(outcome(JSON.readTree(line), timer)), StandardCharsets.US_ASCII));
    }
  }

  private static Map<String, Object> outcome(JsonNode one, ScheduledExecutorService timer) throws Exception {
    long deadline = one.path("deadline_ms").asLong();
    long cancel = one.path("cancel_ms").asLong();
    try (FletcherClient client =
            FletcherClient.builder(one.path("address").asText())
                .token(one.path("token").asText(""))
                .maxRetries(one.path("max_retries").asInt())
                .connect();
        Context.CancellableContext context =
            deadline > 0
                ? Context.current().withDeadlineAfter(deadline, TimeUnit.MILLISECONDS, timer)
                : Context.current().withCancellation()) {
      if (cancel > 0) {
        timer.schedule(context::close, cancel, TimeUnit.MILLISECONDS);
      }
      return Map.of("answer", context.call(() -> run(client, one)));
    } catch (RowException error) {
      return Map.of("row_error", Map.of("row", error.row(), "code", error.code()));
    } catch (FletcherException error) {
      return Map.of("error", Map.of("code", error.code(), "message", error.getMessage(), "field", error.field()));
    }
  }

  private static Object run(FletcherClient client, JsonNode one) throws Exception {
    Command command = new Command();
    one.path("command").fields().forEachRemaining(
        field -> command.field(field.getKey(), JSON.convertValue(field.getValue(), Object.class)));
    if (one.path("call").asText().equals("put")) {
      try (BufferAllocator allocator = new RootAllocator();
          ArrowReader batches = new Rows(allocator, one)) {
        return client.put(one.path("dataset").asText(), batches, command);
      }
    }
    List<String> texts = new ArrayList<>();
    one.path("texts").forEach(text -> texts.add(text.asText()));
    return switch (one.path("call").asText()) {
      case "embed_queries" -> client.embedQueries(texts, command);
      case "embed_documents" -> client.embedDocuments(texts, command);
      default -> client.embed(texts, command);
    };
  }

  /** Rows whose ids are their numbers. */
  private static final class Rows extends ArrowReader {
    private final JsonNode one;
    private final Set<Long> nulls = new HashSet<>();
    private long nextRow;

    Rows(BufferAllocator allocator, JsonNode one) {
      super(allocator);
      this.one = one;
      one.path("null_texts").forEach(row -> nulls.add(row.asLong()));
    }

    @Override
    public boolean loadNextBatch() throws java.io.IOException {
      long end = Math.min(one.path("rows").asLong(), nextRow + one.path("batch_rows").asLong());
      if (nextRow >= end) {
        return false;
      }
      try {
        Thread.sleep(one.path("pause_ms").asLong());
      } catch (InterruptedException error) {
        throw new java.io.IOException(error);
      }
      VectorSchemaRoot root = getVectorSchemaRoot();
      root.clear();
      int place = 0;
      for (; nextRow < end; nextRow++, place++) {
        ((BigIntVector) root.getVector("id")).setSafe(place, nextRow);
        if (nulls.contains(nextRow)) {
          ((VarCharVector) root.getVector("text")).setNull(place);
        } else {
          ((VarCharVector) root.getVector("text")).setSafe(place, ("text " + nextRow).getBytes(StandardCharsets.UTF_8));
        }
      }
      root.setRowCount(place);
      return true;
    }

    @Override
    public Map<Long, org.apache.arrow.vector.dictionary.Dictionary> getDictionaryVectors() {
      return new HashMap<>();
    }

    @Override
    public long bytesRead() {
      return 0;
    }

    @Override
    protected void closeReadSource() {}

    @Override
    protected Schema readSchema() {
      return SCHEMA;
    }
  }
}
