package longbowfletcher;

import com.fasterxml.jackson.databind.JsonNode;
import io.grpc.ChannelCredentials;
import io.grpc.Context;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.TlsChannelCredentials;
import java.net.URI;
import java.util.ArrayList;
import java.util.Iterator;
import java.util.List;
import java.util.Map;
import java.util.UUID;
import java.util.concurrent.TimeUnit;
import java.util.function.Consumer;
import org.apache.arrow.flight.Action;
import org.apache.arrow.flight.CallOption;
import org.apache.arrow.flight.CallOptions;
import org.apache.arrow.flight.FlightCallHeaders;
import org.apache.arrow.flight.FlightClient;
import org.apache.arrow.flight.FlightGrpcUtils;
import org.apache.arrow.flight.HeaderCallOption;
import org.apache.arrow.flight.Result;
import org.apache.arrow.memory.BufferAllocator;
import org.apache.arrow.memory.RootAllocator;
import org.apache.arrow.vector.ipc.ArrowReader;

/**
 * Client of one server. Thread-safe.
 *
 * <p>Calls end when the {@link Context} of gRPC in which they were made is cancelled, or when its
 * deadline passes.
 */
public final class FletcherClient implements AutoCloseable {
  /** Version of this client, which is that of the Fletcher it was released with. */
  public static final String VERSION = "0.1.0";

  private static final int WIRE_VERSION = 1;
  // The server sends smaller messages unless it is asked for others.
  private static final int MAX_MESSAGE_BYTES = 64 << 20;
  // gRPC's servers end connections on which clients ping more often than every five minutes.
  private static final long PING_MINUTES = 6;
  private static final long CHECK_SECONDS = 20;

  final BufferAllocator allocator = new RootAllocator();
  final FlightClient flight;
  final Retry retry;
  private final ManagedChannel channel;
  private final String token;

  private FletcherClient(ManagedChannel channel, Builder chosen) {
    this.channel = channel;
    this.token = chosen.token;
    this.retry = new Retry(chosen.maxRetries);
    this.flight = FlightGrpcUtils.createFlightClient(allocator, channel);
  }

  /** Connects to a server, such as grpc://HOST:PORT or grpc+tls://HOST:PORT. */
  public static FletcherClient connect(String address) {
    return builder(address).connect();
  }

  /** Options of a connection. */
  public static Builder builder(String address) {
    return new Builder(address);
  }

  /** Options of a connection. */
  public static final class Builder {
    private final String address;
    private String token = "";
    private ChannelCredentials tls;
    private int maxRetries = 6;

    private Builder(String address) {
      this.address = address;
    }

    /** Bearer token that every call sends. */
    public Builder token(String token) {
      this.token = token;
      return this;
    }

    /** Certificates, for addresses that begin with grpc+tls://. */
    public Builder tls(ChannelCredentials credentials) {
      this.tls = credentials;
      return this;
    }

    /** Most retries of a call in a row without progress. The default is 6. */
    public Builder maxRetries(int retries) {
      this.maxRetries = retries;
      return this;
    }

    /**
     * Connects.
     *
     * @throws FletcherException if the server does not answer, does not take the token, or speaks
     *     another version of the wire
     */
    public FletcherClient connect() {
      URI target = target();
      ManagedChannel channel =
          Grpc.newChannelBuilderForAddress(target.getHost(), target.getPort(), credentials(target))
              .maxInboundMessageSize(MAX_MESSAGE_BYTES)
              .keepAliveTime(PING_MINUTES, TimeUnit.MINUTES)
              .keepAliveTimeout(1, TimeUnit.MINUTES)
              .build();
      FletcherClient client = new FletcherClient(channel, this);
      try {
        client.checkServer(address);
      } catch (RuntimeException error) {
        client.close();
        throw error;
      }
      return client;
    }

    private URI target() {
      try {
        URI target = new URI(address);
        if (target.getHost() != null && target.getPort() > 0 && target.getScheme() != null) {
          return target;
        }
      } catch (java.net.URISyntaxException error) {
        // told below
      }
      throw FletcherException.invalid("address", "`address` is '" + address + "', expected grpc://HOST:PORT or grpc+tls://HOST:PORT");
    }

    private ChannelCredentials credentials(URI target) {
      return switch (target.getScheme()) {
        case "grpc", "grpc+tcp" -> {
          if (tls != null) {
            throw FletcherException.invalid("tls", "TLS is given, but " + address + " is not encrypted; use grpc+tls://");
          }
          yield InsecureChannelCredentials.create();
        }
        case "grpc+tls" -> tls != null ? tls : TlsChannelCredentials.create();
        default -> throw FletcherException.invalid("address", "`address` is '" + address + "', expected grpc:// or grpc+tls://");
      };
    }
  }

  private void checkServer(String address) {
    JsonNode health = call("health", null, CallOptions.timeout(CHECK_SECONDS, TimeUnit.SECONDS));
    int wire = health.path("wire").asInt();
    if (!health.path("status").asText().equals("ok") || wire != WIRE_VERSION) {
      throw FletcherException.invalid("address", address + " speaks version " + wire + " of Fletcher's wire, this client version " + WIRE_VERSION + "; use the client of the server's release");
    }
  }

