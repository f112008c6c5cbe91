package longbowfletcher;

import com.fasterxml.jackson.databind.JsonNode;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.concurrent.locks.LockSupport;
import org.apache.arrow.flight.FlightClient;
import org.apache.arrow.flight.FlightDescriptor;
import org.apache.arrow.flight.FlightStream;
import org.apache.arrow.vector.VarCharVector;
import org.apache.arrow.vector.VectorSchemaRoot;
import org.apache.arrow.vector.types.pojo.ArrowType;
import org.apache.arrow.vector.types.pojo.Field;
import org.apache.arrow.vector.types.pojo.Schema;

/** One DoExchange. A thread of its own writes, so that neither side waits for the other. */
final class Exchange {
  // A message should have 1 to 4 MiB.
  static final int MESSAGE_BYTES = 2 << 20;
  private static final int MESSAGE_ROWS = 1024;
  private static final Schema SCHEMA = new Schema(List.of(Field.nullable("text", ArrowType.Utf8.INSTANCE)));

  private final FletcherClient client;
  private final FlightDescriptor descriptor;
  private volatile boolean isOver;

  Exchange(FletcherClient client, Map<String, Object> command) {
    this.client = client;
    this.descriptor = FlightDescriptor.command(Json.write(command));
  }

  List<float[]> run(List<String> texts) {
    FlightClient.ExchangeReaderWriter call = client.flight.doExchange(descriptor, client.headers());
    Thread writer = new Thread(() -> write(call.getWriter(), texts), "fletcher-exchange");
    writer.setDaemon(true);
    writer.start();
    boolean isWhole = false;
    try {
      List<float[]> vectors = read(call.getReader(), texts.size());
      isWhole = true;
      return vectors;
    } catch (RuntimeException error) {
      throw FletcherException.from(error);
    } finally {
      isOver = true;
      end(call, writer, isWhole);
    }
  }

  private static void end(FlightClient.ExchangeReaderWriter call, Thread writer, boolean isWhole) {
    if (!isWhole) {
      call.getReader().cancel("the caller ended the call", null);
    }
    try {
      writer.join();
      call.getReader().close();
    } catch (InterruptedException error) {
      Thread.currentThread().interrupt();
    } catch (Exception error) {
      // The call has ended already.
    }
  }

  private void write(FlightClient.ClientStreamListener writer, List<String> texts) {
    try (VectorSchemaRoot root = VectorSchemaRoot.create(SCHEMA, client.allocator)) {
      VarCharVector column = (VarCharVector) root.getVector(0);
      writer.start(root);
      int row = 0;
      do {
        root.clear();
        int first = row;
        int size = 0;
        while (row < texts.size() && row - first < MESSAGE_ROWS) {
          byte[] text = texts.get(row).getBytes(StandardCharsets.UTF_8);
          if (row > first && size + text.length > MESSAGE_BYTES) {
            break;
          }
          column.setSafe(row - first, text);
          size += text.length + 4;
          row++;
        }
        root.setRowCount(row - first);
        while (!writer.isReady() && !isOver) {
          LockSupport.parkNanos(200_000);
        }
        if (isOver) {
          return;
        }
        writer.putNext();
      } while (row < texts.size());
      writer.completed();
    } catch (RuntimeException error) {
      // Reading tells why the call ended. A fault of this side must end it.
      writer.error(error);
    }
  }

  private List<float[]> read(FlightStream reader, int numTexts) {
    List<float[]> vectors = new ArrayList<>(numTexts);
    while (reader.next()) {
      byte[] raw = Json.bytes(reader.getLatestMetadata());
      FletcherException told = FletcherException.fromJson(raw, null);
      if (told != null) {
        throw told;
      }
      JsonNode errors = Json.tree(raw).path("errors");
      if (!errors.isEmpty()) {
        throw new RowException(Json.as(errors.get(0), RowError.class));
      }
      Vectors.append(vectors, reader.getRoot());
    }
    if (vectors.size() != numTexts) {
      throw new FletcherException("unavailable", "the server ended the exchange after " + vectors.size() + " of " + numTexts + " texts");
    }
    return vectors;
  }
}