  /** Ends the connection, and with it all calls. */
  @Override
  public void close() {
    channel.shutdownNow();
    try {
      flight.close();
    } catch (InterruptedException error) {
      Thread.currentThread().interrupt();
    }
    allocator.close();
  }

  /** Calls an action with a JSON body, which may be null, and returns its JSON answer. */
  public JsonNode action(String name, Object body) {
    return call(name, body);
  }

  private JsonNode call(String name, Object body, CallOption... options) {
    byte[] raw = body == null ? new byte[0] : Json.write(body);
    List<CallOption> all = new ArrayList<>(List.of(options));
    all.add(headers());
    try {
      Iterator<Result> results = flight.doAction(new Action(name, raw), all.toArray(CallOption[]::new));
      if (results.hasNext()) {
        JsonNode answer = Json.tree(results.next().getBody());
        results.forEachRemaining(one -> {});
        return answer;
      }
    } catch (RuntimeException error) {
      throw FletcherException.from(error);
    }
    throw new FletcherException("internal", "the server did not answer `" + name + "`");
  }

  /** The token, as an option of calls. */
  CallOption headers() {
    FlightCallHeaders headers = new FlightCallHeaders();
    if (!token.isEmpty()) {
      headers.insert("authorization", "Bearer " + token);
    }
    return new HeaderCallOption(headers);
  }

  /** Waits before another attempt, or throws the error if no attempt is left. */
  void waitAfter(int failures, RuntimeException error) {
    retry.waitAfter(failures, FletcherException.from(error));
    channel.resetConnectBackoff();
  }

  /** The server's models. */
  public List<Model> models() {
    List<Model> models = new ArrayList<>();
    action("list_models", null).path("models").forEach(one -> models.add(Json.as(one, Model.class)));
    return models;
  }

  /** Embeds queries with the model's prompt for queries, if it has one. */
  public List<float[]> embedQueries(List<String> texts, Command command) {
    return embedWith(List.of("query", "search_query"), texts, command);
  }

  /** Embeds documents with the model's prompt for documents, if it has one. */
  public List<float[]> embedDocuments(List<String> texts, Command command) {
    return embedWith(List.of("document", "passage", "corpus", "search_document"), texts, command);
  }

  /** Embeds queries with the default model. */
  public List<float[]> embedQueries(List<String> texts) {
    return embedQueries(texts, new Command());
  }

  /** Embeds documents with the default model. */
  public List<float[]> embedDocuments(List<String> texts) {
    return embedDocuments(texts, new Command());
  }

  private List<float[]> embedWith(List<String> names, List<String> texts, Command command) {
    Object wanted = command.over(Map.of()).get("model");
    for (Model model : models()) {
      boolean isWanted = model.name().equals(wanted) || (model.name() + "@" + model.hash()).equals(wanted);
      if (wanted == null ? !model.isDefault() : !isWanted) {
        continue;
      }
      for (String name : names) {
        if (model.prompts() != null && model.prompts().containsKey(name)) {
          return embed(command.over(Map.of("prompt", name)), texts);
        }
      }
    }
    return embed(command.over(Map.of()), texts);
  }

  /**
   * Embeds texts. Vectors are float32, whatever type the server sends.
   *
   * @throws RowException for the first text without a vector
   */
  public List<float[]> embed(List<String> texts, Command command) {
    return embed(command.over(Map.of()), texts);
  }

  /** Embeds texts with the default model. */
  public List<float[]> embed(List<String> texts) {
    return embed(texts, new Command());
  }

  private List<float[]> embed(Map<String, Object> command, List<String> texts) {
    command.putIfAbsent("dtype", "float32");
    command.putIfAbsent("accept_compression", List.of("zstd"));
    for (int failures = 1; ; failures++) {
      try {
        return new Exchange(this, command).run(texts);
      } catch (RuntimeException error) {
        waitAfter(failures, error);
      }
    }
  }

  /**
   * Embeds rows and stores them in a dataset.
   *
   * <p>The batches have a column {@code text} and, if wanted, an {@code id}. If the connection
   * breaks, or the server or its store is unavailable, the call connects again, and sends what the
   * server does not have. The caller closes the reader.
   *
   * @param onAck called for acknowledgements, on the caller's thread
   */
  public Summary put(String dataset, ArrowReader batches, Command command, Consumer<Ack> onAck) {
    Map<String, Object> fields = command.over(Map.of());
    boolean isNamed = fields.containsKey("upload_id");
    fields.put("dataset", dataset);
    fields.putIfAbsent("upload_id", UUID.randomUUID().toString().replace("-", ""));
    try (Upload upload = new Upload(this, fields, batches, onAck)) {
      return upload.run(isNamed);
    }
  }

  /** Embeds rows and stores them in a dataset. */
  public Summary put(String dataset, ArrowReader batches, Command command) {
    return put(dataset, batches, command, ack -> {});
  }
}
